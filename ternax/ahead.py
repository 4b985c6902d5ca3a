"""The decode step of a split model, compiled for accelerators that are not there.

XLA partitions, fuses and plans memory as it would on the machine, so bytes a device and exchanges
between devices are proven on any processor. Nothing is timed.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from ternax import collectives, engine
from ternax.collectives import Collective
from ternax.errors import UsageError
from ternax.kernels import aot, target
from ternax.mesh import make_mesh
from ternax.nn.cache import cache_specs, init_cache
from ternax.random_weights import abstract_part
from ternax.sharding import Layout
from ternax.workload import Workload


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled decode step needs of each device.

    Attributes:
      argument_bytes: weights, cache and state that it is given.
      temporary_bytes: what one call allocates besides.
      found, planned: exchanges of a step, counted in the program and foretold.
    """

    argument_bytes: int
    temporary_bytes: int
    found: list[Collective]
    planned: list[Collective]


def mesh_of(device: str, sizes):
    """A mesh of as many devices `device`, a key of `kernels.aot.DEVICES`, as `sizes` take.

    To be asked for before jax first looks at its devices. UsageError where nothing compiles.
    """
    from jax.experimental import topologies

    if device not in aot.DEVICES:
        raise UsageError(f"device must be one of {', '.join(aot.DEVICES)}, found {device!r}")
    if reason := aot.why_not():
        raise UsageError(f"cannot compile ahead of time here: {reason}")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    count = math.prod(sizes.values())
    found = topologies.get_topology_desc(
        device, "cuda", target_config=aot.DEVICES[device].proto, topology=f"1x{count}x1"
    )
    return make_mesh(sizes, found.devices)


def compile_decode(device: str, layout: Layout, workload: Workload) -> Compiled:
    """The decode step of the layout's model, compiled for its mesh, which is one of `mesh_of`."""
    program, leaves, state = _abstract(layout, workload)
    with target.compiling_for(aot.DEVICES[device].target):
        lowered = engine.decode.trace(
            program, leaves, state, jax.ShapeDtypeStruct((), jnp.int32)
        ).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise UsageError("the compiler plans no memory: jax and its CUDA plugin do not match")
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives.of_program(compiled.as_text() or "", layout.config.num_layers),
        collectives.planned(layout, workload.batch),
    )


def _abstract(layout: Layout, workload: Workload):
    """What `engine.decode` takes, as shapes on their devices."""
    part, specs = abstract_part(
        layout,
        embed_dtype=workload.embed_dtype,
        head_dtype=workload.head_dtype,
        backend=workload.backend,
    )
    graph, leaves = nnx.split(part)

    def there(leaf, spec: PartitionSpec, local: bool = True):
        shape = layout.whole(leaf.shape, spec) if local else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=layout.sharding(spec))

    for path, variable in nnx.to_flat_state(leaves):
        variable.set_value(there(variable.get_value(), specs[".".join(map(str, path))]))
    rows = workload.batch // layout.batch
    context = layout.local_context(workload.context)
    local = jax.eval_shape(
        lambda: init_cache(layout.local_config, rows, context, workload.kv_dtype)
    )
    cache = jax.tree.map(there, local, cache_specs(layout, local))
    by_row = layout.partition(["batch"])

    def of_rows(dtype):
        return there(jax.ShapeDtypeStruct((workload.batch,), dtype), by_row, local=False)

    keys = jax.eval_shape(lambda: engine.row_keys(0, workload.batch))
    state = engine.DecodeState(cache, of_rows(jnp.int32), of_rows(jnp.bool_), of_rows(keys.dtype))
    return engine.Program(graph, layout=layout), leaves, state
