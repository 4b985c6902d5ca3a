"""Memory and collectives of a model's own programs, compiled for a GPU that is not there.

The abstract packed model is traced as the engine runs it, prefill and a decode step, and XLA
says what arguments and temporaries take. Nothing is allocated and nothing is timed.
"""

import dataclasses
from typing import Any

from ternax import collectives
from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.kernels import aot, target

# Names of the catalogue that there is a compiler's description for.
DEVICES = {"h100-sxm": "h100", "h200-sxm": "h200"}
# How formats of a plan are called by the model that runs.
SCHEMES = {"trit2": "absmean,granularity=row", "int8": "int8", "int4": "int4", "fp16": "none"}
TABLES = {"fp16": "bf16", "fp32": "f32", "int8": "int8", "int4": "int4"}
CACHES = {"fp16": "bf16", "fp32": "f32", "int8": "int8"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of both programs.

    Attributes:
      argument_bytes: weights and the cache, as they lie on the device.
      prefill_bytes, decode_bytes: temporaries of each program beside them.
      collectives: of a decode step.
    """

    argument_bytes: int
    prefill_bytes: int
    decode_bytes: int
    collectives: int

    @property
    def temporary_bytes(self) -> int:
        """Of the larger program: what must be free beside the arguments."""
        return max(self.prefill_bytes, self.decode_bytes)


def _named(what: str, names: dict[str, str], name: str) -> str:
    if name not in names:
        raise UsageError(f"--compile: {what} must be one of {', '.join(names)}, found {name}")
    return names[name]


def compile_model(
    config: ModelConfig,
    device: str,
    *,
    weights: str,
    tables: str,
    kv: str,
    batch: int,
    context: int,
    prompt: int,
) -> Compiled:
    """Compiles prefill of `prompt` tokens a row and a decode step. To be called before jax looks
    at its devices.

    device: a name of the catalogue; weights, tables, kv: formats by the names of a plan.

    Raises UsageError for what cannot be compiled here, and says what is missing.
    """
    name = _named("--device", DEVICES, device)
    scheme = _named("--scheme", SCHEMES, weights)
    table = _named("--tables", TABLES, tables)
    cache_dtype = _named("--kv", CACHES, kv)
    missing = aot.why_not()
    if missing:
        raise UsageError(f"--compile: {missing}")
    where = aot.sharding(name)

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ternax import engine
    from ternax.config import with_scheme
    from ternax.edit import pack_model
    from ternax.models import MODELS
    from ternax.nn.cache import init_cache

    config = with_scheme(config, scheme)

    def there(tree) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    def build():
        model = MODELS[config.family](config, rngs=nnx.Rngs(0))
        return pack_model(model, embed_dtype=table, head_dtype=table)

    with target.compiling_for(aot.DEVICES[name].target):
        graph, leaves = nnx.split(nnx.eval_shape(build))
        program = engine.Program(graph)
        cache = jax.eval_shape(lambda: init_cache(config, batch, context, cache_dtype))
        keys = jax.eval_shape(lambda: engine.row_keys(0, batch))
        token: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
        done: Any = jax.ShapeDtypeStruct((batch,), jnp.bool_)
        state = engine.DecodeState(cache, token, done, keys)
        tokens = jax.ShapeDtypeStruct((batch, prompt), jnp.int32)
        steps = jax.ShapeDtypeStruct((), jnp.int32)

        def compiled(traced):
            return traced.lower(lowering_platforms=("cuda",)).compile()

        read = compiled(
            engine.prefill.trace(program, there(leaves), there(tokens), there(cache), there(keys))
        )
        step = compiled(engine.decode.trace(program, there(leaves), there(state), there(steps), 1))
    memory = step.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        read.memory_analysis().temp_size_in_bytes,
        memory.temp_size_in_bytes,
        sum(one.times for one in collectives.of_program(step.as_text() or "", config.num_layers)),
    )
