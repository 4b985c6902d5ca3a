"""Every check over every claim of a case: a verdict for each row, with its arithmetic."""

import dataclasses

from ternax.audit import catalogue, size, speed, sums, trends
from ternax.audit.claims import Case, Claim, Table
from ternax.audit.findings import VERDICTS, Finding, worst
from ternax.audit.quantities import Quantity

# What each quantity cannot be judged without.
NEEDS = {
    "parameters": ("model",),
    "size": ("model", "weights"),
    "memory": ("model", "weights"),
    "cache": ("model", "context"),
    "bits": ("weights",),
    "tokens_per_s": ("model", "device", "weights"),
    "latency": ("model", "device", "weights", "phase"),
    "kernel_time": ("device", "weights", "rows", "columns"),
    "batch_gain": ("batch",),
    "result": ("of",),
    "similarity": ("noise",),
    "cost": ("price", "tokens_per_s"),
    "tokens_per_joule": ("power", "tokens_per_s"),
    "joules_per_token": ("power", "tokens_per_s"),
    "tokens_per_hour": ("tokens_per_s",),
    "price": ("cost", "tokens_per_s"),
    "share_of_bound": ("tokens_per_s", "model", "device", "weights", "phase"),
    "left_out": ("context", "model", "device", "weights"),
    "noise": ("similarity",),
    "weights_read": ("phase",),
    "hand_overs": ("model",),
    "operations": ("model",),
    "compute_time": ("model", "device"),
    "compute_only_tokens_per_s": ("model", "device"),
    "read_time": ("model", "device", "weights"),
    "idle": ("model", "device", "weights"),
    "intensity_gap": ("device", "weights"),
    "critical_intensity": ("device",),
    "devices_needed": ("model", "device", "weights"),
    "bandwidth": ("device",),
    "device_memory": ("device",),
    "peak": ("device",),
    "power": ("device",),
}
# The same of what a setting claims.
SETTINGS_NEED = {
    "fits": ("model", "weights", "device"),
    "bottleneck": ("model", "weights", "device"),
    "interactive": ("model", "weights", "device"),
    "faster_than": ("device",),
    "cheaper_than": ("device", "price"),
    "runs_on": ("weights",),
    "of": ("result",),
}


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
    """Judges each row alone, then its table, then sums that refer to other rows."""
    first = {
        id(claim): [
            *(finding for check in (*size.CHECKS, *speed.CHECKS) for finding in check(claim)),
            *(finding for check in catalogue.CHECKS for finding in check(claim, case)),
        ]
        for table in case.tables
        for claim in table.claims
    }
    for table in case.tables:
        for trend in trends.CHECKS:
            for claim, finding in trend(table):
                first[id(claim)].append(finding)
    rows = _rows(case.tables, first)
    judged = []
    for table in case.tables:
        done = []
        for claim in table.claims:
            findings = list(first[id(claim)])
            for check in sums.CHECKS:
                findings += check(claim, rows)
            done.append(Judged(claim, tuple(findings or [_missing(claim)])))
        judged.append((table.name, tuple(done)))
    return Audit(case, tuple(judged))


def _rows(tables: tuple[Table, ...], findings) -> dict[str, tuple[Quantity, str]]:
    """ "id.field" -> its quantity and its row's verdict, of all rows with an id."""
    return {
        f"{claim.settings['id']}.{field}": (quantity, worst(findings[id(claim)]))
        for table in tables
        for claim in table.claims
        if "id" in claim.settings
        for field, quantity in claim.quantities.items()
    }


def _missing(claim: Claim) -> Finding:
    """What a row that no check could judge would need."""
    lacks = [
        f"{field} needs {', '.join(gone)}"
        for field in claim.quantities
        if (gone := [name for name in NEEDS.get(field, ()) if not _has(claim, name)])
    ]
    lacks += [
        f"{name} needs {', '.join(gone)}"
        for name, needs in SETTINGS_NEED.items()
        if name in claim.settings and (gone := [field for field in needs if not _has(claim, field)])
    ]
    if not claim.quantities and not lacks:
        return Finding("unverifiable", "it states no quantity")
    return Finding(
        "unverifiable", f"too little to judge: {'; '.join(lacks) or 'a model or device'}"
    )


def _has(claim: Claim, name: str) -> bool:
    return name in claim.settings or name in claim.quantities
