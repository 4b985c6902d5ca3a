"""`ModelConfig`: bad values are refused by name, and every field is read by someone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ternax import configs, engine
from ternax.config import ModelConfig, RopeScaling
from ternax.errors import UsageError
from ternax.experiments import config_flag
from ternax.models import decoder
from ternax.random_weights import abstract_model

BASE = dataclasses.replace(configs.get_config("tiny-llama"), num_layers=1)
TOKENS = np.arange(48)[None] * 5 % BASE.vocab_size


# --- What is refused -----------------------------------------------------------------------

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_context",
)
BAD = [
    *((field, value) for field in COUNTS for value in (0, -1, 1.5, "64", None, True)),
    *((field, value) for field in ("family", "activation", "inputs") for value in ("other", "", 1)),
    *((field, 3) for field in ("name", "source", "scheme")),
    ("num_heads", 3),
    ("num_kv_heads", 3),  # 4 heads, 2 kv heads: must divide
    ("head_dim", 23),
    *(("norm_eps", value) for value in (0.0, 1.0, -1e-5, math.nan, "1e-5")),
    *(("rope_theta", value) for value in (1.0, -1.0, math.nan, math.inf, None)),
    ("rope_scaling", 8.0),
    ("rope_scaling", dict(factor=8.0)),
    ("tie_embeddings", 1),
    ("tie_embeddings", "yes"),
]
BAD_SCALING = [
    *(("factor", value) for value in (0.0, -8.0, math.nan, math.inf, "8")),
    *(("low_freq_factor", value) for value in (0.0, 4.0, 5.0, math.nan, "1")),
    *(("high_freq_factor", value) for value in (1.0, 0.5, math.nan, math.inf, "4")),
    *(("original_context", value) for value in (0, -1, 32.0, "32")),
]


@pytest.mark.parametrize("field, value", BAD)
def test_bad_value_is_refused_by_name(field, value):
    with pytest.raises(UsageError, match=rf"\bconfig\.{field}\b.*, found "):
        dataclasses.replace(BASE, **{field: value})


@pytest.mark.parametrize("field, value", BAD_SCALING)
def test_bad_scaling_is_refused_by_name(field, value):
    scaling = dataclasses.replace(BASE.rope_scaling, **{field: value})
    with pytest.raises(UsageError, match=rf"config\.rope_scaling\..*{field}.*, found "):
        dataclasses.replace(BASE, rope_scaling=scaling)


def test_every_field_has_a_bad_value():
    assert {field for field, _ in BAD} == {field.name for field in dataclasses.fields(ModelConfig)}
    assert {field for field, _ in BAD_SCALING} == {f.name for f in dataclasses.fields(RopeScaling)}


@pytest.mark.parametrize(
    "scheme",
    [
        "absmeen",
        "absmean,granularity=column",
        "absmean,rows=3",
        "no.such.module:Class",
        "math:pi",
        "",
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_bad_scheme_is_refused_when_the_model_is_made(scheme, packed):
    config = dataclasses.replace(BASE, scheme=scheme)
    with pytest.raises(UsageError, match="scheme|granularity"):
        abstract_model(config, packed=packed)


def test_good_edge_values_are_taken():
    dataclasses.replace(BASE, num_kv_heads=4, rope_scaling=None, rope_theta=10000, norm_eps=1e-12)


# --- Every field is read -------------------------------------------------------------------


def shapes(config):
    """Shape and dtype of every leaf of the float model."""
    state = nnx.state(abstract_model(config, packed=False))
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]


@pytest.fixture(scope="module")
def leaves():
    """The weights all configs of BASE's shape are run with."""
    _, shapes = nnx.split(abstract_model(BASE, packed=False))
    rng = np.random.default_rng(3)

    def draw(leaf):
        size = leaf.shape[-2] ** -0.5 if leaf.ndim == 3 else 1.0
        return jnp.asarray(rng.standard_normal(leaf.shape) * size, jnp.float32)

    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def logits(leaves):
    """config -> logits with those weights, which the shape must fit."""

    def compute(config):
        assert shapes(config) == shapes(BASE), "a field of the arithmetic may not change shapes"
        graph, _ = nnx.split(abstract_model(config, packed=False))
        return np.asarray(decoder._logits(graph, leaves, jnp.asarray(TOKENS)))

    return compute


@pytest.fixture(scope="module")
def base_logits(logits):
    return logits(BASE)


def printed(config):
    """What --print_config shows."""
    return config_flag.config_lines(config)


def accepts_last_position(config):
    """Whether a prompt and its continuation may fill BASE's context."""
    try:
        engine.check_prompts(config, TOKENS, None, BASE.max_context - TOKENS.shape[1])
        return True
    except UsageError as error:
        assert f"context of {config.max_context}" in str(error)
        return False


# field: (another legal value, where it must show)
CHANGES = {
    "name": ("renamed", printed),
    "source": ("elsewhere", printed),
    "family": ("bitnet", shapes),
    "vocab_size": (260, shapes),
    "hidden_size": (80, shapes),
    "intermediate_size": (192, shapes),
    "num_layers": (2, shapes),
    "num_heads": (2, shapes),
    "num_kv_heads": (1, shapes),
    "head_dim": (32, shapes),
    "tie_embeddings": (True, shapes),
    "max_context": (BASE.max_context - 1, accepts_last_position),
    "rope_theta": (10000.0, "logits"),
    "rope_scaling": (None, "logits"),
    "norm_eps": (1e-2, "logits"),
    "activation": ("relu2", "logits"),
    "scheme": ("twn", "logits"),
    "inputs": ("none", "logits"),
}
SCALING_CHANGES = {
    "factor": 4.0,
    "low_freq_factor": 3.0,
    "high_freq_factor": 2.5,
    "original_context": 64,
}


def test_every_field_is_listed():
    """A new field needs a line above: who reads it, and what changes with it?"""
    assert list(sorted(CHANGES)) == sorted(field.name for field in dataclasses.fields(ModelConfig))
    assert set(SCALING_CHANGES) == {field.name for field in dataclasses.fields(RopeScaling)}


def assert_far(found, base):
    """Far above rounding: logits here are of order one."""
    assert np.abs(found - base).max() > 1e-2


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_is_read(field, logits, base_logits):
    value, observe = CHANGES[field]
    changed = dataclasses.replace(BASE, **{field: value})
    if observe == "logits":
        assert_far(logits(changed), base_logits)
    else:
        assert observe(changed) != observe(BASE)


@pytest.mark.parametrize("field", SCALING_CHANGES)
def test_every_field_of_the_scaling_is_read(field, logits, base_logits):
    scaling = dataclasses.replace(BASE.rope_scaling, **{field: SCALING_CHANGES[field]})
    assert_far(logits(dataclasses.replace(BASE, rope_scaling=scaling)), base_logits)


def test_equal_configs_give_equal_logits(logits, base_logits):
    """The comparison above would see nothing else than the field."""
    assert np.array_equal(logits(dataclasses.replace(BASE)), base_logits)


@pytest.mark.parametrize("field, value", [("name", "renamed"), ("source", "elsewhere")])
def test_name_and_source_are_listed(field, value, monkeypatch):
    changed = dataclasses.replace(BASE, **{field: value})
    monkeypatch.setattr(configs, "CONFIGS", {changed.name: changed})
    assert value in config_flag.config_table()
    assert value in printed(changed)


def test_packed_models_read_scheme_and_inputs_too():
    """The packed route holds its own copies: the linear's inputs, the stored format."""

    def read(config):
        down = abstract_model(config).layers.mlp.down
        return down.inputs, down.format

    assert read(BASE) == ("int8", "trit2")
    assert read(dataclasses.replace(BASE, inputs="none", scheme="int4")) == ("none", "int4")
