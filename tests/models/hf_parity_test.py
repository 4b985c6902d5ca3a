"""Logits and greedy tokens equal Hugging Face's, on tiny random models (tests/goldens)."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ternax
from ternax.config import ModelConfig, RopeScaling
from ternax.models import MODELS
from ternax.random_weights import abstract_model

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"
FLOAT = ("hf_llama_gqa", "hf_llama_tied", "hf_bitnet_dense")
ONLINE = "hf_bitnet_online"
# Logits are of order one, in f32 by both; a wrong theta, eps, scale or mask gives 0.05 or more.
TOLERANCE = 3e-5

# Our module, within a block -> HF's. HF stores linears [out, in], ours are [in, out].
LINEARS = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SUB_NORMS = {"attn.sub_norm": "self_attn.attn_sub_norm", "mlp.sub_norm": "mlp.ffn_sub_norm"}


@pytest.fixture(scope="module")
def golden():
    """name -> the arrays of one file, read once."""
    read = {}

    def get(name):
        if name not in read:
            with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
                read[name] = {key: file[key] for key in file.files}
        return read[name]

    return get


def config_of(arrays, name: str) -> ModelConfig:
    """HF's config.json as ours; BitNet's online goldens quantize as it trains, the rest do not."""
    hf = json.loads(str(arrays["config_json"]))
    scaling = hf["rope_scaling"]
    online = "quantization_config" in hf
    return ModelConfig(
        name=name,
        family=hf["model_type"],
        source="tests/goldens",
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope_theta=hf["rope_theta"],
        rope_scaling=scaling
        and RopeScaling(
            scaling["factor"],
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        ),
        norm_eps=hf["rms_norm_eps"],
        activation=hf["hidden_act"],
        tie_embeddings=hf["tie_word_embeddings"],
        max_context=hf["max_position_embeddings"],
        scheme="absmean" if online else "none,dtype=f32",
        inputs="int8" if online else "none",
    )


def load(arrays, config: ModelConfig):
    """A float model with HF's weights. Every weight is used once, every parameter set."""
    weights = {name: array.astype(np.float32) for name, array in arrays.items() if "." in name}
    model = abstract_model(config, packed=False)

    def stacked(name):
        layers = range(config.num_layers)
        return np.stack([weights.pop(f"model.layers.{i}.{name}.weight") for i in layers])

    def put(variable, value):
        assert variable.shape == value.shape
        variable.set_value(jnp.asarray(value))

    def module(path):
        node = model.layers
        for word in path.split("."):
            node = getattr(node, word)
        return node

    for ours, theirs in LINEARS.items():
        put(module(ours).kernel, stacked(theirs).swapaxes(1, 2))
    for ours, theirs in (NORMS | (SUB_NORMS if config.family == "bitnet" else {})).items():
        put(module(ours).weight, stacked(theirs))
    put(model.embedding.weight, weights.pop("model.embed_tokens.weight"))
    put(model.norm.weight, weights.pop("model.norm.weight"))
    if not config.tie_embeddings:
        put(model.head.weight, weights.pop("lm_head.weight"))
    assert not weights
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    return model


def distance(model, arrays) -> float:
    """Largest difference of a logit."""
    logits = np.asarray(model(jnp.asarray(arrays["tokens"])))
    assert logits.shape == arrays["logits"].shape and logits.dtype == np.float32
    return np.abs(logits - arrays["logits"]).max()


@pytest.mark.parametrize("name", [*FLOAT, ONLINE])
def test_logits(golden, name):
    arrays = golden(name)
    assert distance(load(arrays, config_of(arrays, name)), arrays) <= TOLERANCE


@pytest.mark.parametrize("name", ["hf_llama_gqa", ONLINE])
def test_packed_logits_and_greedy_tokens(golden, name):
    """Packed weights, a KV cache and the decode loop, against HF's own generate."""
    arrays = golden(name)
    model = load(arrays, config_of(arrays, name))
    packed = ternax.pack_model(model, embed_dtype="f32", head_dtype="f32")
    assert distance(packed, arrays) <= TOLERANCE
    greedy = arrays["greedy"]
    prompt = arrays["tokens"][:1, :6]
    out = ternax.generate(packed, prompt, max_new_tokens=greedy.shape[1], kv_dtype="f32")
    assert out.tolist() == np.concatenate([prompt, greedy], axis=1).tolist()


def test_families_cover_each_other(golden):
    """The goldens exercise what the configs can say: both families, heads, tables, scaling."""
    configs = [config_of(golden(name), name) for name in (*FLOAT, ONLINE)]
    assert {config.family for config in configs} == set(MODELS)
    assert {config.tie_embeddings for config in configs} == {True, False}
    assert {config.activation for config in configs} == {"silu", "relu2"}
    assert any(config.rope_scaling for config in configs)
    assert any(config.num_heads > config.num_kv_heads for config in configs)
    assert any(config.num_heads * config.head_dim != config.hidden_size for config in configs)
    assert len({config.norm_eps for config in configs}) > 1


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("hf_llama_gqa", dict(rope_scaling=None)),
        ("hf_llama_tied", dict(norm_eps=1e-5)),
        ("hf_bitnet_dense", dict(activation="relu2")),
        (ONLINE, dict(inputs="none")),
    ],
)
def test_a_wrong_field_shows(golden, name, wrong):
    """The goldens can tell: one wrong number is far outside the tolerance."""
    arrays = golden(name)
    config = dataclasses.replace(config_of(arrays, name), **wrong)
    assert distance(load(arrays, config), arrays) > 1000 * TOLERANCE
