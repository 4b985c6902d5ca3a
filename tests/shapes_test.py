"""Shapes of others against what their makers publish, and a mixture's bytes by hand."""

import pytest

from ternax import configs
from ternax.anatomy import Shape
from ternax.errors import UsageError
from ternax.shapes import SHAPES, get_shape

DEEPSEEK = SHAPES["deepseek-v3"].shape


@pytest.mark.parametrize(
    "name, billions", [("mistral-24b", 23.57), ("qwen3-32b", 32.76), ("deepseek-v3", 671.0)]
)
def test_published_parameters(name, billions):
    assert get_shape(name)[0].parameters == pytest.approx(billions * 1e9, rel=1e-3)


def test_a_mixture_is_active_in_37_billion():
    """arXiv:2412.19437: 37B of 671B activated for a token; a cache of 576 values a layer."""
    assert DEEPSEEK.active_parameters == pytest.approx(37e9, rel=0.02)
    assert DEEPSEEK.kv_values_per_token == 61 * (512 + 64)


def test_a_step_reads_the_experts_its_rows_chose():
    one, many = DEEPSEEK.load("fp8"), DEEPSEEK.load("fp8", rows=4096)
    assert one.weight_bytes == pytest.approx(many.weight_bytes)
    expert = 3 * 7168 * 2048
    # 8 of 256 experts in each of 58 layers by one row, all of them by thousands.
    assert one.idle_bytes == pytest.approx(58 * 248 * expert)
    assert many.idle_bytes == pytest.approx(0, abs=1e3)
    two = DEEPSEEK.load("fp8", rows=2)
    assert two.idle_bytes == pytest.approx(58 * 256 * (31 / 32) ** 2 * expert)
    assert one.read_bytes + one.embedding_bytes + one.idle_bytes == pytest.approx(one.weight_bytes)
    assert one.projection_macs + one.head_macs == DEEPSEEK.active_parameters


def test_a_dense_shape_reads_the_same_for_any_rows():
    shape = get_shape("8b")[0]
    assert shape.load("trit2", rows=64) == shape.load("trit2")


def test_names():
    assert get_shape("2b4t") == (Shape.of(configs.get_config("2b4t")), 4096)
    with pytest.raises(UsageError, match="no model is named 'qwen3'; nearest: qwen3-32b"):
        get_shape("qwen3")
