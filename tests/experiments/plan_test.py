"""`experiments.plan` as a user runs it."""

import pathlib
import re
import resource
import subprocess
import sys
import time

import pytest

from ternax import drawing, plan_table, validation
from ternax.experiments import plan
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_one_layout_is_told_and_kept(tmp_path, capsys):
    flags = ["--config=70b", "--device=l40s", "--context=1024", f"--output_dir={tmp_path}"]
    assert plan.main(flags) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    (record,) = read_records(tmp_path / "results.jsonl")
    m = record.metrics
    assert (record.kind, record.phase, record.device) == ("predicted", "plan", "l40s")
    told = float(re.search(r"rate +([\d,.]+) tokens/s", out)[1].replace(",", ""))
    assert told == pytest.approx(m["tokens_per_s"], rel=5e-3)
    step = sum(m[f"{part}_ms"] for part in plan_table.PARTS)
    assert step == pytest.approx(m["tpot_ms_p50"]) and step == pytest.approx(1e3 / told, rel=5e-3)
    parts = ("projections", "head", "embedding", "cache", "activations")
    assert sum(m[f"{part}_bytes"] for part in parts) == pytest.approx(m["device_memory_bytes"])
    assert m["mbu_share"] == pytest.approx(m["efficiency_share"], rel=1e-2)
    assert m["usd_per_million_tokens"] == pytest.approx(1.4 / 3600 / told * 1e6, rel=5e-3)
    assert "rates, published, on dgx-spark" in record.note and "RunPod" in record.note
    for name in ("results.json", "results.csv", "report.md"):
        assert (tmp_path / name).stat().st_size
    assert (tmp_path / "plan.png").exists() == bool(drawing.pyplot())


def test_the_users_own_records_calibrate(tmp_path, capsys):
    """A folder called like the device counts for it; else all there is, in a run's folder too."""
    run = tmp_path / "mine" / "h100-sxm"
    run.mkdir(parents=True)
    lines = (ROOT / "results" / "cpu-zen5" / "compare-8b.jsonl").read_text().splitlines()
    ours = [line for line in lines if '"backend": "cpu"' in line]
    (run / "results.jsonl").write_text("\n".join(ours) + "\n")
    shares = []
    for folder, device in ((run, "l40s"), (run.parent, "h100"), (run.parent, "l40s")):
        out = tmp_path / f"out{len(shares)}"
        flags = ["--config=8b", f"--device={device}", f"--calibrate={folder}"]
        assert plan.main([*flags, f"--output_dir={out}"]) == 0
        (record,) = read_records(out / "results.jsonl")
        assert f"one rate, in {folder}, on h100-sxm" in record.note
        shares.append(record.metrics["efficiency_share"])
    assert shares == [pytest.approx(validation.own(run)[0].efficiency)] * 3
    for folder in (tmp_path / "none", tmp_path):
        assert plan.main([f"--calibrate={folder}"]) == 2
        assert "expected records of decoding" in capsys.readouterr().err
    assert plan.main(["--efficiency=0.5", f"--calibrate={run}"]) == 2
    assert "say the same" in capsys.readouterr().err


def test_the_catalogue_is_ranked_alike_each_time(tmp_path, capsys):
    flags = ["--config=70b", "--scheme=int4", "--objective=cost", "--slo_ms=50"]
    told = []
    for i in range(2):
        assert plan.main([*flags, f"--output_dir={tmp_path / str(i)}"]) == 0
        told.append(capsys.readouterr().out.replace(str(tmp_path / str(i)), ""))
    assert told[0] == told[1] and "left out without a price: m1-pro" in told[0]
    records = read_records(tmp_path / "0" / "results.jsonl")
    cost = [r.metrics["usd_per_million_tokens"] for r in records]
    assert cost == sorted(cost) and len(records) > 3
    assert all(r.metrics["tpot_ms_p50"] <= 50 for r in records)
    rows = [line for line in told[0].splitlines() if ", int4, batch" in line]
    assert len(rows) == len(records) + 1  # the first is told in full too


def test_formats_have_sizes_of_files(tmp_path, capsys):
    """The published I2_S file of 2B-4T, head and embedding one, is 1,178,623,988 bytes long."""
    schemes = "--scheme=fp32,i2_s,1.25-bit"
    assert plan.main(["--config=2b4t", schemes, f"--output_dir={tmp_path / 'a'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "weights fp32 8.995 GB, i2_s 1.179 (7.63x smaller), sherry 0.98" in said
    split = ["--config=2b4t", "--scheme=trit2,i2_s", "--devices=2"]
    assert plan.main([*split, f"--output_dir={tmp_path / 'b'}"]) == 0
    assert "i2_s 1.179" in " ".join(capsys.readouterr().out.split())


def test_the_model_alone_varied(tmp_path, capsys):
    flags = ["--config=mistral-24b,qwen3-32b,70b", "--scheme=nvfp4", "--device=spark"]
    assert plan.main([*flags, f"--output_dir={tmp_path / 'a'}"]) == 0
    out = capsys.readouterr().out
    assert "\n  qwen3-32b: dgx-spark, nvfp4, batch 1 " in out
    records = read_records(tmp_path / "a" / "results.jsonl")
    assert [r.config for r in records] == ["mistral-24b", "qwen3-32b", "70b"]
    rates = [r.metrics["tokens_per_s"] for r in records]
    assert rates == sorted(rates, reverse=True)
    assert plan.main([*flags, "--objective=cost"]) == 2
    assert "layouts of one --config are ranked" in capsys.readouterr().err


def test_a_device_without_a_link_is_ranked_alone(tmp_path):
    flags = ["--config=8b", "--device=m1-pro", "--objective=cost", "--usd_per_hour=0.1"]
    assert plan.main([*flags, f"--output_dir={tmp_path}"]) == 0
    assert {r.device for r in read_records(tmp_path / "results.jsonl")} == {"m1-pro"}


def test_the_inverse_and_demand(tmp_path, capsys):
    flags = ["--scheme=nvfp4", "--context=16", "--target_tokens_per_s=15"]
    assert plan.main([*flags, f"--output_dir={tmp_path / 'a'}"]) == 0
    assert re.search(r"needs .* GB/s of one device for 15 tokens/s", capsys.readouterr().out)
    for record in read_records(tmp_path / "a" / "results.jsonl"):
        m = record.metrics
        assert 1e3 / m["tpot_ms_p50"] >= 15
        assert m["needed_gb_per_s"] * m["efficiency_share"] == pytest.approx(609, rel=3e-3)
    flags = ["--config=8b", "--demand_tokens_per_s=9000", "--objective=price"]
    assert plan.main([*flags, f"--output_dir={tmp_path / 'b'}"]) == 0
    for record in read_records(tmp_path / "b" / "results.jsonl"):
        m, one = record.metrics, record.metrics["tokens_per_s"] / record.metrics["replicas"]
        assert m["tokens_per_s"] >= 9000 > m["tokens_per_s"] - one


def test_what_does_not_fit_is_shown_as_such(tmp_path, capsys):
    flags = ["--scheme=fp16,trit2", "--device=h100", "--devices=1,2"]
    assert plan.main([*flags, f"--output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "\n! h100-sxm, fp16, batch 1" in out
    notes = [r.note for r in read_records(tmp_path / "results.jsonl")]
    assert [": fits" in note for note in notes] == [False, True, True, True]


def test_a_plan_is_quick_and_small(tmp_path):
    """Under two seconds and 400 MB, with the plot."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ternax.experiments.plan", f"--output_dir={tmp_path}"]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor_s = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    assert processor_s < 2, f"{time.perf_counter() - start:.1f} s passed"
    loaded = "import sys, ternax.experiments.plan; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "flags, code, says",
    [
        (["--device=h1000"], 2, "no device is named 'h1000'; nearest: h100"),
        (["--config=71b"], 2, "no model is named '71b'; nearest: 1b"),
        (["--scheme=int3"], 2, "no format is named 'int3'"),
        (["--context=9999999"], 2, "at most 131072, what 70b was made for"),
        (["--slo_ms=0.1"], 3, "the best possible is "),
        (["--slo_ms=-1"], 2, "--slo_ms must be above 0"),
        (["--slo_ms=9", "--target_tokens_per_s=9"], 2, "say the same: give one of them"),
        (["--device=m1-pro", "--objective=cost"], 2, "no price of m1-pro is known"),
        (["--device=m1-pro", "--devices=2"], 2, "m1-pro has no link to another"),
        (["--devices=1,x"], 2, "--devices must be numbers from 1 up behind commas"),
        (["--devices=2", "--tensor=4"], 2, "--tensor must divide --devices"),
        (["--device=l4", "--scheme=fp16", "--objective=latency", "--devices=1"], 3, "no layout"),
        (["--efficiency=1.5"], 2, "efficiency must be above 0"),
    ],
)
def test_mistakes_are_one_line(flags, code, says, tmp_path, capsys):
    assert plan.main([*flags, f"--output_dir={tmp_path / 'none'}"]) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "none").exists()
