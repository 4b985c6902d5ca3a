"""`experiments.validate` as a user runs it."""

import pathlib
import re

from ternax.experiments import validate
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_published_and_our_own(tmp_path, capsys):
    assert validate.main([f"--output_dir={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    errors = [float(x) for x in re.findall(r"median error ([\d.]+) %", out)]
    assert len(errors) == 2 and errors[0] < 20
    assert max(map(len, out.splitlines())) <= 100
    records = read_records(tmp_path / "out" / "results.jsonl")
    assert {(record.kind, record.experiment) for record in records} == {("predicted", "validate")}
    for record in records:
        m = record.metrics
        assert (
            abs(m["tokens_per_s"] / m["reference_tokens_per_s"] - 1 - m["prediction_error"]) < 1e-9
        )
        assert abs(m["share_of_bound"] * m["bound_tokens_per_s"] - m["tokens_per_s"]) < 1e-6
    assert len(records) == sum(map(int, re.findall(r"of (\d+) rows", out)))


def test_rates_of_ones_own(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    rows = [
        f"      - {{model: {model}, weights: fp16, device: h100, tokens_per_s: {rate}}}\n"
        for model, rate in (("8b", 120), ("3b", 290))
    ]
    head = "title: t\nsource: s\nyear: 2025\ntables:\n  - name: a\n    rows:\n"
    mine.write_text(head + "".join(rows))
    (tmp_path / "none").mkdir()
    flags = [f"--published={mine}", f"--results={tmp_path / 'none'}", f"--output_dir={tmp_path}/o"]
    assert validate.main(flags) == 0
    out = capsys.readouterr().out
    assert out.count("median error") == 1 and "h100-sxm    8b" in out
    assert validate.main([f"--results={tmp_path / 'gone'}"]) == 2
    assert "expected a folder of records, found none" in capsys.readouterr().err
    mine.write_text(head + rows[0])
    assert validate.main(flags) == 2
    assert "at least two rows" in capsys.readouterr().err
