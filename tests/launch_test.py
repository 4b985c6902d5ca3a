"""Runs of several processes: a good one, and every way in which one can be lost."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from ternax import launch
from ternax.experiments import launch as command
from ternax.record import read_records

WORDS = [
    "--config=tiny-llama",
    "--config.intermediate_size=256",
    "--config.vocab_size=264",
    "--mesh=tensor:2",
]


@pytest.fixture
def children(tmp_path):
    """Starts processes that only wait, or end as they are told."""
    made = []

    def make(*scripts):
        for index, script in enumerate(scripts):
            said = tmp_path / str(index)
            with open(said, "wb") as stderr:
                process = subprocess.Popen([sys.executable, "-c", script], stderr=stderr)
            made.append(launch.Child(index, process, said))
        return made

    yield make
    for child in made:
        child.process.kill()
        child.process.wait()


WAIT = "import time; time.sleep(60)"
FAIL = "import sys; print('error: {}', file=sys.stderr); sys.exit({})"


def ended(children, heartbeat_s=0.5) -> tuple[launch.Ending, float]:
    start = time.monotonic()
    found = launch.watch(children, heartbeat_s)
    assert all(child.code is not None for child in children), "nobody is left"
    return found, time.monotonic() - start


def test_all_end_well(children):
    assert ended(children("", ""))[0] == launch.Ending(0, "")


def test_one_is_killed(children):
    found = children(WAIT, WAIT, WAIT)
    threading.Timer(0.2, found[1].process.kill).start()
    ending, seconds = ended(found)
    assert ending == launch.Ending(7, "process 1 was ended by SIGKILL") and seconds < 10


def test_one_is_stopped(children):
    found = children(WAIT, WAIT)
    os.kill(found[1].process.pid, signal.SIGSTOP)
    ending, seconds = ended(found, heartbeat_s=0.9)
    assert ending.code == 7 and seconds < 10
    assert re.fullmatch(r"process 1 is stopped and did not answer for \d+ s", ending.sentence)


def test_who_has_a_reason_is_named_before_who_misses_it(children):
    """The survivor's abort and a lost peer's sentence are not the cause."""
    ending, _ = ended(
        children(
            "import os; os.abort()",
            FAIL.format("a peer process is gone", 7),
            FAIL.format("the disk is full", 6),
        )
    )
    assert ending == launch.Ending(6, "process 2: the disk is full")


def test_told_to_end(children):
    found = children(WAIT, WAIT)
    for child in found:
        child.process.terminate()
    ending = launch.watch(found, 1.0, [signal.SIGTERM])
    assert ending == launch.Ending(143, "told to end by SIGTERM: what was done is kept")


@pytest.mark.parametrize(
    "argv, why",
    [
        ([], "expected a command behind the flags"),
        (["--", "os"], "expected an experiment, such as experiments.decode, found 'os'"),
        (["python"], "expected an experiment, such as experiments.decode, found 'python'"),
        (["--processes=0", "--", "experiments.decode"], "--processes"),
    ],
)
def test_what_cannot_be_launched(argv, why, capsys):
    assert command.main(argv) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    "split", [["--mesh=tensor:2"], ["--mesh=data:2", "--batch=2", "--num_tokens=200"]]
)
def test_two_processes_decode_and_the_first_alone_writes(split, tmp_path, capfd):
    """The same tokens as two devices of one process. Of many tokens each call draws several, as
    many in both processes, though their clocks differ."""
    one, two = tmp_path / "one", tmp_path / "two"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ternax.experiments.decode",
            *WORDS[:-1],
            *split,
            f"--output_dir={one}",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    words = ["--", "experiments.decode", *WORDS[:-1], *split, f"--output_dir={two}"]
    assert command.main(["--processes=2", *words]) == 0
    tokens = [
        next(line for line in text.splitlines() if line.startswith("tokens"))
        for text in (done.stdout, capfd.readouterr().out)
    ]
    assert tokens[0] == tokens[1]
    for folder in (one, two):
        phases = [record.phase for record in read_records(folder / "results.jsonl")]
        assert phases == ["plan", "create", "compile", "prefill", "decode"]


def test_a_killed_process_ends_the_run_and_what_was_measured_stays(tmp_path):
    words = [*WORDS[:-1], "--mesh=auto", "--config.max_context=100000", "--num_tokens=90000"]
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "ternax.experiments.launch", "--", "experiments.decode", *words]
        + [f"--output_dir={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("prefill"):
            break
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        pids = [int(pid) for pid in file.read().split()]
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    start = time.monotonic()
    said = process.communicate(timeout=120)[1]
    assert (process.returncode, said) == (7, "error: process 1 was ended by SIGKILL\n")
    assert time.monotonic() - start < 30
    phases = [record.phase for record in read_records(folder / "results.jsonl")]
    assert phases == ["plan", "create", "compile", "prefill"]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
