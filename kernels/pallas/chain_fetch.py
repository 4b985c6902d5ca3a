"""The fetching warpgroup of a chain's block: one stream of tiles. See `chain.py`."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .chain_meet import Refs
from .chain_plan import Plan


def fetch(plan: Plan, refs: Refs, block) -> None:
    """Every tile into shared memory once its slot is free, `ahead` of that into L2."""
    spans, total = [], jnp.int32(0)  # (link, layer, first of the launch's tiles, how many)
    for i in range(len(plan.links)):
        _, start, stop = plan.share(i, block)
        spans.append((i, refs.at[2 * i], total, stop - start))
        total = total + stop - start
    own, behind = list(spans), total
    if plan.links[0].enter == "input":  # the next layer's chain begins as this one
        for i, layer, _, count in own[:2]:
            there = jnp.where(layer + 1 < plan.stacked[i], count, 0)
            spans.append((i, layer + 1, behind, there))
            behind = behind + there

    def tile(i, layer, index):
        first_k, start, _ = plan.share(i, block)
        (along_n, along_k), held = plan.grids[i], plan.held[i]
        n, k = lax.div(start + index, held), lax.rem(start + index, held)
        return refs.data[i].at[(layer * along_n + n) * along_k + first_k + k]

    def prefetch(count):
        for i, layer, first, length in spans:

            @pl.when((count >= first) & (count < first + length))
            def _(i=i, layer=layer, first=first):
                plgpu.async_prefetch(tile(i, layer, count - first))

    if plan.ahead:
        pl.loop(plan.stages, plan.stages + plan.ahead)(prefetch)
    for i, layer, first, length in own:

        @pl.loop(first, first + length)
        def _(count, i=i, layer=layer, first=first):
            slot = lax.rem(count, plan.stages)

            @pl.when(count >= plan.stages)
            def _():
                plgpu.barrier_wait(refs.free.at[slot])

            source = tile(i, layer, count - first)
            plgpu.copy_gmem_to_smem(source, refs.tile_smem.at[slot], refs.full.at[slot])
            if plan.ahead:
                prefetch(count + plan.stages + plan.ahead)

    @pl.loop(jnp.maximum(total - plan.stages, 0), total)
    def drain(count):
        plgpu.barrier_wait(refs.free.at[lax.rem(count, plan.stages)])
