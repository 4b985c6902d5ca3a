"""Decode runs of tiny models: every record, every number from its samples, every ending."""

import contextlib
import csv
import dataclasses
import errno
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ternax import configs, cost, decoding, measure
from ternax.errors import DoesNotFit, Interrupted
from ternax.experiments import decode
from ternax.kernels.backends import BACKENDS
from ternax.metrics import METRICS
from ternax.record import Record, read_records
from ternax.workload import Workload

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = ["plan", "create", "compile", "prefill", "decode"]
# What a platform may not tell; all others must be there.
TOLD = {"peak_memory_bytes", "available_memory_bytes"}
SPEED = {
    "tokens_per_s",
    "bound_tokens_per_s",
    "share_of_bound",
    "tpot_ms_p50",
    "tpot_ms_p99",
    "bytes_per_step",
    "read_bandwidth_gb_per_s",
}
PLANNED = {
    "planned_memory_bytes",
    "weight_bytes",
    "cache_bytes",
    "bytes_per_step",
    "parameters",
    "ternary_parameters",
    "bits_per_weight",
}
EXPECTED = {
    "plan": PLANNED | {"read_bandwidth_gb_per_s", "bound_tokens_per_s", "available_memory_bytes"},
    "create": {"create_s", "weight_bytes", "gb_per_s", "peak_memory_bytes"},
    "compile": {"compile_s", "peak_memory_bytes"},
    "prefill": {"ttft_ms", "prefill_tokens_per_s", "prompt_tokens", "peak_memory_bytes"},
    "decode": SPEED | {"planned_memory_bytes", "peak_memory_bytes", "generated_tokens"},
}
ENERGY = {"joules", "joules_per_token", "watts"}


def without_waiting(patch):
    """A read bandwidth of 20 GB/s, at once, and no energy counter."""
    bandwidth = measure.Bandwidth((10.0, 20.0, 30.0), 2, 1 << 20, "made up")
    patch.setattr(measure, "read_bandwidth", lambda **_: bandwidth)
    patch.setattr(measure, "energy_meter", lambda: measure.EnergyMeter([]))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_waiting(monkeypatch)


def tiny(name="tiny-llama", **changes):
    return dataclasses.replace(configs.get_config(name), **{"num_layers": 1} | changes)


def next_arguments(screen: str) -> list[str]:
    """Arguments of the command that the screen ends with."""
    words = shlex.split(screen.splitlines()[-1].removeprefix("next: "))
    assert words[:3] == ["python", "-m", "experiments.decode"]
    return words[3:]


# --- One run, looked at from all sides -------------------------------------------------------

LINE = (
    "--config=tiny-llama --batch=2 --kv_dtype=int8 --embed_dtype=int4 --head_dtype=int4 "
    "--prompt_length=5 --num_tokens=40 --seed=3 --inputs=none"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory, records, screen) of LINE, on a machine that counts 30 J between two readings."""
    directory, screen = tmp_path_factory.mktemp("decode") / "run", io.StringIO()
    counter = ("made up", itertools.count(0, 30).__next__, None)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        without_waiting(patch)
        patch.setattr(measure, "energy_meter", lambda: measure.EnergyMeter([counter]))
        assert decode.main([*LINE.split(), f"--output_dir={directory}"]) == 0
    return directory, read_records(directory / "results.jsonl"), screen.getvalue()


def test_every_phase_has_its_record_with_its_metrics(finished):
    _, records, _ = finished
    assert [record.phase for record in records] == PHASES
    for record in records:
        expected = EXPECTED[record.phase] | (ENERGY if record.phase == "decode" else set())
        assert expected - TOLD <= record.metrics.keys() <= expected
        assert record.kind == ("predicted" if record.phase == "plan" else "measured")


def test_every_record_says_what_ran(finished):
    _, records, _ = finished
    for record in records:
        assert (record.experiment, record.config, record.scheme) == (
            "decode",
            "tiny-llama",
            "absmean",
        )
        assert (record.inputs, record.layers, record.batch, record.context, record.seed) == (
            "none",
            3,
            2,
            45,
            3,
        )
        assert record.backend in BACKENDS
        assert record.device == measure.device_name(None)
        assert not record.incomplete and record.flags.startswith(LINE)
        assert re.search(r"python 3.*jax 0.*flax", record.versions) and record.commit
        assert len(record.source_sha256) == 64


def test_the_promised_names_are_in_the_file(finished):
    directory, _, _ = finished
    for line in json.loads((directory / "results.json").read_text()):
        assert {
            "experiment",
            "config",
            "scheme",
            "backend",
            "device",
            "layers",
            "batch",
            "context",
            "phase",
            "kind",
            "samples",
            "versions",
            "commit",
            "metrics",
        } <= line.keys()
    assert SPEED <= line["metrics"].keys()


def test_numbers_follow_from_the_samples(finished):
    _, records, _ = finished
    _, create, compile_, prefill, steps = records
    assert create.samples == (create.metrics["create_s"],)
    assert create.metrics["gb_per_s"] == pytest.approx(
        create.metrics["weight_bytes"] / create.samples[0] / 1e9
    )
    assert compile_.metrics["compile_s"] == pytest.approx(sum(compile_.samples))
    assert len(compile_.samples) == 2
    m, median = prefill.metrics, np.median(prefill.samples)
    assert m["prompt_tokens"] == 5
    assert m["ttft_ms"] == pytest.approx(1e3 * median)
    assert m["prefill_tokens_per_s"] == pytest.approx(2 * 5 / median)
    m, median = steps.metrics, np.median(steps.samples)
    assert steps.sample_unit == "s/token" and m["generated_tokens"] == 40
    assert m["tpot_ms_p50"] == pytest.approx(1e3 * median)
    assert m["tpot_ms_p99"] == pytest.approx(1e3 * np.percentile(steps.samples, 99))
    assert m["tokens_per_s"] == pytest.approx(2 / median)
    assert m["share_of_bound"] == pytest.approx(m["tokens_per_s"] / m["bound_tokens_per_s"])
    # 38 of 40 tokens are timed, a few in each device loop, the last ones together.
    loop = int(re.search(r"device loop of up to (\d+) tokens", steps.note)[1])
    assert len(steps.samples) == -(-38 // loop) >= 8
    sizes = [min(loop, 38 - done) for done in range(0, 38, loop)]
    assert m["joules"] == 30 and m["joules_per_token"] == pytest.approx(30 / (2 * 38))
    assert m["watts"] == pytest.approx(30 / np.dot(sizes, steps.samples))


def test_the_bound_follows_from_the_plan_and_the_bandwidth(finished):
    _, records, _ = finished
    planned = cost.plan(
        "tiny-llama",
        batch=2,
        context=45,
        prompt=5,
        kv_dtype="int8",
        embed_dtype="int4",
        head_dtype="int4",
    )
    first, m = records[0].metrics, records[-1].metrics
    assert first["planned_memory_bytes"] == m["planned_memory_bytes"] == planned.total_bytes
    assert first["weight_bytes"] == records[1].metrics["weight_bytes"] == planned.weight_bytes
    assert first["cache_bytes"] == planned.bytes["cache"]
    assert first["bytes_per_step"] == planned.bytes_per_step
    assert first["bound_tokens_per_s"] == pytest.approx(2 * 20e9 / planned.bytes_per_step)
    assert (first["parameters"], first["ternary_parameters"]) == (
        planned.parameters,
        planned.ternary_parameters,
    )
    # While timing rows grow from 7 to 44 tokens.
    cache = planned.step_bytes["cache"]
    assert m["bytes_per_step"] == pytest.approx(
        planned.bytes_per_step - cache + cache * 25.5 / 45, abs=1
    )
    assert m["read_bandwidth_gb_per_s"] == 20
    assert m["bound_tokens_per_s"] == pytest.approx(2 * 20e9 / m["bytes_per_step"])


def test_json_lines_json_and_csv_agree(finished):
    directory, records, _ = finished
    values = [record.to_dict() for record in records]
    assert json.loads((directory / "results.json").read_text()) == values
    rows = list(csv.DictReader((directory / "results.csv").open()))
    assert len(rows) == len(values)
    for row, value in zip(rows, values, strict=True):
        assert [float(sample) for sample in row["samples"].split()] == value["samples"]
        assert {name: float(row[name]) for name in METRICS if row.get(name)} == value["metrics"]
        plain = value.keys() - {"samples", "metrics"}
        assert {name: row[name] for name in plain} == {name: str(value[name]) for name in plain}
    report = (directory / "report.md").read_text()
    assert "predicted: experiment decode" in report and "measured: experiment decode" in report


def test_the_screen_reads_from_plan_to_next_command(finished):
    _, records, screen = finished
    lines = screen.splitlines()
    labels = [line.split()[0] for line in lines if line[:1].isalpha()]
    wanted = ["ternax", "plan", "bound", *PHASES[1:], "tokens", "memory", "wrote"]
    assert labels[: len(wanted)] == wanted
    assert max(len(line) for line in lines if not line.startswith(("wrote", "next"))) <= 100
    assert "tiny-llama in absmean decodes" in screen and "e+" not in screen
    assert decode.rate(records[-1].metrics["tokens_per_s"]) in screen
    args = decode.COMMAND.parse(next_arguments(screen))
    assert (args.config.name, args.scheme, args.batch, args.embed_dtype, args.seed) == (
        "tiny-llama",
        "int8",
        2,
        "int4",
        3,
    )
    assert args.output_dir is None


def test_progress_is_not_shown_where_nobody_looks(finished, capsys):
    assert capsys.readouterr().err == ""


# --- Every scheme, both families, and what --scheme may name ---------------------------------

RUNS = [
    # model, scheme, bits of a weight, inputs
    ("tiny-llama", "twn", 2, "int8"),
    ("tiny-bitnet", "optimal,granularity=row", 2, "int8"),
    ("tiny-bitnet", "sign", 2, "none"),
    ("tiny-llama", "int8", 8, "int8"),
    ("tiny-bitnet", "int4,group_size=16", 4, "int8"),
    ("tiny-llama", "none", 16, "none"),
    ("tiny-bitnet", "ternax.quant.ternary:TWN", 2, "int8"),
]


@pytest.mark.parametrize("name, scheme, bits, inputs", RUNS, ids=[run[1] for run in RUNS])
def test_scheme(name, scheme, bits, inputs):
    config = tiny(name, scheme=scheme, inputs=inputs)
    records = decode.run(config, Workload(prompt_length=2, num_tokens=3))
    assert [record.phase for record in records] == PHASES
    assert {(record.scheme, record.inputs, record.layers) for record in records} == {
        (scheme, inputs, 1)
    }
    planned, steps = records[0].metrics, records[-1]
    scales = 32 / 16 if "group" in scheme else 1.0  # an f32 for 16 weights, or a short row
    # Rows are padded to whole blocks of 16, which counts in matrices this small.
    assert bits <= planned["bits_per_weight"] <= bits * 1.1 + scales
    assert len(steps.samples) == 1 and steps.metrics["generated_tokens"] == 3
    # Energy is absent where the machine does not tell, not zero.
    assert steps.metrics.keys() | TOLD == EXPECTED["decode"] | TOLD


def test_run_takes_a_command_line_of_a_scheme_class(tmp_path, capsys):
    line = ["--config=tiny-bitnet", "--scheme=ternax.quant.ternary:TWN", "--plan_only"]
    assert decode.main(line) == 0
    assert "in ternax.quant.ternary:TWN at 2." in capsys.readouterr().out


# --- Part of a model, text prompts, one thread, a profile ------------------------------------

SCRIPT = r"""
import functools, os, re, sys
from ternax import measure
from ternax.experiments import decode
measure.read_bandwidth = functools.partial(measure.read_bandwidth, max_bytes=1 << 22)
code = decode.main(sys.argv[1:])
allowed = {}
for task in os.listdir("/proc/self/task"):
    text = open(f"/proc/self/task/{task}/status").read()
    allowed[re.search(r"Name:\s+(\S+)", text)[1]] = re.search(
        r"Cpus_allowed_list:\s+(\S+)", text)[1]
print("ALLOWED", allowed)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A run in a process of its own: --threads must come before JAX starts its pools."""
    directory = tmp_path_factory.mktemp("part")
    argv = [
        "--config=tiny-llama",
        "--layers=2",
        "--prompt=Hé!",
        "--num_tokens=6",
        "--threads=1",
        f"--profile_dir={directory / 'profile'}",
        f"--output_dir={directory / 'run'}",
    ]
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (child.returncode, child.stderr) == (0, "")
    return directory, read_records(directory / "run" / "results.jsonl"), child.stdout


def test_a_part_never_reads_as_the_model(part):
    _, records, screen = part
    for record in records:
        assert record.layers == 2 and record.note.startswith("first 2 of 3 layers")
    assert "tiny-llama, first 2 of 3 layers:" in screen
    assert re.search(r"decode   \S+ tokens/s through 2 of 3 layers;", screen)
    words = " ".join(screen.split())
    assert "The first 2 layers alone of tiny-llama in absmean decode " in words
    assert "The model has 3 layers and is slower." in words
    whole = decode.COMMAND.parse(next_arguments(screen[: screen.index("ALLOWED")]))
    assert (whole.layers, whole.prompt, whole.threads) == (3, "Hé!", 1)
    assert records[0].metrics["parameters"] == cost.plan(tiny(num_layers=2)).parameters


def test_a_text_prompt_is_one_token_a_byte(part):
    _, records, screen = part
    assert records[0].context == 4 + 6 and records[3].metrics["prompt_tokens"] == 4
    assert re.search(r"^text     Hé!.*\ndecode   ", screen, re.MULTILINE | re.DOTALL)


def test_one_thread(part):
    _, records, screen = part
    assert all(record.device.endswith(", 1 threads") for record in records)
    allowed = json.loads(screen.partition("ALLOWED ")[2].replace("'", '"'))
    pools = {name: cpus for name, cpus in allowed.items() if name.startswith(("tf_", "xla", "XLA"))}
    assert pools and all(cpus.isdigit() for cpus in pools.values()), allowed


def test_a_profile_is_written_and_told(part):
    directory, records, _ = part
    assert any(path.is_file() for path in (directory / "profile").rglob("*.xplane.pb"))
    assert "profiled" in records[-1].note


def test_prompts():
    random = Workload(batch=3, prompt_length=7, seed=5).tokens(tiny())
    assert random.shape == (3, 7) and random.dtype == np.int32
    assert random.min() >= 0 and random.max() < 259
    assert (random == Workload(batch=3, prompt_length=7, seed=5).tokens(tiny())).all()
    assert (random != Workload(batch=3, prompt_length=7, seed=6).tokens(tiny())).any()
    text = Workload(batch=2, prompt="né").tokens(tiny())
    assert text.tolist() == [list("né".encode())] * 2
    typed = b"\xff!".decode(errors="surrogateescape")  # what Python makes of such an argument
    assert Workload(prompt=typed).tokens(tiny()).tolist() == [[255, 33]]


# --- What fits -------------------------------------------------------------------------------


def have(monkeypatch, gib):
    monkeypatch.setattr(cost, "available_bytes", lambda device=None: int(gib * 2**30))


@pytest.mark.parametrize("gib, name", [(6, "13b"), (3.8, "8b"), (0.9, "tiny-llama")])
def test_fit_auto_plans_the_largest_that_fits_and_says_so(gib, name, monkeypatch, capsys):
    have(monkeypatch, gib)
    assert decode.main(["--config=70b", "--fit=auto", "--plan_only", "--num_tokens=8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"available {gib:.2f} GiB; {name} is the largest of its family that fits" in out
    assert f"plan {name}: " in out and out.count(": fits") == 1 and "DOES NOT" not in out


def test_fit_auto_runs_it_with_the_flags_that_were_given(monkeypatch, capsys, tmp_path):
    have(monkeypatch, 0.9)
    line = [
        "--config=70b",
        "--layers=40",
        "--config.hidden_size=4096",
        "--fit=auto",
        "--seed=1",
        "--scheme=twn",
        "--num_tokens=4",
        "--embed_dtype=bf16",
        f"--output_dir={tmp_path}",
    ]
    assert decode.main(line) == 0
    out = capsys.readouterr().out
    assert "tiny-llama is the largest of its family" in " ".join(out.split())
    last = read_records(tmp_path / "results.jsonl")[-1]
    assert (last.config, last.layers, last.scheme) == ("tiny-llama", 3, "twn")
    assert "first" not in last.note and "through" not in out
    args = decode.COMMAND.parse(next_arguments(out))
    assert (args.config.name, args.layers, args.batch, args.embed_dtype, args.seed) == (
        "tiny-llama",
        3,
        4,
        "bf16",
        1,
    )


def test_fit_auto_keeps_a_model_that_fits(monkeypatch, capsys):
    have(monkeypatch, 30)
    assert decode.main(["--config=70b", "--fit=auto", "--plan_only"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan     70b: 70,553,706,496 parameters") and "largest" not in out


def test_run_refuses_what_does_not_fit(monkeypatch):
    have(monkeypatch, 6)
    with pytest.raises(DoesNotFit, match="70b does not fit"):
        decode.run(configs.get_config("70b"), Workload())


REFUSE = """
import resource, sys
from ternax import cost, measure
from ternax.experiments import decode
cost.available_bytes = lambda device=None: 6 << 30
code = decode.main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(code, measure.peak_resident_bytes(), used.ru_utime + used.ru_stime)
"""


@pytest.mark.parametrize("flag, code", [("--fit=refuse", 3), ("--fit=auto", 0)])
def test_refusing_and_planning_are_cheap(flag, code, tmp_path):
    argv = ["--config=405b", flag] + ["--plan_only"] * (code == 0)
    child = subprocess.run(
        [sys.executable, "-c", REFUSE, *argv],
        cwd=tmp_path,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    returned, peak, seconds = child.stdout.splitlines()[-1].split()
    assert int(returned) == code and child.stderr.count("\n") == (code != 0)
    # The process time of a quiet machine is 1.2 s; 2 s are promised there.
    assert int(peak) < 300e6 and float(seconds) < 4
    assert list(tmp_path.iterdir()) == []  # no results of a run that was not


def test_plan_only_keeps_the_plan_where_a_directory_is_given(tmp_path, capsys):
    assert decode.main(["--config=8b", "--plan_only", f"--output_dir={tmp_path}"]) == 0
    (record,) = read_records(tmp_path / "results.jsonl")
    assert (record.phase, record.kind, record.samples) == ("plan", "predicted", ())
    assert record.metrics.keys() >= PLANNED - {"available_memory_bytes"}
    assert "bound_tokens_per_s" not in record.metrics  # no bandwidth was measured
    assert capsys.readouterr().out.startswith("plan     8b: 8,030,261,248 parameters")


@pytest.mark.parametrize(
    "line, without, more",
    [
        ("--config=2b4t --batch=2 --num_tokens=9", {"batch"}, "--num_tokens=9"),
        ("--config=8b --layers=4 --config.norm_eps=0.001", {"layers"}, "--config.norm_eps=0.001"),
        ("--prompt='two words' --nodebug", set(), "--nodebug '--prompt=two words'"),
        ("--fit=auto --plan_only", {"fit"}, "--plan_only"),
    ],
)
def test_a_command_is_given_again(line, without, more):
    args = decode.COMMAND.parse(shlex.split(line))
    base = args.config.name.partition("(")[0]
    command = decode.command(args, without, config=base)
    assert command == f"python -m experiments.decode --config={base} {more}"
    again = decode.COMMAND.parse(shlex.split(command)[3:])
    assert again.config == args.config


# --- Interrupted -----------------------------------------------------------------------------


def interrupt_at(monkeypatch, module, name, count):
    """Sends SIGINT to this process at the `count`-th call of module.name."""
    original, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(f"{module}.{name}", wrapped)


@pytest.mark.parametrize(
    "module, name, count, phase, samples",
    [
        ("ternax.random_weights", "_fill", 2, "create", 0),
        ("ternax.engine", "row_keys", 1, "compile", 0),
        ("ternax.engine", "DecodeState", 1, "compile", 1),
        ("ternax.sharding", "fetch", 3, "prefill", 2),  # the cold run, two warm ones
        (None, None, None, "decode", 3),  # at the third report of progress
    ],
    ids=["create", "compile", "between-compiles", "prefill", "decode"],
)
def test_interrupted(module, name, count, phase, samples, monkeypatch, tmp_path, capsys):
    if phase == "decode":

        @contextlib.contextmanager
        def progress(name, total, unit):
            calls = itertools.count(1)
            yield (
                lambda amount: (
                    name == "decode"
                    and next(calls) == samples
                    and signal.raise_signal(signal.SIGINT)
                )
            )

        monkeypatch.setattr(decode, "progress", progress)
    else:
        interrupt_at(monkeypatch, module, name, count)
    before = signal.getsignal(signal.SIGINT)
    line = ["--config=tiny-bitnet", "--layers=1", "--num_tokens=12", f"--output_dir={tmp_path}"]
    assert decode.main(line) == 130
    out, err = capsys.readouterr()
    records = read_records(tmp_path / "results.jsonl")
    assert err == (
        f"error: interrupted during {phase}; {len(records)} records kept in {tmp_path}, "
        "the last marked incomplete\n"
    )
    assert [record.phase for record in records] == PHASES[: PHASES.index(phase) + 1]
    assert [record.incomplete for record in records] == [False] * (len(records) - 1) + [True]
    assert len(records[-1].samples) == samples
    assert json.loads((tmp_path / "results.json").read_text()) == [r.to_dict() for r in records]
    assert "incomplete" in (tmp_path / "report.md").read_text()
    assert "next:" not in out and signal.getsignal(signal.SIGINT) is before
    if phase == "decode":  # what there was is worked out
        m = records[-1].metrics
        assert m["tokens_per_s"] == pytest.approx(1 / np.median(records[-1].samples))
        assert m["generated_tokens"] == 2 + samples


def interrupt_after_the_plan(record):
    if record.phase == "plan":
        signal.raise_signal(signal.SIGINT)


def test_interrupted_without_a_store():
    with pytest.raises(Interrupted, match="interrupted during create; 2 records kept, the last"):
        decode.run(tiny(), Workload(), watch=interrupt_after_the_plan)


def test_ctrl_c_on_the_real_thing(tmp_path):
    """A process that decodes for minutes, as a terminal would interrupt it."""
    command = [
        sys.executable,
        "-m",
        "experiments.decode",
        "--config=tiny-bitnet",
        "--config.max_context=400000",
        "--num_tokens=300000",
        f"--output_dir={tmp_path}",
    ]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in child.stdout:
        if line.startswith("prefill"):
            break
    time.sleep(0.5)  # it decodes now, or is about to
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert re.fullmatch(r"error: interrupted during decode; 5 records kept in .*\n", err)
    records = read_records(tmp_path / "results.jsonl")
    assert [record.phase for record in records] == PHASES and records[-1].incomplete
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5


# --- A full disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("full_at, kept", [(1, 0), (3, 2)])
def test_a_disk_that_fills_up_keeps_what_was_written(full_at, kept, monkeypatch, tmp_path, capsys):
    fsync, calls = os.fsync, itertools.count(1)

    def full(file):
        if next(calls) >= full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    line = ["--config=tiny-bitnet", "--layers=1", "--num_tokens=4", f"--output_dir={tmp_path}"]
    assert decode.main(line) == 6
    err = capsys.readouterr().err
    assert err == (
        f"error: {tmp_path}/results.jsonl cannot be written: No space left on device; "
        f"the {kept} records before this one are kept\n"
    )
    monkeypatch.undo()
    assert [r.phase for r in read_records(tmp_path / "results.jsonl")] == PHASES[:kept]


# --- The machine -----------------------------------------------------------------------------


def test_a_peak_that_may_be_the_bandwidth_buffer_is_left_out(monkeypatch):
    monkeypatch.setattr(measure, "reset_peak", lambda: False)
    monkeypatch.setattr(measure, "peak_resident_bytes", lambda device=None: 2**40)
    job = decoding.DecodeRun(tiny(), Workload())
    with pytest.raises(Interrupted):
        job.measure_all(watch=interrupt_after_the_plan)
    assert job.records[-1].phase == "create" and job.records[-1].metrics == {}


# --- The guide -------------------------------------------------------------------------------


def test_the_guide_names_every_field_and_metric_with_its_unit():
    text = (ROOT / "docs" / "records.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    told = {name: (unit, meaning) for name, unit, meaning in rows}
    assert len(told) == len(rows), "a name stands twice"
    fields = {field.name for field in dataclasses.fields(Record)}
    assert told.keys() == fields | METRICS.keys()
    for name, metric in METRICS.items():
        assert told[name][0] == (metric.unit or "none"), name
    for name, (_, meaning) in told.items():
        assert len(meaning.split()) >= 3, f"{name} is not explained"
