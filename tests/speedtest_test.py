"""Fields by hand on made replies, verdicts, and points against a target that is scripted."""

import dataclasses

import pytest

from ternax import speedtest
from ternax.errors import UsageError
from ternax.prompts import KINDS, filler, workloads
from ternax.record import Store
from ternax.reply import Reply
from ternax.speedtest import SpeedTest

COMMON = dict(config="8b", scheme="", inputs="", backend="server", device="d", layers=0)


def reply(start, *arrivals, prompt=5, tokens=None):
    count = len(arrivals) if tokens is None else tokens
    return Reply(start, arrivals[-1], arrivals, prompt, count)


FAILED = Reply(0.0, 1.0, error="no answer in time")


def test_the_fields_of_a_benchmark_by_hand():
    """Two answers of three tokens from 0 to 3 s and from 1 to 5 s, and one that failed."""
    found = speedtest.summary([reply(0, 1, 2, 3), reply(1, 3, 4, 5), FAILED], 2)
    assert (found["completed"], found["failed"], found["max_concurrency"]) == (2, 1, 2)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (10, 6)
    assert found["duration"] == 5
    assert found["request_throughput"] == 2 / 5 and found["output_throughput"] == 6 / 5
    assert found["total_token_throughput"] == 16 / 5
    assert (found["mean_ttft_ms"], found["median_tpot_ms"]) == (1500, 1000)
    assert (found["mean_e2el_ms"], found["mean_itl_ms"]) == (3500, 1000)
    assert found["p99_ttft_ms"] == pytest.approx(1990)
    # Several tokens a piece: ITL is between pieces, TPOT over tokens.
    many = speedtest.summary([reply(0, 1, 3, tokens=5)], 1)
    assert (many["median_itl_ms"], many["median_tpot_ms"]) == (2000, 500)
    one = speedtest.summary([reply(0, 1)], 1)
    assert "median_tpot_ms" not in one and "median_itl_ms" not in one
    assert set(speedtest.summary([FAILED], 1)) == {"max_concurrency", "completed", "failed"}


class Scripted:
    """Answers a token each 10 ms; workloads called "bad" fail."""

    name = "scripted"
    common = COMMON
    here = False

    def __init__(self):
        self.asked = []

    def ask(self, workload, concurrency, first, count):
        self.asked.append((workload.name, concurrency, first, count))
        if workload.name == "code":
            return [FAILED] * count
        slow = 0.5 if first % 1000 == 0 else 0.02
        times = [slow + 0.01 * i for i in range(workload.max_tokens)]
        return [reply(0.0, *times)] * count

    def bound_tokens_per_s(self, workload, concurrency):
        return 200.0 * concurrency


@pytest.fixture
def ran(tmp_path):
    test = SpeedTest(tuple(workloads("short/short,code", 4)), (1, 3), 4, 3.6, "asked for")
    target, store = Scripted(), Store(tmp_path)
    return test, target, store, speedtest.run(test, target, store)


def test_points_keep_cold_apart_and_go_on_behind_a_failure(ran):
    _, target, _, records = ran
    assert target.asked[:2] == [("short/short", 1, 0, 1), ("short/short", 1, 1, 4)]
    assert target.asked[-1] == ("code", 3, 3003, 6)  # whole batches of three
    good, bad, *_ = records
    m = good.metrics
    assert m["cold_ttft_ms"] == pytest.approx(500) and m["median_ttft_ms"] == pytest.approx(20)
    assert m["tokens_per_s"] == pytest.approx(100) and m["share_of_bound"] == pytest.approx(0.5)
    assert m["usd_per_million_tokens"] == pytest.approx(1e3 / m["output_throughput"])
    assert good.samples == pytest.approx([0.05] * 4) and good.phase == "serve"
    assert bad.incomplete and "failed: no answer in time" in bad.note
    assert records[2].metrics["tokens_per_s"] == pytest.approx(300)


def test_what_was_answered_is_not_asked_again(ran):
    test, target, store, records = ran
    target.asked.clear()
    again = speedtest.run(test, target, Store(store.directory))
    assert {name for name, *_ in target.asked} == {"code"}  # what failed is tried again
    assert again[0] == records[0]
    with pytest.raises(UsageError, match="holds another test"):
        speedtest.run(dataclasses.replace(test, flags_text="else"), target, Store(store.directory))


def test_verdicts_are_computed(ran):
    *_, records = ran
    expected = speedtest.expectations("median_ttft_ms:10,output_throughput:12,tokens_per_s:400")
    found = speedtest.verdicts(expected, records)
    assert [r.metrics["expected_ratio"] for r in found] == pytest.approx(
        [2, records[0].metrics["output_throughput"] / 12, 0.25]
    )
    assert [r.note.rpartition(": ")[2] for r in found] == [
        "missed, 2 times that",
        "met",
        "missed, 0.25 times that",
    ]
    assert speedtest.verdicts(expected, [records[1]]) == []
    ttft = "median_ttft_ms"
    for text in ("speed:1", ttft, f"{ttft}:0", "completed:4", f"{ttft}:x"):
        with pytest.raises(UsageError, match="--expect takes times and rates"):
            speedtest.expectations(text)


def test_workloads_by_name():
    assert [w.name for w in workloads("all")] == list(KINDS)
    fixed, code = workloads("128:64,code,128:64")
    assert (fixed.name, fixed.prompt_tokens, fixed.max_tokens) == ("pp128+tg64", 128, 64)
    assert code is KINDS["code"]
    assert {w.max_tokens for w in workloads("all", longest=8)} == {8}
    for text in ("", "poem", "128", "0:5", "5:1", "128:64:2"):
        with pytest.raises(UsageError, match="--workload must be all, short/short"):
            workloads(text)
    assert len(filler(50, 1).split()) == 50 and filler(50, 1) != filler(50, 2)
