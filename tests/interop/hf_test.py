"""Hugging Face directories: goldens of transformers from files, and ours written and back."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import ternax
from ternax.errors import BadModelFile, UsageError
from ternax.interop import hf_saving, safetensors_file
from ternax.interop.hf_saving import weight_scale
from ternax.interop.weights import Weights
from ternax.random_weights import random_model
from tests.checkpoint import stored
from tests.interop import models

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
TOLERANCE = 3e-5  # as in tests/models/hf_parity_test.py
TABLES = dict(embed_dtype="f32", head_dtype="f32")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def golden(name: str):
    """(config.json, weights, tokens, logits) of transformers."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    settings = json.loads(str(arrays["config_json"]))
    weights = {key: value for key, value in arrays.items() if "." in key}
    return settings, weights, arrays["tokens"], arrays["logits"]


def write(path, settings, weights, shards: int = 1):
    """A directory as transformers leaves one, by its own safetensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        safetensors.numpy.save_file(weights, path / "model.safetensors")
        return path
    placed = {}
    for i in range(shards):
        part = {key: weights[key] for key in sorted(weights)[i::shards]}
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file(part, path / name)
        placed |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": placed}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def packed_as_hf(weights: dict, convention: str) -> dict:
    """Latent weights as a packed checkpoint: four quarters of rows a byte, and weight_scale."""
    found = {}
    for name, value in weights.items():
        if name.split(".")[-2] not in PROJECTIONS:
            found[name] = value
            continue
        w = value.astype(np.float32)
        g = max(np.abs(w).mean(dtype=np.float32), np.float32(1e-5))
        codes = (np.clip(np.round(w / g), -1, 1) + 1).astype(np.uint8).reshape(4, -1, w.shape[1])
        found[name] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
        scale = g if convention == "autobitlinear" else 1 / g
        found[f"{name}_scale"] = np.array([scale], np.float32)
    return found


@pytest.mark.parametrize(
    "name, shards",
    [("hf_llama_gqa", 3), ("hf_llama_tied", 1), ("hf_bitnet_dense", 1), ("hf_bitnet_online", 1)],
)
def test_logits_are_transformers(tmp_path, name, shards):
    settings, weights, tokens, logits = golden(name)
    path = write(tmp_path / name, settings, weights, shards)
    scheme = None if "online" in name else "none,dtype=f32"
    model = ternax.load(path, scheme=scheme, **TABLES)
    assert np.abs(np.asarray(model(tokens)) - logits).max() <= TOLERANCE


@pytest.mark.parametrize("convention", ["autobitlinear", "bitlinear"])
def test_both_conventions_of_packed_weights(tmp_path, convention):
    settings, weights, tokens, logits = golden("hf_bitnet_online")
    settings["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": convention,
        "quantization_mode": "offline",
    }
    path = write(tmp_path / "m", settings, packed_as_hf(weights, convention))
    model = ternax.load(path, **TABLES)
    assert np.abs(np.asarray(model(tokens)) - logits).max() <= TOLERANCE
    # Codes and scales come back, to the bit.
    ternax.save(model, tmp_path / "back", f"hf,convention={convention}")
    before, after = (
        safetensors.numpy.load_file(p / "model.safetensors") for p in (path, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name].astype(value.dtype), value)


def test_the_wrong_convention_shows(tmp_path):
    """What a guess would cost: logits that have nothing to do with the model's."""
    settings, weights, tokens, logits = golden("hf_bitnet_online")
    settings["quantization_config"] = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    path = write(tmp_path / "m", settings, packed_as_hf(weights, "autobitlinear"))
    wrong = np.asarray(ternax.load(path, **TABLES)(tokens))
    assert np.abs(wrong - logits).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("name", models.CONFIGS)
def test_packed_models_come_back(tmp_path, name):
    model = models.packed(models.CONFIGS[name], **TABLES)
    ternax.save(model, tmp_path / name, "hf")
    back = ternax.load(tmp_path / name, **TABLES)
    assert dataclasses.replace(back.config, source="") == dataclasses.replace(
        model.config, source=""
    )
    assert stored.bits(back) == stored.bits(model)
    ternax.save(model, tmp_path / "b", "hf,convention=bitlinear")
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    assert settings["quantization_config"]["linear_class"] == "bitlinear"
    mine, theirs = Weights(model), Weights(ternax.load(tmp_path / "b", **TABLES))
    for each in ("layers.0.attn.q", "layers.1.mlp.down"):
        (codes, scale), (found, found_scale) = mine.codes(each), theirs.codes(each)
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_array_max_ulp(found_scale, scale, 1)  # the inverse of an inverse


@pytest.mark.parametrize("name", models.CONFIGS)
def test_latent_floats_come_back(tmp_path, name):
    """Online quantization: what BitNet is trained on by others, and saved by them."""
    model = models.floats(models.CONFIGS[name])
    ternax.save(model, tmp_path / name, "hf")
    back = ternax.load(tmp_path / name, packed=False)
    assert stored.bits(back) == stored.bits(model)
    settings = json.loads((tmp_path / name / "config.json").read_text())
    assert settings["quantization_config"]["quantization_mode"] == "online"


def test_plain_floats_and_bf16(tmp_path):
    config = dataclasses.replace(models.LLAMA, scheme="none", inputs="none")
    model = models.packed(config, embed_dtype="bf16", head_dtype="bf16")
    ternax.save(model, tmp_path / "small-llama", "hf")
    file = safetensors_file.read(tmp_path / "small-llama" / "model.safetensors")
    assert {entry.kind for name, entry in file.entries.items() if "norm" not in name} == {"BF16"}
    back = ternax.load(tmp_path / "small-llama", embed_dtype="bf16", head_dtype="bf16")
    assert stored.bits(back) == stored.bits(model)


def test_shards_are_written_and_read(tmp_path):
    model = models.packed(models.BITNET, **TABLES)
    (tmp_path / "m").mkdir()
    hf_saving.save(Weights(model), tmp_path / "m", shard_bytes=200_000)
    names = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert stored.bits(ternax.load(tmp_path / "m", **TABLES)) == stored.bits(model)


def test_a_tied_table_may_be_there_twice(tmp_path):
    """As some uploads have it; transformers reads one of them."""
    settings, weights, tokens, logits = golden("hf_llama_tied")
    twice = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    model = ternax.load(write(tmp_path / "m", settings, twice), scheme="none,dtype=f32", **TABLES)
    assert np.abs(np.asarray(model(tokens)) - logits).max() <= TOLERANCE
    twice["lm_head.weight"][-1, -1] += 1
    with pytest.raises(BadModelFile, match="lm_head.weight: .* is no copy of the table"):
        ternax.load(write(tmp_path / "n", settings, twice))


def test_names_of_1bitllm(tmp_path):
    """Their sub-norms have other names, and config.json says online in other words."""
    settings, weights, tokens, logits = golden("hf_bitnet_online")
    del settings["quantization_config"]
    settings |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama"}
    settings |= {"weight_bits": 1, "input_bits": 8}
    other = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    renamed = {
        ".".join(other.get(word, word) for word in name.split(".")): value
        for name, value in weights.items()
    }
    model = ternax.load(write(tmp_path / "m", settings, renamed), **TABLES)
    assert np.abs(np.asarray(model(tokens)) - logits).max() <= TOLERANCE


@pytest.mark.parametrize("convention", ["autobitlinear", "bitlinear"])
def test_weight_scales_read_as_they_were(convention):
    rng = np.random.default_rng(0)
    one = np.float32(1)
    short = (rng.uniform(0.01, 100, 500).astype(np.float32).view(np.uint32) & 0xFFFF0000).view("f4")
    for written in (*short, *rng.uniform(0.01, 100, 500).astype(np.float32)):
        scale = written if convention == "autobitlinear" else one / written
        found = weight_scale(scale, convention)[0]
        assert (found if convention == "autobitlinear" else one / found) == scale
    for written in short:  # bf16, as published: the very bits
        scale = written if convention == "autobitlinear" else one / written
        assert weight_scale(scale, convention)[0] == written


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(scheme="int8"), "no form of int8 with inputs int8"),
        (dict(scheme="absmean", inputs="none"), "leaves inputs unquantized"),
        (dict(family="bitnet"), "heads that are not as wide"),
    ],
)
def test_what_transformers_has_no_form_of(tmp_path, changes, why):
    model = random_model(dataclasses.replace(models.LLAMA, num_layers=1, **changes))
    with pytest.raises(UsageError, match=why):
        ternax.save(model, tmp_path / "m", "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_scale_for_each_row_is_no_weight_scale(tmp_path):
    with pytest.raises(UsageError, match="scales that differ, and weight_scale is one"):
        ternax.save(models.packed(models.ROWS), tmp_path / "m", "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "edit, why",
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not read"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "activation must be one of"),
        ({"hidden_size": "64"}, "hidden_size must be a positive count"),
        ({"num_hidden_layers": 3}, "layers.2.*missing"),
        ({"num_hidden_layers": 1}, "layers.1.*unknown"),
        ({"vocab_size": 65}, "expected .* .65, 64., found F16 .64, 64."),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "expected quant_method bitnet"),
        ({"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}, "linear_class"),
        (
            {"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}},
            "a norm for each matrix",
        ),
        ({"tie_word_embeddings": True}, "lm_head.weight: stands beside"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path, edit, why):
    settings, weights, _, _ = golden("hf_llama_gqa")
    with pytest.raises(BadModelFile, match=why):
        ternax.load(write(tmp_path / "m", settings | edit, weights))
