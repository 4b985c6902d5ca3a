"""Step `attention`: one token over caches of several sizes, by itself, in GB/s of slots in use."""

import functools

import jax
import jax.numpy as jnp

from ternax.gpu import exactness
from ternax.gpu.made import Step
from ternax.kernels import attention, ring

# (query heads, kv heads, head width) of 70b; rows, slots, how they are stored.
HEADS = (64, 8, 128)
POINTS = ((1, 1024, "bf16"), (1, 8192, "bf16"), (16, 1024, "int8"), (64, 1024, "int8"))
TINY_HEADS, TINY_POINTS = (4, 2, 32), ((1, 32, "bf16"), (2, 32, "int8"))
_RING_BYTES, _MOST_LAYERS = 256 << 20, 32
_ROUNDS = 7


def run(step: Step) -> None:
    """A Record a backend and point."""
    heads = TINY_HEADS if step.rehearse else HEADS
    for rows, slots, dtype in TINY_POINTS if step.rehearse else POINTS:
        for name in exactness.names_here(step):
            label = f"{heads[0]}/{heads[1]} x {heads[2]}, {dtype} cache"
            if step.left_s < 0:
                step.say(f"attention: no time left for {label} of {slots} x {rows} by {name}")
                return
            try:
                _point(step, name, label, heads, rows, slots, dtype)
            except Exception as error:
                said = (str(error).strip() or "it said nothing").splitlines()[0][:200]
                step.say(f"attention: {name}, {label}: {type(error).__name__}: {said}")


def _point(step: Step, name: str, label: str, heads, rows: int, slots: int, dtype: str) -> None:
    one = 2 * rows * heads[1] * slots * (heads[2] * 2 if dtype == "bf16" else heads[2] + 4)
    layers = 2 if step.rehearse else min(_MOST_LAYERS, ring.layers_of(one, _RING_BYTES))
    program = of_layers(name, heads, rows, slots, dtype, layers, repeats=1).compile()
    taken_by = exactness.way(name, program.weights[0], program.carry[1])
    program.run(1)
    taken = [ring.sample_s(program) for _ in range(_ROUNDS)]
    seconds = ring.median_s(taken)
    metrics = {"call_us": 1e6 * seconds, "gb_per_s": one / seconds / 1e9}
    if step.read_gb_per_s:
        metrics["read_bandwidth_gb_per_s"] = step.read_gb_per_s
        metrics["share_of_read"] = one / seconds / 1e9 / step.read_gb_per_s
    step.keep(
        "kernel",
        metrics,
        f"attention of one token, {label}, all slots in use; {layers} layers{taken_by}",
        samples=taken,
        config=f"attention {slots}",
        inputs=dtype,
        backend=name,
        layers=layers,
        batch=rows,
        context=slots,
    )


def of_layers(name: str, heads, rows: int, slots: int, dtype: str, layers: int, repeats: int):
    """A program of one step of attention in each layer; the caches go from each to the next."""
    query, groups, width = heads
    arguments = exactness.cache_arguments(query, groups, width, slots, rows, dtype, layers)
    qkv, rope, *stores, start, length, _ = arguments
    start = jnp.zeros_like(start)
    one = jax.jit(functools.partial(attention.step_attention, backend=name))

    def body(carry, fixed):
        _, *stores = carry
        qkv, rope, start, length = fixed
        for layer in range(layers):
            out, *stores = one(qkv, rope, *stores, start, length, jnp.int32(layer))
        return out, *stores

    out = jnp.zeros((rows, 1, heads[0], heads[2]))
    return ring.program(body, (out, *stores), (qkv, rope, start, length), repeats, layers * repeats)
