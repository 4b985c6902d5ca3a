"""Runs of training that are killed at random moments: do they end as one that was not?"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ternax import training
from ternax.errors import PeerFailed

# What a line of metrics tells of the run; the rest is of the clock.
OF_THE_RUN = ("step", "loss_nats", "gradient_norm", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run that was killed and resumed.

    Attributes:
      after_s: from its start to SIGKILL, in seconds.
      killed_at: steps whose metrics were written by then.
      differences: how its end differs from the undisturbed run's; none when it does not.
    """

    after_s: float
    killed_at: int
    differences: tuple[str, ...]


def train_apart(
    words: Sequence[str], folder: pathlib.Path, kill: Callable[[], bool] | None = None
) -> bool:
    """Runs `experiments.train` with these arguments in a process of its own. True: it was killed.

    Args:
      words: its arguments but for --output_dir and --log_every, which is 1.
      folder: the run's.
      kill: asked every 10 ms; SIGKILL follows when it says True. None leaves the run alone.

    Raises:
      PeerFailed: it failed by itself; with its last line.
    """
    command = [sys.executable, "-m", "ternax.experiments.train", *words, "--log_every=1"]
    with subprocess.Popen(
        [*command, f"--output_dir={folder}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        try:
            while kill is not None and process.poll() is None and not kill():
                time.sleep(0.01)
            if kill is not None and process.poll() is None:
                process.kill()
                process.communicate()
                return True
            said = process.communicate()[1]
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise PeerFailed(f"training in {folder} ended with {process.returncode}: {last}")
    return False


def steps_written(folder: pathlib.Path) -> int:
    """Whole lines of the run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def differences(one: pathlib.Path, other: pathlib.Path) -> tuple[str, ...]:
    """What differs between two finished runs: losses of every step, and the final state."""
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    found = []
    if len(lines[0]) != len(lines[1]):
        found.append(f"{len(lines[0])} and {len(lines[1])} lines of metrics")
    for a, b in zip(*lines, strict=False):
        found += [f"step {a['step']}: {name}" for name in OF_THE_RUN if a[name] != b[name]]
    states = [training.final_state(folder) for folder in (one, other)]
    leaves = [jax.tree_util.tree_flatten_with_path(state)[0] for state in states]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            found.append(jax.tree_util.keystr(path))
    return tuple(found)


def trial(words: Sequence[str], folder: pathlib.Path, whole: pathlib.Path, after_s: float) -> Trial:
    """Starts a run in `folder`, kills it, resumes it to its end and compares it with `whole`.

    A run that ends before `after_s` is thrown away and another killed at half of it.
    """
    while not train_apart(words, folder, _after(after_s)):
        shutil.rmtree(folder)
        after_s /= 2
    killed_at = steps_written(folder)
    train_apart(words, folder)
    return Trial(after_s, killed_at, differences(folder, whole))


def moments(times: int, seconds: float, seed: int) -> list[float]:
    """Moments at which runs that take `seconds` are killed: uniform over all of a run."""
    draw = random.Random(seed)
    return [draw.uniform(0, seconds) for _ in range(times)]


def _after(seconds: float) -> Callable[[], bool]:
    """A `kill` that says True once `seconds` have passed since this call."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end
