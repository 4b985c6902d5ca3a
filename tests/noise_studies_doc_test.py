"""docs/noise_studies.md says what the committed records do, and names files that are there."""

import pathlib
import re

from ternax.noise_table import title
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "robustness"
PAGE = (ROOT / "docs" / "noise_studies.md").read_text()


def tolerances(name):
    """(noise, scheme) -> metrics, of the records that say which strengths are tolerated."""
    records = read_records(FOLDER / f"{name}.jsonl")
    found = [r for r in records if "noise_draws" in r.metrics and "noise_strength" not in r.metrics]
    return {(title(r), r.scheme, r.note.split(":")[0].split(" on ")[1]): r.metrics for r in found}


def percent(value):
    return f"{100 * value:.2g} %"


def with_interval(metrics, loss, show=percent):
    name = f"tolerated_{loss}"
    low, high = (show(metrics[f"{name}_{end}"]).removesuffix(" %") for end in ("low", "high"))
    return f"{show(metrics[name])} [{low}, {high}]"


def test_storage():
    shown = 0
    for (noise, _, _), m in tolerances("storage").items():
        if "saturate" not in noise and m["bits_per_byte_clean"] < 1.3895:
            continue  # floats as they are: no strength, but one flip
        flips = m["tolerated_005"] * m["stored_bits"]
        cells = with_interval(m, "005"), f"{flips:,.0f}", with_interval(m, "020")
        assert f"| {m['bits_per_byte_clean']:.3f} | {' | '.join(cells)} |" in PAGE
        shown += 1
    assert shown >= 6


def test_policies():
    for (noise, _, _), m in tolerances("policies").items():
        if "tolerated_020" in m:
            cells = with_interval(m, "005"), with_interval(m, "020")
            assert f"| `{noise}` | {' | '.join(cells)} |" in PAGE


def test_memory():
    for m in tolerances("memory").values():
        if "tolerated_005" in m:
            assert f"| {with_interval(m, '005', '{:.2g}'.format)} |" in PAGE


def test_every_file_of_records_is_named():
    said = PAGE + (ROOT / "results" / "README.md").read_text()
    named = set(re.findall(r"`([\w-]+\.jsonl)`", said))
    assert {path.name for path in FOLDER.glob("*.jsonl")} <= named
