"""The chain kernel: projections that follow one another, and all between them, in one launch.

From the output of attention to the next layer's q, k and v there is no step that needs
another kernel: o, gate and up, down, qkv, and between them residual sums, gates, norms and the
quantization of activations. One launch does them all, one block a processor:

    fetching      weights of o | weights of gate_up ......... | weights of down ... | of qkv
    multiplying        [enter] o  [enter] gate_up ........ [enter] down ... [enter] qkv [leave]

A block's fetching warpgroup streams its share of every matrix, without a stop at the seams: while
the others `enter` the next projection, the shared memory fills with its first tiles.

To enter is, for each multiplying warpgroup, to take a slice of the rows: read what the last
product summed, scale it, add or gate, and leave the values with their share of the sum of
squares and of the largest magnitude; and behind a barrier of the whole grid to read all shares,
and the values that the block's own tiles meet, which it quantizes into its shared memory. Blocks
are parted along K, so that those are few and stay there for the whole product. Products end as
`decode.py` has them, in int32 atomic additions, for which a second barrier waits. All sums are
of integers or in a fixed order, so a step gives the same bits every time.

A single row of up to 8192 columns is entered by each block alone, whole: `chain_alone.py`. Then
nothing but sums goes through memory, and one barrier is enough; gates, three times as wide, are
still shared out.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import decode, operand, skinny, tiles
from .chain_enter import Worker
from .chain_fetch import fetch
from .chain_meet import Refs
from .chain_plan import (
    LANES,
    SLICES,
    Link,
    Plan,
    Weights,
    chunks,
    enters_alone,
    heuristic,
    mark_names,
    padded_rows,
    stages_that_fit,
    why_not,
)

__all__ = [
    "Link",
    "Weights",
    "chunks",
    "enters_alone",
    "heuristic",
    "mark_names",
    "padded_rows",
    "run",
    "times",
    "why_not",
]


def run(
    links: Sequence[Link],
    weights: Sequence[Weights],
    stream: jax.Array,
    given: jax.Array | None,
    rows: int,
    config: Mapping[str, int],
    interpret: bool = False,
) -> tuple[jax.Array | None, jax.Array]:
    """Runs a chain.

    Args:
      links: their shapes fit: a gate halves the N before it, sums keep it.
      weights: of each link.
      stream: f32 [padded_rows, D], the residual stream.
      given: f32 [rows or padded_rows, K], the first link's "input"; None: it reads the stream.
      rows: rows that are real, MAX_ROWS at most; the others compute nothing of meaning.
      config: as for `decode.accumulate`; stages as far as shared memory has room, behind them
        "ahead", tiles of each block on their way into L2, and "alone": 1 where blocks may enter
        a row without one another.
      interpret: as there; then the grid has one block.

    Returns:
      (f32 [padded_rows, N], the last product, which is not added to the stream, or None where N
      is the stream's D, and it is; the stream, f32 [padded_rows, D]).
    """
    return _launch(links, weights, stream, given, rows, config, interpret)[:2]


def times(
    links: Sequence[Link],
    weights: Sequence[Weights],
    stream: jax.Array,
    given: jax.Array | None,
    rows: int,
    config: Mapping[str, int],
) -> jax.Array:
    """Runs a chain that leaves the time on its way.

    Returns int32 [multiplying warpgroups, `mark_names`, 2]: the low 32 bits of its processor's
    cycles, which no two processors count alike, and of ns, which all do, in steps of some ns up
    to 1 us.
    """
    return _launch(links, weights, stream, given, rows, {**config, "marks": True}, False)[2]


def _launch(links, weights, stream, given, rows, config, interpret):
    if given is not None and 1 < given.shape[0] < padded_rows(rows):
        given = jnp.pad(given, ((0, padded_rows(rows) - given.shape[0]), (0, 0)))
    settings = tuple(sorted(config.items()))
    return _run(tuple(links), tuple(weights), stream, given, rows, settings, interpret)


# A function of its own, so that a kernel that a program launches twice is built once.
@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _run(links, weights, stream, given, rows, settings, interpret):
    columns, last = stream.shape[1], links[-1].shape[1]
    leaves = None if last == columns else last
    stacked = tuple(w.data.shape[0] for w in weights)
    settings = dict(settings)
    settings["alone"] = int(settings["alone"] and enters_alone(links, rows, columns))
    fit = stages_that_fit(links, rows, settings["blocks"], bool(settings["alone"]))
    settings["stages"] = min(settings["stages"], fit)
    plan = Plan(links, stacked, rows, columns, leaves, interpret, **settings)
    kernel = _kernel(plan)
    at = jnp.stack([index for w in weights for index in (w.layer, w.norm_layer)])
    read = []
    for link, w in zip(links, weights, strict=True):
        read += [w.data.reshape(-1, *operand.TILE), w.scale, *([w.norm] if link.normed else [])]
    found = kernel(at, stream, *([] if given is None else [given]), *read)
    found = [None, *found] if leaves is None else found
    return found[0], found[1], found[-1] if plan.marks else None


def _kernel(plan):
    """(at, stream, given?, then data, scale, norm? of each link) -> (product?, stream, ...)."""
    if plan.interpret and plan.blocks != 1:
        raise ValueError(
            f"the interpreter has no barrier of a grid: expected 1 block, {plan.blocks}"
        )
    if plan.stages % plan.pairs:
        plan = dataclasses.replace(plan, stages=plan.stages // plan.pairs * plan.pairs)

    def body(*refs):
        refs = _named(plan, iter(refs))
        block, group = lax.axis_index("block"), lax.axis_index("group")

        @pl.when(group == plan.consumers)
        def _():
            plgpu.set_max_registers(decode.FETCH_REGISTERS, action="decrease")
            fetch(plan, refs, block)

        @pl.when(group < plan.consumers)
        def _():
            registers = decode.multiply_registers(plan.consumers)
            plgpu.set_max_registers(registers, action="increase")
            Worker(plan, refs, block, group).calculate()

    body.__name__ = "ternax_chain"
    return plgpu.kernel(
        body,
        out_type=_outputs(plan),
        scratch_types=_scratch(plan),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.consumers + 1,
        thread_name="group",
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
        # Threads meet where one reads what another wrote: at a barrier of the kernel's own.
        compiler_params=plgpu.CompilerParams(
            reduction_scratch_bytes=0, unsafe_no_auto_barriers=True
        ),
    )


def _named(plan, refs):
    """The kernel's references, in order, by name."""
    links = plan.links
    at = next(refs)
    at = [at[index] for index in range(2 * len(links))]  # once: memory is far
    stream_in = next(refs)
    given = next(refs) if links[0].enter == "input" else None
    data, scale, norm = [], [], []
    for link in links:
        data.append(next(refs))
        scale.append(next(refs))
        norm.append(next(refs) if link.normed else None)
    out = None if plan.leaves is None else next(refs)
    stream_out = next(refs)
    made = ([next(refs) for _ in links] for _ in range(5))
    made = [*made, next(refs) if plan.marks else None]
    arrays = (at, stream_in, given, data, scale, norm, out, stream_out, *made, *refs)
    if plan.interpret:
        return Refs(*arrays)
    return Refs(*arrays, pl.get_global(plgpu.SemaphoreType.REGULAR))


def _outputs(plan: Plan) -> list[jax.ShapeDtypeStruct]:
    """What the kernel returns, and behind it what blocks leave for one another."""
    shape, padded = jax.ShapeDtypeStruct, plan.padded
    wide = -(-plan.workers // LANES) * LANES
    statistic = [shape((padded, wide), jnp.float32) for _ in plan.links]
    return [
        *([] if plan.leaves is None else [shape((padded, plan.leaves), jnp.float32)]),
        shape((padded, plan.columns), jnp.float32),
        *(shape((plan.copies, padded, n * tiles.ROWS), jnp.int32) for n, _ in plan.grids),
        *(shape((padded, k * tiles.TILE_K), jnp.float32) for _, k in plan.grids),
        *statistic,
        *statistic,
        *(shape((padded, wide), jnp.int32) for _ in plan.links),
        *([shape((plan.workers, len(mark_names(plan.links)), 2), jnp.int32)] if plan.marks else []),
    ]


def _scratch(plan: Plan) -> list:
    held, consumers = max(plan.held), plan.consumers
    if plan.rows == 1:  # the first of eight rows, which no swizzle moves
        activations = plgpu.SMEM((held, SLICES[0], 8, tiles.SLICE), jnp.int8)
    else:
        shape = (held, plan.tile_rows, tiles.TILE_K)
        activations = plgpu.SMEM(shape, jnp.int8, transforms=skinny.SWIZZLED)
    return [
        plgpu.SMEM((plan.stages, *operand.TILE), jnp.uint8),
        activations,
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=len(plan.links)),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=len(plan.links)),
        plgpu.SMEM((len(plan.links), 2, consumers, SLICES[0]), jnp.float32),
        plgpu.SMEM((len(plan.links), consumers, SLICES[0]), jnp.int32),
        # Of the grid, for the interpreter; else of a block, before it arrives there.
        plgpu.Barrier(num_arrivals=consumers, num_barriers=plan.meetings),
    ]
