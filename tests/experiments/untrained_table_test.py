"""experiments.robustness --preset=table: its rows, going on, and what it refuses."""

import pytest

from ternax.experiments import robustness, untrained_table
from ternax.record import read_records

FLAGS = ["--preset=table", "--config=tiny-llama", "--noise=trit_resample", "--noise=stuck"]


def test_published_figures_come_from_the_document():
    assert untrained_table.published() == {0.0: 1.0, 0.1: 0.9, 0.2: 0.799, 0.3: 0.7}


def test_the_table_and_its_continuation(tmp_path, capsys):
    where = f"--output_dir={tmp_path}"
    assert robustness.main([*FLAGS, "--strengths=0.2", where]) == 0
    said = capsys.readouterr().out
    records = read_records(tmp_path / "results.jsonl")
    assert max(map(len, said.splitlines())) <= 100
    assert "Untrained: all weights are random" in said and "no information about any" in said
    # Two layers, each measured and predicted, and one stack of the first noise.
    assert [r.kind for r in records] == ["measured", "predicted"] * 2 + ["measured"]
    assert all("untrained" in r.note for r in records)
    assert records[0].metrics["product_cosine"] == pytest.approx(0.8, abs=0.03)
    assert records[1].metrics["product_cosine_closed_form"] == pytest.approx(0.8)
    assert records[0].layers == 1 and records[4].layers == 3
    row = next(line for line in said.splitlines() if "trit_resample" in line)
    assert row.split()[2:4] == ["0.2", "0.799"]
    # Another rate: what is there is neither computed nor written again.
    assert robustness.main([*FLAGS, "--strengths=0.1,0.2", where]) == 0
    again = read_records(tmp_path / "results.jsonl")
    assert again[:5] == records and len(again) == 10


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--config=70bb"], "no model is named '70bb'"),
        (["--noise=gaussian"], "strikes trits, found gaussian, on weights"),
        (["--strengths=2"], "rate must lie in [0, 1]"),
        (["--layers=9"], "layers must lie between 1 and 3"),
    ],
)
def test_refusals_are_one_line(flags, why, tmp_path, capsys):
    code = robustness.main([*FLAGS[:2], *flags, f"--output_dir={tmp_path / 'out'}"])
    said = capsys.readouterr()
    assert code == 2 and len(said.err.splitlines()) == 1 and why in said.err
    assert not (tmp_path / "out").exists()


def test_a_study_has_all_layers(tmp_path, capsys):
    assert robustness.main(["--layers=1", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "--layers is for --preset=table" in capsys.readouterr().err
