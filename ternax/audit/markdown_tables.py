"""Markdown tables as rows of claims, with the line and column of every cell."""

import re

from ternax.audit.fields import NOTHING, QUANTITIES, SETTINGS
from ternax.audit.nodes import Leaf, Source, near

Rows = list[dict[str, Leaf]]


def tables(
    source: Source, lines: list[str], first: int, renamed: dict[str, str]
) -> list[tuple[str, Rows]]:
    """(heading, rows) of every table.

    Args:
      lines, first: of the file behind its head, and the number of the first.
      renamed: header as written -> field, with a unit in brackets where cells have none.
    """
    found: list[tuple[str, Rows]] = []
    heading, header = "claims", None
    for number, line in enumerate(lines, first):
        if title := re.match(r"#+\s+(.*)", line):
            heading = title[1].strip()
        if not line.lstrip().startswith("|"):
            header = None
        elif header is None:
            header = _header(source, line, number, renamed)
            found.append((heading, []))
        elif not re.fullmatch(r"[\s|:-]+", line):
            # A row that fills only columns left out is a heading within the table.
            if row := _row(source, header, line, number):
                found[-1][1].append(row)
    return found


def _header(
    source: Source, line: str, number: int, renamed: dict[str, str]
) -> list[tuple[str, str]]:
    """(field, unit) of each column; field "-" for one to leave out."""
    out: list[tuple[str, str]] = []
    for cell, column in _cells(line):
        name = renamed.get(cell, cell)
        unit = re.fullmatch(r"(\w+|-)\s*(?:[(\[](.+)[)\]])?", name)
        if unit is None or (unit[1] not in (*QUANTITIES, *SETTINGS, "-")):
            close = near(name, [*QUANTITIES, *SETTINGS])
            raise source.refuse(
                number,
                column,
                f"no field is named {name!r}; {close}; map it in the head: "
                f"`columns: {{{cell!r}: FIELD}}`, or - to leave it out",
            )
        if unit[1] != "-" and unit[1] in [field for field, _ in out]:
            why = f"{unit[1]} is given twice: two columns of one field; leave one out with -"
            raise source.refuse(number, column, why)
        out.append((unit[1], unit[2] or ""))
    return out


def _row(source: Source, header: list[tuple[str, str]], line: str, number: int) -> dict[str, Leaf]:
    cells = _cells(line)
    if len(cells) != len(header):
        raise source.refuse(
            number, 1, f"expected {len(header)} cells as in the header, found {len(cells)}"
        )
    row = {}
    for (name, unit), (text, column) in zip(header, cells, strict=True):
        if name != "-" and text:
            row[name] = (text if text in NOTHING else f"{text} {unit}".strip(), number, column)
    return row


def _cells(line: str) -> list[tuple[str, int]]:
    """(text, column) of a Markdown row's cells."""
    inner = line.strip().removeprefix("|")
    if not inner.endswith("\\|"):
        inner = inner.removesuffix("|")  # one alone: before it may stand an empty cell
    parts = re.split(r"(?<!\\)\|", inner)
    out, column = [], line.index("|") + 2
    for part in parts:
        lead = len(part) - len(part.lstrip())
        out.append((part.strip().replace("**", "").replace("\\|", "|"), column + lead))
        column += len(part) + 1
    return out
