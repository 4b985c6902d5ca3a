"""Rounds, what is kept of them, and the ratios: all programs made up, each speed chosen."""

import dataclasses
import subprocess

import pytest

from ternax import comparison, measure
from ternax.comparison import Contest
from ternax.errors import DoesNotFit, Interrupted, PeerFailed, UsageError
from ternax.peer import Peer, PeerSpeed
from ternax.record import Record, Store

HOST = f"{measure.cpu_model()}, 1 threads"
A, B = Peer("a", ("true",)), Peer("b / c", ("true",))


def contest(rounds=2, peers=(A, B), **changed):
    return Contest(
        **dict(
            config="tiny-llama",
            decode_words=(),
            peers=peers,
            prompt_length=4,
            num_tokens=2,
            rounds=rounds,
            repetitions=1,
            threads=1,
        )
        | changed
    )


def ours(device=HOST):
    common = dict(experiment="compare", config="tiny-llama", scheme="absmean", inputs="int8")
    common |= dict(backend="cpu", device=device, layers=3, batch=1, context=8, kind="measured")
    rates = dict(tokens_per_s=8.0, bound_tokens_per_s=10.0, read_bandwidth_gb_per_s=20.0)
    return [
        Record(phase="prefill", metrics={"prefill_tokens_per_s": 4.0, "parameters": 9}, **common),
        Record(phase="decode", metrics={"parameters": 9, **rates}, **common),
    ]


@pytest.fixture
def machine(monkeypatch):
    """The order in which programs ran; `fail` names one that raises instead, in a round."""
    ran, rates = [], iter(range(10, 10_000, 10))

    def program(name):
        ran.append(name)
        if error := machine.fail.get((name, ran.count(name))):
            raise error

    def theirs(self, **_):
        program(self.name)
        return PeerSpeed((2.0 * ran.count(self.name),), (0.25,), "m", 10, 9, "abc")

    class machine:
        fail = {}
        device = HOST

    machine.ran = ran
    monkeypatch.setattr(comparison, "_ours", lambda _: program("ours") or ours(machine.device))
    monkeypatch.setattr(Peer, "measure", theirs)
    monkeypatch.setattr(comparison, "_bandwidth", lambda _: float(next(rates)))
    return machine


def test_rounds_go_forwards_and_backwards(machine, tmp_path):
    ratios = comparison.run(contest(3), Store(tmp_path))
    forwards = ["ours", "a", "b / c"]
    assert machine.ran == [*forwards, *forwards[::-1], *forwards]
    found = {(r.phase, r.backend): r for r in ratios}
    # Prefill of 4 tokens in 2, 4, 6 s beside our 4 tokens/s; decode in 0.25 s a token beside 8.
    assert found["prefill", "cpu / a"].samples == (2.0, 4.0, 6.0)
    assert found["prefill", "cpu / a"].metrics == {"speed_ratio": 4.0}
    assert found["decode", "cpu / b / c"].samples == (2.0, 2.0, 2.0)
    assert "3 rounds, too few" in found["decode", "cpu / a"].note


def test_six_rounds_have_an_interval(machine, tmp_path):
    found = comparison.run(contest(6, (A,)), Store(tmp_path))[0]
    assert found.phase == "prefill"
    assert found.metrics == dict(speed_ratio=7.0, speed_ratio_low=2.0, speed_ratio_high=12.0)


def test_our_bound_follows_the_rate_beside_the_run(machine, tmp_path):
    store = Store(tmp_path)
    comparison.run(contest(1, (A,)), store)
    metrics = store.records[1].metrics  # rates of 10 before and 20 after: 15 instead of 20
    assert metrics["read_bandwidth_gb_per_s"] == 15.0 and metrics["bound_tokens_per_s"] == 7.5
    assert metrics["share_of_bound"] == pytest.approx(8 / 7.5)


def test_an_accelerator_keeps_its_own_bandwidth(machine, tmp_path):
    machine.device, store = "an accelerator", Store(tmp_path)
    comparison.run(contest(1, (A,)), store)
    assert store.records[1].metrics["read_bandwidth_gb_per_s"] == 20.0
    assert store.records[1].metrics["share_of_bound"] == pytest.approx(0.8)


def test_whole_rounds_are_never_measured_again(machine, tmp_path):
    comparison.run(contest(2), Store(tmp_path))
    store = Store(tmp_path)
    lines = len(store.records)
    first = comparison.run(contest(2), store)
    assert len(store.records) == lines and len(machine.ran) == 6  # ratios neither
    again = comparison.run(contest(1), store)
    assert [r.samples for r in again] == [r.samples for r in first]  # none is dropped
    more = comparison.run(contest(3), store)
    assert len(machine.ran) == 9 and [len(r.samples) for r in more] == [3] * 4
    assert [r.samples for r in store.records[-4:]] == [r.samples for r in more]


@pytest.mark.parametrize("kept", range(6))
def test_a_round_cut_short_on_disk_is_measured_again(machine, tmp_path, kept):
    store = Store(tmp_path)
    comparison.run(contest(2), store)
    whole = store.records[:12]
    torn = Store(tmp_path / "torn")
    # Twice cut short, one as long as the other lacks.
    for record in [*whole[: 6 + kept], *whole[6 : 12 - kept]]:
        torn.append(record)
    expected = [1, 2] if kept == 0 else [1]
    assert list(comparison.whole_rounds(torn.records, contest())) == expected
    comparison.run(contest(2), torn)
    held = comparison.whole_rounds(torn.records, contest())
    assert list(held) == [1, 2] and all(len(found) == 6 for found in held.values())
    assert list(comparison.whole_rounds(Store(torn.directory).records, contest())) == [1, 2]


@pytest.mark.parametrize(
    "raised, expected", [(KeyboardInterrupt(), Interrupted), (PeerFailed("a died"), PeerFailed)]
)
def test_an_ending_in_round_2_keeps_round_1(machine, tmp_path, raised, expected):
    machine.fail, store, seen = {("a", 2): raised}, Store(tmp_path), []
    with pytest.raises(expected, match=f"1 of 3 rounds are kept in {tmp_path}; the same command"):
        comparison.run(contest(3), store, watch=seen.append)
    assert len(store.records) == 6 and len(seen) == 8  # b's second was seen, and is not kept
    machine.fail = {}
    assert len(comparison.run(contest(3), store)[0].samples) == 3


@pytest.mark.parametrize("name", ["cpu", "reference", "ternax", "b / c"])
def test_names_that_mean_two_things_are_refused(name):
    with pytest.raises(UsageError, match="names must differ from each other and from ternax, "):
        contest(peers=(B, dataclasses.replace(A, name=name)))


@pytest.mark.parametrize(
    "code, said, expected, message",
    [
        (2, "x\nerror: bad flag", UsageError, "bad flag"),
        (3, "error: too large", DoesNotFit, "too large"),
        (1, "error: a bug", PeerFailed, "our plan ended with 1; the last it said: error: a bug"),
        (-9, "", PeerFailed, "our plan was ended by SIGKILL"),
    ],
)
def test_the_plan_refuses_as_decode_does(monkeypatch, code, said, expected, message):
    done = subprocess.CompletedProcess([], code, "", said)
    monkeypatch.setattr(comparison, "run_program", lambda *_: done)
    with pytest.raises(expected, match=f"^{message}"):
        comparison.check(contest())
