"""A multiplying warpgroup of a chain among all others: what they share, barriers of the grid, the
time on the way. See `chain.py`."""

from typing import Any, NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .chain_plan import Plan


class Refs(NamedTuple):
    """Memory that a block of a chain has to do with; lists have an entry for each link."""

    at: list  # layers: of weights and of norms, link by link
    stream_in: Any
    given: Any
    data: list
    scale: list
    norm: list
    out: Any
    stream_out: Any
    sums: list  # int32 [copies, padded, N]
    values: list  # f32 [padded, K], what is quantized
    squares: list  # f32 [padded, workers], and so on: each worker's share of a row's
    peaks: list
    offsets: list
    marks: Any  # int32 [workers, marks, 2]: cycles, ns
    tile_smem: Any
    x_smem: Any
    full: Any
    free: Any
    quantized: Any
    noted: Any  # of a block: its groups' statistics are there
    statistics: Any  # f32 [links, 2, consumers, 4]: squares and peaks of four slices
    row_sums: Any  # int32 [links, consumers, 4], of digits
    gathered: Any  # of a block, before it arrives at the grid's
    come: Any = None  # the grid's barrier, where there is one


class Member:
    """Number `group` of its block."""

    def __init__(self, plan: Plan, refs: Refs, block, group):
        self.plan, self.refs, self.block, self.group = plan, refs, block, group
        self.worker = block * plan.consumers + group
        self.met = self.marked = 0  # barriers and marks behind us

    def mark(self):
        """Leaves the time; see `Plan.mark_names`."""
        if self.plan.marks and not self.plan.interpret:
            _leave_time(self.refs.marks.at[self.worker, self.marked])
            self.marked += 1

    def arrive(self):
        """At the grid's next barrier: what this group has written, others may read behind it."""
        plan, refs = self.plan, self.refs
        plgpu.barrier_arrive(refs.gathered.at[self.met])
        if plan.interpret:
            return

        @pl.when(self.group == 0)  # one for the block: arrivals at one place take turns
        def _():
            plgpu.barrier_wait(refs.gathered.at[self.met])
            plgpu.semaphore_signal(refs.come, 1, memory_scope="gpu")

    def wait(self):
        """Until all blocks have arrived."""
        plan, refs = self.plan, self.refs
        if plan.interpret:
            plgpu.barrier_wait(refs.gathered.at[self.met])
        else:
            target = (self.met + 1) * plan.blocks
            plgpu.semaphore_wait(refs.come, target, decrement=False, memory_scope="gpu")
        self.met += 1

    def meet(self):
        self.arrive()
        self.wait()


def _leave_time(place):
    """Stores the processor's cycles and ns, the low 32 bits, from one thread of a warpgroup."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_, place):
        from jax.experimental.mosaic.gpu import utils

        with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
            utils.inline_ptx(
                "{ .reg .u32 c, t; mov.u32 c, %clock; mov.u32 t, %globaltimer_lo; "
                "st.global.v2.u32 [$0], {c, t}; }",
                utils.memref_ptr(place),
                has_side_effects=True,
            )

    emit(place)
