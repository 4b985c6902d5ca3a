"""The table in docs/models.md, cell by cell: each architecture, whole, in each type of GGUF that
has no test of its own in gguf_test.py, and what the gguf package makes of the same bytes."""

import dataclasses

import gguf
import numpy as np
import pytest
from gguf import quants

import ternax
from ternax.interop import gguf_file
from ternax.interop.files import Plan
from ternax.interop.foreign import is_matrix, shapes
from ternax.interop.gguf import GGUFModel, tensor_name
from ternax.interop.weights import Weights
from tests.interop import models

TABLES = dict(embed_dtype="f32", head_dtype="f32")
CONFIGS = {
    name: dataclasses.replace(config, num_layers=1) for name, config in models.CONFIGS.items()
}
# Of a value: a rounding to so many bits, or the half step of an 8-bit code of 32 neighbours.
ROUNDED = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ROUNDED)
def test_matrices_of_floats(tmp_path, name, kind):
    """Out, and in as the floats that they are."""
    model = models.packed(CONFIGS[name], **TABLES)
    ternax.save(model, tmp_path / "m.gguf", f"gguf:{kind}")
    back = ternax.load(tmp_path / "m.gguf", scheme="none,dtype=f32", inputs="none", **TABLES)
    mine, theirs = Weights(model), Weights(back)
    for each, shape in shapes(CONFIGS[name]).items():
        if is_matrix(each, shape):
            want, found = mine.floats(each), theirs.floats(each)
            assert np.abs(found - want).max() <= ROUNDED[kind] * np.abs(want).max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype, kind", [("int8", "Q8_0"), ("int4", "Q4_0"), ("bf16", "BF16")])
def test_tables(tmp_path, name, dtype, kind):
    model = models.packed(CONFIGS[name], embed_dtype=dtype, head_dtype=dtype)
    ternax.save(model, tmp_path / "m.gguf", "gguf:TQ2_0")
    assert GGUFModel(tmp_path / "m.gguf").file.entries["token_embd.weight"].kind == kind
    back = ternax.load(tmp_path / "m.gguf", **TABLES)
    for table in ("embedding",) if model.config.tie_embeddings else ("embedding", "head"):
        np.testing.assert_allclose(
            Weights(back).floats(table), Weights(model).floats(table), rtol=2**-11
        )


def blocks(kind: str, rows: np.ndarray, rng) -> np.ndarray:
    """A matrix in `kind`: by the gguf package, or, of what it does not write, any codes."""
    if kind == "Q4_0":
        return quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
    raw = rng.integers(0, 256, (rows.size // 256, 210), dtype=np.uint8)
    raw[:, 208:] = np.full((len(raw), 1), 1e-3, "<f2").view(np.uint8)
    return raw


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_matrices_in_blocks_of_others(tmp_path, name, kind):
    """In: the values are the gguf package's, in the order of rows that the model has."""
    config, rng = CONFIGS[name], np.random.default_rng(0)
    ternax.save(models.packed(config, **TABLES), tmp_path / "whole.gguf", "gguf:F32")
    metadata, file = gguf_file.read(tmp_path / "whole.gguf")
    plans, want = [], {}
    matrices = {tensor_name(n): n for n, shape in shapes(config).items() if is_matrix(n, shape)}
    for where, entry in file.entries.items():
        raw = file.read(where)
        stored = entry.kind
        if where in matrices:
            stored = kind
            raw = blocks(kind, raw.view(np.float32).reshape(entry.shape), rng).reshape(-1)
            number = gguf.GGMLQuantizationType[kind]
            want[where] = quants.dequantize(raw, number).reshape(entry.shape)
        plans.append(Plan(where, entry.shape, stored, raw.size, lambda raw=raw: [raw]))
    with open(tmp_path / "m.gguf", "wb") as out:
        gguf_file.write(out, metadata, plans)
    back = ternax.load(tmp_path / "m.gguf", scheme="none,dtype=f32", inputs="none", **TABLES)
    for where, each in matrices.items():
        rows = want[where]
        if config.family == "llama" and each.endswith(("attn.q", "attn.k")):
            pairs = rows.reshape(-1, config.head_dim // 2, 2, rows.shape[1])
            rows = pairs.swapaxes(1, 2).reshape(rows.shape)
        np.testing.assert_array_equal(Weights(back).floats(each), rows)
