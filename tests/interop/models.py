"""Small models whose rows are whole blocks of every kind, for the tests of files."""

import dataclasses
import functools

import jax
from flax import nnx

import ternax
from ternax.config import ModelConfig, RopeScaling
from ternax.models import MODELS

LLAMA = ModelConfig(
    name="small-llama",
    family="llama",
    vocab_size=260,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
    norm_eps=1e-5,
    activation="silu",
    tie_embeddings=False,
    max_context=256,
    source="made for tests",
)
BITNET = dataclasses.replace(
    LLAMA,
    name="small-bitnet",
    family="bitnet",
    head_dim=64,
    rope_scaling=None,
    tie_embeddings=True,
    rope_theta=10000.0,
)
RELU2 = dataclasses.replace(BITNET, name="small-relu2", activation="relu2")
# Scales that differ, which some formats cannot hold.
ROWS = dataclasses.replace(LLAMA, num_layers=1, scheme="absmean,granularity=row")
CONFIGS = {config.name: config for config in (LLAMA, BITNET, RELU2)}


def floats(config: ModelConfig, seed: int = 0):
    """A float model whose norms are not all one."""
    model = MODELS[config.family](config, rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "weight" and "norm" in path[-2]:
            noise = jax.random.uniform(next(keys), variable.get_value().shape, minval=0.5)
            variable.set_value(noise)
    return model


@functools.cache
def packed(config: ModelConfig, seed: int = 0, **packing):
    """The same, packed; made once."""
    return ternax.pack_model(floats(config, seed), **packing)
