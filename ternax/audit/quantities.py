"""Numbers as people write them: "~298,000 tok/s", "50-60 TPS", "59.1B", "200-400 MB".

A quantity is the interval its digits stand for: half a unit of the last digit on both
sides (trailing zeros of a whole number are not digits: 140 is 135 to 145), what stands behind
"±" where that is more, a twentieth more for "~", everything above for "+" or ">". "GB" covers
1e9 and 2**30 bytes, since both are written so.
"""

import dataclasses
import difflib
import math
import re


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is written, as an interval in base units (bytes, s, tokens/s, W, FLOP/s, dollars).

    `nominal` is the number itself, of a range its middle, with the smaller of two units.
    """

    low: float
    high: float
    dimension: str
    text: str
    nominal: float

    def distance(self, value: float) -> float:
        """How far a value is from the number or, where that is a range, from its middle."""
        return abs(math.log(value / self.nominal)) if value > 0 < self.nominal else math.inf

    def meets(self, low: float, high: float | None = None) -> bool:
        """Whether some value is in both intervals."""
        return self.low <= (low if high is None else high) and low <= self.high


_BYTES = {
    "B": (1.0, 1.0),
    "KB": (1e3, 2.0**10),
    "kB": (1e3, 2.0**10),
    "MB": (1e6, 2.0**20),
    "GB": (1e9, 2.0**30),
    "TB": (1e12, 2.0**40),
    "KiB": (2.0**10, 2.0**10),
    "MiB": (2.0**20, 2.0**20),
    "GiB": (2.0**30, 2.0**30),
    "TiB": (2.0**40, 2.0**40),
}


def _same(dimension: str, **factors: float) -> dict[str, tuple[str, float, float]]:
    return {name: (dimension, factor, factor) for name, factor in factors.items()}


def _spelled(dimension: str, factor: float, *names: str) -> dict[str, tuple[str, float, float]]:
    return dict.fromkeys(names, (dimension, factor, factor))


# Unit as written -> dimension, smallest and largest factor to base units.
UNITS: dict[str, tuple[str, float, float]] = {
    **{unit: ("bytes", *factors) for unit, factors in _BYTES.items()},
    **_same("seconds", s=1, sec=1, seconds=1, ms=1e-3, us=1e-6, µs=1e-6, min=60),
    **_spelled("seconds", 1e-3, "ms/token", "ms/tok"),
    **_spelled("seconds", 1, "s/token", "s/tok"),
    **_spelled("tokens/s", 1, "tok/s", "tokens/s", "t/s", "TPS", "tps", "tokens/sec", "tok/sec"),
    **_spelled("tokens/s", 1, "tokens/second", "tokens per second", "toks/s", "T/s"),
    **_spelled("tokens/s", 1e3, "ktok/s", "Ktok/s", "ktokens/s"),
    **_spelled("tokens/s", 1 / 60, "tok/min", "tokens/min", "TPM"),
    **_spelled("tokens/hour", 1, "tok/h", "tokens/h", "tokens/hour"),
    **_spelled("tokens/joule", 1, "tok/J", "tokens/J", "tokens/joule", "tok/s/W", "tokens/s/W"),
    **_spelled("tokens/watt", 1, "tok/W", "tokens/W", "tokens/Watt", "tokens/watt"),
    **_spelled("joules/token", 1, "J/token", "J/tok"),
    **_spelled("joules/token", 1e-3, "mJ/token", "mJ/tok"),
    **_same("watts", W=1, kW=1e3, Watt=1, watts=1),
    **_spelled("bytes/s", 1e9, "GB/s", "GB/sec", "GBps"),
    **_spelled("bytes/s", 1e9 / 8, "Gb/s", "Gbit/s", "Gbps"),
    **_spelled("bytes/s", 1e6, "MB/s"),
    **_spelled("bytes/s", 1e12, "TB/s"),
    **_spelled("bytes/s", 1e15, "PB/s"),
    **_spelled("bytes/s", 2.0**30, "GiB/s"),
    **_spelled("operations/s", 1e9, "GFLOP/s", "GFLOPS", "GOPS"),
    **_spelled("operations/s", 1e12, "TFLOP/s", "TFLOPS", "TFLOPs", "TOPS", "TOP/s"),
    **_spelled("operations/s", 1e15, "PFLOP/s", "PFLOPS", "POPS"),
    **_spelled("operations", 1, "FLOP", "FLOPs"),
    **_same("operations", MFLOP=1e6, GFLOP=1e9, TFLOP=1e12, PFLOP=1e15),
    **_spelled("operations/byte", 1, "FLOP/B", "FLOP/byte", "FLOPs/byte", "flop/B"),
    **_spelled("dollars/hour", 1, "$/h", "$/hour", "USD/h", "$/hr", "USD/hr", "USD/hour"),
    **_spelled("dollars/token", 1e-3, "$/ktok", "$/1K tokens", "$/1k tokens", "$/1000 tokens"),
    **_spelled("dollars/token", 1e-6, "$/Mtok", "$/M tokens", "$/1M tokens", "$/1e6 tokens"),
    **_spelled("dollars/token", 1e-9, "$/Gtok", "$/B tokens", "$/1B tokens", "$/1e9 tokens"),
    **_spelled("bits", 1, "bit", "bits", "bpw", "bits/weight"),
    **_spelled("number", 1, "", "x", "×", "tokens", "token", "params", "parameters", "layers"),
    **_spelled("number", 0.01, "%"),
}
# What the words of a dimension are made of: a factor to base units, and their powers. Tokens
# and numbers are counts; a watt is a joule a second.
Unit = tuple[tuple[str, int], ...]
_MADE_OF: dict[str, tuple[float, dict[str, int]]] = {
    "number": (1, {}),
    "tokens": (1, {}),
    "bytes": (1, {"bytes": 1}),
    "bits": (1 / 8, {"bytes": 1}),
    "seconds": (1, {"seconds": 1}),
    "hours": (3600, {"seconds": 1}),
    "operations": (1, {"operations": 1}),
    "joules": (1, {"joules": 1}),
    "watts": (1, {"joules": 1, "seconds": -1}),
    "dollars": (1, {"dollars": 1}),
}
_MADE_OF |= {"s": _MADE_OF["seconds"]}
_MADE_OF |= {name.removesuffix("s"): found for name, found in _MADE_OF.items() if len(name) > 1}

# Without a space behind a number; "B" is bytes only behind a space or a digit of a size in bytes.
SUFFIXES = {"K": 1e3, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# Commas stand between thousands alone: "0,61" is half of something else.
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d+)?(?:e[+-]?\d{1,2})?"
_FORM = re.compile(
    rf"^(?P<about>[~≈<>±]?)\s*(?P<sign>[-−+]?)\s*\$?(?P<one>{_NUMBER})(?P<s1>[KkMBT]?)\+?"
    rf"(?:\s*(?:-|–|to)\s*\$?(?P<two>{_NUMBER})(?P<s2>[KkMBT]?))?(?P<plus>\+?)\s*(?P<unit>.*)$"
)


class UnknownUnit(ValueError):
    """Text that is no quantity; the message says what was expected."""


def half_digit(number: str) -> float:
    """Half a unit of the last digit: 0.05 for 59.1, 5 for 140, 50 for 21,500."""
    mantissa, _, exponent = number.replace(",", "").partition("e")
    scale = 10.0 ** int(exponent or 0)
    if "." in mantissa:
        return 0.5 * 10.0 ** -len(mantissa.partition(".")[2]) * scale
    zeros = len(mantissa) - len(mantissa.rstrip("0"))
    return 0.5 * 10.0 ** min(zeros, len(mantissa) - 1) * scale


def parse(text: str, default_unit: str | None = None) -> Quantity:
    """The quantity that a text stands for.

    Args:
      text: a number or a range, with "~", "±", "+", thousands' commas, K M B T, and a unit.
      default_unit: for a number without one; None: it needs one.

    Raises:
      UnknownUnit: not a number, or a unit that is not in UNITS.
    """
    plain = " ".join(str(text).replace("**", "").replace("+/-", "±").split())
    found = _FORM.match(plain)
    if found is None:
        raise UnknownUnit(f"expected a number with a unit, found {plain!r}")
    unit = found["unit"].strip()
    about = 0.0
    if margin := re.fullmatch(rf"±\s*({_NUMBER})\s*(.*)", unit):
        about, unit = float(margin[1].replace(",", "")), margin[2]
    if "$" in plain and unit.startswith("/"):
        unit = f"${unit}"  # "$0.59/h" for "0.59 $/h"
    suffixes = [found["s1"], found["s2"] or ""]
    shared = suffixes[-1] if found["two"] else suffixes[0]
    if shared == "B" and (not unit) and default_unit in _BYTES:
        unit, suffixes = "B", ["", ""]
    if not unit and default_unit is None:
        raise UnknownUnit(f"expected a unit behind {plain!r}, such as GB, ms or tok/s")
    unit = unit or str(default_unit)
    if unit not in UNITS:
        near = difflib.get_close_matches(unit, UNITS, n=4, cutoff=0.3) or list(UNITS)[:20]
        raise UnknownUnit(f"no unit is written {unit!r} (in {plain!r}); nearest: {', '.join(near)}")
    dimension, least, most = UNITS[unit]
    ends = []
    for number, suffix in ((found["one"], suffixes[0] or shared), (found["two"], suffixes[1])):
        if number is not None:
            factor = SUFFIXES.get(suffix, 1.0)
            value = float(number.replace(",", "")) * factor
            half = max(half_digit(number), about) * factor
            ends.append((value - half, value + half))
    if sum(ends[0]) > sum(ends[-1]):
        raise UnknownUnit(f"expected the smaller number of a range first, found {plain!r}")
    low, high = ends[0][0] * least, ends[-1][1] * most
    nominal = sum(map(sum, ends)) / (2 * len(ends)) * least
    if found["sign"] in ("-", "−"):
        low, high, nominal = -high, -low, -nominal
    if found["about"] in ("~", "≈"):
        low, high = low - 0.05 * abs(low), high + 0.05 * abs(high)
    if "+" in plain[1:].replace("e+", "") or found["about"] == ">":
        high = math.inf
    if found["about"] == "<":
        low = 1e-6 * high
    return Quantity(low, high, dimension, plain, nominal)


def base(dimension: str) -> tuple[float, Unit]:
    """(factor to base units, their powers) of a dimension such as "bytes/s"."""
    above, _, below = dimension.partition("/")
    factor, powers = _MADE_OF[above][0], dict(_MADE_OF[above][1])
    if below:
        factor /= _MADE_OF[below][0]
        for name, power in _MADE_OF[below][1].items():
            powers[name] = powers.get(name, 0) - power
    return factor, tuple(sorted((name, power) for name, power in powers.items() if power))


def unit_words(unit: Unit) -> str:
    """A unit by the name of its dimension, or by its powers: "bytes/s", "bytes^2"."""
    for dimension in dict.fromkeys(dimension for dimension, *_ in UNITS.values()):
        if base(dimension) == (1, unit):
            return "plain numbers" if dimension == "number" else dimension
    return " ".join(f"{name}^{power}" for name, power in unit)


def words(value: float, dimension: str) -> str:
    """A computed number for reading, in the unit its size asks for."""
    scales: dict[str, tuple[tuple[float, str], ...]] = {
        "number": ((1e9, "B"), (1e6, "M"), (1, "")),
        "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
        "seconds": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
        "bytes/s": ((1e12, "TB/s"), (1e9, "GB/s")),
        "operations/s": ((1e12, "TFLOP/s"),),
        "operations": ((1e12, "TFLOP"), (1e9, "GFLOP")),
        "tokens/s": ((1, "tok/s"),),
        "tokens/joule": ((1, "tok/J"),),
        "joules/token": ((1, "J/token"),),
        "dollars/token": ((1e-9, "dollars for 1e9 tokens"),),
        "dollars/hour": ((1, "$/h"),),
        "watts": ((1, "W"),),
        "bits": ((1, "bits"),),
        "operations/byte": ((1, "FLOP/B"),),
    }
    known = scales.get(dimension, ((1, ""),))
    for scale, unit in known:
        if scale <= abs(value) < math.inf or (scale, unit) == known[-1]:
            gap = "" if dimension == "number" else " "
            return f"{plain(value / scale)}{gap}{unit}".strip()
    raise AssertionError(dimension)


def plain(number: float, digits_shown: int = 4) -> str:
    """Significant digits without an exponent."""
    if number == 0 or math.isinf(number):
        return "0" if number == 0 else "infinity"
    digits = float(f"{number:.{digits_shown}g}")
    return f"{digits:,.0f}" if abs(digits) >= 1000 else f"{digits:.10f}".rstrip("0").rstrip(".")
