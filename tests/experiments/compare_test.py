"""The command as a user runs it: ours a tiny model, the peer a script that prints like one."""

import contextlib
import io
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from ternax.experiments import compare
from ternax.record import Record, read_records

ROOT = pathlib.Path(__file__).resolve().parents[2]

PEER = """
import json, pathlib, sys, time
here = pathlib.Path(__file__).parent
mode = (here / "mode").read_text()
(here / "started").touch()
if mode == "hang":
    time.sleep(600)
if mode == "die":
    sys.exit("no luck today")
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
prompt, new, repetitions = int(asked["-p"]), int(asked["-n"]), int(asked["-r"])
common = dict(build_commit="abc", model_type="peer's model", model_size=10**9, model_n_params=10**9)
common["n_threads"] = int(asked["-t"])
tests = [(prompt, 0, prompt * 10**7), (0, new, new * 10**8)]
print(json.dumps([
    dict(common, n_prompt=p, n_gen=n, samples_ns=[ns] * repetitions) for p, n, ns in tests
]))
"""


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A folder with the peer and the file that says how it behaves."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "peer.py").write_text(PEER)
    (folder / "model.gguf").touch()
    (folder / "mode").write_text("well")
    return folder


def words(peer, *more: str) -> list[str]:
    command = shlex.join([sys.executable, str(peer / "peer.py"), "-m", str(peer / "model.gguf")])
    flags = ["--config=tiny-llama", "--prompt_length=4", "--num_tokens=8", "--threads=1"]
    return [*flags, f"--peer=made up={command}", *more]


def ran(arguments) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = compare.main(arguments)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def finished(peer, tmp_path_factory):
    """(directory, screen) of one round."""
    directory = tmp_path_factory.mktemp("compare") / "run"
    code, screen, errors = ran(words(peer, "--rounds=1", f"--output_dir={directory}"))
    assert (code, errors) == (0, "")
    return directory, screen


def test_records_of_one_round(finished):
    records = read_records(finished[0] / "results.jsonl")
    assert [(r.phase, r.backend == "made up") for r in records[:4]] == [
        ("prefill", False),
        ("decode", False),
        ("prefill", True),
        ("decode", True),
    ]
    for record in records[:4]:
        assert (record.experiment, record.config, record.batch) == ("compare", "tiny-llama", 1)
        assert record.metrics["round"] == 1 and record.metrics["read_bandwidth_gb_per_s"] > 0
    prefill, decode = (record.metrics for record in records[2:4])
    assert prefill["prefill_tokens_per_s"] == pytest.approx(100)
    assert decode["tokens_per_s"] == pytest.approx(10)
    ours = records[1]
    assert ours.metrics["generated_tokens"] == 10 and ours.metrics["parameters"] == 190_272
    assert 1 / ours.metrics["tokens_per_s"] == pytest.approx(sum(ours.samples) / len(ours.samples))
    ratio = records[5]
    assert ratio.samples == (pytest.approx(ours.metrics["tokens_per_s"] / 10),)
    assert ratio.backend == f"{ours.backend} / made up"
    assert len(records) == 6 and (finished[0] / "report.md").exists()


def test_screen_of_one_round(finished):
    screen = finished[1]
    assert "compare  tiny-llama: ternax, made up; 1 rounds, 0 held" in screen
    assert "made up counts 1,000,000,000 parameters and ternax 190,272: not the same" in screen
    assert "6 rounds are needed for its 95 % interval" in " ".join(screen.split())
    assert all(len(line) <= 100 for line in screen.splitlines()[:-1])


def test_the_same_command_goes_on(peer, finished):
    """After a peer that died: the round that was whole is kept, the other measured again."""
    directory, _ = finished
    again = words(peer, "--rounds=2", f"--output_dir={directory}")
    (peer / "mode").write_text("die")
    code, _, errors = ran(again)
    assert code == 7 and len(errors.splitlines()) == 1
    assert "peer made up ended with 1; the last it said: no luck today; 1 of 2 rounds" in errors

    (peer / "mode").write_text("well")
    code, screen, errors = ran(again)
    assert (code, errors) == (0, "") and "2 rounds, 1 held" in screen
    records = read_records(directory / "results.jsonl")
    assert [r.metrics.get("round") for r in records] == [1] * 4 + [None] * 2 + [2] * 4 + [None] * 2
    assert [len(r.samples) for r in records[-2:]] == [2, 2]

    code, _, errors = ran([*again, "--seed=1"])
    assert code == 2 and "holds rounds of another comparison" in errors


def test_ctrl_c_ends_a_peer_that_hangs(peer, tmp_path):
    (peer / "mode").write_text("hang")
    (peer / "started").unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "experiments.compare",
            *words(peer, "--rounds=2", f"--output_dir={tmp_path}"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A run in the background hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (peer / "started").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.startswith(f"error: interrupted in round 1; 0 of 2 rounds are kept in {tmp_path}")
    assert len(errors.splitlines()) == 1
    (peer / "mode").write_text("well")


@pytest.mark.parametrize(
    "more, code, why",
    [
        (["--config=405b"], 3, "405b"),
        (["--num_tokens=251"], 2, "tiny-llama's context of 256 tokens, found 4 + 253"),
        (["--layers=1"], 2, "--layers: a peer runs its whole model"),
        (["--profile_dir=x"], 2, "--profile_dir is for experiments.decode"),
        (["--rounds=0"], 2, "--rounds must be at least 1"),
        (["--timeout_s=0"], 2, "--timeout_s must be at least 1"),
        (["--peer=made up=true -m no.gguf"], 2, "no.gguf is no file"),
        (["--backend=tpu9"], 2, "--backend: no backend is named 'tpu9'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_peer_runs(peer, tmp_path, more, code, why):
    (peer / "started").unlink(missing_ok=True)
    found, screen, errors = ran(words(peer, *more, f"--output_dir={tmp_path / 'out'}"))
    assert found == code and why in errors and len(errors.splitlines()) == 1
    assert screen == "" and not (peer / "started").exists() and not (tmp_path / "out").exists()


def test_a_peer_is_needed():
    code, _, errors = ran(["--config=tiny-llama"])
    assert code == 2 and errors.startswith("error: --peer is missing: --peer='llama.cpp=")


def test_widest_lines(capsys):
    """A name of 32 characters, 999 rounds and large rates stay within the screen."""
    common = dict(experiment="compare", config="c", scheme="s", inputs="", device="d", layers=0)
    common |= dict(batch=1, context=1, phase="decode", kind="measured")
    metrics = dict(tokens_per_s=987_654.0, parameters=10**12, read_bandwidth_gb_per_s=1234.5)
    ours = Record(backend="cpu", metrics=metrics | dict(round=999, share_of_bound=0.999), **common)
    peer = Record(backend="n" * 32, metrics=metrics | {"round": 999, "parameters": 1}, **common)
    ratio = dict(speed_ratio=0.0123, speed_ratio_low=0.00123, speed_ratio_high=12_345.0)
    compare.show(ours)
    compare.show(peer)
    found = Record(backend=f"cpu / {'n' * 32}", metrics=ratio, **common)
    lines = [*capsys.readouterr().out.splitlines(), *compare.table([[peer, ours]], [found])]
    assert max(map(len, lines)) <= 100
    assert any(line.endswith("0.0123 [0.00123 .. 12,300]") for line in lines)
    assert [line.split()[1] for line in lines[3:5]] == ["cpu", "n" * 32]  # ours first
