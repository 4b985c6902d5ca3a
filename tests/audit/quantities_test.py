"""Numbers as people write them, against what their digits stand for."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from ternax.audit.quantities import UNITS, UnknownUnit, half_digit, parse, plain, words


@pytest.mark.parametrize(
    "text, unit, low, high, dimension",
    [
        ("1,074 tok/s", None, 1073.5, 1074.5, "tokens/s"),
        ("~298,000", "tok/s", 297_500 * 0.95, 298_500 * 1.05, "tokens/s"),
        ("~300,000+", "tok/s", 250_000 * 0.95, math.inf, "tokens/s"),
        ("400K tok/s", None, 350_000, 450_000, "tokens/s"),
        ("50-60 TPS", None, 45, 65, "tokens/s"),
        ("12-15+ TPS", None, 11.5, math.inf, "tokens/s"),
        ("59.1B", "", 59.05e9, 59.15e9, "number"),
        ("14.8 GB", None, 14.75e9, 14.85 * 2**30, "bytes"),
        ("200-400 MB", None, 150e6, 450 * 2**20, "bytes"),
        ("12.55 GiB", None, 12.545 * 2**30, 12.555 * 2**30, "bytes"),
        ("476 ms", None, 0.4755, 0.4765, "seconds"),
        ("13.32 us", None, 13.315e-6, 13.325e-6, "seconds"),
        ("0.5-1 TB/s", None, 0.45e12, 1.5e12, "bytes/s"),
        ("-59.7%", "", -0.5975, -0.5965, "number"),
        ("99.3 %", None, 0.9925, 0.9935, "number"),
        ("110x", "x", 105, 115, "number"),
        ("$0.59/h", None, 0.585, 0.595, "dollars/hour"),
        ("152 $/1e9 tokens", None, 151.5e-9, 152.5e-9, "dollars/token"),
        ("3.1 tokens/Watt", None, 3.05, 3.15, "tokens/watt"),
        ("**15GB**", None, 14.5e9, 15.5 * 2**30, "bytes"),
        ("989 TFLOP/s", None, 988.5e12, 989.5e12, "operations/s"),
        ("1.58 bits", None, 1.575, 1.585, "bits"),
        ("61.53 ± 0.05", "tok/s", 61.48, 61.58, "tokens/s"),
        ("61.5 +/- 1.2 tok/s", None, 60.3, 62.7, "tokens/s"),
        ("41.35 ± 0.00 tok/s", None, 41.345, 41.355, "tokens/s"),
        ("> 500 tok/s", None, 450, math.inf, "tokens/s"),
        ("1,234,567.5 tok/s", None, 1_234_567.45, 1_234_567.55, "tokens/s"),
        ("800.0 Gb/s", None, 99.99375e9, 100.00625e9, "bytes/s"),
        ("141 GFLOP", None, 140.5e9, 141.5e9, "operations"),
        ("0.141 TFLOP", None, 0.1405e12, 0.1415e12, "operations"),
        ("7.5 MFLOP", None, 7.45e6, 7.55e6, "operations"),
        ("21 PB/s", None, 20.5e15, 21.5e15, "bytes/s"),
        ("12 ktok/s", None, 11_500, 12_500, "tokens/s"),
        ("600.0 tok/min", None, 9.999166, 10.000833, "tokens/s"),
        ("0.020 $/1K tokens", None, 19.5e-6, 20.5e-6, "dollars/token"),
    ],
)
def test_what_digits_stand_for(text, unit, low, high, dimension):
    found = parse(text, unit)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.dimension == dimension


@pytest.mark.parametrize(
    "text, why",
    [
        ("fast", "expected a number with a unit, found 'fast'"),
        ("0,61 GB", "no unit is written ',61 GB'"),
        ("1,0745 tok/s", "no unit is written '5 tok/s'"),
        ("1e400 GB", "no unit is written '0 GB'"),
        ("12 GW/s", "no unit is written 'GW/s' .* nearest: .*GB/s"),
        ("12", "expected a unit behind '12'"),
        ("", "expected a number"),
        ("60-50 tok/s", "expected the smaller number of a range first, found '60-50 tok/s'"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(UnknownUnit, match=why):
        parse(text)


@hypothesis.given(st.floats(1e-3, 1e6), st.integers(0, 4), st.sampled_from(sorted(UNITS)))
def test_a_number_lies_in_its_own_interval(value, places, unit):
    text = f"{value:.{places}f}"
    found = parse(f"{text} {unit}".strip(), "")
    _, least, most = UNITS[unit or ""]
    number = float(text)
    assert found.low <= number * least * (1 + 1e-9) and number * most <= found.high * (1 + 1e-9)


def test_half_of_the_last_digit():
    assert [half_digit(text) for text in ("140", "141", "59.1", "21,500", "1e9", "0")] == (
        pytest.approx([5, 0.5, 0.05, 50, 5e8, 0.5])
    )


def test_words():
    assert words(21.35e9, "bytes") == "21.35 GB"
    assert words(0.4763, "seconds") == "476.3 ms"
    assert words(68.45e9, "number") == "68.45B"
    assert plain(0.00012) == "0.00012" and plain(123456.0) == "123,500"
