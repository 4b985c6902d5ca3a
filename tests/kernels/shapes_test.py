"""The written-out shapes are those of the models."""

import pytest

from ternax.configs import CONFIGS
from ternax.kernels.shapes import SHAPES
from ternax.random_weights import abstract_model


def test_every_model_has_its_shapes():
    assert list(SHAPES) == list(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_packed_model(name):
    config = CONFIGS[name]
    model = abstract_model(config)
    attn, mlp = model.layers.attn, model.layers.mlp
    head = model.embedding if config.tie_embeddings else model.head
    linears = {"qkv": attn.qkv, "o": attn.o, "gate_up": mlp.gate_up, "down": mlp.down, "head": head}
    assert SHAPES[name] == {key: linear.packed.shape for key, linear in linears.items()}
