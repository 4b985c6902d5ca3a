"""A model's own programs, compiled for accelerators that are not there, one or a mesh of them.

The abstract packed model is traced as the engine runs it, and XLA partitions, fuses and plans
memory as it would on the machine: bytes a device and exchanges between devices are proven on any
processor. Nothing is allocated and nothing is timed.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ternax import collectives, engine, launches
from ternax.collectives import Collective
from ternax.config import ModelConfig
from ternax.edit import fit_kernels
from ternax.errors import UsageError
from ternax.kernels import aot, target
from ternax.mesh import make_mesh
from ternax.nn.cache import cache_specs, init_cache
from ternax.random_weights import abstract_model, abstract_part
from ternax.sharding import check_batch, layout_for
from ternax.workload import Workload


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiled programs need of each device.

    Attributes:
      argument_bytes: weights, cache and state that a decode step is given.
      prefill_bytes, decode_bytes: what a call of each program allocates besides.
      found, planned: exchanges of a decode step, counted in the program and foretold.
      launches: kernels launched for each layer of a decode step, or None, see `launches`.
    """

    argument_bytes: int
    prefill_bytes: int
    decode_bytes: int
    found: list[Collective]
    planned: list[Collective]
    launches: float | None

    @property
    def temporary_bytes(self) -> int:
        """Of the larger program: what must be free beside the arguments."""
        return max(self.prefill_bytes, self.decode_bytes)


def compile_for(device: str, mesh: Mesh, config: ModelConfig, workload: Workload) -> Compiled:
    """Compiles both programs of a decode run.

    Args:
      device: a key of `kernels.aot.DEVICES`.
      mesh: of `mesh_of`.
      config: the model.
      workload: what is decoded.

    Raises UsageError where the model, or the batch, does not split so.
    """
    programs = _Programs(device, mesh, config, workload)
    step, layout = programs.decode(), programs.layout
    memory = step.memory_analysis()
    read = programs.prefill().memory_analysis()
    if memory is None or read is None:
        raise UsageError("the compiler plans no memory: jax and its CUDA plugin do not match")
    text = step.as_text() or ""
    return Compiled(
        memory.argument_size_in_bytes,
        read.temp_size_in_bytes,
        memory.temp_size_in_bytes,
        collectives.of_program(text, config.num_layers),
        [] if layout is None else collectives.planned(layout, workload.batch),
        launches.a_layer(text),
    )


def mesh_of(device: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of as many devices `device`, a key of `kernels.aot.DEVICES`, as `sizes` take.

    To be asked for before jax first looks at its devices. UsageError where nothing compiles.
    """
    if device not in aot.DEVICES:
        raise UsageError(f"device must be one of {', '.join(aot.DEVICES)}, found {device!r}")
    if reason := aot.why_not():
        raise UsageError(f"cannot compile ahead of time here: {reason}")
    return make_mesh(sizes, aot.devices(device, math.prod(sizes.values())))


class _Programs:
    """Prefill and decode of a model, all that they take as shapes and where these lie."""

    def __init__(self, device: str, mesh: Mesh, config: ModelConfig, workload: Workload):
        self._target, self._mesh, self._workload = aot.DEVICES[device].target, mesh, workload
        self.layout = layout = layout_for(mesh, config)
        check_batch(layout, workload.batch)
        packing: dict[str, Any] = dict(
            embed_dtype=workload.embed_dtype,
            head_dtype=workload.head_dtype,
            backend=workload.backend,
        )
        specs: dict[str, P] = {}
        with target.compiling_for(self._target):
            if layout is None:
                part = abstract_model(config, **packing)
                local, rows = config, workload.batch
            else:
                part, specs = abstract_part(layout, **packing)
                local, rows = layout.local_config, workload.batch // layout.batch
            graph, self._leaves = nnx.split(fit_kernels(part))
            slots, kv = workload.context, workload.kv_dtype
            slots = layout.local_context(slots) if layout else slots
            cache = jax.eval_shape(lambda: init_cache(local, rows, slots, kv))
            keys = jax.eval_shape(lambda: engine.row_keys(0, workload.batch))
        for path, variable in nnx.to_flat_state(self._leaves):
            spec = specs.get(".".join(map(str, path)), P())
            variable.set_value(self._there(variable.get_value(), spec))
        places = cache_specs(layout, cache) if layout else jax.tree.map(lambda _: P(), cache)
        self._cache = jax.tree.map(self._there, cache, places)
        self._keys = self._of_rows(keys.dtype)
        self._program = engine.Program(graph, layout=layout)

    def _there(self, leaf, spec: P):
        """One device's leaf as the mesh's: its shape of all devices together, and where it lies."""
        shape = self.layout.whole(leaf.shape, spec) if self.layout else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(self._mesh, spec))

    def _of_rows(self, dtype, *shape: int):
        """What has a first dimension of the batch's rows."""
        spec = self.layout.partition(["batch"]) if self.layout else P()
        where = NamedSharding(self._mesh, spec)
        return jax.ShapeDtypeStruct((self._workload.batch, *shape), dtype, sharding=where)

    def _compile(self, step, *arguments) -> jax.stages.Compiled:
        with target.compiling_for(self._target):
            traced = step.trace(self._program, self._leaves, *arguments)
            return traced.lower(lowering_platforms=("cuda",)).compile()

    def prefill(self) -> jax.stages.Compiled:
        tokens = self._of_rows(jnp.int32, self._workload.prompt_length)
        return self._compile(engine.prefill, tokens, self._cache, self._keys)

    def decode(self) -> jax.stages.Compiled:
        token, done = self._of_rows(jnp.int32), self._of_rows(jnp.bool_)
        state = engine.DecodeState(self._cache, token, done, self._keys)
        return self._compile(engine.decode, state, jax.ShapeDtypeStruct((), jnp.int32))
