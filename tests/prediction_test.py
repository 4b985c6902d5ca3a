"""One setting's answers, against arithmetic by hand and the identities between them."""

import dataclasses
import math

import pytest

from ternax.anatomy import Shape
from ternax.configs import get_config
from ternax.configs.hardware import DEVICES, get_device
from ternax.errors import UsageError
from ternax.prediction import Setting, predict

SHAPE = Shape.of(get_config("70b"))


def setting(**changes) -> Setting:
    return Setting(**({"shape": SHAPE, "device": get_device("h100")} | changes))


def test_a_70b_in_trits_by_hand():
    """68.45e9 trits, a head of 128256 x 8192 in fp16, 327,680 bytes of cache a token."""
    found = predict(setting(context=1000))
    weights = 68_451_041_280 / 4 + 128_256 * 8192 * 2
    assert found.total_s == pytest.approx((weights + 1000 * 327_680) / 3.35e12, rel=3e-3)
    assert found.limit == "weights" and found.compute_s == 0 and found.fits
    assert (found.operands, found.peak_tflops) == ("int8", 1978.9)
    assert found.cache_bytes == 1000 * 327_680
    dollars = 4.76 / 3600 * found.total_s * 1e6
    assert found.usd_per_million_tokens == pytest.approx(dollars)
    assert found.joules_per_token == pytest.approx(700 * found.total_s)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_identities(device, batch):
    at = setting(device=DEVICES[device], batch=batch, context=128)
    found = predict(at)
    parts = ("weights_s", "head_s", "kv_s", "activations_s", "compute_s", "collectives_s")
    assert sum(getattr(found, part) for part in parts) == pytest.approx(found.total_s)
    # The point lies on the roof at efficiency 1, and that far below it at less.
    roof = min(found.peak_tflops, found.intensity * at.device.bandwidth_gb_per_s / 1e3)
    assert found.attained_tflops == pytest.approx(roof)
    half = predict(dataclasses.replace(at, efficiency=0.5))
    assert half.attained_tflops == pytest.approx(roof / 2)
    assert (found.intensity > found.critical_intensity) == (found.limit == "compute")
    assert (batch > found.critical_batch) == (found.compute_s > 0) or math.isinf(
        found.critical_batch
    )
    assert found.fits == (batch <= found.batch_that_fits)


def test_operands_a_device_lacks_are_widened():
    assert get_device("m2-ultra").operands("int8") == "fp16"
    assert get_device("x86-server").operands("fp16") == "fp32"
    assert get_device("a100").operands("fp4") == "fp16"
    assert get_device("b200").operands("fp4") == "fp4"


def test_refusals():
    with pytest.raises(UsageError, match="batch must be at least 1, found 0"):
        setting(batch=0)
    with pytest.raises(UsageError, match="efficiency must be above 0 and at most 1, found 2"):
        setting(efficiency=2.0)
    with pytest.raises(UsageError, match="m1-pro has no link to another: devices must be 1"):
        setting(device=get_device("m1-pro"), devices=2)
