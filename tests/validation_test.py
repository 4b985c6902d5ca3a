"""Predictions by other rows: the arithmetic, the published rates, and our own records."""

import json
import pathlib
import shutil

import pytest

from ternax import validation
from ternax.errors import BadModelFile, UsageError
from ternax.validation import Row

ROOT = pathlib.Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "experiments" / "claims" / "published" / "decode.yaml"


def row(device: str, measured: float, bound: float) -> Row:
    return Row("s", device, "m", "trit2", 1, 1, 0, measured, bound, 1e9, 2.0)


def test_each_row_is_predicted_by_the_others():
    rows = [row("a", 50, 100), row("a", 60, 100), row("a", 30, 100), row("b", 9, 10)]
    found = validation.predict(rows)
    # Medians of the two others: 0.45, 0.40, 0.55; device b has none, so the median of a's.
    assert [p.efficiency for p in found] == pytest.approx([0.45, 0.40, 0.55, 0.50])
    assert [p.error for p in found] == pytest.approx([-0.1, -1 / 3, 25 / 30, -4 / 9])
    assert validation.median_error(found) == pytest.approx((1 / 3 + 4 / 9) / 2)
    assert validation.efficiencies(rows) == pytest.approx({"a": 0.5, "b": 0.9})


def test_a_row_takes_no_part_in_its_own_prediction():
    rows = [row("a", 50, 100), row("a", 60, 100)]
    changed = [row("a", 5000, 100), row("a", 60, 100)]
    assert validation.predict(rows)[0].tokens_per_s == validation.predict(changed)[0].tokens_per_s
    with pytest.raises(UsageError, match="at least two rows .* found 1"):
        validation.predict(rows[:1])


def test_published_rates_are_predicted():
    rows = validation.published(PUBLISHED)
    assert len(rows) >= 22 and len({r.device for r in rows}) >= 7
    assert all(0 < r.efficiency < 1 for r in rows), "a rate above its bound"
    assert validation.median_error(validation.predict(rows)) < 0.20
    spark = [r for r in rows if r.device == "dgx-spark"]
    assert spark[0].bound_tokens_per_s == pytest.approx(6.71, abs=0.02)
    # 48 tokens in 221.08 - 57.40 ms, and 2B-4T's 1.182 GB at 1,555 GB/s.
    bitnet = next(r for r in rows if r.model == "2b4t")
    assert bitnet.tokens_per_s == pytest.approx(48 / (0.22108 - 0.05740), rel=1e-3)
    assert bitnet.bound_tokens_per_s == pytest.approx(1555 / 1.19, rel=0.01)


def test_the_guides_tell_what_is_predicted_here():
    """The medians of README and docs/audit.md, and the guide's row of each device."""
    readme, guide = (
        " ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/audit.md")
    )
    rows, own = validation.published(PUBLISHED), validation.own(ROOT / "results")
    median, ours = (
        f"{100 * validation.median_error(validation.predict(found)):.1f} %" for found in (rows, own)
    )
    assert f"{len(rows)} published rates with a median error of {median}, {len(own)} of" in readme
    assert f"of our own with {ours}" in readme
    assert f"The median error of the {len(rows)} is {median}, and of {len(own)} of our" in guide
    assert all(row.efficiency <= 1 for row in rows) and "No published row exceeds" in guide
    over = [row.efficiency for row in own if row.efficiency > 1]
    assert f"{len(over)} of our own do, the highest at {100 * max(over):.1f} % of it" in guide
    largest = max((found.error for found in validation.predict(own)), key=abs)
    assert f"Largest of our own is {100 * largest:+.0f} %" in guide
    for device, share in validation.efficiencies(rows).items():
        count = sum(found.device == device for found in rows)
        assert f"| {device} | {count} | {share:.2f} |" in guide


def test_our_own_records_are_predicted():
    rows = validation.own(ROOT / "results")
    assert len(rows) >= 10 and {r.device for r in rows} >= {"cpu-zen4", "cpu-zen5"}
    assert validation.median_error(validation.predict(rows)) < 0.10


def test_bounds_are_those_of_the_records(tmp_path):
    """The plan counted them on the abstract model when the run was made."""
    checked = 0
    for path in sorted((ROOT / "results").glob("*/*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            values = json.loads(line)
            known = values.get("metrics", {})
            if values.get("phase") != "decode" or values.get("backend") != "cpu":
                continue
            if not {"bound_tokens_per_s", "read_bandwidth_gb_per_s"} <= known.keys():
                continue
            alone = tmp_path / f"{path.stem}-{number}" / path.parent.name
            alone.mkdir(parents=True)
            (alone / path.name).write_text(line + "\n")
            (found,) = validation.own(alone.parent)
            assert found.bound_tokens_per_s == pytest.approx(known["bound_tokens_per_s"], rel=0.01)
            checked += 1
            shutil.rmtree(alone.parent)
    assert checked > 20


@pytest.mark.parametrize(
    "torn", ['{"phase": "decode", "back', "[1]", '{"phase": "decode", "backend": "cpu"}']
)
def test_a_line_that_is_no_record(tmp_path, torn):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.jsonl").write_text(f'{{"phase": "load"}}\n{torn}\n')
    with pytest.raises(BadModelFile, match="m/a.jsonl: line 2: not a record"):
        validation.own(tmp_path)


@pytest.mark.parametrize("other", ["phase: prefill", "batch: best", "batch: 8"])
def test_a_published_row_of_something_else_is_refused(tmp_path, other):
    rates = tmp_path / "rates.yaml"
    rows = "".join(
        f"      - {{model: 8b, weights: fp16, device: h100, tokens_per_s: 150, {said}}}\n"
        for said in ("phase: decode, batch: 1", other)
    )
    rates.write_text(f"title: t\nsource: s\nyear: 2025\ntables:\n  - name: a\n    rows:\n{rows}")
    name, _, found = other.partition(": ")
    with pytest.raises(BadModelFile, match=f"line 8: {name}: expected .*, found {found}"):
        validation.published(rates)


def test_a_row_with_too_little(tmp_path):
    bare = tmp_path / "bare.yaml"
    bare.write_text(
        "title: t\nsource: s\nyear: 2025\ntables:\n  - name: a\n    rows:\n"
        "      - {model: 8b, tokens_per_s: 3}\n"
    )
    with pytest.raises(BadModelFile, match="line 7: a row needs model, weights, device"):
        validation.published(bare)
