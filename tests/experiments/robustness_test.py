"""experiments.robustness: records, table, resuming, and what it refuses."""

import dataclasses
import math

import pytest

from ternax import cost, noise_table
from ternax import robustness as measured
from ternax.configs.stdlib import STDLIB_BITNET
from ternax.experiments import robustness
from ternax.noise_summary import area, crossing, shape_error
from ternax.record import read_records

FLAGS = ["--sequences=9", "--length=32", "--draws=2", "--strengths=0.01,0.1"]
SELECT = "--select=.*mlp.down"  # one shape to compile for


def ran(capsys, directory, *arguments):
    code = robustness.main([*arguments, f"--output_dir={directory}"])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    lines = [line for line in said.out.splitlines() if not line.startswith("wrote ")]
    assert max(map(len, lines)) <= 100
    table = said.out.partition("\nnoise  ")[2].splitlines()[:-1]  # the last says what was written
    report = (directory / "report.md").read_text().splitlines()
    assert table[1:] and set(table[1:]) <= set(report) and report.count("```") == 2
    return read_records(directory / "results.jsonl"), said.out


def test_a_study_and_its_continuation(tmp_path, capsys):
    flags = [*FLAGS, "--noise=bitflip", "--no_sensitivity", "--no_forecast", SELECT]
    records, screen = ran(capsys, tmp_path / "out", *flags)
    points = [r for r in records if r.phase == "evaluate"]
    assert len(points) == 2 * 2 and {len(r.samples) for r in points} == {9}
    measured, predicted = (
        [r for r in records if r.phase == "noise" and r.kind == kind and "SNR of" not in r.note]
        for kind in ("measured", "predicted")
    )
    assert len(measured) == 3 and len(predicted) == 2
    for summary, expected in zip(measured[:2], predicted, strict=True):
        m, p = summary.metrics, expected.metrics
        mine = [r for r in points if r.metrics["noise_strength"] == m["noise_strength"]]
        rises = [r.metrics["bits_per_byte_rise"] for r in mine]
        assert m["bits_per_byte_rise"] == pytest.approx(sum(rises) / 2)
        assert m["bits_per_byte_rise_low"] < m["bits_per_byte_rise"]
        assert m["bits_per_byte_rise_text_low"] < m["bits_per_byte_rise_text_high"]
        assert m["product_cosine"] == pytest.approx(p["product_cosine"], abs=0.02)
        assert p["product_cosine_closed_form"] < 1
        assert "bits_per_byte_rise" not in p
    assert "tolerated_020" in measured[2].metrics
    assert measured[2].metrics["parameters"] == cost.count_parameters(STDLIB_BITNET)[0]
    assert "trained_tokens" not in measured[2].metrics  # its manifest does not tell
    assert "bitflip" in screen and "strength tolerated" in screen
    # More strengths and another noise: what is there is not measured again.
    more = [*FLAGS[:-1], "--strengths=0.01,0.03,0.1", "--noise=bitflip", "--noise=stuck"]
    again, _ = ran(capsys, tmp_path / "out", *more, *flags[-3:])
    assert again[: len(records)] == records
    assert len([r for r in again if r.phase == "evaluate"]) == 2 * (3 + 3)


def test_what_is_foreseen_and_the_controls(tmp_path, capsys, monkeypatch):
    from ternax import noise_study

    monkeypatch.setattr(noise_study, "CURVE", (0.6,))
    flags = ["--sequences=9", "--length=32", "--draws=2", "--strengths=0.02", "--noise=trit_other"]
    flags += ["--controls", "--protect=0.3", r"--select=layers\.1\.mlp\..*"]
    records, screen = ran(capsys, tmp_path / "out", *flags)
    found = {
        r.kind: r.metrics for r in records if r.note.startswith("trit_other at 0.02 on layers")
    }
    rise = found["measured"]["bits_per_byte_rise"]
    assert found["predicted"]["bits_per_byte_rise"] == pytest.approx(rise, rel=0.35, abs=0.005)
    # Each projection alone, measured and foreseen.
    alone = [r for r in records if "on layers\\.1\\.mlp\\.up, draw" in r.note]
    assert len(alone) == 2 and 0 < alone[0].metrics["changed_count"] <= 256 * 256
    assert len([r for r in records if "sensitivity" in r.metrics]) == 3
    # Output SNR by projection.
    ratios = {r.kind: r.samples for r in records if ": output SNR of " in r.note}
    assert ratios["measured"] == pytest.approx(ratios["predicted"], abs=0.7)
    # Controls: as many changes elsewhere; a share kept clean costs less.
    controls = {
        r.note.partition(": ")[0]: r.metrics
        for r in records
        if r.phase == "noise" and ": trit_other at 0.02" in r.note
    }
    assert controls["elsewhere"]["changed_count"] == found["measured"]["changed_count"]
    assert {"gaussian of equal norm", "0.3 of dearest outputs kept"} <= controls.keys()
    assert any(r.note.startswith("weights permuted: nothing") for r in records)
    assert "budget, predicted" in screen and "weights permuted" in screen
    # The same again: nothing is measured, and nothing said twice.
    assert ran(capsys, tmp_path / "out", *flags)[0] == records


@pytest.mark.parametrize("option", ["--select=embedding", "--rows=0.5"])
def test_what_has_no_prediction_is_measured_all_the_same(option, tmp_path, capsys):
    flags = ["--sequences=9", "--length=32", "--draws=2", "--strengths=0.03", "--noise=bitflip"]
    records, _ = ran(capsys, tmp_path / "out", *flags, option)
    assert {r.kind for r in records} == {"measured"} and len(records) == 2 + 2
    assert not any("product_cosine" in r.metrics for r in records)


def test_crossings():
    strengths, rises = (0.01, 0.1, 1.0), (0.02, 0.2, 2.0)  # in proportion
    assert crossing(strengths, rises, 0.05) == pytest.approx(0.025)
    assert crossing(strengths, rises, 0.01) == pytest.approx(0.005)
    assert crossing(strengths, rises, 3.0) is None
    assert crossing(strengths, (-0.01, 0.09, 1.0), 0.04) == pytest.approx(0.055)
    assert crossing(strengths, (0.01, math.inf, math.inf), 0.2) == 0.01
    assert area([0, 1, 3], [1.0, 0.5, 0.5]) == pytest.approx(1.75 / 3)
    assert shape_error(1.0) == 0 and shape_error(0.5) == 3


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--noise=bitflop"], "noise: expected one of sign_flip"),
        (["--noise=bitflip,rate=0.1"], "rate is swept over"),
        (["--noise=bitflip", "--strengths=0.1,2"], "rate must lie in [0, 1], found 2.0"),
        (["--noise=ternax.noise.analog:Gaussian"], "--strengths: expected some for ternax"),
        (["--strengths=a,b"], "expected numbers with commas between, found 'a,b'"),
        (["--noise=bitflip", "--strengths=0.1,0.01"], "expected rising numbers above 0"),
        (["--select=layers.*.ffn"], "nothing is named 'layers.*.ffn'; nearest: layers."),
        (["--noise=gaussian", "--select=embedding"], "expected projections of integer codes"),
        (["--sequences=999"], "expected 1 .. 665, what the text has, found 999"),
        (["--text={short}"], "expected more than 256 tokens, found 10"),
        (["--config=tiny-bitnt"], "tiny-bitnt"),
    ],
)
def test_refusals_are_one_line(arguments, why, tmp_path, capsys):
    (tmp_path / "short").write_bytes(b"too short")
    arguments = [word.format(short=tmp_path / "short") for word in arguments]
    assert robustness.main([*arguments, f"--output_dir={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and why in said.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_study(tmp_path, capsys):
    flags = ["--sequences=8", "--length=16", "--draws=1", "--strengths=0.1", "--noise=stuck"]
    flags += ["--no_sensitivity", "--no_forecast", SELECT]
    ran(capsys, tmp_path / "out", *flags)
    assert robustness.main([*flags, "--seed=4", f"--output_dir={tmp_path / 'out'}"]) == 2
    assert "holds another study (seed 0, here 4)" in capsys.readouterr().err


def test_what_layers_read_and_random_weights(tmp_path, capsys):
    flags = ["--sequences=4", "--length=16", "--draws=2", "--strengths=0.05", "--noise=sign_flip"]
    flags += ["--by_depth", "--no_sensitivity", "--no_forecast"]
    cosines = {}
    for weights in ("auto", "random"):
        records, said = ran(capsys, tmp_path / weights, *flags, f"--weights={weights}")
        assert ("random weights" in said) == (weights == "random")
        [record] = [record for record in records if record.sample_unit == "cosine"]
        assert len(record.samples) == STDLIB_BITNET.num_layers
        first, *others = record.samples
        assert first == pytest.approx(1, abs=1e-6)  # the table is not struck
        assert others == sorted(others, reverse=True) and others[-1] < 0.99
        shown = next(
            line
            for line in said.splitlines()
            if line.startswith("sign_flip  ") and "1.0000" in line
        )
        assert shown.split()[2:-1] == [f"{value:.4f}" for value in record.samples]
        cosines[weights] = others[-1]
    assert cosines["random"] < cosines["auto"]


def test_the_cache_and_all_memory(tmp_path, capsys):
    flags = ["--sequences=4", "--length=16", "--draws=1", "--strengths=0.001", "--select=.*"]
    flags += ["--noise=cache_bits,dtype=int8", "--noise=memory_bits,cache=int8"]
    records, said = ran(capsys, tmp_path / "out", *flags)
    points = {r.note.partition(" at ")[0]: r.metrics for r in records if r.phase == "evaluate"}
    assert points["cache_bits,dtype=int8"]["changed_count"] == 0  # at each read, not counted
    assert points["memory_bits,cache=int8"]["changed_count"] > 1000
    assert all("first_divergence_tokens" not in metrics for metrics in points.values())
    assert "plug-in" not in said.partition("strength tolerated")[0]


def test_a_divergence_that_overflows_is_left_out(tmp_path, capsys, monkeypatch):
    right = measured.contrast

    def overflowed(*arguments):
        return dataclasses.replace(right(*arguments), kl_bits=math.inf)

    monkeypatch.setattr(measured, "contrast", overflowed)
    flags = ["--sequences=4", "--length=16", "--draws=2", "--strengths=0.01", "--noise=stuck"]
    records, _ = ran(capsys, tmp_path / "out", *flags, "--no_sensitivity", "--no_forecast")
    known = [r.metrics for r in records if "bits_per_byte_rise" in r.metrics]
    assert len(known) == 3 and all("kl_bits" not in metrics for metrics in known)
    assert all("top1_agreement" in metrics for metrics in known)


def test_a_lost_model_fits_its_columns():
    metrics = {"bits_per_byte_rise": 5.34e36, "bits_per_byte_rise_low": -7e36}
    metrics |= {"bits_per_byte_rise_high": 1.8e37}
    assert noise_table.spread(metrics) == "5.3e+36 +-1.2e+37"
    assert noise_table.spread({"bits_per_byte_rise": 6.5409}) == "6.5409"
