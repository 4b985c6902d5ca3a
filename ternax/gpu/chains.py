"""Step `chain`: a layer's projections in one launch, held against the same steps by themselves.

It has barriers of the whole grid, so it is also run many times over: the bits must stay.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ternax.config import ModelConfig
from ternax.configs import get_config
from ternax.gpu import exactness
from ternax.gpu.contenders import Backend, Shape
from ternax.gpu.made import Step
from ternax.kernels import ring, target
from ternax.kernels.packing import Packed
from ternax.kernels.pallas import backend, chain, tiles
from ternax.kernels.pallas.chain import Link
from ternax.nn.linear import ACTIVATIONS
from ternax.nn.norm import rms_norm
from ternax.quant.inputs import INPUTS

MODELS = ("70b", "8b", "2b4t")
# A ring of one link: tiles, scales f32 [L, N], norms f32 [L, K] or None.
Weights = tuple[Packed, jax.Array, jax.Array | None]
# Settings of a kernel, as what compiled programs go by.
Config = tuple[tuple[str, int], ...]
ROWS = (1, 16, 8)
# Over the largest value. Roots and sums differ in their last bits, so a few activations take
# the next code; a tile that is missing is off by some tenths.
ERROR = 0.02
_AGAIN = 20
# How the note begins that says where a launch's time goes.
MARKS = "us until a group of a block is so far"
_ROUNDS = 7


def run(step: Step) -> None:
    """Two Records a model and number of rows: whether it is right, and how long it takes."""
    why = Backend(ring.RING_BYTES, "mosaic").why_not()
    if why:
        step.say(f"chain: {why}")
        return
    for name in MODELS:
        model = get_config(name)
        links = links_of(model)
        made = weights_of(links)
        for rows in ROWS:
            if step.left_s < 0:
                step.say(f"chain: no time left for {model.name} x {rows} and what follows")
                return
            why = chain.why_not(links, rows, target.current().core_count)
            if why:
                step.say(f"chain: {model.name} x {rows}: {why}")
                continue
            try:
                _check(step, model, links, made, rows)
                _time(step, model, links, made, rows)
                if rows == 1:
                    _between_marks(step, model, links, made)
            except Exception as error:
                said = (str(error).strip() or "it said nothing").splitlines()[0][:200]
                note = f"exactness, {rows} rows: FAILED to run: {type(error).__name__}: {said}"
                step.say(f"chain: {model.name} x {rows}: {note}")
                step.keep("kernel", {}, note, config=f"{model.name}:chain", batch=rows)


def links_of(config: ModelConfig) -> tuple[Link, ...]:
    """From the output of attention to the next layer's q, k and v."""
    width, ffn, eps = config.hidden_size, config.intermediate_size, config.norm_eps
    inner = config.num_heads * config.head_dim
    qkv = inner + 2 * config.num_kv_heads * config.head_dim
    sub = config.family == "bitnet"
    return (
        Link((inner, width), "input", sub, eps),
        Link((width, 2 * ffn), "residual", True, eps),
        Link((ffn, width), config.activation, sub, eps),
        Link((width, qkv), "residual", True, eps),
    )


def bytes_of(links: Sequence[Link]) -> int:
    """Of a layer's tiles."""
    return sum(math.prod(tiles.data_shape(link.shape)) for link in links)


def weights_of(links: Sequence[Link]) -> list[Weights]:
    """A ring of layers of each link."""
    layers = ring.layers_of(bytes_of(links))
    return [_weights(link, layers) for link in links]


def _weights(link: Link, layers: int) -> Weights:
    k_size, n = link.shape
    w = Backend(ring.RING_BYTES, "mosaic").stack(Shape("", k_size, n), layers)
    scale = jnp.abs(ring.random_bits((layers, n), jnp.bfloat16).astype(jnp.float32))
    norm = ring.random_bits((layers, k_size), jnp.bfloat16, 1).astype(jnp.float32)
    return w, scale / k_size**0.5, jnp.abs(norm) if link.normed else None


def settings(links: Sequence[Link], rows: int) -> Config:
    """Those that models take."""
    return tuple(backend.chain_heuristic([link.shape for link in links], rows).items())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def launch(links: tuple[Link, ...], rows: int, config: Config, layer, stream, given, arrays):
    """One launch. layer: int32 []; arrays: (data, scale, norm) of each link."""
    weights = [chain.Weights(data, scale, norm, layer, layer) for data, scale, norm in arrays]
    return chain.run(links, weights, stream, given, rows, dict(config))


def layers_in_turn(links, rows: int, config: Config, layers: int, carry, arrays):
    """Each layer of a ring once, on the stream that the one before left; see `ring.program`."""
    stream, given, product = carry
    for layer in range(layers):
        product, stream = launch(links, rows, config, jnp.int32(layer), stream, given, arrays)
    return stream, given, product


def _inputs(links, rows: int) -> tuple[jax.Array, jax.Array]:
    """(stream, given): f32 [padded rows, ...], normal."""
    padded = chain.padded_rows(rows)
    keys = jax.random.split(jax.random.key(rows))
    stream = jax.random.normal(keys[0], (padded, links[0].shape[1]))
    return stream, jax.random.normal(keys[1], (padded, links[0].shape[0]))


def in_steps(links: Sequence[Link], made, layer: int, stream, given):
    """(last product, stream), by exact integer products and the formulas of models."""
    product = jnp.zeros_like(stream)  # nothing is added before the first product
    for link, (w, scale, norm) in zip(links, made, strict=True):
        if link.enter == "input":
            value = given
        elif link.enter == "residual":
            value = stream = stream + product
        else:
            first, second = jnp.split(product, 2, axis=-1)
            value = ACTIVATIONS[link.enter](first) * second
        if norm is not None:
            value = rms_norm(value, norm[layer], link.eps)
        codes, x_scale = INPUTS["int8"](value)
        one = Packed(w.data[layer : layer + 1], w.scale[:1], None, "trit2", w.layout, w.shape)
        sums = exactness.oracle(codes, tiles.canonical(one).data[0, 0], link.shape[0])
        product = sums.astype(jnp.float32) * (x_scale * scale[layer])
    return product, stream


def _check(step: Step, model: ModelConfig, links, made, rows: int) -> None:
    stream, given = _inputs(links, rows)
    config = settings(links, rows)
    product, after = once(links, rows, config, made)
    expected, expected_after = in_steps(links, made, 1, stream[:rows], given[:rows])
    off = max(
        float(jnp.max(jnp.abs(a[:rows] - b)) / jnp.max(jnp.abs(b)))
        for a, b in ((product, expected), (after, expected_after))
    )
    moved = 0
    for _ in range(_AGAIN):
        again, _ = once(links, rows, config, made)
        moved += int(jnp.any(again[:rows] != product[:rows]))
    wrong = [f"off by {off:.3g} of the largest"] if not off <= ERROR else []
    wrong += [f"{moved} of {_AGAIN} runs had other bits"] if moved else []
    if wrong:
        step.say(f"chain: {model.name} x {rows} WRONG: {', '.join(wrong)}")
    step.keep(
        "kernel",
        {"relative_error": off},
        f"exactness, {rows} rows: {'WRONG: ' + ', '.join(wrong) if wrong else 'as its steps'}",
        config=f"{model.name}:chain",
        inputs="int8",
        backend="mosaic",
        batch=rows,
    )


def once(links, rows: int, config: Config, made: Sequence[Weights]):
    """(last product, stream) of layer 1."""
    stream, given = _inputs(links, rows)
    arrays = [(w.data, scale, norm) for w, scale, norm in made]
    return launch(links, rows, config, jnp.int32(1), stream, given, arrays)


def program(links, rows: int, config: Config, made: Sequence[Weights]) -> ring.Program:
    """A ring of layers, each a launch."""
    stream, given = _inputs(links, rows)
    arrays = [(w.data, scale, norm) for w, scale, norm in made]
    layers = made[0][0].data.shape[0]
    repeats = ring.repeats_of(layers, bytes_of(links))
    return ring.program(
        functools.partial(layers_in_turn, links, rows, config, layers),
        (stream, given, jnp.zeros((stream.shape[0], links[-1].shape[1]))),
        arrays,
        repeats,
        layers * repeats,
    )


def _time(step: Step, model: ModelConfig, links, made, rows: int) -> None:
    config, nbytes, layers = settings(links, rows), bytes_of(links), made[0][0].data.shape[0]
    timed = program(links, rows, config, made).compile()
    timed.run(1)
    taken = [ring.sample_s(timed) for _ in range(_ROUNDS)]
    seconds = ring.median_s(taken)
    rate = nbytes / seconds / 1e9
    metrics = {"call_us": 1e6 * seconds, "gb_per_s": rate, "weight_bytes": nbytes}
    if step.read_gb_per_s:
        metrics |= {
            "read_bandwidth_gb_per_s": step.read_gb_per_s,
            "share_of_read": rate / step.read_gb_per_s,
        }
    step.keep(
        "kernel",
        metrics,
        f"K {model.hidden_size}, a layer's o, gate and up, down, q, k and v in one launch; "
        f"{timed.calls} launches a program over {layers} layers; "
        + ", ".join(f"{name} {value}" for name, value in config),
        samples=taken,
        config=f"{model.name}:chain",
        inputs="int8",
        backend="mosaic",
        layers=layers,
        batch=rows,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _marks(links: tuple[Link, ...], config: Config, stream, given, arrays):
    """`chain.times` of the ring's last layer, behind all the others, whose stream it reads."""
    *before, last = range(arrays[0][0].shape[0])

    def weights(layer):
        at = jnp.int32(layer)
        return [chain.Weights(data, scale, norm, at, at) for data, scale, norm in arrays]

    for layer in before:
        _, stream = chain.run(links, weights(layer), stream, given, 1, dict(config))
    return chain.times(links, weights(last), stream, given, 1, dict(config))


def _between_marks(step: Step, model: ModelConfig, links, made) -> None:
    """A Record of where a launch's time goes: us from mark to mark, the median of blocks."""
    arrays = [(w.data, scale, norm) for w, scale, norm in made]
    arguments = links, settings(links, 1), *_inputs(links, 1), arrays
    jax.block_until_ready(_marks(*arguments))  # the first run loads the kernel
    taken = intervals_us(np.asarray(_marks(*arguments)))
    step.keep(
        "kernel",
        {},
        marks_note(chain.mark_names(links)[1:], taken),
        samples=[float(middle) for middle in np.median(taken, axis=0)],
        unit="us",
        config=f"{model.name}:chain",
        inputs="int8",
        backend="mosaic",
        batch=1,
    )


def marks_note(names: Sequence[str], taken: np.ndarray) -> str:
    """taken: f64 [workers, intervals], us."""
    middle, slowest = np.median(taken, axis=0), taken.max(axis=0)
    shown = zip(names, middle, slowest, strict=True)
    parts = ", ".join(f"{name} {m:.2f} ({s:.2f})" for name, m, s in shown)
    return f"{MARKS}, median (slowest): {parts}"


def intervals_us(marks: np.ndarray) -> np.ndarray:
    """f64 [workers, marks - 1] of int32 [workers, marks, 2], cycles and ns, see `chain.times`."""
    cycles, ns = (np.diff(marks[..., i].astype(np.uint32), axis=1) for i in (0, 1))
    cycles_per_us = 1e3 * cycles.sum(axis=1) / ns.sum(axis=1)  # a clock each
    return cycles / cycles_per_us[:, None]
