"""`pack_model`: what is fused keeps its names, scales and values; a refusal changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax import configs, edit
from ternax.errors import NumericCheckFailed, UsageError
from ternax.kernels.packing import unpack_numpy
from ternax.nn.linear import PackedLinear
from ternax.nn.table import PackedTable
from ternax.quant import SCHEMES
from ternax.random_weights import abstract_model

CONFIG = dataclasses.replace(configs.get_config("tiny-llama"), num_layers=2)
TIED = dataclasses.replace(CONFIG, name="tied", tie_embeddings=True)
TOKENS = np.arange(2 * 12).reshape(2, 12) * 7 % CONFIG.vocab_size
PARTS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
NAMES = [
    f"layers.{i}.{branch}.{part}"
    for branch, parts in PARTS.items()
    for part in parts
    for i in range(2)
]


@pytest.fixture(scope="module")
def float_leaves():
    """One set of float weights; models are merged from it, since packing takes them away."""
    _, shapes = nnx.split(abstract_model(CONFIG, packed=False))
    rng = np.random.default_rng(3)

    def draw(leaf):
        size = leaf.shape[-2] ** -0.5 if leaf.ndim == 3 else 1.0
        return jnp.asarray(rng.standard_normal(leaf.shape) * size, jnp.float32)

    return jax.tree.map(draw, shapes)


def float_model(leaves, config=CONFIG):
    graph, _ = nnx.split(abstract_model(config, packed=False))
    return nnx.merge(graph, jax.tree.map(jnp.array, leaves))


def shapes(model):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.state(model))


@pytest.fixture(scope="module")
def packed(float_leaves):
    return edit.pack_model(float_model(float_leaves), backend="reference")


# --- What is fused -------------------------------------------------------------------------


def test_names_stay(packed, float_leaves):
    assert edit.linear_names(packed) == edit.linear_names(float_model(float_leaves)) == NAMES
    assert edit.is_packed(packed) and not edit.is_packed(float_model(float_leaves))


def test_parts_and_widths(packed):
    layers = packed.layers
    assert layers.attn.qkv.parts == (("q", 96), ("k", 48), ("v", 48))
    assert layers.attn.o.parts == (("o", 64),)
    assert layers.mlp.gate_up.parts == (("gate", 176), ("up", 176))
    assert layers.mlp.down.parts == (("down", 64),)
    gone = [
        part
        for branch, parts in PARTS.items()
        for part in parts
        if hasattr(getattr(layers, branch), part) and part not in ("o", "down")
    ]
    assert gone == [], "the float weights are still held"


def test_every_part_keeps_its_codes_and_scale(packed, float_leaves):
    """Each layer of each part, against its own scheme on its own float weight."""
    floats = dict(edit.float_linears(float_model(float_leaves)))
    for pattern, linear in edit.packed_parts(packed):
        first = 0
        for part, width in linear.parts:
            if pattern.endswith(f".{part}"):
                break
            first += width
        source = floats[pattern]
        for layer in range(CONFIG.num_layers):
            right = source.scheme.quantize(source.kernel[...][layer])
            rows = np.asarray(linear.packed.data)[layer, 0, first : first + width]
            scale = np.asarray(linear.packed.scale)[layer, 0]
            scale = scale if scale.shape[-1] == 1 else scale[:, first : first + width]
            where = f"{pattern} of layer {layer}"
            codes = unpack_numpy(rows, linear.format, linear.shape[0])
            assert np.array_equal(codes, right.codes[0]), where
            assert (scale == np.asarray(right.scale[0])).all(), where


def test_norms_are_left_alone(packed, float_leaves):
    for name in ("attn_norm", "mlp_norm"):
        before = getattr(float_model(float_leaves).layers, name).weight[...]
        assert np.array_equal(getattr(packed.layers, name).weight[...], before)


def test_backend_is_pinned_everywhere(packed):
    nodes = [
        node
        for _, node in nnx.iter_modules(packed)
        if isinstance(node, (PackedLinear, PackedTable))
    ]
    assert [node.backend for node in nodes] == ["reference"] * 6


# --- The same model ------------------------------------------------------------------------

UNPACKABLE = ("nf4", "nvfp4")
SPECS = [
    *(name for name in SCHEMES if name not in UNPACKABLE),
    "twn,granularity=group,group_size=16",
]


@pytest.mark.parametrize("spec", SPECS)
def test_packed_logits_equal_fake_quantized(spec, float_leaves):
    """Same weights, floats as inputs: what differs is 22-bit activations and f32 sums."""
    config = dataclasses.replace(CONFIG, scheme=spec, inputs="none")
    graph, _ = nnx.split(abstract_model(config, packed=False))

    @jax.jit
    def both(leaves):
        fake = nnx.merge(graph, leaves).forward(TOKENS)[0]
        model = edit.pack_model(nnx.merge(graph, leaves), embed_dtype="f32", head_dtype="f32")
        return fake, model.forward(TOKENS)[0]

    fake, found = both(float_leaves)
    assert np.std(fake) > 0.1
    np.testing.assert_allclose(found, fake, atol=1e-4)


# Largest change of a logit in standard deviations of them: about as the format's bits say.
TABLE_ERRORS = {"bf16": 0.03, "int8": 0.06, "int4": 1.0}


def test_table_formats_round_what_they_say(float_leaves):
    config = dataclasses.replace(CONFIG, inputs="none")
    graph, _ = nnx.split(abstract_model(config, packed=False))

    @jax.jit
    def logits(leaves):
        def packed(dtype):
            model = edit.pack_model(nnx.merge(graph, leaves), embed_dtype="f32", head_dtype=dtype)
            return model.forward(TOKENS)[0]

        return {dtype: packed(dtype) for dtype in ("f32", *TABLE_ERRORS)}

    found = logits(float_leaves)
    for dtype, bound in TABLE_ERRORS.items():
        error = np.abs(found[dtype] - found["f32"]).max() / np.std(found["f32"])
        assert bound / 50 < error < bound, dtype


def test_abstract_packing_has_the_real_shapes(packed, float_leaves):
    """What is planned on the abstract model is what packing makes."""
    assert shapes(packed) == shapes(abstract_model(CONFIG))
    config = dataclasses.replace(CONFIG, scheme="twn,granularity=group,group_size=16")
    tables = dict(embed_dtype="int4", head_dtype="bf16")
    real = edit.pack_model(float_model(float_leaves, config), **tables)
    abstract = abstract_model(config, **tables)
    assert shapes(real) == shapes(abstract)
    assert nnx.split(real)[0] == nnx.split(abstract)[0]


# --- What is refused, before anything changes ----------------------------------------------


def refuse(model, error, match, **packing):
    before = nnx.split(model)
    with pytest.raises(error, match=match):
        edit.pack_model(model, **packing)
    after = nnx.split(model)
    assert before[0] == after[0], "the refused model is no longer what it was"


def test_packing_twice(packed):
    refuse(packed, UsageError, "expected a float model, found one that is packed")


@pytest.mark.parametrize("scheme", UNPACKABLE)
def test_scheme_without_kernels(scheme, float_leaves):
    model = float_model(float_leaves, dataclasses.replace(CONFIG, scheme=scheme))
    refuse(model, UsageError, f"format {scheme} cannot be packed: no kernel")


@pytest.mark.parametrize("flag", ["embed_dtype", "head_dtype"])
def test_unknown_table_format(flag, float_leaves):
    refuse(
        float_model(float_leaves),
        UsageError,
        f"{flag} must be one of f32, bf16, int8, int4, found 'fp8'",
        **{flag: "fp8"},
    )


def test_tied_tables_in_two_formats():
    with pytest.raises(UsageError, match="config tied ties .* found bf16 and int8"):
        abstract_model(TIED, embed_dtype="bf16", head_dtype="int8")


def bad(leaves, path, index, value):
    model = float_model(leaves)
    node = model
    for word in path.split("."):
        node = getattr(node, word)
    node[...] = node[...].at[index].set(value)
    return model


@pytest.mark.parametrize(
    "path, index, value, name",
    [
        ("layers.mlp.up.kernel", (1, 3, 5), np.nan, "layers.1.mlp.up"),
        ("layers.attn.q.kernel", (0, 0, 0), np.inf, "layers.0.attn.q"),
        ("layers.mlp.down.kernel", (1, 175, 63), -np.inf, "layers.1.mlp.down"),
        ("embedding.weight", (0, 0), np.nan, "embedding"),
        ("head.weight", (258, 63), np.nan, "head"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(path, index, value, name, float_leaves):
    refuse(
        bad(float_leaves, path, index, value),
        NumericCheckFailed,
        f"^{name}: expected finite weights, found 1 of ",
    )
