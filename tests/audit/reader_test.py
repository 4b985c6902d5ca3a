"""Files of claims: what is read, and where and how the rest is refused."""

import pathlib
import textwrap

import pytest

from ternax.audit import audit, read
from ternax.errors import BadModelFile

HEAD = "title: t\nsource: s\nyear: 2025\n"


def file(tmp_path, text: str, name: str = "claims.yaml") -> pathlib.Path:
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


def one(tmp_path, row: str):
    return read(file(tmp_path, f"{HEAD}tables:\n  - name: a\n    rows:\n      - {row}\n"))


def test_yaml(tmp_path):
    case = read(
        file(
            tmp_path,
            HEAD
            + textwrap.dedent("""\
            defaults: {device: l40s, weights: trit2}
            models:
              mine: {config: 70b, num_kv_heads: 64}
              bare: {parameters: 24B}
            devices:
              here: {bandwidth: 35.8 GB/s, memory: 24 GiB, int8: 1 TOPS}
            tables:
              - name: speed
                defaults: {phase: decode}
                rows:
                  - {model: mine, tokens_per_s: 45}
                  - {model: bare, tokens_per_s: "1,000 tok/s", device: here}
            """),
        )
    )
    (table,) = case.tables
    first, second = table.claims
    assert (case.title, case.source, case.year, table.name) == ("t", "s", 2025, "speed")
    assert first.model.shape.num_kv_heads == 64 and first.device.name == "l40s"
    assert first.settings["phase"] == "decode" and first.weights.name == "trit2"
    assert second.model.parameters == 24e9 and second.model.shape is None
    assert second.device.bandwidth_gb_per_s == pytest.approx(35.8)
    assert second.device.memory_bytes_at_most == pytest.approx(24 * 2**30)
    assert second.quantities["tokens_per_s"].nominal == 1000


def test_counts_of_billions_behind_a_space(tmp_path):
    """llama-bench writes "6.74 B" of parameters, which elsewhere are bytes."""
    ((claim,),) = (table.claims for table in one(tmp_path, "{parameters: 6.74 B}").tables)
    assert claim.quantities["parameters"].nominal == pytest.approx(6.74e9)


@pytest.mark.parametrize("memory, most", [("44 GB", 44 * 2**30), ("23.20 GiB", 23.2 * 2**30)])
def test_memory_of_a_device_is_read_as_the_catalogue_reads_it(tmp_path, memory, most):
    row = "tables:\n  - name: a\n    rows:\n      - {device: d}\n"
    head = f"{HEAD}devices:\n  d: {{bandwidth: 1 GB/s, memory: {memory}, int8: 1 TOPS}}\n"
    ((claim,),) = (table.claims for table in read(file(tmp_path, head + row)).tables)
    assert claim.device.memory_bytes_at_most == pytest.approx(most)


MARKDOWN = """\
---
title: t
source: s
year: 2025
defaults: {device: rtx4090, weights: fp16, phase: decode, batch: 1}
columns: {"t/s": tokens_per_s, "Notes": "-"}
---

# Speeds

| model | t/s | Notes |
|---|---:|---|
| 8b | **65.2** | warm |
| 1b | - | not run |

## Memory

| model | size (GiB) |
|-------|------|
| 8b | 14.96 |
"""


def test_markdown(tmp_path):
    case = read(file(tmp_path, MARKDOWN, "claims.md"))
    assert [table.name for table in case.tables] == ["Speeds", "Memory"]
    first, second = case.tables[0].claims
    assert first.quantities["tokens_per_s"].text == "65.2" and not second.quantities
    assert case.tables[1].claims[0].quantities["size"].text == "14.96 GiB"
    assert [judged.verdict for judged in audit(case).rows] == [
        "possible",
        "unverifiable",
        "possible",
    ]


@pytest.mark.parametrize(
    "row, place, why",
    [
        ("{model: 70c}", "line 7, column 17", "no model is named '70c'.*nearest: 70b"),
        ("{device: h1000}", "line 7, column 18", "no device is named 'h1000'; nearest: h100"),
        ("{weights: int3}", "line 7, column 19", "no format is named 'int3'; known: fp32"),
        ("{tokens_per_second: 3}", "line 7, column 29", "no field .* nearest: tokens_per_s"),
        ("{memory: 15}", "line 7, column 18", "memory: expected a unit behind '15'"),
        ("{memory: 15 GX}", "line 7, column 18", "memory: no unit is written 'GX'"),
        ("{memory: 15 ms}", "line 7, column 18", "memory: expected bytes, found seconds"),
        ("{devices_needed: 0}", "line 7, column 26", "devices_needed: expected more than zero"),
        ("{other_price: 3 GB}", "line 7, column 23", "other_price: expected dollars/hour"),
        ("{tokens_per_hour: 5 ± 5}", "line 7, column 27", "tokens_per_hour: expected more than"),
        ("{memory: 0 GB}", "line 7, column 18", "memory: expected more than zero, found '0 GB'"),
        (
            "{batch: many}",
            "line 7, column 17",
            "batch: expected a whole number or best, found 'many'",
        ),
        (
            "{tokens_per_s: 1,074 tok/s}",
            "line 7, column 35",
            "'074 tok/s'; between braces a number",
        ),
        ("{devices: best}", "line 7, column 19", "devices: expected a whole number, found 'best'"),
        ("{batch: 1000000000000000}", "line 7, column 17", "batch: expected a whole number"),
        ("{model: 8b, layers: 33}", "line 7, column 29", "layers: 8b has 32, found 33"),
        ("{phase: train}", "line 7, column 17", "phase: expected one of decode, prefill"),
        ("{model: [70b]}", "line 7, column 17", "row: model: expected one value, found a list"),
        ("{id: v1.0, result: 1}", "line 7, column 14", "id: expected a word without '.'"),
        ("{noise: -10%}", "line 7, column 17", "noise: expected zero or more, found '-10%'"),
        ("{}", "line 7, column 9", "row: expected at least one field"),
        ("[1, 2]", "line 7, column 9", "row: expected `name: value` lines"),
        ("{model: 70b, model: 8b}", "line 7, column 22", "model is given twice"),
        ("{id: a}\n      - {id: a}", "line 8, column 14", "id: 'a' is that of line 7 already"),
        ("{id: a, result: 1, of: a.result / 2}", "line 7, column 32", "row 'a' refers to itself"),
        (
            "{id: a, result: 1, of: b.result / 2}\n      - {id: b, result: 1, of: 2 * a.result}",
            "line [78], column 3\\d",
            "row '[ab]' refers to itself: [ab] of [ab] of [ab]",
        ),
        (
            "{result: 1, of: a.size / 2}",
            "line 7, column 25",
            "no row has the id 'a'; no row has one",
        ),
        (
            "{id: one, size: 1 GB}\n      - {result: 1, of: mean(on.size; 2 GB)}",
            "line 8, column 25",
            "no row has the id 'on'; nearest: one",
        ),
        ("{id: a}\n      - {result: 1, of: a.sizes / 2}", "line 8, column 25", "nearest: size"),
        ("{memory: 1 GB", r"line 8, column 1", "not YAML: "),
    ],
)
def test_a_row_that_cannot_be_read(tmp_path, row, place, why):
    with pytest.raises(BadModelFile, match=f"claims.yaml: {place}: .*{why}"):
        one(tmp_path, row)


@pytest.mark.parametrize(
    "text, place, why",
    [
        ("", "line 1, column 1", "found nothing"),
        ("title: t\nyear: 2025\ntables: []\n", "line 1", "source is missing: where it can be read"),
        (HEAD + "tables: []\n", "line 1", "expected at least one table"),
        (HEAD + "tables:\n  - {name: a, rows: []}\n", "line 1", "at least one row"),
        (HEAD + "table: []\n", "line 4, column 1", "no entry is named 'table'; nearest: tables"),
        (HEAD + "tables: {a: b}\n", "line 4, column 9", "tables: expected a list"),
        (HEAD + "tables:\n  - rows: []\n", "line 5, column 5", "a table needs a name and rows"),
        (HEAD.replace("2025", "soon"), "line 3, column 7", "year: expected four digits"),
        (
            HEAD + "models:\n  a: {layers: 3}\n",
            "line 5, column 15",
            "no field of a model is named 'layers'",
        ),
        (
            HEAD + "models:\n  a: {parameters: 0}\n",
            "line 5, column 19",
            "more than zero, found '0'",
        ),
        (
            HEAD + "models:\n  a: {config: 8b, num_layers: 0}\n",
            "line 5, column 6",
            "a: a shape without weights",
        ),
        (HEAD + "models:\n  a: {active: 3B}\n", "line 5, column 15", "active: expected beside"),
        (
            HEAD + "models:\n  a: {config: 8b, active: 3B}\n",
            "line 5, column 27",
            "active: expected beside parameters, alone",
        ),
        (
            HEAD + "models:\n  a: {parameters: 3B, active: 4B}\n",
            "line 5, column 31",
            "active: expected at most 3B, found '4B'",
        ),
        (HEAD + "models:\n  a: {hidden_size: 3}\n", "line 5, column 6", "a: a shape lacks"),
        (HEAD + "models:\n  a: {num_layers: x}\n", "line 5, column 19", "expected a whole number"),
        (HEAD + "devices:\n  a: {memory: 1 GB}\n", "line 5, column 6", "bandwidth is missing"),
        ("title: &a [*a]\n", "line 1, column 8", "no anchors or aliases: write 'a' out"),
        (HEAD + "a: &b [1]\nc: &d [*b, *b]\n", "line 4, column 4", "no anchors or aliases"),
        ("title: " + 3000 * "[", "line 1, column 27", "more than 20 deep"),
    ],
)
def test_a_head_that_cannot_be_read(tmp_path, text, place, why):
    with pytest.raises(BadModelFile, match=f"claims.yaml: {place}.*{why}"):
        read(file(tmp_path, text))


@pytest.mark.parametrize(
    "old, new, place, why",
    [
        ("| model | t/s |", "| model | speed |", "line 11, column 11", "map it in the head"),
        ("| 8b | **65.2** | warm |", "| 8b | 65.2 |", "line 13, column 1", "expected 3 cells"),
        (
            '"Notes": "-"',
            '"Notes": tokens_per_s',
            "line 11, column 17",
            "tokens_per_s is given twice",
        ),
        ("**65.2**", "65.2 mph", "line 13, column 8", "no unit is written 'mph'"),
        ("---\ntitle", "title", "line 1, column 1", "between two lines of ---"),
        ("year: 2025", "year: [", "line 6, column 1", "not YAML"),
    ],
)
def test_markdown_that_cannot_be_read(tmp_path, old, new, place, why):
    path = file(tmp_path, MARKDOWN.replace(old, new, 1), "claims.md")
    with pytest.raises(BadModelFile, match=f"claims.md: {place}.*{why}"):
        read(path)


def test_a_markdown_row_without_claims_is_left_out(tmp_path):
    """A heading within a table, in a column that is left out, and a row of blanks."""
    rows = "| 8b | **65.2** | warm |\n| | | small models |\n|  |  |  |\n"
    path = file(tmp_path, MARKDOWN.replace("| 8b | **65.2** | warm |\n", rows, 1), "claims.md")
    assert len(read(path).tables[0].claims) == len(
        read(file(tmp_path, MARKDOWN, "plain.md")).tables[0].claims
    )


def test_cells_without_a_number(tmp_path):
    """N/A under a header with a unit, and an empty last cell."""
    cells = "| 8b | 14.96 |\n| 1b | N/A |\n| 8b ||\n"
    path = file(tmp_path, MARKDOWN.replace("| 8b | 14.96 |\n", cells), "claims.md")
    rows = read(path).tables[1].claims
    assert [sorted(claim.quantities) for claim in rows] == [["size"], [], []]


def test_files_that_are_no_claims(tmp_path):
    with pytest.raises(BadModelFile, match="No such file"):
        read(tmp_path / "gone.yaml")
    with pytest.raises(BadModelFile, match=r"ends in \.yaml, \.yml or \.md"):
        read(file(tmp_path, "a,b", "claims.csv"))
    (tmp_path / "claims.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadModelFile, match="cannot be read as UTF-8"):
        read(tmp_path / "claims.yaml")
