"""Embedding and head read one table alike, in every format, packed or float."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax import configs, edit
from ternax.nn.table import TABLE_FORMATS, PackedTable, Table
from ternax.quant import make_scheme
from ternax.random_weights import abstract_model

VOCAB = 37
SPECS = {"f32": "none,dtype=f32", "bf16": "none,dtype=bf16", "int8": "int8", "int4": "int4"}
# Largest error of a weight over the largest |w| of its row: bits kept by each format.
ROUNDING = {"f32": 0.0, "bf16": 2**-8, "int8": 0.5001 / 127, "int4": 0.5001 / 7}


def make(format: str, features: int):
    """(float weights [V, D], packed table, what it stands for [V, D])."""
    rng = np.random.default_rng(features)
    weight = rng.standard_normal((VOCAB, features)).astype(np.float32)
    scheme = make_scheme(SPECS[format], (features, VOCAB))

    @jax.jit
    def quantize(w):
        quantized = scheme.quantize(w)
        return quantized.pack("table"), quantized.dequantize().T

    packed, stands_for = quantize(weight.T)
    return weight, PackedTable(packed), np.asarray(stands_for)


def test_every_format_is_tested():
    assert set(SPECS) == set(ROUNDING) == set(TABLE_FORMATS)


# 256: whole blocks and, in int4, two groups; 40: padded, and no group divides it.
@pytest.mark.parametrize("features", [40, 256])
@pytest.mark.parametrize("format", TABLE_FORMATS)
def test_packed_table(format, features):
    weight, table, stands_for = make(format, features)
    peak = np.abs(weight).max(-1, keepdims=True)
    assert (np.abs(stands_for - weight) <= ROUNDING[format] * peak).all()
    tokens = np.array([[0, 36, 5], [5, 1, 2]])
    x = np.random.default_rng(1).standard_normal((2, 3, features)).astype(np.float32)
    one, rows, logits = jax.jit(
        lambda x: (table.embed(jnp.int32(5)), table.embed(jnp.asarray(tokens)), table.logits(x))
    )(x)
    assert np.array_equal(one, stands_for[5]) and np.array_equal(rows, stands_for[tokens])
    assert logits.shape == (2, 3, VOCAB) and rows.dtype == logits.dtype == jnp.float32
    # 22 bits of each activation, sums and scales in f32.
    right = x.astype(np.float64) @ stands_for.T
    np.testing.assert_allclose(logits, right, atol=1e-5 * np.sqrt(features))


def test_float_table():
    table = Table(VOCAB, 24, std=0.5, rngs=nnx.Rngs(0))
    weight = np.asarray(table.weight[...])
    assert abs(weight.std() - 0.5) < 0.05
    tokens = jnp.array([[3, 36]])
    assert np.array_equal(table.embed(tokens), weight[np.asarray(tokens)])
    x = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
    np.testing.assert_allclose(table.logits(x), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("name, tied", [("tiny-llama", False), ("tiny-bitnet", True)])
def test_a_tied_table_exists_once(name, tied):
    for packed in (False, True):
        model = abstract_model(configs.get_config(name), packed=packed)
        assert hasattr(model, "head") is not tied
        tables = [
            node for _, node in nnx.iter_modules(model) if isinstance(node, (Table, PackedTable))
        ]
        assert len(tables) == (1 if tied else 2)


@pytest.mark.parametrize("format", TABLE_FORMATS)
def test_model_tables_take_every_format(format):
    model = abstract_model(configs.get_config("tiny-llama"), embed_dtype=format, head_dtype="f32")
    assert (model.embedding.format, model.head.format) == (format, "f32")
    assert edit.is_packed(model)
