"""Every check over every claim of a case: a verdict for each row, with its arithmetic."""

import dataclasses
import graphlib
from collections.abc import Iterator

from ternax.audit import catalogue, law, parallel, size, speed, sums, trends
from ternax.audit.arithmetic import references
from ternax.audit.claims import Case, Claim
from ternax.audit.fields import QUANTITIES, SETTINGS_NEED
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
    alone = (*size.CHECKS, *speed.CHECKS, *law.CHECKS, *parallel.CHECKS)
    claims = [claim for table in case.tables for claim in table.claims]
    found = {
        id(claim): [
            *(finding for check in alone for finding in check(claim)),
            *(finding for check in catalogue.CHECKS for finding in check(claim, case)),
        ]
        for claim in claims
    }
    for table in case.tables:
        for trend in trends.CHECKS:
            for claim, finding in trend(table):
                found[id(claim)].append(finding)
    rows: dict[str, tuple[Quantity, str]] = {}
    for claim in claims:
        _refer(rows, claim, found[id(claim)])
    for claim in _in_order(claims):
        for check in sums.CHECKS:
            found[id(claim)] += check(claim, rows)
        found[id(claim)] += _missing(claim, not found[id(claim)])
        _refer(rows, claim, found[id(claim)])
    return Audit(
        case,
        tuple(
            (table.name, tuple(Judged(claim, tuple(found[id(claim)])) for claim in table.claims))
            for table in case.tables
        ),
    )


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


def _missing(claim: Claim, nothing: bool) -> Iterator[Finding]:
    """What a quantity or setting that no check could judge would need.

    nothing: no check had anything to say. What goes into another quantity that is judged is
    no claim of its own: a rate beside a price, say.
    """
    stated = {name: QUANTITIES[name].needs for name in claim.quantities}
    stated |= {name: SETTINGS_NEED[name] for name in SETTINGS_NEED if name in claim.settings}
    lacks = {
        name: gone
        for name, needs in stated.items()
        if (gone := [n for n in needs if not _has(claim, n)])
    }
    used = {
        word
        for name, needs in stated.items()
        if name not in lacks
        for need in needs
        for word in need.split(" or ")
    }
    said = [f"{name} needs {', '.join(gone)}" for name, gone in lacks.items() if name not in used]
    if said:
        yield Finding("unverifiable", f"too little to judge: {'; '.join(said)}")
    elif nothing and not claim.quantities:
        yield Finding("unverifiable", "it states no quantity")
    elif nothing:
        yield Finding("unverifiable", "too little to judge: a shape of the model is needed")


def _has(claim: Claim, need: str) -> bool:
    return any(n in claim.settings or n in claim.quantities for n in need.split(" or "))
