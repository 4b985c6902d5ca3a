"""Named models: parameter counts on the abstract model, and lookups by name."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from ternax import configs, edit
from ternax.errors import UsageError
from ternax.random_weights import abstract_model

# name: (all parameters, parameters of the projections), counted from the released shapes.
COUNTS = {
    "1b": (1_235_814_400, 973_078_528),
    "3b": (3_212_749_824, 2_818_572_288),
    "8b": (8_030_261_248, 6_979_321_856),
    "13b": (13_015_864_320, 12_687_769_600),
    "70b": (70_553_706_496, 68_451_041_280),
    "405b": (405_853_388_800, 401_646_551_040),
    "bitnet-700m": (728_842_752, 679_477_248),
    "bitnet-2b4t": (2_412_820_480, 2_084_044_800),
    "bitnet-3b": (3_324_387_840, 3_221_504_000),
    "bitnet-7b": (6_738_898_944, 6_476_005_376),
}
# name: what no count can see: theta, stretch, eps, activation, tied, context; from config.json.
ARITHMETIC = {
    "1b": (5e5, 32.0, 1e-5, "silu", True, 131072),
    "3b": (5e5, 32.0, 1e-5, "silu", True, 131072),
    "8b": (5e5, 8.0, 1e-5, "silu", False, 131072),
    "13b": (1e4, None, 1e-5, "silu", False, 4096),
    "70b": (5e5, 8.0, 1e-5, "silu", False, 131072),
    "405b": (5e5, 8.0, 1e-5, "silu", False, 131072),
    "bitnet-700m": (1e4, None, 1e-5, "silu", True, 2048),
    "bitnet-2b4t": (5e5, None, 1e-5, "relu2", True, 4096),
    "bitnet-3b": (1e4, None, 1e-5, "silu", True, 2048),
    "bitnet-7b": (1e4, None, 1e-5, "silu", False, 2048),
}


def size(leaf) -> int:
    """Elements, in Python integers: 405b passes 2^31 in one leaf."""
    return math.prod(leaf.shape)


def test_every_released_model_is_counted():
    ours = {"tiny-llama", "tiny-bitnet", "stdlib-bitnet"}
    assert set(COUNTS) == set(ARITHMETIC) == set(configs.CONFIGS) - ours


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    model = abstract_model(configs.get_config(name), packed=False)
    total = sum(map(size, jax.tree.leaves(nnx.state(model, nnx.Param))))
    ternarizable = sum(size(linear.kernel) for _, linear in edit.float_linears(model))
    assert (total, ternarizable) == COUNTS[name]


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    config = configs.get_config(name)
    scaling = config.rope_scaling
    assert ARITHMETIC[name] == (
        config.rope_theta,
        scaling and scaling.factor,
        config.norm_eps,
        config.activation,
        config.tie_embeddings,
        config.max_context,
    )
    if scaling:
        rest = dataclasses.replace(scaling, factor=1.0)
        assert dataclasses.astuple(rest) == (1.0, 1.0, 4.0, 8192)


def test_70b_packs_its_projections_in_two_bits_each():
    model = abstract_model(configs.get_config("70b"))
    linears = {id(linear): linear for _, linear in edit.packed_parts(model)}.values()
    nbytes = sum(size(linear.packed.data) * linear.packed.data.dtype.itemsize for linear in linears)
    assert nbytes == 68_451_041_280 // 4


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_names_and_sources(name):
    config = configs.get_config(name)
    assert config.name == name and config.source


def test_alias():
    assert configs.get_config("2b4t") is configs.CONFIGS["bitnet-2b4t"]
    assert set(configs.ALIASES.values()) <= set(configs.CONFIGS)


@pytest.mark.parametrize(
    "wrong, near", [("70B", "70b"), ("bitnet2b4t", "bitnet-2b4t"), ("tiny-lama", "tiny-llama")]
)
def test_unknown_name_is_told_the_nearest(wrong, near):
    with pytest.raises(UsageError, match=rf"no model is named '{wrong}'; nearest: {near}\b"):
        configs.get_config(wrong)


def test_a_name_like_none_is_told_all():
    with pytest.raises(UsageError) as error:
        configs.get_config("zzz")
    assert all(name in str(error.value) for name in (*configs.CONFIGS, *configs.ALIASES))
