"""docs/performance.md shows the committed records as the program prints them, and no others."""

import pathlib

from ternax.gpu import screen
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_table_is_that_of_the_records():
    records = read_records(ROOT / "results" / "h200" / "day.jsonl")
    table = "\n".join(screen.table(records))
    assert f"```text\n{table}\n```" in (ROOT / "docs" / "performance.md").read_text()


def test_the_headline_is_in_the_samples():
    lines = (ROOT / "results" / "h200" / "first-day.jsonl").read_text()
    assert '"tokens_per_s": 116.13' in lines and '"tpot_ms_p50": 8.61' in lines
