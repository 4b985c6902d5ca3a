"""Any row that can be read is judged: no combination of fields ends in anything else."""

import hypothesis
import hypothesis.strategies as st
import pytest

from ternax.audit import VERDICTS, audit, read
from ternax.audit.fields import COUNTS, QUANTITIES, WORDS
from ternax.audit.quantities import UNITS
from ternax.audit.sums import NotArithmetic, evaluate

HEAD = """\
title: t
source: s
year: 2025
models:
  bare: {parameters: 24B}
  wide: {config: 70b, num_kv_heads: 64}
devices:
  here: {bandwidth: 35.8 GB/s, memory: 24 GiB, int8: 1 TOPS}
tables:
  - name: a
    rows:
"""
SETTINGS = {
    "model": ("70b", "8b", "2b4t", "bare", "wide"),
    "device": ("h100", "l40s", "rtx4090", "m1-pro", "epyc-9654", "here"),
    "weights": ("fp16", "trit2", "nvfp4", "i2_s", "q4_0", "fp8"),
    "tables": ("fp16", "int8", "trit2"),
    "kv": ("fp16", "int8", "fp8"),
    "operands": ("fp32", "fp16", "int8", "fp4", "none such"),
    "of": ("1 / 2", "fp32 / trit2", "x.size / 0 GB", "2 - 2", "3 / nothing", "mean(1; 2)", "4 GB"),
    "cheaper_than": ("a100", "m1-pro"),
    "other_price": ("1.18 $/h",),
    "faster_than": ("a100", "m1-pro"),
    "id": ("x", "y"),
    **WORDS,
    **{name: ("1", "2", "512") for name in COUNTS},
}


def unit_of(name: str) -> str:
    dimensions = QUANTITIES[name].dimensions
    return next(
        unit for unit, (kind, *_) in UNITS.items() if kind in dimensions or "*" in dimensions
    )


@st.composite
def rows(draw):
    settings = draw(st.sets(st.sampled_from(sorted(SETTINGS)), max_size=9))
    quantities = draw(st.sets(st.sampled_from(sorted(QUANTITIES)), min_size=1, max_size=4))
    row = {name: draw(st.sampled_from(SETTINGS[name])) for name in sorted(settings)}
    for name in sorted(quantities):
        numbers = ["0.001", "1", "~40", "50-60", "300,000+", "7e12"]
        zero = ["0"] if QUANTITIES[name].dimensions == ("number",) else []
        number = draw(st.sampled_from([*zero, *numbers]))
        row[name] = f"{number} {unit_of(name)}"
    return "      - {" + ", ".join(f'{key}: "{value}"' for key, value in row.items()) + "}\n"


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(rows(), min_size=1, max_size=4))
def test_every_row_gets_a_verdict(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("claims") / "claims.yaml"
    path.write_text(HEAD + "".join(made))
    found = audit(read(path)).rows
    assert len(found) == len(made)
    assert all(judged.findings and judged.verdict in VERDICTS for judged in found)


@pytest.mark.parametrize(
    "row, lacks",
    [
        ("tokens_per_s: 3", "tokens_per_s needs model, device, weights"),
        ("model: 70b, memory: 3 GB", "memory needs weights"),
        ("model: 70b, cache: 3 GB", "cache needs context"),
        ("result: 3x", "result needs of"),
        ("tokens_per_joule: 3 tok/J", "tokens_per_joule needs power, tokens_per_s"),
        ("price: 3 $/h, cost: 3 $/Mtok", "cost needs tokens_per_s"),
        ("says: fast", "it states no quantity"),
    ],
)
def test_too_little_says_what_is_missing(tmp_path, row, lacks):
    path = tmp_path / "claims.yaml"
    path.write_text(f"{HEAD}      - {{{row}}}\n")
    (judged,) = audit(read(path)).rows
    assert judged.verdict == "unverifiable"
    assert lacks in judged.findings[0].text


@pytest.mark.parametrize(
    "text, low, high",
    [
        ("2 + 3 * 4", 14, 14),
        ("10 / 4 - 1", 1.5, 1.5),
        ("1 - 8 / 16", 0.5, 0.5),
        ("mean(1; 2; 6)", 3, 3),
        ("1.5 s / 0.5 s", 1.45 / 0.55, 1.55 / 0.45),
        ("2 * 3.5 - 1.0", 5.85, 6.15),
    ],
)
def test_arithmetic_on_intervals(text, low, high):
    assert evaluate(text, {}) == pytest.approx((low, high))


@pytest.mark.parametrize(
    "text, why", [("1 / 0", "holds zero"), ("a.b / 2", "no row has a.b"), ("x", "a number")]
)
def test_what_is_no_arithmetic(text, why):
    with pytest.raises(NotArithmetic, match=why):
        evaluate(text, {})
