"""docs/performance.md shows the committed records as the program prints them, and no others."""

import json
import pathlib

from ternax.gpu import screen
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_table_is_that_of_the_records():
    records = read_records(ROOT / "results" / "h200" / "day.jsonl")
    table = "\n".join(screen.table(records))
    assert f"```text\n{table}\n```" in (ROOT / "docs" / "performance.md").read_text()


def test_the_headline_is_in_the_samples():
    lines = (ROOT / "results" / "h200" / "first-day.jsonl").read_text().splitlines()
    [decode] = [r for r in map(json.loads, lines) if r.get("phase") == "decode"]
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    for said in (
        f"context: {decode['tokens_per_s']:.1f} tokens/s**",
        f"{decode['tpot_ms_p50']:.2f} ms a step, {decode['watts']:.0f} W, ",
        f"{decode['joules_per_token']:.1f} J a token): {decode['share_of_bound']:.2f} of what",
        f"at the {decode['read_bandwidth_gb_per_s'] / 1e3:.2f} TB/s of the same process",
    ):
        assert said in text
    assert f"70b whole at {decode['tokens_per_s']:.0f} tokens/s" in (ROOT / "README.md").read_text()
