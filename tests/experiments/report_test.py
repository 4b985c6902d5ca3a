"""`experiments.report` over the committed records, and what it refuses."""

import json
import re

import pytest

from ternax import drawing
from ternax.experiments import report
from ternax.record import Record


def test_the_committed_records(tmp_path, capsys):
    assert report.main([f"--output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    count = int(re.search(r"report +(\d+) records", out)[1])
    told = json.loads((tmp_path / "records.json").read_text())
    kept = [Record.from_dict(values) for values in told]
    assert len(kept) == count == len((tmp_path / "records.csv").read_text().splitlines()) - 1
    for heading in ("## Environment", "### decode, measured", "## Planned against measured peak"):
        assert heading in text
    # A number of the page is found again in the line that it names.
    line = next(part for part in text.splitlines() if "cpu-zen5/decode-70b.jsonl:" in part)
    file, number = re.search(r"(cpu-zen5/decode-70b\.jsonl):(\d+)", line).groups()
    source = (report.RESULTS / file).read_text().splitlines()[int(number) - 1]
    assert json.loads(source)["config"] == "70b"
    assert (tmp_path / "report.png").exists() == bool(drawing.pyplot())


def test_one_experiment_alone(tmp_path, capsys):
    flags = ["--experiment=scaling", "--usd_per_hour=1", f"--output_dir={tmp_path}"]
    assert report.main(flags) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## scaling" in text and "## decode" not in text and "usd_per_million_tokens" in text


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--results=nowhere"], "expected a folder of records, found none"),
        (["--experiment=speed"], "--experiment=speed: no such records"),
    ],
)
def test_mistakes_are_one_line(flags, says, tmp_path, capsys):
    assert report.main([*flags, f"--output_dir={tmp_path / 'none'}"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (tmp_path / "none").exists()
