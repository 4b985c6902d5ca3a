"""docs/noise_studies.md says what the committed records do, and names files that are there."""

import pathlib
import re
import statistics

import pytest

from ternax import noise_meta, noise_table
from ternax.noise_table import title
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "robustness"
PAGE = (ROOT / "docs" / "noise_studies.md").read_text()


def records_of(name):
    found = read_records(FOLDER / f"{name}.jsonl")
    assert found
    return found


def tolerances(name):
    """[(noise, metrics)] of the records that say which strengths are tolerated, in order."""
    found = [(r, r.metrics) for r in records_of(name)]
    summed = [(r, m) for r, m in found if "noise_draws" in m and "noise_strength" not in m]
    assert summed
    return [(title(r), m) for r, m in summed]


def in_order(rows):
    """Whether the page has all these lines, in this order."""
    at = -1
    for row in rows:
        at = PAGE.find(row, at + 1)
        assert at >= 0, row


def percent(value):
    return f"{100 * value:.2g} %"


def with_interval(metrics, loss, show=percent):
    name = f"tolerated_{loss}"
    low, high = (show(metrics[f"{name}_{end}"]).removesuffix(" %") for end in ("low", "high"))
    return f"{show(metrics[name])} [{low}, {high}]"


STORED = {
    "ternary, 2 bits": (2, "bitflip"),
    "ternary, base 3": (1.625, "bitflip,storage=tq1_0"),
    "int8": (8, "bitflip"),
    "int4": (4, "bitflip"),
    "bf16, clamped": (16, "bitflip,policy=saturate"),
    "float16, clamped": (16, "bitflip,storage=f16,policy=saturate"),
    "int8, a network of equal bytes": (8, "bitflip"),
}


def test_storage():
    # Floats as they are tolerate no rate, only luck.
    found = [
        (noise, m)
        for noise, m in tolerances("storage")
        if "saturate" in noise or not 1.3893 < m["bits_per_byte_clean"] < 1.3895
    ]
    assert [noise for noise, _ in found] == [noise for _, noise in STORED.values()]
    rows = []
    for (label, (bits, _)), (_, m) in zip(STORED.items(), found, strict=True):
        flips = m["tolerated_005"] * m["stored_bits"]
        cells = with_interval(m, "005"), f"{flips:,.0f}", with_interval(m, "020")
        rows.append(f"| {label} | {bits} | {m['bits_per_byte_clean']:.3f} | {' | '.join(cells)} |")
    in_order(rows)


def test_policies():
    in_order(
        f"| `{noise}` | {with_interval(m, '005')} | {with_interval(m, '020')} |"
        for noise, m in tolerances("policies")
        if "tolerated_020" in m and "norm" not in noise  # a cliff
    )


MEMORY = (
    *("projections, 2 bits", "embedding and head, one table, int8"),
    *("scales of projections and table, f32", "norms, f32", "cache, bf16"),
    *("cache, int8 and its scales", "cache, int8, its scales kept clean"),
    *("all of these, cache in bf16", "all of these, cache in int8"),
)


def test_memory():
    rows = []
    for label, (_, m) in zip(MEMORY, tolerances("memory"), strict=True):
        known = "tolerated_005" in m
        assert known != label.endswith("f32")  # scales and norms have a cliff
        rows.append(f"| {label} | {with_interval(m, '005', '{:.2g}'.format) if known else ''}")
    in_order(rows)


@pytest.mark.parametrize("random", [False, True])
def test_depth(random):
    found = [r for r in records_of("depth") if ("random weights" in r.note) == random]
    assert "\n".join(noise_table.depth(found)[1:-1]) in PAGE


@pytest.mark.parametrize("name", ["budget", "loss"])
def test_training_under_noise(name):
    lines = noise_meta.lines(records_of(f"noise-aware-{name}"))
    shown = lines if name == "budget" else lines[lines.index("") + 1 :]
    assert "\n".join(shown) in PAGE


def test_tuning():
    draws = {}
    for record in records_of("noise-aware-tuning"):
        run = record.flags.partition("--config=runs/d6/")[2].partition("/")[0]
        draws.setdefault(run, []).append(record.metrics)

    def cells(run):
        clean, struck = (
            statistics.fmean(
                m["bits_per_byte"] - less * m["bits_per_byte_rise"] for m in draws[run]
            )
            for less in (1, 0)
        )
        return f"{clean:.3f} | {struck:.3f}"

    in_order(
        f"| {rate} | {cells(f'tune-plain-{rate}')} | {cells(f'tune-noisy-{rate}')} |"
        for rate in ("0.0015", "0.003", "0.006", "0.012", "0.024")
    )


def test_sizes():
    slopes = {}
    for record in records_of("sizes"):
        if "slope" in record.metrics:
            response, _, axis = record.note.partition(";")[0].rpartition(": ")
            m = record.metrics
            ends = f"[{m['slope_low']:.3f}, {m['slope_high']:.3f}]"
            slopes[response, axis] = f"{m['slope']:.3f} {ends}"
    lines = [
        f"{slopes[f'{noise}: strength that costs {loss} bits per byte', axis]}"
        for noise in ("sign_flip", "bitflip", "stuck")
        for loss in ("0.05", "0.2")
        for axis in ("parameters", "tokens_per_parameter")
    ]
    in_order(lines)


def test_every_file_of_records_is_named():
    said = PAGE + (ROOT / "results" / "README.md").read_text()
    named = set(re.findall(r"`([\w-]+\.jsonl)`", said))
    assert {path.name for path in FOLDER.glob("*.jsonl")} <= named


def test_nothing_stands_for_what_is_to_come():
    assert not re.findall(r"^[A-Z]{6,}$", PAGE, re.MULTILINE)
