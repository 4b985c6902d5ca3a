"""Audits tables of published numbers: what physics and arithmetic say of each row.

`audit(read(path))` judges a file of claims; `markdown` prints it. `docs/audit.md` is the guide.
"""

from ternax.audit.claims import Case
from ternax.audit.findings import VERDICTS, Finding
from ternax.audit.judge import Audit, Judged, audit
from ternax.audit.reader import read
from ternax.audit.report import markdown, summary

__all__ = [
    "VERDICTS",
    "Audit",
    "Case",
    "Finding",
    "Judged",
    "audit",
    "markdown",
    "read",
    "summary",
]
