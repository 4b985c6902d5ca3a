"""Checks of arithmetic: `of` expressions, energy, money, and what they inherit.

Numbers are intervals, as written; a sum is right when its interval meets the claimed one.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from ternax import roofline
from ternax.audit.arithmetic import AVERAGES, NotArithmetic, Rows, evaluate, references
from ternax.audit.claims import Claim
from ternax.audit.findings import Finding, equals, shown
from ternax.audit.quantities import Quantity, base, plain, unit_words, words
from ternax.audit.subject import ORDINARY, load_of, peak_of, readings, shape_of, tables_of
from ternax.errors import UsageError
from ternax.formats import FORMATS, TRIT_ENTROPY_BITS, get_format


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
        value = evaluate(text, rows)
    except NotArithmetic as error:
        yield Finding("unverifiable", f"{text}: {error}")
        return
    factor, unit = base(claimed.dimension)
    if value.unit != unit:
        found = f"{text} is in {unit_words(value.unit)}, {claimed.text} in {unit_words(unit)}"
        if value.unit and unit:
            yield Finding("mislabelled", f"{found}: another unit")
        else:
            yield Finding("unverifiable", f"{found}: expected one unit on both sides")
        return
    instead = [*_other_pairs(text, rows), *_other_averages(text, rows, factor)]
    yield equals(claimed, value.low / factor, text, high=value.high / factor, instead=instead)
    for name in (".".join(pair) for pair in references(text)):
        said, verdict = rows[name]
        if verdict in ("mislabelled", "impossible"):
            text = f"{name} = {said.text} is itself {verdict}: what follows is of something else"
            yield Finding("mislabelled", text)


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


def _other_averages(text: str, rows: Rows, factor: float) -> list[tuple[float, str]]:
    """For mean(...) and median(...): what the other gives."""
    found = re.match(rf"\s*({'|'.join(AVERAGES)})\(", text)
    if found is None:
        return []
    out = []
    for other in AVERAGES.keys() - {found[1]}:
        value = evaluate(text.replace(found[1], other, 1), rows)
        out.append(((value.low + value.high) / 2 / factor, f"the {other} of these"))
    return out


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
        most = power.high / rate.low
        yield equals(q["joules_per_token"], power.low / rate.high, how, high=most)
    load, device = load_of(claim), claim.device
    energies = not q.keys().isdisjoint(("tokens_per_joule", "joules_per_token"))
    decodes = energies and claim.settings.get("phase") == "decode"
    if load is not None and device is not None and decodes:
        peak = peak_of(claim, device)
        one = roofline.decode_step(
            load,
            device.bandwidth_gb_per_s,
            peak[0] if peak else math.inf,
            devices=claim.count("devices"),
        )
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
        one = roofline.decode_step(
            load,
            device.bandwidth_gb_per_s,
            peak[0] if peak else math.inf,
            devices=claim.count("devices"),
        )
        least = roofline.usd_per_million_tokens(price.nominal, one.tokens_per_s) / 1e6
        text = f"one sequence at its bound pays {shown(cost, least)} at {price.text}, "
        text += f"{shown(cost, least / ORDINARY)} at {100 * ORDINARY:.0f} % of it"
        yield Finding("possible", text)


CHECKS = (result, energy, money)
