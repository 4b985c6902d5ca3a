"""An audit as Markdown: counts, then each table with verdict and arithmetic."""

import html

from ternax.audit.judge import Audit, Judged

_HEAD = """# Audit

Each row of these tables, recomputed from the shapes of the models, the datasheets of the devices
and the table's own numbers. **possible**: no limit is broken, and the share of the bound is
said. **impossible**: a limit is, by the factor given. **mislabelled**: the number is that of
something else, which is named. **unverifiable**: what is missing is named. What a claim leaves
open is filled in its favour and stands under "assuming".
"""


def markdown(audits: list[Audit]) -> str:
    """One page for all cases."""
    return "\n".join([_HEAD, *(line for audit in audits for line in _case(audit))]).rstrip() + "\n"


def summary(audit: Audit) -> str:
    """One line: how many rows came out how."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in audit.counts.items())
    return f"{audit.case.title}: {len(audit.rows)} rows: {counts}"


def _case(audit: Audit) -> list[str]:
    case = audit.case
    lines = [f"## {_cell(case.title)}", "", f"{_cell(case.source)}, {case.year}.", ""]
    lines += [summary(audit).removeprefix(f"{case.title}: ") + ".", ""]
    for name, rows in audit.tables:
        lines += [f"### {_cell(name)}", "", "| claim | verdict | arithmetic |", "|---|---|---|"]
        lines += [_row(judged) for judged in rows]
        lines.append("")
    return lines


def _row(judged: Judged) -> str:
    cells = []
    for finding in judged.findings:
        several = len({f.verdict for f in judged.findings}) > 1
        cells.append(f"{finding.verdict}: {finding.said}" if several else finding.said)
    says = _cell(judged.claim.says)
    return f"| {says} | **{judged.verdict}** | {'<br>'.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text for a cell: no markup of its own, since it comes from a file of claims."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())
