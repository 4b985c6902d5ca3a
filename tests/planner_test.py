"""Layouts against arithmetic by hand, their identities, and how they are ranked."""

import dataclasses

import pytest

from ternax import planner
from ternax.anatomy import Shape
from ternax.configs import get_config
from ternax.configs.hardware import DEVICES, get_device
from ternax.errors import DoesNotFit, UsageError
from ternax.formats import FORMATS
from ternax.planner import Efficiency, Layout, Terms, bandwidth_needed_gb_per_s, rank
from ternax.prediction import Setting
from ternax.shapes import SHAPES
from ternax.validation import Row

SHAPE = Shape.of(get_config("70b"))
ALL = {name: Efficiency(0.6, "for tests") for name in DEVICES}


def layout(replicas=1, **changes) -> Layout:
    given = {"shape": SHAPE, "device": get_device("h100"), "context": 1000} | changes
    return Layout(Setting(**given), replicas)


def test_a_70b_on_four_devices_by_hand():
    one = layout(devices=4, batch=8, efficiency=0.5)
    cache = 8 * 1000 * 327_680
    table = 128_256 * 8192 * 2
    assert one.bytes["cache"] == cache / 4
    assert one.bytes["head"] == one.bytes["embedding"] == table / 4
    assert one.bytes["projections"] == pytest.approx(68_451_041_280 / 16, rel=3e-3)
    assert one.memory_bytes == 0.9 * 80 * 2**30
    read = 4 * (one.bytes["projections"] + one.bytes["head"]) + cache
    ring = 160 * (10e-6 + 2 * 3 / 4 * 8 * 16_384 / 450e9)
    rows = 8 * 16_384 / (0.5 * 4 * 3.35e12)
    seconds = read / (0.5 * 4 * 3.35e12) + rows + ring
    assert one.step.total_s == pytest.approx(seconds)
    assert one.tokens_per_s == pytest.approx(8 / seconds)
    assert one.usd_per_million_tokens == pytest.approx(4 * 4.76 / 3600 * seconds / 8 * 1e6)
    assert one.joules_per_token == pytest.approx(4 * 700 * seconds / 8)
    # Without latencies and at both limits nothing is faster; shares are of those limits.
    assert one.bound.total_s < one.step.total_s
    assert one.mbu == pytest.approx(read / seconds / (4 * 3.35e12), rel=1e-3)
    assert one.mfu < one.mbu < 0.5


def test_copies_add_up_and_do_not_slow_down():
    one, three = layout(batch=4), layout(batch=4, replicas=3)
    assert (three.devices, three.rows) == (3, 12)
    assert three.tokens_per_s == pytest.approx(3 * one.tokens_per_s)
    assert three.step == one.step and three.bytes == one.bytes
    assert three.usd_per_million_tokens == pytest.approx(one.usd_per_million_tokens)
    wanted = one.for_demand(2.5 * one.tokens_per_s)
    assert wanted.replicas == 3


def test_more_devices_than_cache_heads_hold_copies_of_it():
    deepseek = SHAPES["deepseek-v3"].shape
    cut, whole = (
        layout(shape=deepseek, device=get_device("b200"), devices=n, weights="fp8") for n in (8, 1)
    )
    assert cut.bytes["cache"] == whole.bytes["cache"]
    assert cut.bytes["projections"] == whole.bytes["projections"] / 8
    eight, one = layout(devices=8), layout()
    assert eight.bytes["cache"] == one.bytes["cache"] / 8


@pytest.mark.parametrize("weights", FORMATS)
def test_every_format_is_planned(weights):
    one = layout(weights=weights)
    assert one.step.total_s > 0 and one.tokens_per_s < one.bound.tokens_per_s * 1.001
    parts = [getattr(one.step, f.name) for f in dataclasses.fields(one.step)]
    assert sum(parts[:-1]) == pytest.approx(one.step.total_s)  # the last are the rows
    assert one.fits == (one.resident_bytes <= one.memory_bytes)


def candidates(**changes):
    given = dict(
        schemes=("trit2", "fp16"),
        tables="fp16",
        kv="fp16",
        counts=(1, 2, 8),
        tensor=planner.TENSOR,
        batches=(1, 16),
        context=1000,
        efficiency=ALL,
        terms=Terms(),
    )
    return list(planner.layouts(SHAPE, list(DEVICES.values()), **given | changes))


def test_layouts_are_all_that_can_be():
    found = candidates()
    assert len({(str(one.setting), one.replicas) for one in found}) == len(found)
    assert {one.devices for one in found} == {1, 2, 8}
    assert all(one.setting.devices == 1 for one in found if one.setting.device.name == "m1-pro")
    assert {one.replicas for one in candidates(tensor=None)} == {1}


@pytest.mark.parametrize("objective", planner.OBJECTIVES)
def test_a_ranking_is_the_best_of_what_fits(objective):
    found = candidates()
    first, *rest = rank(found, objective)
    worth = {
        "cost": lambda one: one.usd_per_million_tokens,
        "price": lambda one: one.usd_per_h,
        "latency": lambda one: one.step.total_s,
        "throughput": lambda one: -one.tokens_per_s,
    }[objective]
    legal = [one for one in found if one.fits and worth(one) is not None]
    assert worth(first) == min(map(worth, legal))
    assert all(worth(a) <= worth(b) for a, b in zip([first, *rest], rest, strict=False))
    assert all(one.fits for one in (first, *rest))
    assert rank(found[::-1], objective) == [first, *rest]  # whatever the order they come in


def test_a_time_that_must_be_met():
    found = candidates()
    assert all(1e3 * one.step.total_s <= 10 for one in rank(found, "cost", slo_ms=10))
    with pytest.raises(DoesNotFit, match="in 0.001 ms: the best possible is .* ms, 8 x b200"):
        rank(found, "cost", slo_ms=0.001)
    with pytest.raises(DoesNotFit, match="no layout fits; the least is .* GiB a device"):
        rank([layout(device=get_device("l4"), weights="fp16")], "cost")
    with pytest.raises(UsageError, match="no price is known"):
        rank([layout(device=get_device("m2-ultra"))], "cost")


def test_the_inverse():
    """A 70b in NVFP4 reads 40.6 GB a token: 609 GB/s make 15 of them, 1.07 TB/s at 0.57."""
    one = layout(weights="nvfp4", context=1, efficiency=0.57)
    need = bandwidth_needed_gb_per_s(one, 15)
    assert need * 0.57 == pytest.approx(609, rel=2e-3)
    faster = dataclasses.replace(get_device("h100"), bandwidth_gb_per_s=need)
    at = dataclasses.replace(one.setting, device=faster)
    assert Layout(at).tokens_per_s == pytest.approx(15)


def test_an_efficiency_says_where_it_comes_from():
    def row(device, share, kind="published"):
        return Row("a page", device, "8b", "trit2", 32, 1, 10, share * 50, 50.0, 1.0, 1.0, kind)

    rows = [row("l40s", 0.4), row("l40s", 0.6), row("b200", 0.9)]
    assert planner.calibrated(get_device("l40s"), rows) == Efficiency(
        0.5, "median of 2 rates, published, on l40s"
    )
    other = planner.calibrated(get_device("h100"), rows)
    assert (other.share, other.source) == (0.6, "median of 3 rates, published, on l40s, b200")
    mine = planner.calibrated(get_device("h100"), [*rows, row("a-cpu", 0.8, "our own")])
    assert mine == other  # a share of what a processor was seen to read says nothing of a GPU
    kinds = [row("h100-sxm", 0.5), row("h100-sxm", 0.7, "our own"), row("l40s", 0.1)]
    assert planner.calibrated(get_device("h100"), kinds) == Efficiency(
        pytest.approx(0.6), "median of 2 rates, published and our own, on h100-sxm"
    )
    # A memory that was slower when it was read beside: no share of a limit is above 1.
    fast = planner.calibrated(get_device("h100"), [row("run", 1.2, "our own")], "runs")
    assert fast == Efficiency(1.0, "median of one rate, in runs, on run")
    with pytest.raises(UsageError, match="give --efficiency"):
        planner.calibrated(get_device("h100"), [])


def test_copies_and_splits_have_names_of_their_own():
    one = layout(device=get_device("h100"), weights="int8", devices=2)
    both = layout(device=get_device("h100"), weights="int8", replicas=2)
    assert planner.name(one).startswith("2 x h100-sxm, int8")
    assert planner.name(both).startswith("2 x (1 x h100-sxm), int8")


def test_refusals():
    for terms in (dict(memory_share=0), dict(memory_share=1.1), dict(launch_s=-1)):
        with pytest.raises(UsageError, match="must be .* found"):
            Terms(**terms)
