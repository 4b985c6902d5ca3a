"""The law against arithmetic done by hand, published figures, and its own symmetries."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from ternax import roofline
from ternax.anatomy import Shape
from ternax.configs import get_config
from ternax.configs.hardware import get_device

SHAPE_70B = Shape.of(get_config("70b"))
H100, L40S = get_device("h100"), get_device("l40s")


def bound(load, device, operands="int8", **options):
    peak = device.peak_tflops[operands]
    return roofline.decode_step(load, device.bandwidth_gb_per_s, peak, **options)


def test_a_70b_in_fp16_on_an_h100_by_hand():
    """70.55e9 parameters less the embedding, 2 bytes each, over 3.35 TB/s: 24.1 tokens/s."""
    step = bound(SHAPE_70B.load("fp16"), H100, "fp16")
    by_hand = (70_553_706_496 - 128_256 * 8192) * 2 / 3.35e12
    assert step.total_s == pytest.approx(by_hand, rel=1e-3)
    assert step.limit == "weights" and step.compute_s == 0
    assert roofline.critical_intensity(3350, 989.4) == pytest.approx(295, abs=0.5)


def test_published_bounds():
    """NVIDIA/dgx-spark-playbooks PR 91: NVFP4 reads 40.61 GB a token, 6.72 tokens/s at 273 GB/s."""
    load = SHAPE_70B.load("nvfp4")
    assert load.read_bytes == pytest.approx(40.61e9, rel=1e-3)
    spark = roofline.decode_step(load, 273, 500)
    assert spark.tokens_per_s == pytest.approx(6.72, abs=0.01)


def test_parts_sum_to_the_total():
    step = bound(
        SHAPE_70B.load("trit2"),
        H100,
        batch=300,
        context=100,
        devices=2,
        link_gb_per_s=450,
        collective_latency_s=1e-5,
        launch_s=3e-6,
        activations=True,
    )
    parts = [getattr(step, f.name) for f in dataclasses.fields(step) if f.name.endswith("_s")]
    assert min(parts) > 0 and step.total_s == pytest.approx(sum(parts))
    assert step.tokens_per_s == pytest.approx(300 / sum(parts))


positive = st.floats(1e-2, 1e3)


@hypothesis.given(scale=st.floats(1.5, 50), batch=st.integers(1, 512), context=st.integers(0, 9999))
def test_symmetries(scale, batch, context):
    load = SHAPE_70B.load("int4")
    once = roofline.decode_step(load, 1000, 500, batch=batch, context=context)
    faster = roofline.decode_step(load, 1000 * scale, 500 * scale, batch=batch, context=context)
    assert once.total_s == pytest.approx(scale * faster.total_s)
    # n devices without a link's cost are one device n times as fast; efficiency the reverse.
    two = roofline.decode_step(load, 1000, 500, batch=batch, context=context, devices=2)
    assert two.total_s == pytest.approx(once.total_s / 2)
    half = roofline.decode_step(
        load, 2000, 1000, batch=batch, context=context, efficiency=0.5, compute_efficiency=0.5
    )
    assert half.total_s == pytest.approx(once.total_s)
    # More rows never take less time, and never make fewer tokens a second.
    more = roofline.decode_step(load, 1000, 500, batch=batch + 1, context=context)
    assert more.total_s >= once.total_s * (1 - 1e-12)
    assert more.tokens_per_s >= once.tokens_per_s * (1 - 1e-12)


def test_the_critical_batch_is_where_both_limits_meet():
    load = SHAPE_70B.load("trit2")
    for context in (0, 100):
        batch = roofline.critical_batch(load, 864, 733, context=context)
        at = roofline.decode_step(load, 864, 733, batch=batch, context=context)
        macs = batch * (load.projection_macs + load.head_macs)
        macs += batch * context * load.attention_macs_per_token
        assert roofline.compute_s(macs, 733) == pytest.approx(at.memory_s)
        past = roofline.decode_step(load, 864, 733, batch=2 * batch, context=context)
        assert at.compute_s == pytest.approx(0, abs=1e-9) and past.limit == "compute"
    assert math.isinf(roofline.critical_batch(load, 864, 733, context=100_000))


def test_prefill_is_computing_and_one_token_is_reading():
    load = SHAPE_70B.load("trit2")
    long = roofline.prefill_s(load, 864, 733, tokens=2048)
    assert long > 2048 * 2 * 68_451_041_280 / 733e12
    one = roofline.prefill_s(load, 864, 733, tokens=1)
    assert one == pytest.approx(load.read_bytes / 864e9, rel=1e-4)


def test_a_ring_sends_almost_twice_its_bytes():
    assert roofline.all_reduce_s(1e9, 1, 100, 1) == 0
    assert roofline.all_reduce_s(1e9, 2, 100, 0.5) == pytest.approx(0.51)
    assert roofline.all_reduce_s(1e9, 8, 100, 0) == pytest.approx(0.0175)


def test_memory_energy_and_money():
    load = SHAPE_70B.load("trit2")
    room = roofline.batch_that_fits(load, 48e9, context=1)
    assert room == pytest.approx(81_000, rel=0.01)
    assert roofline.resident_bytes(load, batch=room, context=1) <= 48e9
    assert roofline.batch_that_fits(SHAPE_70B.load("fp16"), 80e9, context=10) == 0
    assert roofline.joules_per_token(350, 1074) == pytest.approx(0.3259, abs=1e-4)
    # $0.59 an hour at 1,074 tokens/s: $152.60 for 1e9 tokens.
    assert 1000 * roofline.usd_per_million_tokens(0.59, 1074) == pytest.approx(152.60, abs=0.01)


def test_a_draft_reads_weights_and_cache_once():
    load = SHAPE_70B.load("trit2")
    one = roofline.decode_step(load, 3350, 1979, batch=2, context=500)
    five = roofline.decode_step(load, 3350, 1979, batch=2, context=500, positions=5)
    assert (one.weights_s, one.kv_s) == (five.weights_s, five.kv_s)
    assert five.total_s == pytest.approx(one.total_s, rel=1e-4)
    # With enough of them computing decides, and grows by the token.
    many = [
        roofline.decode_step(load, 3350, 1979, positions=count).total_s for count in (4096, 8192)
    ]
    assert many[1] == pytest.approx(2 * many[0], rel=1e-6)


@hypothesis.given(acceptance=st.floats(0, 1), drafted=st.integers(0, 12))
def test_tokens_of_a_round_are_the_sum_over_where_it_ends(acceptance, drafted):
    """The first j tokens are kept with chance a**j, and one more always comes: sum of a**j."""
    by_hand = sum(acceptance**kept for kept in range(drafted + 1))
    assert roofline.tokens_a_round(acceptance, drafted) == pytest.approx(by_hand)


def test_speculation_without_drafts_is_decoding():
    load, small = SHAPE_70B.load("fp16"), Shape.of(get_config("1b")).load("fp16")
    verify, draft = (roofline.decode_step(part, 3350, 989) for part in (load, small))
    plain = roofline.speculative_tokens_per_s(verify, draft, drafted=0, acceptance=0.7)
    assert plain == verify.tokens_per_s
    # A draft model as slow as the model itself can only lose.
    assert (
        roofline.speculative_tokens_per_s(verify, verify, drafted=4, acceptance=0.99)
        < verify.tokens_per_s
    )
    fast = roofline.speculative_tokens_per_s(verify, draft, drafted=4, acceptance=0.8)
    assert fast == pytest.approx(3.3616 / (verify.total_s + 4 * draft.total_s), rel=1e-4)
