"""Checks of arithmetic: `of` expressions, energy, money, and what they inherit.

Numbers are intervals, as written; a sum is right when its interval meets the claimed one.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from ternax import roofline
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, equals
from ternax.audit.quantities import Quantity, UnknownUnit, parse, plain, words
from ternax.audit.subject import load_of, peak_of, readings, shape_of, tables_of
from ternax.errors import UsageError
from ternax.formats import FORMATS, TRIT_ENTROPY_BITS, get_format

Interval = tuple[float, float]
# "id.field" -> the quantity there, and the verdict of its row.
Rows = Mapping[str, tuple[Quantity, str]]


class NotArithmetic(ValueError):
    """An `of` that cannot be computed; the message says why."""


def _apply(operator: str, a: Interval, b: Interval) -> Interval:
    if operator == "/":
        if b[0] <= 0 <= b[1]:
            raise NotArithmetic("division by an interval that holds zero")
        ends = [x / y for x in a for y in b]
    elif operator == "*":
        ends = [x * y for x in a for y in b]
    else:
        ends = [x + y if operator == "+" else x - y for x in a for y in b]
    return min(ends), max(ends)


def evaluate(text: str, rows: Rows) -> Interval:
    """Left to right, * and / before + and -, operators between spaces; mean(a; b; c)."""
    if found := re.fullmatch(r"mean\((.+)\)", text.strip()):
        parts = [evaluate(part, rows) for part in found[1].split(";")]
        return sum(p[0] for p in parts) / len(parts), sum(p[1] for p in parts) / len(parts)
    tokens = re.split(r"\s+([-+*/])\s+", text.strip())
    terms: list[Interval] = [_term(tokens[0], rows)]
    signs = ["+"]
    for operator, token in zip(tokens[1::2], tokens[2::2], strict=True):
        if operator in "*/":
            terms[-1] = _apply(operator, terms[-1], _term(token, rows))
        else:
            terms.append(_term(token, rows))
            signs.append(operator)
    total: Interval = (0.0, 0.0)
    for sign, term in zip(signs, terms, strict=True):
        total = _apply(sign, total, term)
    return total


def _term(token: str, rows: Rows) -> Interval:
    if token in rows:
        return rows[token][0].low, rows[token][0].high
    if re.fullmatch(r"[A-Za-z_][\w-]*\.\w+", token):
        raise NotArithmetic(f"no row has {token}; known: {', '.join(rows) or 'none'}")
    try:
        found = parse(token, "")
    except UnknownUnit as error:
        raise NotArithmetic(str(error)) from error
    if re.fullmatch(r"\d+", token) and found.dimension == "number":
        exact = float(token)  # a bare count, as in "x - 1"
        return exact, exact
    return found.low, found.high


def result(claim: Claim, rows: Rows) -> Iterator[Finding]:
    """`result` against `of`: formats of a model, or arithmetic on numbers and other rows."""
    claimed, text = claim.quantities.get("result"), claim.settings.get("of")
    if claimed is None or text is None:
        return
    formats = re.fullmatch(r"(\w+) / (\w+)", text)
    if formats and all(_is_format(name) for name in formats.groups()):
        yield _of_formats(claim, claimed, *formats.groups())
        return
    try:
        low, high = evaluate(text, rows)
    except NotArithmetic as error:
        yield Finding("unverifiable", f"{text}: {error}")
        return
    yield equals(claimed, low, text, high=high, instead=_other_pairs(text, rows))
    for token in re.split(r"\s+[-+*/]\s+|;", text.replace("mean(", "").rstrip(")")):
        verdict = rows[token.strip()][1] if token.strip() in rows else "possible"
        if verdict in ("mislabelled", "impossible"):
            said = f"{token.strip()} = {rows[token.strip()][0].text} is itself {verdict}"
            yield Finding("mislabelled", f"{said}: what follows from it is of something else")


def _is_format(name: str) -> bool:
    try:
        return bool(get_format(name))
    except UsageError:
        return False


def _of_formats(claim: Claim, claimed: Quantity, one: str, two: str) -> Finding:
    """A ratio of sizes of one model in two formats."""
    above, below = get_format(one), get_format(two)
    plain_ratio = above.bits_per_weight / below.bits_per_weight
    entropy = (above.bits_per_weight / TRIT_ENTROPY_BITS, "bits over log2(3): an entropy, unstored")
    shape = shape_of(claim)
    if shape is None:
        how = f"{plain(above.bits_per_weight)} / {plain(below.bits_per_weight)} bits a weight"
        return equals(claimed, plain_ratio, how, instead=[entropy])
    table = (claim.tables or (tables_of(claim) if claim.weights else FORMATS["fp16"])).name
    wide = shape.load(above.name, embedding=above.name, head=above.name).weight_bytes
    narrow = shape.load(below.name, embedding=table, head=table).weight_bytes
    instead = [(plain_ratio, "that of the projections alone"), entropy]
    instead += [
        (
            wide / other.load(below.name, embedding=table, head=table).weight_bytes,
            f"one model over {name}",
        )
        for name, other in readings(shape)
    ]
    how = f"{shape.name}: {words(wide, 'bytes')} in {one} / {words(narrow, 'bytes')} in {two}"
    return equals(claimed, wide / narrow, how, instead=instead, assumes=f"tables {table} beside")


def _other_pairs(text: str, rows: Rows) -> list[tuple[float, str]]:
    """For a.field / b.field: what other pairs of that column give."""
    pair = re.fullmatch(r"(\S+)\.(\w+) / (\S+)\.\2", text.strip())
    if pair is None:
        return []
    column = {key: found for key, (found, _) in rows.items() if key.endswith(f".{pair[2]}")}
    return [
        (a.nominal / b.nominal, f"{x} / {y}")
        for x, a in column.items()
        for y, b in column.items()
        if x != y and f"{x} / {y}" != text.strip() and b.nominal
    ]


def energy(claim: Claim, rows: Rows) -> Iterator[Finding]:
    """tokens/s over watts is tokens a joule, whatever a table calls it."""
    del rows
    q = claim.quantities
    per_joule, power, rate = q.get("tokens_per_joule"), q.get("power"), q.get("tokens_per_s")
    if per_joule is not None and per_joule.dimension == "tokens/watt":
        yield Finding("mislabelled", f"{per_joule.text}: tokens/s over watts are tokens a joule")
        per_joule = dataclasses.replace(per_joule, dimension="tokens/joule")
    if power is None or rate is None:
        return
    low, high = rate.low / power.high, rate.high / power.low
    if per_joule is not None:
        yield equals(per_joule, low, f"{rate.text} / {power.text}", high=high)
    if "joules_per_token" in q:
        how = f"{power.text} / {rate.text}"
        yield equals(q["joules_per_token"], 1 / high, how, high=1 / low)
    load, device = load_of(claim), claim.device
    if load is not None and device is not None and claim.settings.get("phase") == "decode":
        peak = peak_of(claim, device)
        one = roofline.decode_step(load, device.bandwidth_gb_per_s, peak[0] if peak else math.inf)
        least = roofline.joules_per_token(power.nominal, one.tokens_per_s)
        text = f"one sequence at its bound: {words(one.tokens_per_s, 'tokens/s')}"
        text += f", {words(1 / least, 'tokens/joule')}, {words(least, 'joules/token')}"
        yield Finding("possible", text)


def money(claim: Claim, rows: Rows) -> Iterator[Finding]:
    del rows
    q = claim.quantities
    rate, price, hourly = q.get("tokens_per_s"), q.get("price"), q.get("tokens_per_hour")
    if hourly is not None and rate is not None:
        how = f"{rate.text} x 3600 s"
        # Without its dimension: "3.87M" and "3.87M tokens/h" both say it.
        plain_count = dataclasses.replace(hourly, dimension="number")
        yield equals(plain_count, 3600 * rate.low, how, high=3600 * rate.high)
    if price is None:
        return
    cost = q.get("cost")
    if cost is not None and (rate is not None or hourly is not None):
        if rate is not None:
            low, high = price.low / (3600 * rate.high), price.high / (3600 * rate.low)
            how = f"{price.text} / (3600 x {rate.text})"
        else:
            assert hourly is not None
            low, high = price.low / hourly.high, price.high / hourly.low
            how = f"{price.text} / {hourly.text}"
        yield equals(cost, low, how, high=high)
    load, device = load_of(claim), claim.device
    if cost is not None and load is not None and device is not None:
        peak = peak_of(claim, device)
        one = roofline.decode_step(load, device.bandwidth_gb_per_s, peak[0] if peak else math.inf)
        least = roofline.usd_per_million_tokens(price.nominal, one.tokens_per_s) / 1e6
        text = f"one sequence at its bound pays {words(least, 'dollars/token')} at {price.text}"
        yield Finding("possible", text)


CHECKS = (result, energy, money)
