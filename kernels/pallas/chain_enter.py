"""A multiplying warpgroup of a chain's block: how it enters a projection. See `chain.py`."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import chain_alone, skinny, tiles
from .chain_meet import Member
from .chain_plan import GATES, LANES, SLICES, Known, chunks, inverse_root, layout, steps


class Worker(Member):
    """One warpgroup: number `group` of its block."""

    def place(self, i):
        """Where this worker reads what link i has made: (columns from which on, how many)."""
        plan = self.plan
        if i + 1 < len(plan.links):
            k_size = plan.links[i + 1].shape[0]
            first, width = self.own_part(k_size)
            gated = plan.links[i + 1].enter in GATES
            return ([first, k_size + first] if gated else [first]), width
        first, width = self.own_part(plan.leaves or plan.columns)
        return [first], width

    def own_part(self, size):
        """(first, how many) of this worker's columns; those without work repeat the last's."""
        plan = self.plan
        part = chunks(size, plan.workers)
        return jnp.minimum(self.worker, part.workers - 1) * part.width, part.width

    def working(self, size):
        plan = self.plan
        return self.worker < chunks(size, plan.workers).workers

    def scales(self, i):
        plan, refs = self.plan, self.refs
        firsts, width = self.place(i)
        return [
            plan.read(refs.scale[i].at[refs.at[2 * i], pl.ds(first, width)], layout(1).reduce(0))
            for first in firsts
        ]

    def product(self, i, known):
        """f32 [padded, width] from each column of `self.place(i)` on: what link i has made."""
        plan, refs = self.plan, self.refs
        firsts, width = self.place(i)
        totals = [
            sum(
                plan.read(refs.sums[i].at[copy, :, pl.ds(first, width)])
                for copy in range(plan.copies)
            )
            for first in firsts
        ]
        x_scale, lacks, w_scales = known
        if lacks is None:
            lacks = self.shares(refs.offsets[i], plan.links[i].shape[0], jnp.sum)
            lacks, x_scale = (plan.over_columns(each, width) for each in (lacks, x_scale))
        return [
            (total + lacks).astype(jnp.float32) * (x_scale * plan.over_rows(w_scale))
            for total, w_scale in zip(totals, w_scales, strict=True)
        ]

    def shares(self, ref, size, reduce):
        """[padded]: the workers' shares of a row's statistic, of `size` columns, together.

        Of one row, every warp has it.
        """
        plan = self.plan
        count = chunks(size, plan.workers).workers
        cols = pl.ds(0, -(-count // LANES) * LANES)
        if plan.rows == 1:
            found = plan.over_rows(plan.read(ref.at[0, cols], layout(1).reduce(0)))
        else:
            found = plan.read(ref.at[:, cols])
        return reduce(jnp.where(plan.column_index(found.shape[1]) < count, found, 0), axis=1)

    def clear(self):
        """Sums begin at zero, and so do values beyond K."""
        plan, refs = self.plan, self.refs
        for i, link in enumerate(plan.links):
            part = chunks(refs.sums[i].shape[2], plan.workers)

            @pl.when(self.worker < part.workers)
            def _(i=i, part=part):
                cols = pl.ds(self.worker * part.width, part.width)
                for copy in range(plan.copies):
                    refs.sums[i][copy, :, cols] = plan.zeros(part.width, jnp.int32)

            if pad := -link.shape[0] % tiles.TILE_K:

                @pl.when(self.worker == i % plan.workers)
                def _(i=i, pad=pad, k=link.shape[0]):
                    refs.values[i][:, pl.ds(k, pad)] = plan.zeros(pad, jnp.float32)

    def load_values(self, i, j, first, width):
        """f32 [padded, width] of the block's j-th tile, columns `first` on; of one row the
        whole tile, [4, 128], a slice for each warp."""
        plan, refs = self.plan, self.refs
        first_k, _, _ = plan.share(i, self.block)
        tile = first_k + j
        if plan.rows > 1:
            return plan.read(
                refs.values[i].at[:, pl.ds(tile * tiles.TILE_K + first, width)], layout(4)
            )
        if plan.interpret:
            return refs.values[i][0, pl.ds(tile * tiles.TILE_K, width)].reshape(SLICES)
        slices = refs.values[i].reshape(plan.padded, -1, tiles.SLICE)
        return plan.read(slices.at[0, pl.ds(tile * SLICES[0], SLICES[0])], layout(4))

    def turns(self, i):
        """This group's tiles of those whose activations the block holds; some come twice."""
        plan = self.plan
        for turn in range(-(-plan.held[i] // plan.consumers)):
            yield jnp.minimum(self.group + turn * plan.consumers, plan.held[i] - 1)

    def quantize(self, i, factor, loaded):
        """Leaves the activations of this block's tiles in shared memory, as int8.

        loaded: their values, where there is one row; else they are read here.
        """
        plan, refs = self.plan, self.refs
        factor = plan.cast(factor, layout(4).reduce(1))
        width = tiles.TILE_K * 8 // plan.tile_rows  # of more rows registers hold fewer columns

        def digits(value):
            found = plan.rounded(value * plan.over_columns(factor, value.shape[1]))
            return found.astype(jnp.int8)

        if plan.rows == 1:  # the first of eight rows, which no swizzle moves
            for j, value in zip(self.turns(i), loaded, strict=True):
                refs.x_smem[j, :, 0, :] = digits(value)
        else:

            @pl.loop(0, -(-plan.held[i] // plan.consumers))
            def _(turn):
                j = jnp.minimum(self.group + turn * plan.consumers, plan.held[i] - 1)
                for first in range(0, tiles.TILE_K, width):
                    value = self.load_values(i, j, first, width)
                    refs.x_smem[j, :, pl.ds(first, width)] = digits(value)

        if not plan.interpret:
            plgpu.commit_smem()
        plgpu.barrier_arrive(refs.quantized.at[i])
        plgpu.barrier_wait(refs.quantized.at[i])

    def calculate(self):
        plan, refs = self.plan, self.refs
        self.mark()
        self.clear()
        if plan.alone:
            stream = None  # read where it is needed
        else:
            mine, mine_width = self.own_part(plan.columns)
            stream = plan.read(refs.stream_in.at[:, pl.ds(mine, mine_width)])
        base, known = jnp.int32(0), None
        for i in range(len(plan.links)):
            if plan.enters_alone(i):
                known, stream = chain_alone.enter(self, i, known, stream)
            else:
                known, stream = self.enter(i, known, stream)
            base = self.multiply(i, base)
            self.mark()
        self.leave(known, stream)
        self.mark()

    def enter(self, i, known, stream):
        """Takes a part of the rows; the others' is known behind the grid's second barrier."""
        plan, refs, link = self.plan, self.refs, self.plan.links[i]
        k_size = link.shape[0]
        first, width = self.own_part(k_size)
        cols = pl.ds(first, width)
        if link.normed:
            weight = plan.read(refs.norm[i].at[refs.at[2 * i + 1], cols], layout(1).reduce(0))
        if i:
            self.meet()
        self.mark()
        if link.enter == "input":
            if refs.given.shape[0] == plan.padded:
                value = plan.read(refs.given.at[:, cols])
            else:
                value = plan.over_rows(plan.read(refs.given.at[0, cols], layout(1).reduce(0)))
        elif link.enter == "stream":
            value = stream
        elif link.enter == "residual":
            [found] = self.product(i - 1, known)
            value = stream = stream + found
        else:
            gate, up = self.product(i - 1, known)
            value = GATES[link.enter](gate) * up
        weighed = value * plan.over_rows(weight) if link.normed else value

        @pl.when(self.working(k_size))
        def _():
            refs.values[i][:, cols] = weighed
            refs.peaks[i][:, self.worker] = jnp.max(jnp.maximum(weighed, -weighed), axis=1)
            if link.normed:
                refs.squares[i][:, self.worker] = jnp.sum(value * value, axis=1)

        self.meet()
        self.mark()
        loaded = []
        if plan.rows == 1:
            loaded = [self.load_values(i, j, 0, tiles.TILE_K) for j in self.turns(i)]
        peak, root = self.shares(refs.peaks[i], k_size, jnp.max), None
        if link.normed:
            root = inverse_root(self.shares(refs.squares[i], k_size, jnp.sum), link)
        x_scale, factor = steps(peak, root)
        self.quantize(i, factor, loaded)

        @pl.when(self.working(k_size))
        def _():
            digits = plan.rounded(weighed * plan.over_columns(factor, width))
            last = ((plan.column_index(width) + first) // tiles.SLICE) % 4 == 3
            refs.offsets[i][:, self.worker] = jnp.sum(jnp.where(last, digits, -digits), axis=1)

        self.mark()
        w_scales = None if self.next_is_alone(i) else self.scales(i)
        return Known(x_scale, None, w_scales), stream

    def next_is_alone(self, i):
        """Whether what link i makes is read by whole rows; else by parts."""
        plan = self.plan
        return plan.enters_alone(i + 1) if i + 1 < len(plan.links) else plan.adds_alone

    def leave(self, known, stream):
        """What the last product has made, and the stream."""
        plan, refs = self.plan, self.refs
        end = len(plan.links) - 1
        if plan.alone and stream is None:
            stream = chain_alone.stream_tiles(self)
        if plan.alone and plan.leaves is not None:
            chain_alone.write_stream(self, stream)
        self.meet()
        self.mark()
        if plan.adds_alone:
            chain_alone.write_stream(self, chain_alone.added(self, end, known, stream))
            return
        [found] = self.product(end, known)
        if plan.leaves is None:
            stream = stream + found
        else:
            first, width = self.own_part(plan.leaves)

            @pl.when(self.working(plan.leaves))
            def _():
                refs.out[:, pl.ds(first, width)] = found

        if not plan.alone:
            mine, mine_width = self.own_part(plan.columns)

            @pl.when(self.working(plan.columns))
            def _():
                refs.stream_out[:, pl.ds(mine, mine_width)] = stream

    def multiply(self, i, base):
        """This group's part of link i; how many tiles the block has had then."""
        plan, refs = self.plan, self.refs
        _, start, stop = plan.share(i, self.block)
        team, half = lax.div(self.group, 2), lax.rem(self.group, 2)

        def turn(unit):
            """How many of this team's turns are before the unit, of all links."""
            return lax.div(base + unit - start - team + plan.pairs - 1, plan.pairs)

        @pl.loop(lax.div(start, plan.held[i]), lax.div(stop - 1, plan.held[i]) + 1)
        def _(n):
            first, last = (
                jnp.maximum(start, n * plan.held[i]),
                jnp.minimum(stop, (n + 1) * plan.held[i]),
            )

            def one(j, accumulators):
                count = j * plan.pairs + team
                slot = lax.rem(count, plan.stages)
                x = refs.x_smem.at[count - base + start - n * plan.held[i]]
                plgpu.barrier_wait(refs.full.at[slot])
                found = skinny.multiply(
                    accumulators, refs.tile_smem.at[slot], half, x, plan.interpret
                )
                plgpu.barrier_arrive(refs.free.at[slot])
                return found

            accumulators = lax.fori_loop(
                turn(first), turn(last), one, skinny.zeros(plan.tile_rows, plan.interpret)
            )
            column = n * tiles.ROWS + half * tiles.HALF
            out_sums = refs.sums[i].at[team if plan.interpret else 0]
            skinny.add(out_sums, column, accumulators, plan.rows, plan.interpret)

        return base + stop - start
