"""The table of published models in README: each by the fields of its own config.json, whole and
small, in and out of every format; and the same by its true sizes, as far as no weights are needed.

Fields of config.json from the models' pages; TriLM's scales, one for each part of a matrix that
was trained on a device of its own, from arXiv:2407.12327.
"""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

import ternax
from ternax.errors import UsageError
from ternax.interop import saving
from ternax.interop.weights import Weights

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The table's columns, each with the formats it stands for; F16's cousins are in matrix_test.py.
FORMATS = {
    "hf": ("hf", "hf,convention=bitlinear"),
    "gguf:TQ2_0, TQ1_0": ("gguf:TQ2_0", "gguf:TQ1_0"),
    "gguf:I2_S": ("gguf:I2_S",),
    "gguf:F16, BF16, F32, Q8_0": ("gguf:F16", "gguf:BF16", "gguf:F32", "gguf:Q8_0"),
    "orbax": ("orbax",),
}
REASONS = {
    "¹": "its rows are blocks of",
    "²": "leaves inputs unquantized",
    "³": "scales that differ; I2_S holds one",
}
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def settings(sizes, act="silu", theta=10000.0, eps=1e-5, tied=False, kind="llama", **more):
    """config.json; sizes as in SIZES."""
    names = {"llama": ["LlamaForCausalLM"], "bitnet": ["BitNetForCausalLM"]}
    return {
        "architectures": names[kind],
        "model_type": kind,
        "hidden_act": act,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        "vocab_size": 260,
        "num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        **dict(zip(SIZES, sizes, strict=True)),
        **more,
    }


BITNET = {"quant_method": "bitnet"}
ONLINE = {"architectures": ["BitnetForCausalLM"], "weight_bits": 1, "input_bits": 8}
AUTO = BITNET | {"linear_class": "autobitlinear", "quantization_mode": "offline"}
SKIPS = BITNET | {"modules_to_not_convert": ["lm_head"]}
# Name in the table -> (config.json, made small; the true sizes; options of load).
PUBLISHED: dict[str, tuple[dict, tuple[int, ...], dict[str, str]]] = {
    "bitnet-b1.58-2B-4T": (
        settings((256, 512, 4, 1), "relu2", 5e5, tied=True, kind="bitnet")
        | {"quantization_config": AUTO},
        (2560, 6912, 20, 5),
        {},
    ),
    "Llama3-8B-1.58": (
        settings((256, 512, 4, 1), theta=5e5) | {"quantization_config": BITNET},
        (4096, 14336, 32, 8),
        {},
    ),
    "Falcon3-1.58": (
        settings((512, 768, 2, 1), theta=1000042, eps=1e-6, head_dim=256)
        | {"quantization_config": SKIPS},
        (3072, 23040, 12, 4),
        {},
    ),
    "bitnet_b1_58-large": (
        settings((256, 512, 4, 4), tied=True, **ONLINE),
        (1536, 4096, 16, 16),
        {},
    ),
    "bitnet_b1_58-3B": (
        settings((256, 320, 4, 4), tied=True, **ONLINE),
        (3200, 8640, 32, 32),
        {},
    ),
    "TriLM": (
        settings((256, 512, 4, 4)),
        (3072, 9216, 24, 24),
        {"scheme": "ls,granularity=row", "inputs": "none"},
    ),
    "Llama 3": (
        settings((256, 512, 4, 1), theta=5e5),
        (4096, 14336, 32, 8),
        {"scheme": "absmean", "inputs": "int8"},
    ),
}


def matrices(found: dict) -> dict[str, tuple[int, int]]:
    """The one layer's projections, by name -> rows, columns."""
    width, ffn, heads, kv = (found[key] for key in SIZES)
    head_dim = found.get("head_dim", width // heads)
    rows = {"q": heads * head_dim, "k": kv * head_dim, "v": kv * head_dim, "o": width}
    columns = {"o": heads * head_dim, "down": ffn}
    rows |= {"gate": ffn, "up": ffn, "down": width}
    return {name: (n, columns.get(name, width)) for name, n in rows.items()}


def write(path: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """A directory as published; returns f32 [N, K] that each projection is, by our name of it."""
    found, rng = PUBLISHED[name][0], np.random.default_rng(0)
    width, ffn = found["hidden_size"], found["intermediate_size"]
    layer = "model.layers.0"
    norms = {"model.norm": width, f"{layer}.input_layernorm": width}
    norms[f"{layer}.post_attention_layernorm"] = width
    if "quantization_config" in found and found["model_type"] == "bitnet":
        norms |= {f"{layer}.self_attn.attn_sub_norm": width, f"{layer}.mlp.ffn_sub_norm": ffn}
    elif found["architectures"] == ["BitnetForCausalLM"]:
        norms |= {f"{layer}.self_attn.inner_attn_ln": width, f"{layer}.mlp.ffn_layernorm": ffn}
    tensors = {f"{each}.weight": rng.uniform(0.5, 1, size) for each, size in norms.items()}
    for table in ("model.embed_tokens", *(() if found["tie_word_embeddings"] else ("lm_head",))):
        tensors[f"{table}.weight"] = rng.normal(size=(found["vocab_size"], width))
    tensors = {each: value.astype(np.float16) for each, value in tensors.items()}
    want = {}
    for each, shape in matrices(found).items():
        group = "attn" if len(each) == 1 else "mlp"
        where = f"{layer}.{'self_attn' if group == 'attn' else 'mlp'}.{each}_proj.weight"
        trits, parts = rng.integers(-1, 2, shape).astype(np.float32), np.float32([[0.5], [0.75]])
        if "quantization_config" in found:
            quarters = (trits + 1).astype(np.uint8).reshape(4, -1, shape[1])
            stored = sum(quarter << 2 * q for q, quarter in enumerate(quarters)).astype(np.uint8)
            multiplies = found["quantization_config"].get("linear_class") == "autobitlinear"
            tensors[f"{where}_scale"] = np.float32([0.75])
            values = trits * (np.float32(0.75) if multiplies else 1 / np.float32(0.75))
        elif name == "TriLM":
            values = (trits.reshape(2, -1) * parts).reshape(shape)
            stored = values.astype(np.float16)
        else:
            stored = rng.normal(size=shape).astype(np.float16)
            latent = stored.astype(np.float32)
            mean = np.abs(latent).mean()
            values = np.clip(np.round(latent / mean), -1, 1) * mean
        tensors[where], want[f"layers.0.{group}.{each}"] = stored, values
    path.mkdir()
    (path / "config.json").write_text(json.dumps(found))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return want


def table() -> dict[str, list[str]]:
    """README's table: a model -> its cells."""
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| published model |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    assert rows[0][2:] == [f"`{column}`".replace(", ", "`, `") for column in FORMATS]
    end = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]))
    return {re.sub(r"[`*]", "", name): cells[1:] for name, *cells in rows[2:end]}


def same(model, want: dict[str, np.ndarray], rtol: float) -> None:
    """Zeros where zeros are, and all else as it was."""
    for name, values in want.items():
        np.testing.assert_allclose(Weights(model).floats(name), values, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_and_out(tmp_path, name):
    """Every cell: what it says of the small model, whole, and of the true sizes, unmade."""
    _, sizes, options = PUBLISHED[name]
    want = write(tmp_path / name, name)
    model = ternax.load(tmp_path / name, embed_dtype="f32", head_dtype="f32", **options)
    same(model, want, rtol=1e-6)
    width, ffn, heads, kv = sizes
    large = dataclasses.replace(
        model.config,
        hidden_size=width,
        intermediate_size=ffn,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=width // heads,
    )
    cells = table()[name]
    assert len(cells) == len(FORMATS)
    for cell, (column, formats) in zip(cells, FORMATS.items(), strict=True):
        for format in formats:
            path = tmp_path / format
            if cell != "yes":
                for config in (model.config, large):
                    with pytest.raises(UsageError, match=REASONS[cell.removeprefix("no ")]):
                        saving.check(config, path, format)
                continue
            saving.check(large, path, format)
            if column.endswith("Q8_0") or format != formats[0]:  # in matrix_test.py, gguf_test.py
                continue
            ternax.save(model, path, format)
            tables = {} if format == "orbax" else dict(embed_dtype="f32", head_dtype="f32")
            back = ternax.load(path, i2_s="x86" if "I2_S" in format else None, **tables)
            same(back, want, rtol=2**-10 if "TQ" in format else 1e-6)


def test_every_published_model_is_there():
    assert list(table()) == list(PUBLISHED)
