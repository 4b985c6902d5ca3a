"""The arithmetic of `of`: sums, products and means of intervals that carry their unit.

Bytes stay bytes: 3 GB / 1 s is in bytes/s, and 3 GB + 1 s is refused. Tokens are a count.
"""

import dataclasses
import re
import statistics
from collections.abc import Callable, Iterator, Mapping

from ternax.audit.quantities import Quantity, Unit, UnknownUnit, base, parse, unit_words

# "id.field" -> the quantity there, and the verdict of its row.
Rows = Mapping[str, tuple[Quantity, str]]
AVERAGES: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
}


class NotArithmetic(ValueError):
    """An `of` that cannot be computed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An interval in base units (bytes, s, J, dollars, operations), and which they are."""

    low: float
    high: float
    unit: Unit = ()


def evaluate(text: str, rows: Rows) -> Value:
    """Left to right, * and / before + and -, operators between spaces; mean(a; b), median(a; b).

    Raises NotArithmetic: an unknown row, no number, other units added, zero divided by.
    """
    if found := re.fullmatch(rf"({'|'.join(AVERAGES)})\((.+)\)", text.strip()):
        parts = [evaluate(part, rows) for part in found[2].split(";")]
        for part in parts[1:]:
            _alike(parts[0], part, found[1])
        average = AVERAGES[found[1]]
        lows, highs = [part.low for part in parts], [part.high for part in parts]
        return Value(average(lows), average(highs), parts[0].unit)
    tokens = re.split(r"\s+([-+*/])\s+", text.strip())
    terms = [_term(tokens[0], rows)]
    signs = []
    for operator, token in zip(tokens[1::2], tokens[2::2], strict=True):
        if operator in "*/":
            terms[-1] = _product(operator, terms[-1], _term(token, rows))
        else:
            terms.append(_term(token, rows))
            signs.append(operator)
    total = terms[0]
    for sign, term in zip(signs, terms[1:], strict=True):
        _alike(total, term, sign)
        ends = (term.low, term.high) if sign == "+" else (-term.high, -term.low)
        total = Value(total.low + ends[0], total.high + ends[1], total.unit)
    return total


def references(text: str) -> Iterator[tuple[str, str]]:
    """(id, field) of every other row that an `of` names."""
    inner = re.sub(rf"^\s*(?:{'|'.join(AVERAGES)})\(|\)\s*$", "", text)
    for token in re.split(r"\s+[-+*/]\s+|;", inner):
        if found := re.fullmatch(r"([^\s.]+)\.([A-Za-z_]\w*)", token.strip()):
            yield found[1], found[2]


def _alike(a: Value, b: Value, operator: str) -> None:
    if a.unit != b.unit:
        between = f"{unit_words(a.unit)} and {unit_words(b.unit)}"
        raise NotArithmetic(f"{operator} between {between}: expected one unit")


def _product(operator: str, a: Value, b: Value) -> Value:
    if operator == "/" and b.low <= 0 <= b.high:
        raise NotArithmetic("division by an interval that holds zero")
    ends = [x / y if operator == "/" else x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    powers = dict(a.unit)
    for name, power in b.unit:
        powers[name] = powers.get(name, 0) + (power if operator == "*" else -power)
    unit = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Value(min(ends), max(ends), unit)


def _term(token: str, rows: Rows) -> Value:
    token = token.strip()
    if token in rows:
        return _of(rows[token][0])
    if list(references(token)):
        raise NotArithmetic(f"no row has {token}; known: {', '.join(rows) or 'none'}")
    try:
        found = parse(token, "")
    except UnknownUnit as error:
        raise NotArithmetic(str(error)) from error
    if re.fullmatch(r"\d+", token):
        return Value(float(token), float(token))  # a bare count, as in "x - 1"
    return _of(found)


def _of(quantity: Quantity) -> Value:
    factor, unit = base(quantity.dimension)
    return Value(quantity.low * factor, quantity.high * factor, unit)
