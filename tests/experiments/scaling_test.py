"""experiments.scaling: depths run in turn, one line through them, and what it refuses."""

import json

import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.experiments import scaling
from ternax.record import read_records


def test_the_axis_is_two_depths_of_the_model_at_least():
    assert scaling.axis("8, 2,4", 8) == [2, 4, 8]
    for text in (None, "", "4", "4,4,5", "2,4", "0,2,3", "2,3,9", "2,3,x", "²,3,4"):
        with pytest.raises(UsageError, match="--layers_axis .* found"):
            scaling.axis(text, 8)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scaling") / "out"
    arguments = ["--config=tiny-bitnet", "--layers_axis=1,2,3", "--rounds=1", "--num_tokens=4"]
    assert scaling.main([*arguments, f"--output_dir={directory}"]) == 0
    return directory


def test_every_depth_is_a_record_and_the_line_another(ran):
    *points, line = read_records(ran / "results.jsonl")
    assert [record.layers for record in points] == [1, 2, 3]
    assert {record.experiment for record in (*points, line)} == {"scaling"}
    assert all(record.kind == "measured" and record.samples for record in points)
    times = [record.metrics["tpot_ms_p50"] / 1e3 for record in points]
    sizes = [record.metrics["bytes_per_step"] for record in points]
    assert list(line.samples) == pytest.approx(times)
    slope, fixed = np.polyfit(sizes, times, 1, w=1 / np.array(times))
    assert line.metrics["fixed_ms"] == pytest.approx(1e3 * fixed)
    assert line.metrics["streaming_gb_per_s"] == pytest.approx(1e-9 / slope)
    assert "layers 1, 2, 3" in line.note
    assert len(json.loads((ran / "results.json").read_text())) == 4


def test_refusals_come_before_anything_runs(capsys):
    assert scaling.main(["--config=tiny-bitnet"]) == 2
    assert scaling.main(["--config=tiny-bitnet", "--layers_axis=1,2,3", "--layers=2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("error: --layers") for line in said)
