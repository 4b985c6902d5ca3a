"""Records as text: tables for a screen of 100 columns, and the report of a run.

A table never mixes kinds: measured, extrapolated and predicted numbers stand in
tables of their own, each under its kind's name.
"""

import statistics
import textwrap
from collections.abc import Sequence

_IDENTITY = (
    "experiment",
    "config",
    "scheme",
    "inputs",
    "backend",
    "device",
    "layers",
    "batch",
    "context",
    "seed",
)
_MAX_CELL = 24


def table(records, width: int = 100) -> str:
    """One block of lines per kind; no line is longer than `width`.

    What all records of a kind share stands in the block's heading, what differs
    becomes a column, then the median sample and every metric any of them has.
    Metrics that do not fit beside each other continue in a further block that
    repeats the leading columns.
    """
    kinds = dict.fromkeys(record.kind for record in records)
    blocks = [_block(kind, [r for r in records if r.kind == kind], width) for kind in kinds]
    return "\n\n".join(blocks)


def _block(kind: str, records, width: int) -> str:
    shared, leading = _leading(records, width)
    heading = textwrap.fill(f"{kind}: {', '.join(shared)}", width, subsequent_indent="  ")
    columns = []
    if any(record.samples for record in records):
        columns.append(("median", [_median(record) for record in records]))
        columns.append(("n", [str(len(r.samples)) if r.samples else "" for r in records]))
    for name in dict.fromkeys(name for record in records for name in record.metrics):
        columns.append((name, [format_metric(name, r.metrics.get(name)) for r in records]))

    groups: list[list] = []
    used = 0
    room = width - sum(_column_width(column) + 2 for column in leading)
    for column in columns or [("", [""] * len(records))]:
        need = _column_width(column) + 2
        if not groups or used + need > room:
            groups.append([])
            used = 0
        groups[-1].append(column)
        used += need
    lines = heading.splitlines()
    for i, group in enumerate(groups):
        # A row with nothing in a continuing block would only repeat its name.
        rows = [row for row in range(len(records)) if i == 0 or any(c[row] for _, c in group)]
        lines += _grid([(name, [cells[row] for row in rows]) for name, cells in leading + group])
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def _leading(records, width: int):
    """What all records share, in words, and the columns of what tells them apart.

    Long cells are cut until the columns leave half of the width to the numbers.
    """
    shared = []
    columns = [("phase", [record.phase for record in records])]
    for name in _IDENTITY:
        values = [getattr(record, name) for record in records]
        if len(set(values)) > 1:
            columns.append((name, [str(value) for value in values]))
        elif values[0] not in ("", 0):
            shared.append(f"{name} {values[0]}")
    if any(record.incomplete for record in records):
        columns.append(("state", ["incomplete" if r.incomplete else "" for r in records]))
    for longest in range(_MAX_CELL, 5, -1):
        columns = [(name, [_shorten(cell, longest) for cell in cells]) for name, cells in columns]
        if sum(_column_width(column) + 2 for column in columns) <= width // 2:
            break
    return shared, columns


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _heading_lines(name: str) -> list[str]:
    """A metric's name broken at underscores, so that columns stay narrow."""
    lines = [""]
    for word in name.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1]) + len(word) > 10:
            lines.append("")
        lines[-1] += word
    return lines


def _column_width(column) -> int:
    name, cells = column
    return max(map(len, [*_heading_lines(name), *cells]))


def _grid(columns) -> list[str]:
    headings = [_heading_lines(name) for name, _ in columns]
    height = max(map(len, headings))
    rows = [
        [([""] * (height - len(lines)) + lines)[i] for lines in headings] for i in range(height)
    ]
    rows += [[cells[i] for _, cells in columns] for i in range(len(columns[0][1]))]
    widths = [_column_width(column) for column in columns]
    # The first column is words, the others read best right-aligned.
    return [
        (
            "  "
            + row[0].ljust(widths[0])
            + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    ]


def columns(
    heads: Sequence[tuple[str, int]], rows: Sequence[Sequence[str]], width: int = 100
) -> list[str]:
    """Rows of cells under heads, a name and a least width each; the first stand left, the others
    right.

    A column in which no row has anything is left out. The first grows, and is cut, as far as a
    line of `width` has room for what it says.
    """
    kept = [i for i, cells in enumerate(zip(*rows, strict=True)) if i == 0 or any(cells)] or [0]
    table = [[name for name, _ in heads], *rows]
    widths = [max(heads[i][1], *(len(row[i]) for row in table)) for i in kept[1:]]
    longest = max(len(row[0]) for row in table)
    room = max(width - sum(widths) - len(widths), 4)
    first = min(max(heads[0][1], longest), room)
    lines = []
    for row in table:
        others = "".join(f" {row[i]:>{w}}" for i, w in zip(kept[1:], widths, strict=True))
        lines.append(f"{row[0]:{first}.{first}}{others}".rstrip())
    return lines


def _median(record) -> str:
    if not record.samples:
        return ""
    return f"{statistics.median(record.samples):.4g} {record.sample_unit}"


def format_metric(name: str, value) -> str:
    """A metric for reading: sizes in GiB or MiB, shares in percent, else four digits."""
    if value is None:
        return ""
    if "bytes" in name:
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if abs(value) >= size:
                return f"{value / size:.2f} {unit}"
        return f"{value} B"
    if "share" in name or "agreement" in name:
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def report(records, shown: Sequence[str] | None = None) -> str:
    """The run as a Markdown page: what was asked, on what, by which sources, and the tables.

    shown: lines instead of tables of records and their notes, as a command shows them itself.
    """
    if not records:
        return "# No records\n\nNothing was measured.\n"
    last = records[-1]
    lines = [f"# {last.experiment}: {last.config}", "", "| | |", "|---|---|"]
    for name in ("flags", "device", "backend", "versions", "commit", "source_sha256", "time_utc"):
        cell = " ".join(str(getattr(last, name)).split()).replace("|", "\\|")
        lines.append(f"| {name} | {cell} |")
    lines += ["", "```", *(shown or [table(records)]), "```", ""]
    if any(record.incomplete for record in records):
        lines += ["Stopped before the end: records marked incomplete hold fewer samples.", ""]
    if shown:
        return "\n".join(lines).rstrip() + "\n"
    notes = dict.fromkeys(record.note for record in records if record.note)
    return "\n".join([*lines, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def row(label: str, text: str, width: int = 100) -> str:
    """`text` behind a label, wrapped into a column of its own."""
    return textwrap.fill(
        text, width, initial_indent=f"{label:9}", subsequent_indent=" " * 9, break_on_hyphens=False
    )


def rate(number: float) -> str:
    """Three significant digits, never an exponent: "0.0123", "62.2", "367,000"."""
    digits = float(f"{number:.3g}")
    return f"{digits:,.0f}" if digits >= 100 else f"{digits:.12f}".rstrip("0").rstrip(".")


def decimal(nbytes: float) -> str:
    """Bytes that are moved, in the powers of ten of a bandwidth: "18.2 GB", "83.4 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= 0.5 * size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def binary(nbytes: float) -> str:
    """Bytes that are held, in the powers of two of a memory: "18.54 GiB", "4.51 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= 0.1 * size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 2**10:.2f} KiB"
