"""Any row that can be read is judged: no combination of fields ends in anything else."""

import hypothesis
import hypothesis.strategies as st
import pytest

from ternax.audit import VERDICTS, audit, read
from ternax.audit.fields import COUNTS, MAY_BE_ZERO, QUANTITIES, WORDS
from ternax.audit.quantities import UNITS, unit_words
from ternax.audit.sums import NotArithmetic, evaluate

HEAD = """\
title: t
source: s
year: 2025
models:
  bare: {parameters: 24B}
  wide: {config: 70b, num_kv_heads: 64}
  experts: {parameters: 46.7B, active: 12.9B}
devices:
  here: {bandwidth: 35.8 GB/s, memory: 24 GiB, int8: 1 TOPS}
tables:
  - name: a
    rows:
"""
SETTINGS = {
    "model": ("70b", "8b", "2b4t", "bare", "wide", "experts"),
    "device": ("h100", "l40s", "rtx4090", "m1-pro", "epyc-9654", "here"),
    "weights": ("fp16", "trit2", "nvfp4", "i2_s", "q4_0", "fp8"),
    "tables": ("fp16", "int8", "trit2"),
    "kv": ("fp16", "int8", "fp8"),
    "operands": ("fp32", "fp16", "int8", "fp4", "none such"),
    "of": ("1 / 2", "fp32 / trit2", "x.size / 0 GB", "2 - 2", "3 / nothing", "mean(1; 2)", "4 GB"),
    "cheaper_than": ("a100", "m1-pro"),
    "other_price": ("1.18 $/h",),
    "faster_than": ("a100", "m1-pro"),
    **WORDS,
    **{name: ("1", "2", "512") for name in COUNTS},
    "batch": ("1", "2", "512", "best"),
    "layers": ("1", "2", "30"),
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
        zero = ["0"] if name in MAY_BE_ZERO else []
        number = draw(st.sampled_from([*zero, *numbers]))
        row[name] = f"{number} {unit_of(name)}"
    return "      - {" + ", ".join(f'{key}: "{value}"' for key, value in row.items()) + "}\n"


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.lists(rows(), min_size=1, max_size=4))
def test_every_row_gets_a_verdict(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("claims") / "claims.yaml"
    path.write_text(f"{HEAD}      - {{id: x, size: 3 GB}}\n{''.join(made)}")
    found = audit(read(path)).rows
    assert len(found) == 1 + len(made)
    assert all(judged.findings and judged.verdict in VERDICTS for judged in found)


@pytest.mark.parametrize(
    "row, lacks",
    [
        ("tokens_per_s: 3", "tokens_per_s needs model, device, weights"),
        ("model: 70b, memory: 3 GB", "memory needs weights"),
        ("model: 70b, cache: 3 GB", "cache needs context"),
        ("result: 3x", "result needs of"),
        ("tokens_per_joule: 3 tok/J", "tokens_per_joule needs power, tokens_per_s"),
        ("price: 3 $/h, cost: 3 $/Mtok", "cost needs tokens_per_s or tokens_per_hour"),
        ("model: bare, cache: 3 GB, context: 9", "a shape of the model is needed"),
        ("model: 8b, weights: fp16, size: 16 GB, tokens_per_s: 3", "tokens_per_s needs device"),
        ("says: fast", "it states no quantity"),
    ],
)
def test_too_little_says_what_is_missing(tmp_path, row, lacks):
    path = tmp_path / "claims.yaml"
    path.write_text(f"{HEAD}      - {{{row}}}\n")
    (judged,) = audit(read(path)).rows
    assert judged.verdict == "unverifiable"
    assert lacks in judged.findings[-1].text


# One row that each quantity can be judged in, with all that it may need.
WHOLE = {
    "model": "8b", "device": "h100", "weights": "fp16", "phase": "decode", "context": "8",
    "batch": "1", "rows": "64", "columns": "64", "of": "1 / 2",
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTITIES)
def test_what_a_quantity_needs_is_what_its_checks_ask_for(tmp_path, name):
    """With what `fields` lists, some check judges it; without any one of it, none does."""
    needs = [need.split(" or ")[0] for need in QUANTITIES[name].needs]
    row = {name: f"1 {unit_of(name)}"}
    phases = {"weights_read": {"phase": "speculative"}}
    for need in needs:
        row[need] = (WHOLE | phases.get(name, {})).get(need) or f"1 {unit_of(need)}"

    def findings(row):
        path = tmp_path / "claims.yaml"
        line = ", ".join(f'{key}: "{value}"' for key, value in row.items())
        path.write_text(f"{HEAD}      - {{{line}}}\n")
        (judged,) = audit(read(path)).rows
        return judged.findings

    assert not any("too little" in found.text for found in findings(row))
    for need in needs:
        lacking = findings({key: value for key, value in row.items() if key != need})
        assert f"{name} needs {need}" in lacking[-1].text and "too little" in lacking[-1].text


def speeds(tmp_path, *rows: str):
    path = tmp_path / "claims.yaml"
    path.write_text(HEAD + "".join(f"      - {{{row}}}\n" for row in rows))
    return audit(read(path)).rows


def test_experts_that_no_token_chose_take_memory_and_no_time(tmp_path):
    """Mixtral 8x7B: 46.7B parameters, 12.9B of them read; gpt-fast has 97.92 tokens/s in int8."""
    on = "device: a100-80-sxm, weights: int8, phase: decode, batch: 1"
    bare, fast, fits, size = speeds(
        tmp_path,
        f"model: bare, {on}, tokens_per_s: 97.92",
        f"model: experts, {on}, tokens_per_s: 97.92",
        "model: experts, device: a100-80-sxm, weights: fp16, fits: 'no'",
        "model: experts, weights: int8, size: 12.9 GB",
    )
    assert bare.verdict == "impossible"  # 24 GB at 2,039 GB/s: 85 tokens/s
    assert fast.verdict == "possible" and "12.9 GB at 2,039 GB/s" in fast.findings[0].text
    assert fits.verdict == "possible" and "93.4 GB" in fits.findings[0].text
    assert size.verdict == "impossible" and "46.7 GB to" in size.findings[0].text


def test_the_best_batch_is_what_fits_or_what_the_matrix_unit_can_use(tmp_path):
    """70b in fp8 on one H100: 85.9 GB less 70.6 hold 182 sequences of 256 tokens."""
    best = "model: 70b, weights: fp8, device: h100, phase: decode, batch: best"
    fits, long, bare, wild = speeds(
        tmp_path,
        f"{best}, context: 256, tokens_per_s: '2,998', latency: 60 ms",
        f"{best}, context: 65536, tokens_per_s: 10",
        f"{best}, tokens_per_s: '2,998'",
        f"{best}, tokens_per_s: '30,000'",
    )
    assert fits.verdict == "possible" and "182 sequences" in fits.findings[0].text
    assert long.verdict == "impossible" and "no sequence of 65,536" in long.findings[1].text
    assert bare.verdict == "possible" and "at most 14,4" in bare.findings[0].text
    assert wild.verdict == "impossible"


def test_a_size_of_a_bare_count_is_bounded_on_both_sides(tmp_path):
    """671B in fp8: 671 GB, 700 with what stays wider, and 1.34 TB is fp16's."""
    right, twice, half = speeds(
        tmp_path,
        *(
            f"model: experts, weights: fp8, size: {size}"
            for size in ("47.5 GB", "93.4 GB", "23.4 GB")
        ),
    )
    assert right.verdict == "possible"
    assert twice.verdict == "mislabelled" and "is that of fp16 (93.4 GB)" in twice.findings[0].text
    assert half.verdict == "mislabelled" and "is that of " in half.findings[0].text


def test_costs_are_told_in_the_unit_of_the_claim(tmp_path):
    (row,) = speeds(tmp_path, "price: 2.50 $/h, tokens_per_s: 3472, cost: 0.20 $/Mtok")
    assert "= 0.1996 $/Mtok to 0.2004 $/Mtok" in row.findings[0].text


DEPTHS = "model: 8b, device: h100, weights: fp16, phase: prefill"


def test_a_rate_is_drawn_on_by_the_time_of_a_token(tmp_path):
    """4 and 8 layers at 2 and 4 ms a token: 32 take 16 ms, 62.5 tokens/s, and not 125."""
    four, eight = (
        f"{DEPTHS}, layers: 4, tokens_per_s: 500",
        f"{DEPTHS}, layers: 8, tokens_per_s: 250",
    )
    on = f"{DEPTHS}, layers: 32, extrapolated: 'yes', tokens_per_s"
    right, wrong = speeds(tmp_path, four, eight, f"{on}: 62.5", f"{on}: 125")[2:]
    assert "16 ms a token, 62.5 tok/s, as claimed" in right.findings[-1].text
    assert wrong.verdict == "mislabelled" and "not from these rows" in wrong.findings[-1].text


def test_a_line_through_one_depth_is_not_judged(tmp_path):
    """Nothing is wrong with either number, and nothing joins them."""
    four, on = speeds(
        tmp_path,
        f"{DEPTHS}, layers: 4, tokens_per_s: 500",
        f"{DEPTHS}, layers: 32, extrapolated: 'yes', tokens_per_s: 1",
    )
    assert (four.verdict, on.verdict) == ("possible", "unverifiable")
    assert "1 other depth" in on.findings[-1].text


def test_a_verdict_is_inherited_through_every_row_between(tmp_path):
    """`c` stands before what it is of."""
    c, b, a = speeds(
        tmp_path,
        "id: c, result: 0.5, of: b.result / 2",
        "id: b, result: 1.0, of: a.size / 12.9 GB",
        "id: a, model: experts, weights: int8, size: 12.9 GB",
    )
    assert [row.verdict for row in (a, b, c)] == ["impossible", "mislabelled", "mislabelled"]


BARE = "model: bare, device: h100, weights: fp16"


@pytest.mark.parametrize(
    "row, lacks",
    [
        # Beside a quantity that is fine, one that no check says anything of.
        ("model: bare, weights: fp16, context: 9, memory: 60 GB, cache: 500 GB", "cache: a shape"),
        ("model: bare, weights: fp16, memory: 60 GB, parameters: 99B", "parameters: a shape"),
        (
            "model: 8b, weights: fp16, device: h100, batch: best, context: 1000, "
            "tokens_per_s: 5000, share_of_bound: 99 %",
            "share_of_bound: batch as a number is needed",
        ),
        (
            "model: 8b, weights: fp16, device: h100, phase: speculative, latency: 1 us, "
            "memory: 20 GB",
            "latency: no check judges it with phase speculative",
        ),
        (
            "model: 8b, weights: fp16, device: h100, phase: kernel, tokens_per_s: 100, "
            "latency: 1 us",
            "latency: no check judges it with phase kernel",
        ),
        # Of a count of parameters alone, what is unknown is not zero.
        (f"{BARE}, context: 8192, left_out: 14 %", "left_out: a shape of the model is needed"),
        (f"{BARE}, devices: 2, bottleneck: collectives", "bottleneck: a shape of the model"),
        (f"{BARE}, context: 8192, critical_batch: 99", "critical_batch: a shape of the model"),
        (f"{BARE}, layers: 4, memory: 2 GB", "memory: a shape of the model is needed"),
        (f"{BARE}, layers: 4, tokens_per_s: 900", "tokens_per_s: a shape of the model is needed"),
        (f"{BARE}, context: 8192, batch: 64, fits: no", "a shape of the model is needed"),
        # Without a model, what the catalogue lacks.
        ("device: here, power: 900 W", "power: no board power of here is known"),
        ("device: here, price: 9 $/h", "price: no price of here is known"),
        (
            "device: rtx3090, operands: fp8, critical_intensity: 100 FLOP/B",
            "critical_intensity: no fp8 peak of NVIDIA GeForce RTX 3090 is known",
        ),
    ],
)
def test_a_row_is_possible_only_when_all_it_states_was_judged(tmp_path, row, lacks):
    (judged,) = speeds(tmp_path, row)
    assert judged.verdict == "unverifiable"
    assert lacks in judged.findings[-1].text


def test_what_goes_into_a_quantity_that_is_judged_needs_no_model(tmp_path):
    row = "tokens_per_s: 1074, power: 350 W, tokens_per_joule: 3.07 tok/J"
    (judged,) = speeds(tmp_path, row)
    assert judged.verdict == "possible"


@pytest.mark.parametrize(
    "row, convention",
    [
        ("operations: 141B FLOP", "141B FLOP is that of all parameters (141.1 GFLOP)"),
        ("operations: 136.9 GFLOP", "that of the projections alone (136.9 GFLOP)"),
        ('compute_only_tokens_per_s: "7,009 tok/s"', "next to that of all parameters"),
        ("read_time: 42.1 ms", "that of all parameters (42.12 ms)"),
        ("weights: int4, intensity_gap: 74x", "that of 4 bits, codes without their scales"),
    ],
)
def test_usual_ways_to_count_are_no_false_alarms(tmp_path, row, convention):
    """2 N of all 70.55e9 parameters or the 68.45e9 in projections; 4 bits for int4's 4.25."""
    weights = "" if "weights" in row else "weights: fp16, "
    (judged,) = speeds(tmp_path, f"model: 70b, device: h100, operands: fp16, {weights}{row}")
    assert judged.verdict == "possible"
    assert convention in judged.findings[0].text


@pytest.mark.parametrize(
    "row",
    [
        "operations: 145.1 GFLOP",
        "compute_only_tokens_per_s: 6800.1 tok/s",
        "read_time: 43.1 ms",
        "read_time: 40.1 ms",
        "intensity_gap: 290.1x",
    ],
)
def test_beyond_both_ways_to_count_is_impossible(tmp_path, row):
    (judged,) = speeds(tmp_path, f"model: 70b, device: h100, operands: fp16, weights: fp16, {row}")
    assert judged.verdict == "impossible"


def test_a_larger_model_with_a_smaller_cache_may_take_less(tmp_path):
    """More parameters by an eighth and 4 kv heads for 32 explain 5 %; seven times more do not."""
    model = "weights: int4, memory"
    _, near, far = speeds(
        tmp_path,
        f"model: experts, {model}: 30.0 GB",
        f"model: 70b, {model}: 28.5 GB",
        f"model: 405b, {model}: 20.0 GB",
    )
    assert not any("is less than" in found.text for found in near.findings)
    assert any("20.0 GB for 405b is less than" in found.text for found in far.findings)


@pytest.mark.parametrize(
    "usd, verdict", [(0.3, "possible"), (1.5, "possible"), (40, "mislabelled")]
)
def test_a_price_beside_the_catalogue(tmp_path, usd, verdict):
    (row,) = speeds(tmp_path, f"device: l40s, price: {usd} $/h")
    assert row.verdict == verdict and "$0.79 spot, $1.4 on demand" in row.findings[0].text


def test_or_more_has_no_upper_end(tmp_path):
    """ "12-15+" and "300+" as documents have them: judged by what they are at least."""
    needed, watts = speeds(
        tmp_path,
        "model: 70b, weights: fp8, device: h100, tokens_per_s: 12-15+, devices_needed: 4",
        "device: h100, tokens_per_s: 50, power: 300+ W, joules_per_token: 6 J/token",
    )
    assert needed.verdict == "mislabelled" and "1 will do" in needed.findings[-1].text
    assert "= 4.545 J/token to infinity J/token" in watts.findings[-1].text


def test_digits_that_reach_below_a_bound_are_told(tmp_path):
    """24B in 16 bits at 307 GB/s: 6.4 tokens/s; "10" stands for 5 to 15, "10.0" does not."""
    on = "model: bare, weights: fp16, device: x86-server, phase: decode, batch: 1, tokens_per_s"
    loose, strict = speeds(tmp_path, f"{on}: 10", f"{on}: 10.0")
    assert loose.verdict == "possible" and "5 is within its digits" in loose.findings[0].text
    assert strict.verdict == "impossible"


def test_a_node_has_the_power_and_the_price_of_its_devices(tmp_path):
    """Eight H100: 5.6 kW, and $38 or $4.76 an hour; one that costs $38 is another device."""
    node = "device: h100, devices: 8"
    power, more, all_of_it, one_of_it, other = speeds(
        tmp_path,
        f"{node}, power: 5.6 kW",
        f"{node}, power: 10.2 kW",
        f"{node}, price: 38 $/h",
        f"{node}, price: 4.76 $/h",
        "device: h100, price: 38 $/h",
    )
    assert (power.verdict, more.verdict) == ("possible", "impossible")
    assert (all_of_it.verdict, one_of_it.verdict) == ("possible", "possible")
    assert "8 x NVIDIA H100" in all_of_it.findings[0].text
    assert other.verdict == "mislabelled" and "7.98 times the highest" in other.findings[0].text


def test_a_share_of_the_matrix_peak_of_a_prompt(tmp_path):
    """8b in 16 bits, 31,500 tokens/s: 2 x 7 to 8 x 31.5 k / 989 T = 44 to 51 %."""
    prompt = "model: 8b, weights: fp16, device: h100, phase: prefill, tokens_per_s: '31,500'"
    right, wrong = speeds(
        tmp_path, f"{prompt}, share_of_bound: 48%", f"{prompt}, share_of_bound: 70%"
    )
    assert right.verdict == "possible"
    assert wrong.verdict == "mislabelled" and "= 44 %, not 70%" in wrong.findings[-1].text


def test_far_from_a_bound_is_noted(tmp_path):
    near, far = speeds(
        tmp_path,
        f"{DEPTHS}, tokens_per_s: 30000",
        "model: 8b, device: h100, weights: fp16, phase: decode, batch: 1, tokens_per_s: 2.0",
    )
    assert "improbable" not in near.findings[0].text
    assert far.verdict == "possible" and "0.9 % of it, improbable: 112" in far.findings[0].text


@pytest.mark.parametrize(
    "text, low, high, unit",
    [
        ("2 + 3 * 4", 14, 14, ""),
        ("10 / 4 - 1", 1.5, 1.5, ""),
        ("1 - 8 / 16", 0.5, 0.5, ""),
        ("2 - 3 - 4", -5, -5, ""),
        ("mean(1; 2; 6)", 3, 3, ""),
        ("median(1; 2; 6)", 2, 2, ""),
        ("median(1 s; 2 s; 6 ms; 7 s)", 1.0, 2.0, "seconds"),
        ("1.5 s / 0.5 s", 1.45 / 0.55, 1.55 / 0.45, ""),
        ("2 * 3.5 - 1.0", 5.85, 6.15, ""),
        ("3.0 GiB / 1.0 s", 2.95 * 2**30 / 1.05, 3.05 * 2**30 / 0.95, "bytes/s"),
        ("100.0 tok/s / 50.0 W", 99.95 / 50.05, 100.05 / 49.95, "tokens/joule"),
        ("1000.0 tok/s * 1.0 s", 999.95 * 0.95, 1000.05 * 1.05, ""),
        ("36.0 tok/h * 100.0 s", 35.95 / 3600 * 99.95, 36.05 / 3600 * 100.05, ""),
        ("2 * 2.0 bits", 2 * 1.95 / 8, 2 * 2.05 / 8, "bytes"),
        ("3.0 s * 3.0 s", 2.95**2, 3.05**2, "seconds^2"),
    ],
)
def test_arithmetic_on_intervals(text, low, high, unit):
    found = evaluate(text, {})
    if text.startswith("median(1 s"):  # between 0.5 to 1.5 and 1.5 to 2.5
        assert (found.low, found.high) == (1.0, 2.0)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert unit_words(found.unit) == (unit or "plain numbers")


@pytest.mark.parametrize(
    "text, why",
    [
        ("1 / 0", "holds zero"),
        ("a.b / 2", "no row has a.b"),
        ("x", "a number"),
        ("3 GB + 1 s", "\\+ between bytes and seconds: expected one unit"),
        ("3 s - 1", "- between seconds and plain numbers"),
        ("mean(3 s; 1 GB)", "mean between seconds and bytes"),
    ],
)
def test_what_is_no_arithmetic(text, why):
    with pytest.raises(NotArithmetic, match=why):
        evaluate(text, {})


@pytest.mark.parametrize(
    "result, of, verdict, says",
    [
        ("3 GB/s", "3 GB / 1 s", "possible", "= 1.6"),
        ("3", "3 GB / 1 s", "unverifiable", "in bytes/s, 3 in plain numbers: expected one unit"),
        ("3 GB", "70 * 2 / 8", "unverifiable", "in plain numbers, 3 GB in bytes"),
        ("3 s", "3 GB / 1 s", "mislabelled", "in bytes/s, 3 s in seconds: another unit"),
        ("14.8 GB", "59.1B * 2.00 bits", "possible", "= 14."),
        ("3.07 tok/J", "1,074 tok/s / 350 W", "possible", "tok/J"),
        ("3.07 tokens/Watt", "1,074 tok/s / 350 W", "mislabelled", "in tokens/watt: another unit"),
    ],
)
def test_a_result_has_the_unit_of_its_arithmetic(tmp_path, result, of, verdict, says):
    (row,) = speeds(tmp_path, f"result: '{result}', of: '{of}'")
    assert row.verdict == verdict and says in row.findings[0].text
