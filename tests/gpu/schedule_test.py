"""Steps and their minutes; processes that hang, fail, or tell their records."""

import time

import pytest

from ternax.errors import UsageError
from ternax.gpu import made, schedule
from ternax.gpu.schedule import STEPS


def test_steps_by_name_and_by_first_word():
    assert schedule.chosen(None) == list(STEPS)
    names = [step.name for step in schedule.chosen("facts,kernels")]
    assert names == ["facts", "kernels-70b", "kernels-8b", "kernels-2b4t"]
    with pytest.raises(UsageError, match="--steps: there are facts, .*found 'kernel'"):
        schedule.chosen("facts,kernel")


def test_graphs_off_runs_what_they_change():
    steps = schedule.chosen("facts,decode-70b,tune")
    names = [(step.name, on) for step, on in schedule.with_graphs(steps, ("on", "off"))]
    assert names == [("facts", True), ("tune", True), ("decode-70b", True), ("decode-70b", False)]
    off = [(step.name, on) for step, on in schedule.with_graphs(steps, ("off",))]
    assert off == [("facts", True), ("tune", True), ("decode-70b", False)]


def test_processes_have_flags_of_their_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    by_name = {step.name: step for step in STEPS}
    assert by_name["decode-70b"].environment(True)["XLA_FLAGS"] == "--mine=1"
    kernels = by_name["kernels-70b"].environment(False)
    assert kernels["XLA_FLAGS"].split()[0] == "--mine=1"
    assert kernels["XLA_FLAGS"].endswith(schedule.GRAPHS_OFF)
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" in kernels


def test_minutes_are_shared_by_plan():
    left = 8 * 60.0
    for i in range(len(STEPS)):
        seconds = schedule.share_s(left, STEPS[i:])
        assert seconds >= schedule.LEAST_S
        left -= seconds
    assert left == pytest.approx(schedule.GRACE_S, abs=10)
    # All minutes that steps leave go to those behind them.
    assert schedule.share_s(300, STEPS[-1:]) == 300 - schedule.GRACE_S


def test_the_plan_of_all_steps_fits_ten_minutes():
    assert sum(step.seconds for step in STEPS) + schedule.GRACE_S <= 600


def run(tmp_path, *words, limit_s=100.0):
    records, lines = [], []
    log = tmp_path / "steps.log"
    words = [*words, f"--output_dir={tmp_path}"]
    ended = schedule.run(words, {}, limit_s, records.append, lines.append, log)
    return ended, records, lines


def test_a_step_tells_its_records(tmp_path):
    ended, [record], _ = run(tmp_path, "--only=facts", "--rehearse")
    assert ended.code == 0 and record.experiment == made.EXPERIMENT
    assert "--only=facts" in record.flags


def test_a_step_that_fails_says_why(tmp_path):
    ended, records, _ = run(tmp_path, "--only=facts", "--seconds=-1")
    assert (ended.code, records) == (2, [])
    assert ended.said.startswith("error: --seconds")


def test_a_step_that_is_late_is_ended(tmp_path):
    start = time.monotonic()
    ended, records, _ = run(tmp_path, "--only=facts", "--rehearse", limit_s=0.05)
    assert ended.code is None and records == []
    assert time.monotonic() - start < 10


def test_a_line_is_a_record_or_it_is_none(capsys):
    step = made.Step(1, made.tell, made.say, note="CUDA graphs off")
    kept = step.keep("kernel", {"call_us": 2.5}, "K 1", samples=[1e-6], config="70b:o", batch=1)
    step.say("a line")
    first, second = capsys.readouterr().out.splitlines()
    assert made.told(first) == kept and made.told(second) is None
    assert made.told(first[:-5]) is None
    assert kept.note == "K 1; CUDA graphs off"
