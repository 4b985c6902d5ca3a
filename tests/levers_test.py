"""Levers against arithmetic by hand and what must hold whatever the device."""

import dataclasses

import pytest

from ternax import levers, roofline
from ternax.anatomy import Shape
from ternax.configs import get_config
from ternax.configs.hardware import get_device
from ternax.errors import UsageError
from ternax.levers import Speculation
from ternax.prediction import Setting, predict

AT = Setting(Shape.of(get_config("70b")), get_device("h100"))
DRAFT = Speculation(Shape.of(get_config("1b")), drafted=3, acceptance=0.5)


def by_change(setting, speculation=None):
    return {lever.change: lever for lever in levers.levers(setting, speculation)}


def test_each_is_the_setting_with_one_change():
    found = by_change(AT, DRAFT)
    assert next(iter(found)) == "" and found[""].setting == AT
    for words, change in (
        ("weights in int4", {"weights": "int4"}),
        ("batch 16", {"batch": 16}),
        ("2 devices", {"devices": 2}),
        ("on b200", {"device": get_device("b200")}),
    ):
        expected = predict(dataclasses.replace(AT, **change))
        assert found[words].tokens_per_s == expected.tokens_per_s
        assert (found[words].resident_bytes, found[words].fits) == (
            expected.resident_bytes,
            expected.fits,
        )
    # What is already so is no lever.
    assert "weights in trit2" not in found and "on h100-sxm" not in found
    assert not any(
        "devices" in w for w in by_change(dataclasses.replace(AT, device=get_device("m1-pro")))
    )


def test_experts_read_by_rows_that_choose_alone():
    """80 layers of 3 x 8192 x 28672 trits, a scale a row: of 1/4 one row leaves 3/4 unread."""
    experts = 80 * (3 * 8192 * 28672 / 4 + 4 * (2 * 28672 + 8192))
    whole = AT.load.projection_bytes
    one = levers.active_load(AT, 0.25)
    assert whole - one.projection_bytes == pytest.approx(0.75 * experts)
    assert AT.load.projection_macs - one.projection_macs == 0.75 * 80 * 3 * 8192 * 28672
    two = levers.active_load(dataclasses.replace(AT, batch=2), 0.25)
    assert whole - two.projection_bytes == pytest.approx(0.75**2 * experts)
    assert levers.active_load(AT, 1.0) == AT.load
    # They stay in memory all the same.
    quarter = by_change(AT)["1/4 of the MLP active"]
    assert quarter.resident_bytes == levers.resident_bytes(AT)


def test_speculation_by_hand():
    """Half of the drafts kept, three drafted: 1 + 1/2 + 1/4 + 1/8 tokens a round."""
    found = by_change(AT, DRAFT)["1b drafts 3, 50 % kept"]
    small = dataclasses.replace(AT, shape=DRAFT.shape)
    verify = roofline.read_s(AT.load.read_bytes + 2048 * 327_680, 3350)
    draft = predict(small).total_s
    assert found.tokens_per_s == pytest.approx(1.875 / (verify + 3 * draft), rel=1e-3)
    assert found.resident_bytes == levers.resident_bytes(AT) + levers.resident_bytes(small)
    with pytest.raises(UsageError, match="found 0 and 0.5"):
        Speculation(DRAFT.shape, drafted=0, acceptance=0.5)
