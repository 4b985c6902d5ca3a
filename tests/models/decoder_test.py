"""Decoding equals the full forward; depth costs no compile time; nothing stored is copied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from ternax import collectives, configs, engine
from ternax.nn.cache import init_cache
from ternax.random_weights import abstract_model, random_model
from tests import hlo

FAMILIES = {"llama": "tiny-llama", "bitnet": "tiny-bitnet"}
LENGTH, PREFIX = 270, 5  # past one cache block of 256 slots
VOCAB = 259


# One shape for most tests, so that they share what is compiled.
WORDS = np.random.default_rng(7).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """A packed model of either family whose activations stay floats.

    With int8 inputs a difference of 1e-6 may tip a rounding over, which costs 1/127;
    without them, f32 noise stays f32 noise and the comparison can be tight.
    """
    config = dataclasses.replace(configs.get_config(FAMILIES[request.param]), inputs="none")
    return random_model(config, embed_dtype="f32", head_dtype="f32")


@jax.jit
def token_by_token(model, tokens, cache):
    """Logits [B, T, V] of PREFIX tokens at once, then of one at a time."""
    first, cache = model.forward(tokens[:, :PREFIX], cache)

    def step(cache, token):
        logits, cache = model.forward(token[:, None], cache)
        return cache, logits[:, 0]

    cache, rest = lax.scan(step, cache, tokens[:, PREFIX:].T)
    return jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], axis=1), cache.length


# Logits have a standard deviation of one. The caches round keys and values to 8 bits of
# mantissa, or to 1/127 of a vector's largest: a few per mille, through three layers.
@pytest.mark.parametrize("kv_dtype, tolerance", [("f32", 2e-4), ("bf16", 0.05), ("int8", 0.1)])
def test_decoding_equals_the_full_forward_everywhere(model, kv_dtype, tolerance):
    full = np.asarray(model(WORDS))
    found, length = token_by_token(model, WORDS, init_cache(model.config, 2, LENGTH, kv_dtype))
    assert int(length) == LENGTH
    worst = np.abs(np.asarray(found) - full).max(axis=(0, 2))
    assert worst.max() <= tolerance, f"worst at position {worst.argmax()}"
    assert full.std() > 0.5


def test_int8_inputs_too():
    """A rounding may tip over in places: most positions are tight, all are near.

    One layer, so that a place does not spread to all later positions through their keys.
    """
    model = random_model(dataclasses.replace(configs.get_config("tiny-bitnet"), num_layers=1))
    words = WORDS[:, :40]
    found, _ = token_by_token(model, words, init_cache(model.config, 2, 40, "f32"))
    worst = np.abs(np.asarray(found) - np.asarray(model(words))).max(axis=(0, 2))
    assert worst.max() <= 0.1 and np.median(worst) <= 1e-4


def test_padding_on_the_left_changes_nothing(model):
    """Row 1 starts at slot 9; its logits are those of the row alone, at every position."""
    alone = np.asarray(model(np.roll(WORDS, -9, axis=1)))[1, : LENGTH - 9]
    cache = init_cache(model.config, 2, LENGTH, "f32", jnp.array([0, 9]))
    found, _ = token_by_token(model, WORDS, cache)
    np.testing.assert_allclose(np.asarray(found)[1, 9:], alone, atol=2e-4)


def test_causal(model):
    changed = np.where(np.arange(LENGTH) == 8, (WORDS + 1) % VOCAB, WORDS)
    one, other = np.asarray(model(WORDS)), np.asarray(model(changed))
    assert np.array_equal(one[:, :8], other[:, :8])
    assert (np.abs(one - other)[:, 8:20].max(-1) > 1e-3).all()


def test_last_only_is_the_last_position(model):
    last, cache = jax.jit(lambda m, t: m.forward(t, last_only=True))(model, WORDS)
    assert cache is None and last.shape == (2, 1, VOCAB)
    np.testing.assert_allclose(last[:, 0], model(WORDS)[:, -1], atol=1e-4)


# --- The compiled step ---------------------------------------------------------------------

WIDE = dataclasses.replace(
    configs.get_config("tiny-llama"),
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    vocab_size=4096,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    max_context=1024,
)
CONTEXT = 512
# Under one layer's smallest weight (64 KiB) and one cache block of one sequence (32 KiB in
# int8), over what a step may move: the new token's keys, one row of the embedding.
MIN_BYTES = 1 << 13
# A block of the head in f32 and what surrounds it; see kernels/reference.py.
TEMPORARY_BYTES = {"int8": 4 << 20, "bf16": 12 << 20}


def arguments(config, batch, kv_dtype, **packing):
    """(graph, leaves, cache, keys) without memory."""
    graph, leaves = nnx.split(abstract_model(config, **packing))
    cache, keys = jax.eval_shape(
        lambda: (init_cache(config, batch, CONTEXT, kv_dtype), engine.row_keys(0, batch))
    )
    return engine.Program(graph), leaves, cache, keys


def compiled_decode(config, batch, kv_dtype, table, backend=None):
    """(compiled step, the cache's bytes)."""
    program, leaves, cache, keys = arguments(
        config, batch, kv_dtype, embed_dtype=table, head_dtype=table, backend=backend
    )
    state = engine.DecodeState(
        cache,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.bool_),
        keys,
    )
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return engine.decode.lower(program, leaves, state, steps).compile(), stored


@pytest.fixture(scope="module")
def shallow():
    return compiled_decode(WIDE, 1, "bf16", "int8")


@pytest.fixture(scope="module")
def deep():
    return compiled_decode(dataclasses.replace(WIDE, num_layers=12), 1, "bf16", "int8")


def check_step(compiled, cache_bytes, table):
    """Nothing stored is copied, the cache is updated where it lies, temporaries are one block; and
    one device, which no mesh was asked for, talks to no other."""
    assert hlo.copies(compiled, MIN_BYTES) == []
    text = compiled.as_text()
    assert collectives.of_program(text, WIDE.num_layers) == [] and "partition-id" not in text
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes <= TEMPORARY_BYTES[table]


def test_no_stored_byte_is_copied(shallow):
    check_step(*shallow, "int8")


@pytest.mark.parametrize(
    "batch, kv_dtype, table, backend",
    [
        (4, "int8", "bf16", None),
        (1, "int8", "bf16", None),
        (4, "bf16", "int8", None),
        (1, "int8", "int8", "reference"),
    ],
)
def test_no_stored_byte_is_copied_either(batch, kv_dtype, table, backend):
    check_step(*compiled_decode(WIDE, batch, kv_dtype, table, backend), table)


def test_prefill_copies_nothing_either():
    program, leaves, cache, keys = arguments(WIDE, 1, "bf16")
    words = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    compiled = engine.prefill.lower(program, leaves, words, cache, keys).compile()
    assert hlo.copies(compiled, 4 * MIN_BYTES) == []  # 16 tokens' keys are 4 KiB
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.k.size * 2 * 2


def test_depth_costs_no_instruction_and_no_memory(shallow, deep):
    """Compile time follows the number of instructions; a copied stack would show in memory."""

    def instructions(compiled):
        return sum(map(len, hlo.parse(compiled.as_text()).values()))

    assert instructions(deep[0]) == instructions(shallow[0])
    assert hlo.temp_bytes(deep[0]) <= hlo.temp_bytes(shallow[0]) + MIN_BYTES
    assert deep[1] > 2 * shallow[1]


# --- Training ------------------------------------------------------------------------------


def test_gradients_reach_every_parameter_and_lower_the_loss():
    """Sub-norms, an embedding and a head of its own: every kind of parameter there is."""
    config = dataclasses.replace(configs.get_config("tiny-bitnet"), tie_embeddings=False)
    model = engine.load(config, packed=False)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    words = WORDS[:, :32]

    @jax.jit
    def step(params):
        def loss(params):
            logits, _ = nnx.merge(graph, params, rest).forward(words)
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, words[:, 1:, None], axis=-1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        return value, gradients, jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients)

    before, gradients, params = step(params)
    after, _, _ = step(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        where = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), where
        stack = gradient if "layers" in where else gradient[None]  # each layer has its own
        assert np.abs(stack).reshape(len(stack), -1).max(-1).all(), where
    assert after < before - 1e-3
