"""experiments.scaling as a user runs it."""

import dataclasses
import json

import pytest

from ternax import curves, drawing
from ternax.experiments import scaling
from ternax.record import read_records
from ternax.sweep import Axis, Sweep
from tests import curves_test


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scaling") / "out"
    arguments = ["--config=tiny-bitnet", "--axis=layers:1,2,3", "--rounds=1", "--num_tokens=4"]
    arguments.append(f"--output_dir={directory}")
    assert scaling.main(arguments) == 0
    return directory, arguments


def test_points_are_measured_and_the_whole_is_extrapolated_beside(ran):
    directory, _ = ran
    *points, line, beyond = read_records(directory / "results.jsonl")
    assert [record.layers for record in points] == [1, 2, 3]
    assert {record.experiment for record in (*points, line, beyond)} == {"scaling"}
    assert all(record.kind == "measured" and record.samples for record in points)
    assert list(line.samples) == [record.metrics["tpot_ms_p50"] / 1e3 for record in points]
    assert (beyond.kind, beyond.layers) == ("extrapolated", 3)
    assert beyond.metrics["reference_tokens_per_s"] == points[2].metrics["tokens_per_s"]
    assert len(json.loads((directory / "results.json").read_text())) == 5
    assert (directory / "scaling.png").exists() == bool(drawing.pyplot())


def test_the_same_command_measures_nothing_again(ran, capsys):
    directory, arguments = ran
    before = (directory / "results.jsonl").read_bytes()
    assert scaling.main(arguments) == 0
    out = capsys.readouterr().out
    assert (directory / "results.jsonl").read_bytes() == before
    assert "resumed  3 measurements" in out and "round 1" not in out
    shown = out.splitlines()
    assert max(map(len, shown[:-1])) <= 100
    assert [line.split()[:2] for line in shown if line.startswith("  layers")] == [
        ["layers", "1"],
        ["layers", "2"],
        ["layers", "3"],
    ]
    assert any(line.startswith("extrapolated: tiny-bitnet: t = a + b layers") for line in shown)


def test_refusals_come_before_anything_runs(tmp_path, capsys):
    for flags in (
        ["--axis=depth"],
        ["--axis=layers:1,2", "--layers=2"],
        ["--axis=size:1b,8b", "--config=1b"],
        ["--axis=context:3,64"],
    ):
        flags = flags if "--config=1b" in flags else ["--config=tiny-bitnet", *flags]
        assert scaling.main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith("error: --") for line in said)
    assert (
        not (tmp_path / "out" / "results.jsonl").exists()
        or not (tmp_path / "out" / "results.jsonl").read_bytes()
    )


def test_a_grid_of_sizes_is_summed_up_within_the_screen():
    """Twelve rows with planned beside peak memory, then the worst of both predictions."""
    names, prompts = ("1b", "bitnet-2b4t", "bitnet-700m", "8b"), ("16", "512", "2048")
    study = Sweep((Axis("size", names), Axis("prompt", prompts)), ())
    made = [
        curves_test.point(
            (("size", name), ("prompt", prompt)),
            (bound := 1e-2 * (i + 1)) / 0.8 + 1e-4 * (16 + 8 * i),
            1,
            config=name,
            bound=1 / bound,
            layers=16 + 8 * i,
        )
        for i, name in enumerate(names)
        for prompt in prompts
    ]
    told = {"ttft_ms": 12345.0, "prefill_tokens_per_s": 1234.0}
    made = [dataclasses.replace(r, metrics=r.metrics | told) for r in made]
    shown = scaling.screen(study, [*made, *curves.curves(study, made)])
    rows = [line for line in shown if line.startswith("  size ")]
    assert len(rows) == 12 and all(line.endswith("+3.0 %") for line in rows)
    assert max(map(len, shown)) <= 100
    assert shown[1].split()[-3:] == ["GiB", "planned", "error"]
    assert sum("80 % of the bandwidth, a = " in line for line in shown) == 12
    assert any(line.startswith("sizes: 12 predicted by the others, worst") for line in shown)
    assert "measured peak of 12 points, worst +3.0 %" in shown[-1]
