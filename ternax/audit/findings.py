"""Verdicts, and how a written quantity is held against a computed one."""

import dataclasses
import re
from collections.abc import Iterable

from ternax.audit.quantities import Quantity, plain, words

# Worst last: what is impossible stays so, and a row is possible when all of it is.
VERDICTS = ("possible", "unverifiable", "mislabelled", "impossible")
# Shares of a bound below this are noted: nothing forbids them.
IMPROBABLE = 0.01


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check says of one claim.

    Attributes:
      verdict: one of VERDICTS.
      text: the arithmetic; for impossible the limit and the factor, for mislabelled what the
        number is instead, for unverifiable what is missing.
      assumes: what is not in the claim and was taken for granted, in the claim's favour.
    """

    verdict: str
    text: str
    assumes: str = ""

    @property
    def said(self) -> str:
        """The arithmetic, with what was taken for granted behind it."""
        return self.text + (f" (assuming {self.assumes})" if self.assumes else "")


def worst(findings: Iterable[Finding]) -> str:
    found = [finding.verdict for finding in findings]
    return max(found, key=VERDICTS.index) if found else "unverifiable"


def factor(claimed: Quantity, computed: float) -> str:
    """How far the claimed number is from the computed one: "3.2 times more"."""
    if claimed.nominal <= 0 or computed <= 0:
        return "which is not it"
    ratio = claimed.nominal / computed
    how = "more" if ratio > 1 else "less"
    if 0.95 < ratio < 1.05:
        return f"{plain(100 * abs(ratio - 1), 2)} % {how}"
    return f"{plain(max(ratio, 1 / ratio), 3)} times {how}"


def shown(claimed: Quantity, value: float) -> str:
    """A computed value in the words of the claimed one: in percent, or for a million tokens."""
    if claimed.dimension == "dollars/token" and not re.search("1e9|Gtok|B tok", claimed.text):
        return f"{plain(1e6 * value)} $/Mtok"
    percent = "%" in claimed.text and claimed.dimension == "number"
    return f"{plain(100 * value)} %" if percent else words(value, claimed.dimension)


def equals(
    claimed: Quantity,
    low: float,
    how: str,
    *,
    high: float | None = None,
    instead: Iterable[tuple[float, str]] = (),
    assumes: str = "",
) -> Finding:
    """A quantity that has one right value, or one in an interval.

    instead: (value, what it is): other readings; the nearest that meets makes it mislabelled.
    """
    high = low if high is None else high
    right = shown(claimed, low)
    if high > low + 1e-3 * abs(low):
        right += f" to {shown(claimed, high)}"
    said = f"{how} = {right}"
    if claimed.meets(low, high):
        return Finding("possible", f"{said}; claimed {claimed.text}", assumes)
    if other := nearest(claimed, instead):
        return Finding("mislabelled", f"{said}; {claimed.text} is {other}", assumes)
    more = factor(claimed, high if claimed.low > high else low)
    return Finding("impossible", f"{said}; claimed {claimed.text}, {more}", assumes)


def nearest(claimed: Quantity, instead: Iterable[tuple[float, str]]) -> str:
    """The reading that a claimed quantity meets best, in words; "" when it meets none."""
    met = [pair for pair in instead if claimed.meets(pair[0])]
    if not met:
        return ""
    value, what = min(met, key=lambda pair: claimed.distance(pair[0]))
    return f"{what} ({shown(claimed, value)})"


def at_least(claimed: Quantity, floor: float, how: str, assumes: str = "") -> Finding:
    """A quantity that physics bounds from below."""
    said = f"{how}: at least {words(floor, claimed.dimension)}; claimed {claimed.text}"
    if claimed.high >= floor * (1 - 1e-9):
        return Finding("possible", said + _far(floor, claimed.nominal), assumes)
    return Finding("impossible", f"{said}, {factor(claimed, floor)}", assumes)


def at_most(claimed: Quantity, ceiling: float, how: str, assumes: str = "") -> Finding:
    """A quantity that physics bounds from above; says which share of the bound it is."""
    said = f"{how}: at most {words(ceiling, claimed.dimension)}; claimed {claimed.text}"
    if claimed.low <= ceiling * (1 + 1e-9):
        share = f"{plain(100 * claimed.nominal / ceiling, 2)} % of it"
        if claimed.nominal > ceiling:
            share = f"{plain(claimed.low, 3)} is within its digits"
        said += f", {share}{_far(claimed.nominal, ceiling)}"
        return Finding("possible", said, assumes)
    return Finding("impossible", f"{said}, {factor(claimed, ceiling)}", assumes)


def _far(less: float, more: float) -> str:
    """A note where a claim is so far on the right side of its bound that it may be another's."""
    return (
        f", improbable: {plain(more / less, 3)} times off" if 0 < less < IMPROBABLE * more else ""
    )
