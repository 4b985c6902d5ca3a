"""What samples say, by hand."""

import pytest

from ternax import cost, decode_metrics


def test_of_a_plan():
    plan = cost.plan("tiny-bitnet", batch=2, context=64)
    bare = decode_metrics.of_plan(plan, None)
    assert bare["planned_memory_bytes"] == plan.total_bytes
    assert not {"bound_tokens_per_s", "available_memory_bytes"} & bare.keys()
    told = decode_metrics.of_plan(cost.plan("tiny-bitnet", batch=2, available_bytes=7), 10.0)
    assert told["available_memory_bytes"] == 7 and told["bound_tokens_per_s"] > 0


def test_of_samples():
    plan = cost.plan("tiny-bitnet", batch=2, context=64)
    m = decode_metrics.of_decode(plan, [0.1, 0.4, 0.2], [20.0, 30.0, 10.0], 32, sharing=4)
    # 20 GB/s shared by four devices; a step of 0.2 s makes two tokens.
    bound = 2 * 5e9 / plan.bytes_per_step_at(32)
    assert (m["tokens_per_s"], m["read_bandwidth_gb_per_s"]) == (pytest.approx(10), 20)
    assert m["bound_tokens_per_s"] == pytest.approx(bound)
    assert m["share_of_bound"] == pytest.approx(10 / bound)
    assert m["tpot_ms_p50"] == pytest.approx(200) and m["tpot_ms_p99"] == pytest.approx(396)
    read = decode_metrics.of_prefill([0.5, 0.1, 0.2], 2, 30)
    assert read == {"ttft_ms": pytest.approx(200), "prefill_tokens_per_s": pytest.approx(300)}
    made = decode_metrics.of_create(plan, 2.0)
    assert made["gb_per_s"] == pytest.approx(plan.weight_bytes / 2e9)
