"""experiments.gpu_day as a user runs it, where there is no GPU."""

import json

import pytest

from ternax import measure
from ternax.experiments import gpu_day
from ternax.gpu.schedule import STEPS
from ternax.record import read_records


def test_the_plan_is_printed(capsys):
    assert gpu_day.main(["--dry_run", "--steps=facts,decode-70b", "--graphs=on,off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["facts", "decode-70b", "decode-70b", "together"]
    assert "(graphs off)" in lines[2] and lines[3].split()[1] == "128"
    gpu_day.main(["--dry_run"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:-1] == [
        step.name for step in STEPS
    ]


def test_every_step_does_something():
    assert all(callable(gpu_day.step_body(step.name)) for step in STEPS)


@pytest.mark.skipif(bool(measure.nvml_handles()), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(tmp_path, capsys):
    assert gpu_day.main([f"--output_dir={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no NVIDIA GPU is here: --dry_run") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--graphs=maybe", "--graphs must be on, off or on,off, found 'maybe'"),
        ("--only=kernels", "--only must be a step that --dry_run lists, found 'kernels'"),
        ("--steps=all", "--steps: there are facts"),
        ("--minutes=0", "--minutes"),
    ],
)
def test_bad_flags(flag, said, capsys):
    assert gpu_day.main([flag]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_rehearsal(tmp_path, capsys):
    """Steps in processes of their own; records come with the commit that was given."""
    words = ["--rehearse", "--steps=facts,tune", "--minutes=3", "--commit=abc123"]
    assert gpu_day.main([*words, f"--output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    records = read_records(tmp_path / "results.jsonl")
    assert [(r.phase, r.commit) for r in records] == [("device", "abc123")]
    assert "tune: backend 'mosaic' cannot run here" in out
    assert "facts: 1 records" in out and f"{tmp_path}/results.json" in out
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
    # Few enough files to be brought home together.
    assert len(list(tmp_path.rglob("*"))) <= 8
