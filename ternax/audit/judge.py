"""Every check over every claim of a case: a verdict for each row, with its arithmetic."""

import dataclasses
import graphlib
from collections.abc import Iterator

from ternax.audit import catalogue, gaps, law, parallel, size, speed, sums, trends
from ternax.audit.arithmetic import Rows, references
from ternax.audit.claims import Case, Claim
from ternax.audit.findings import VERDICTS, Finding, worst
from ternax.audit.quantities import Quantity


@dataclasses.dataclass(frozen=True)
class Judged:
    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        return worst(self.findings)


@dataclasses.dataclass(frozen=True)
class Audit:
    """A case with the verdicts of its rows, table by table."""

    case: Case
    tables: tuple[tuple[str, tuple[Judged, ...]], ...]

    @property
    def rows(self) -> list[Judged]:
        return [judged for _, rows in self.tables for judged in rows]

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> rows, worst first."""
        found = [judged.verdict for judged in self.rows]
        return {verdict: found.count(verdict) for verdict in reversed(VERDICTS)}


def audit(case: Case) -> Audit:
    """Judges each row alone, then its table, then sums, behind the rows that they refer to."""
    claims = [claim for table in case.tables for claim in table.claims]
    found = {id(claim): _alone(claim, case) for claim in claims}
    touched: dict[int, set[str]] = {id(claim): set() for claim in claims}
    for table in case.tables:
        for trend, fields in trends.CHECKS:
            for claim, finding in trend(table):
                found[id(claim)].append(finding)
                touched[id(claim)].update(fields)
    rows: dict[str, tuple[Quantity, str]] = {}
    for claim in claims:
        _refer(rows, claim, found[id(claim)])

    def judge(claim: Claim) -> list[Finding]:
        return _alone(claim, case) + _sums(claim, rows)

    for claim in _in_order(claims):
        found[id(claim)] += _sums(claim, rows)
        found[id(claim)] += gaps.unjudged(claim, judge, touched[id(claim)])
        _refer(rows, claim, found[id(claim)])
    return Audit(
        case,
        tuple(
            (table.name, tuple(Judged(claim, tuple(found[id(claim)])) for claim in table.claims))
            for table in case.tables
        ),
    )


def _alone(claim: Claim, case: Case) -> list[Finding]:
    checks = (*size.CHECKS, *speed.CHECKS, *law.CHECKS, *parallel.CHECKS)
    return [
        *(finding for check in checks for finding in check(claim)),
        *(finding for check in catalogue.CHECKS for finding in check(claim, case)),
    ]


def _sums(claim: Claim, rows: Rows) -> list[Finding]:
    return [finding for check in sums.CHECKS for finding in check(claim, rows)]


def _refer(rows: dict[str, tuple[Quantity, str]], claim: Claim, findings: list[Finding]) -> None:
    """ "id.field" -> its quantity and its row's verdict, of a row with an id."""
    if "id" in claim.settings:
        for field, quantity in claim.quantities.items():
            rows[f"{claim.settings['id']}.{field}"] = quantity, worst(findings)


def _in_order(claims: list[Claim]) -> Iterator[Claim]:
    """Claims behind those that their `of` names, so that a verdict is inherited through all."""
    named = {claim.settings["id"]: i for i, claim in enumerate(claims) if "id" in claim.settings}
    graph = {
        i: {named[name] for name, _ in references(claim.settings.get("of", "")) if name in named}
        for i, claim in enumerate(claims)
    }
    return (claims[i] for i in graphlib.TopologicalSorter(graph).static_order())
