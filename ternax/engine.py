"""From a source to text: `load`, prefill, the decode loop on the device, `generate`.

Everything compiled here takes the model as (graph, leaves): NNX at the edges, plain
`jax.jit` inside. The cache is donated, so a step updates it in place.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from ternax.checkpoint.box import Source, find
from ternax.checkpoint.loading import load as load_saved
from ternax.checkpoint.manifest import Manifest
from ternax.config import ModelConfig, first_layers, with_scheme
from ternax.edit import fit_kernels
from ternax.errors import UsageError
from ternax.interop.loading import load as load_foreign
from ternax.kernels.memory import zeros
from ternax.models import MODELS, Decoder
from ternax.nn.cache import KV_DTYPES, KVCache, cache_specs, init_cache
from ternax.random_weights import random_model
from ternax.sampling import Sampling, sample
from ternax.sharding import RULES, Layout, check_batch, fetch, layout_for, spread

# Tokens decoded by one call of the device loop when the caller does not say.
CHUNK_TOKENS = 16
GREEDY = Sampling()


def load(
    source: str | os.PathLike | ModelConfig,
    *,
    scheme: str | None = None,
    inputs: str | None = None,
    packed: bool = True,
    layers: int | None = None,
    seed: int | None = None,
    weights: str = "auto",
    i2_s: str | None = None,
    mesh: str | Mesh | None = None,
    **packing,
) -> Decoder:
    """A model to call, generate with, study or train.

    Args:
      source: a config name ("70b"), a directory that `ternax.save` wrote, a Hugging Face
        directory, a GGUF file, a model of the Hugging Face hub ("hf:org/name@revision"), or a
        ModelConfig.
        A name in the box ("stdlib-bitnet") gives its trained weights, which are packed; all
        other names, a ModelConfig and packed=False give random ones of that shape.
      scheme: replaces the config's weight scheme; "none" leaves inputs unquantized too.
        Packed weights that are stored have theirs.
      inputs: "int8" or "none", how inputs are quantized; None: as the config says. Weights of
        `ternax.save` have theirs.
      packed: True makes packed codes in place; False latent float weights (f32) that
        train and can be handed to `pack_model`. The two are different random models.
      layers: the first n layers alone.
      seed: of random weights, 0 unless given; stored ones have none.
      weights: "random" draws them even where some are stored.
      i2_s: "x86", "arm" or "rows": how a GGUF file's I2_S is laid out, which it does not say.
      mesh: "data:2,tensor:4" or a Mesh of `ternax.mesh.AXES`: a packed model, split over devices.
      packing: embed_dtype, head_dtype and backend, as for `pack_model`.

    Raises:
      UsageError: an unknown name, or stored weights asked to be what they are not.
      BadModelFile: a file or directory that holds no whole model.
    """
    if (packing or mesh is not None) and not packed:
        given = [*packing, *["mesh"] * (mesh is not None)]
        raise UsageError(f"load: {', '.join(given)} belong to packed=True")
    if isinstance(source, ModelConfig):
        config = source
    else:
        found = find(os.fspath(source), weights, i2_s)
        if found.directory is not None and (packed or not found.boxed):
            if seed is not None:
                raise UsageError(
                    f"seed={seed} is of random weights, and {found.name} has stored ones: leave "
                    "it out, or take weights='random'"
                )
            return load_stored(
                found,
                scheme=scheme,
                inputs=inputs,
                packed=packed,
                layers=layers,
                mesh=mesh,
                **packing,
            )
        config = found.config
    config = first_layers(with_scheme(config, scheme, inputs), layers)
    if packed:
        return random_model(config, seed=seed or 0, layout=layout_for(mesh, config), **packing)
    return MODELS[config.family](config, rngs=nnx.Rngs(seed or 0))


def load_stored(source: Source, *, inputs: str | None = None, **options) -> Decoder:
    """The weights that a Source has: options as for `load_saved` or `interop.loading.load`."""
    if source.stored is None or isinstance(source.stored, Manifest):
        source.check(scheme=options.get("scheme"), inputs=inputs)
        return load_saved(source.directory, **options)
    return load_foreign(source.stored, inputs=inputs, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that changes while decoding.

    Attributes:
      cache: the KV cache.
      token: int32 [B], the newest token, not yet in the cache.
      done: bool [B], rows that met a stop token; they emit padding.
      keys: one random key a row; a draw folds in the token's position.
    """

    cache: KVCache
    token: jax.Array
    done: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled step is specialised on, besides shapes. layout: the model's."""

    graph: nnx.GraphDef
    sampling: Sampling = GREEDY
    stop: tuple[int, ...] = ()
    pad_id: int = 0
    layout: Layout | None = None


def _next_token(program: Program, logits, cache, done, keys):
    """Samples from logits [B, V] at the cache's end; returns (token [B], done [B])."""
    positions = cache.length - cache.start
    token = sample(logits, jax.vmap(jax.random.fold_in)(keys, positions), program.sampling)
    token = jnp.where(done, program.pad_id, token)
    for stop in program.stop:
        done |= token == stop
    return token, done


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(
    program: Program, leaves, tokens: jax.Array, cache: KVCache, keys: jax.Array
) -> DecodeState:
    """Reads whole prompts [B, T], padded on the left as cache.start says; draws the first token."""

    def body(leaves, tokens, cache, keys):
        model = nnx.merge(program.graph, leaves)
        logits, cache = model.forward(tokens, cache, last_only=True)
        done = jnp.zeros(tokens.shape[:1], bool)
        token, done = _next_token(program, logits[:, -1], cache, done, keys)
        return DecodeState(cache, token, done, keys)

    layout = program.layout
    if layout is None:
        return body(leaves, tokens, cache, keys)
    rows = layout.partition(["batch"])
    state = _state_specs(layout, cache)
    arguments = (layout.specs(leaves), rows, state.cache, rows)
    return spread(layout, body, arguments, state)(leaves, tokens, cache, keys)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(
    program: Program, leaves, state: DecodeState, steps: jax.Array, chunk: int = CHUNK_TOKENS
):
    """Up to `steps` <= `chunk` tokens in one call of a loop on the device.

    Ends early once all rows are done.

    Returns:
      (tokens int32 [B, chunk], padding behind what was decoded; the state after).
    """
    layout = program.layout

    def body(leaves, state, steps):
        model = nnx.merge(program.graph, leaves)
        out = jnp.full((state.token.shape[0], chunk), program.pad_id, jnp.int32)

        def running(carry):
            i, _, state = carry
            return (i < steps) & ~_all_done(program, state.done)

        def step(carry):
            i, out, state = carry
            logits, cache = model.forward(state.token[:, None], state.cache)
            token, done = _next_token(program, logits[:, -1], cache, state.done, state.keys)
            state = DecodeState(cache, token, done, state.keys)
            return i + 1, lax.dynamic_update_slice(out, token[:, None], (0, i)), state

        _, out, state = lax.while_loop(running, step, (jnp.int32(0), out, state))
        return out, state

    if layout is None:
        return body(leaves, state, steps)
    whole, specs = layout.partition([]), _state_specs(layout, state.cache)
    arguments = (layout.specs(leaves), specs, whole)
    results = (layout.partition(["batch"]), specs)
    return spread(layout, body, arguments, results)(leaves, state, steps)


def _all_done(program: Program, done) -> jax.Array:
    """bool []: whether every row is done, on whatever device: their loops must end together."""
    layout = program.layout
    if layout is None or layout.batch == 1 or not program.stop:
        return done.all()
    return lax.pmin(done.all().astype(jnp.int32), RULES["batch"]) > 0


def _state_specs(layout: Layout, cache: KVCache) -> DecodeState:
    """The PartitionSpec of each leaf of a DecodeState."""
    rows: Any = layout.partition(["batch"])
    return DecodeState(cache_specs(layout, cache), rows, rows, rows)


def row_keys(seed: int, batch: int) -> jax.Array:
    """One key a row, whatever the batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def pad_left(tokens: np.ndarray, lengths: np.ndarray, pad_id: int = 0) -> np.ndarray:
    """Moves prompts [B, T] of the given lengths from the left edge to the right one."""
    width = tokens.shape[1]
    out = np.full_like(tokens, pad_id)
    for row, length in enumerate(lengths):
        out[row, width - length :] = tokens[row, :length]
    return out


def generate(
    model: Decoder,
    tokens,
    *,
    max_new_tokens: int = 64,
    lengths=None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    kv_dtype: str = "bf16",
    pad_id: int = 0,
) -> np.ndarray:
    """Continues prompts.

    Args:
      tokens: int32 [B, T], prompts from the left edge.
      lengths: int [B], tokens of each prompt; None: all of T.
      max_new_tokens: n, new tokens a row at most.
      temperature, top_k, top_p: see Sampling.
      seed: a row's draws depend on the seed, its index and its own tokens.
      stop: token ids that end a row; the stop token itself is returned.
      kv_dtype: "bf16", "int8" or "f32".

    Returns:
      int32 [B, T + n]: each row its prompt, what was generated, then `pad_id`.
    """
    tokens = np.asarray(tokens)
    sampling = Sampling(temperature, top_k, top_p)
    lengths = check_prompts(model.config, tokens, lengths, max_new_tokens)
    tokens = tokens.astype(np.int32)
    out = np.full((tokens.shape[0], tokens.shape[1] + max_new_tokens), pad_id, np.int32)
    for row, length in enumerate(lengths):
        out[row, :length] = tokens[row, :length]
    filled = lengths.copy()
    chunks = stream(
        model,
        tokens,
        lengths=lengths,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        kv_dtype=kv_dtype,
        pad_id=pad_id,
    )
    for new in chunks:
        for row, start in enumerate(filled):
            out[row, start : start + new.shape[1]] = new[row]
        filled = filled + new.shape[1]
    return out


def stream(
    model: Decoder,
    tokens: np.ndarray,
    *,
    lengths: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    kv_dtype: str = "bf16",
    pad_id: int = 0,
) -> Iterator[np.ndarray]:
    """`generate` as it happens: yields int32 [B, 1 .. CHUNK_TOKENS] until every row is done."""
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, found {kv_dtype!r}")
    batch, width = tokens.shape
    graph, leaves = nnx.split(fit_kernels(model))
    layout = model.layout
    check_batch(layout, batch)
    program = Program(graph, sampling, tuple(stop or ()), pad_id, layout)
    start = np.asarray(width - np.asarray(lengths), np.int32)
    context = width + max_new_tokens
    cache = init_cache(model.config, batch, context, kv_dtype, start, zeros, layout)
    prompts = rows_on(layout, pad_left(tokens, lengths, pad_id))
    state = prefill(program, leaves, prompts, cache, row_keys(seed, batch))
    yield fetch(state.token)[:, None]
    left = max_new_tokens - 1
    while left and not bool(state.done.all()):
        steps = min(left, CHUNK_TOKENS)
        out, state = decode(program, leaves, state, steps)
        yield fetch(out)[:, :steps]
        left -= steps


def rows_on(layout: Layout | None, rows: np.ndarray) -> jax.Array:
    """What a step takes a row of a batch of, [B, ...], where the step reads it."""
    return jnp.asarray(rows) if layout is None else layout.put(rows, ["batch"])


def check_prompts(
    config: ModelConfig, tokens: np.ndarray, lengths, max_new_tokens: int
) -> np.ndarray:
    """The prompts' lengths as int [B]. Raises UsageError for what cannot be decoded."""
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise UsageError(
            f"tokens must be [batch, length] with both at least 1, found {tokens.shape}"
        )
    if tokens.dtype.kind not in "iu":
        raise UsageError(f"tokens must be integers, found {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise UsageError(
            f"tokens must lie in [0, {config.vocab_size}), found {tokens.min()} .. {tokens.max()}"
        )
    lengths = np.full(tokens.shape[0], tokens.shape[1]) if lengths is None else np.asarray(lengths)
    fits = lengths.shape == tokens.shape[:1] and lengths.dtype.kind in "iu"
    if not fits or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise UsageError(
            f"lengths must be {tokens.shape[0]} values between 1 and {tokens.shape[1]}, "
            f"found {lengths.tolist()}"
        )
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if tokens.shape[1] + max_new_tokens > config.max_context:
        raise UsageError(
            f"prompt and new tokens must fit the context of {config.max_context} positions, "
            f"found {tokens.shape[1]} + {max_new_tokens}"
        )
    return lengths
