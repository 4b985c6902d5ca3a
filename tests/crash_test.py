"""Runs that went on on another mesh: what of their metrics must be equal, and what only near."""

import json

import numpy as np
import pytest

from ternax import crash
from ternax.loss_band import band_of

STEPS, RESUMED = 20, 10


def metrics(seed):
    losses = 3 - 0.05 * np.arange(STEPS) + 1e-3 * np.random.default_rng(seed).normal(size=STEPS)
    return [
        {
            "step": step + 1,
            "loss_nats": losses[step],
            "gradient_norm": 1.0,
            "learning_rate": 0.1 / (step + 1),
            "tokens_per_s": float(seed),
            "tokens_crc32": 1000 + step,
        }
        for step in range(STEPS)
    ]


def written(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def start(tmp_path):
    return written(tmp_path / "start", metrics(0))


@pytest.fixture
def band():
    losses = [[line["loss_nats"] for line in metrics(seed)] for seed in range(4)]
    return band_of(np.array(losses), np.ones((4, STEPS)), 5, 20 * STEPS)


def moved(tmp_path, change=lambda lines: None):
    lines = metrics(0)[:RESUMED] + metrics(9)[RESUMED:]
    change(lines)
    return written(tmp_path / "moved", lines)


def test_another_order_of_sums_is_within_noise(tmp_path, start, band):
    assert crash.departures(moved(tmp_path), start, RESUMED, band) == ()
    assert crash.steps_written(tmp_path / "moved") == STEPS


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda lines: lines[RESUMED].update(tokens_crc32=1), "step 11: tokens_crc32"),
        (lambda lines: lines[RESUMED].update(learning_rate=1), "step 11: learning_rate"),
        (lambda lines: lines[RESUMED].update(step=12), "step 12: step"),
        (lambda lines: lines[3].update(loss_nats=2.85), "step 4: loss_nats"),
        (lambda lines: lines[3].update(gradient_norm=1.0000001), "step 4: gradient_norm"),
        (lambda lines: lines.pop(), "19 and 20 lines of metrics"),
    ],
)
def test_what_no_order_of_sums_changes(tmp_path, start, band, change, told):
    assert crash.departures(moved(tmp_path, change), start, RESUMED, band) == (told,)


def test_a_loss_that_jumps_is_told(tmp_path, start, band):
    def jump(lines):
        for line in lines[RESUMED:]:
            line["loss_nats"] += 0.05

    found = crash.departures(moved(tmp_path, jump), start, RESUMED, band)
    assert len(found) == STEPS - RESUMED and found[0].startswith("step 11: a loss ")
    assert found[0].endswith(" times as far off as noise reaches")


def test_only_whole_checkpoints_count(tmp_path):
    assert crash.steps_saved(tmp_path) == 0
    for name in ("9", "10", "20.orbax-checkpoint-tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert crash.steps_saved(tmp_path) == 10
