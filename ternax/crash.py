"""Runs of training that are killed at random moments: do they end as one that was not?

On the mesh they were killed on they must, to the bit. On another one sums are taken in another
order: then data, steps and rates must be the same to the bit, and losses within noise.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from ternax import training
from ternax.errors import PeerFailed
from ternax.loss_band import Band, band_of

# What a line of metrics tells of the run; the rest is of the clock.
OF_THE_RUN = ("step", "loss_nats", "gradient_norm", "learning_rate", "tokens_crc32")
# And what no order of sums changes.
OF_THE_STEP = ("step", "learning_rate", "tokens_crc32")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run that was killed and resumed.

    Attributes:
      start, onto: the mesh it was killed on and the one it went on on; None: no mesh was asked for.
      after_s: from its start to SIGKILL, in seconds.
      killed_at: steps whose metrics were written by then.
      resumed_at: the newest checkpoint's step; 0 where there was none yet.
      handover_nats: how far the loss of the first step behind it is from the undisturbed run's.
      differences: how its end differs from what it must be; none when it does not.
    """

    start: str | None
    onto: str | None
    after_s: float
    killed_at: int
    resumed_at: int
    handover_nats: float
    differences: tuple[str, ...]


class Undisturbed:
    """Runs that nobody killed, one a mesh, and what a killed one must be beside them.

    Attributes:
      folders: mesh -> the run's folder.
      band: where losses of a run that changed its mesh must lie; None of one mesh.
    """

    def __init__(
        self,
        words: Sequence[str],
        meshes: Sequence[str | None],
        directory: pathlib.Path,
        *,
        stretch: int,
        times: int,
    ):
        """Trains them.

        Args:
          words: arguments of `experiments.train` but for the mesh.
          meshes: as --mesh takes them; [None] for runs that go on where they were.
          directory: holds the folders.
          stretch: steps over which the spread of losses is taken as one.
          times: runs that will be held against them.
        """
        self._words = {at: [*words, *([] if at is None else [f"--mesh={at}"])] for at in meshes}
        self._seconds, self.folders = {}, {}
        train_apart(self._words[meshes[0]], directory / "first")  # caches that later ones find
        for number, at in enumerate(meshes):
            self.folders[at], started = directory / f"whole-{number}", time.monotonic()
            train_apart(self._words[at], self.folders[at])
            self._seconds[at] = time.monotonic() - started
        self.band = None
        if len(meshes) > 1:
            losses, norms = (
                np.stack([curve_of(folder, name) for folder in self.folders.values()])
                for name in ("loss_nats", "gradient_norm")
            )
            self.band = band_of(losses, norms, stretch, times * losses.shape[1])

    def moves(self) -> list[tuple[str | None, str | None]]:
        """(mesh that is left, mesh that is gone to): every ordered pair, or the one there is."""
        return list(itertools.permutations(self.folders, 2)) or [(at, at) for at in self.folders]

    def trial(self, start, onto, folder: pathlib.Path, share: float) -> Trial:
        """Starts a run in `folder`, kills it, takes it to its end and says what became of it.

        A run that ends before it is killed is thrown away and another killed at half of it.

        Args:
          start, onto: the meshes it is killed on and goes on on.
          share: of a run, when it is killed: of an undisturbed one's time; of its steps, where
            it goes on on another mesh, since a kill outside of them moves no state.
        """
        whole, began = self.folders[start], time.monotonic()
        while not train_apart(self._words[start], folder, self._kill(start, folder, share)):
            shutil.rmtree(folder)
            share, began = share / 2, time.monotonic()
        after_s = time.monotonic() - began
        killed_at, resumed_at = steps_written(folder), steps_saved(folder)
        train_apart(self._words[onto], folder)
        mine, theirs = curve_of(folder), curve_of(whole)
        behind = slice(resumed_at, resumed_at + 1)  # empty where the last step was saved
        handover_nats = float(np.abs(mine[behind] - theirs[behind]).sum())
        if self.band is None:
            found = differences(folder, whole)
        else:
            found = departures(folder, whole, resumed_at, self.band)
        return Trial(start, onto, after_s, killed_at, resumed_at, handover_nats, found)

    def _kill(self, start, folder: pathlib.Path, share: float) -> Callable[[], bool]:
        """A `kill` for `train_apart`, which starts now."""
        if self.band is not None:
            due = 1 + int(share * len(self.band.mean))
            return lambda: steps_written(folder) >= due
        end = time.monotonic() + share * self._seconds[start]
        return lambda: time.monotonic() >= end


def train_apart(
    words: Sequence[str], folder: pathlib.Path, kill: Callable[[], bool] | None = None
) -> bool:
    """Runs `experiments.train` with these arguments in a process of its own. True: it was killed.

    Args:
      words: its arguments but for --output_dir and --log_every, which is 1.
      folder: the run's.
      kill: asked every 10 ms; SIGKILL follows when it says True. None leaves the run alone.

    Raises:
      PeerFailed: it failed by itself; with its error, or else its last line.
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
        told = said.strip().splitlines() or ["it said nothing"]
        last = next((line for line in reversed(told) if line.startswith("error: ")), told[-1])
        raise PeerFailed(f"training in {folder} ended with {process.returncode}: {last}")
    return False


def steps_written(folder: pathlib.Path) -> int:
    """Whole lines of the run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def steps_saved(folder: pathlib.Path) -> int:
    """The newest whole checkpoint's step, 0 for none. Only looks: what is half written stays."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def metrics_of(folder: pathlib.Path) -> list[dict]:
    """The run's lines of metrics, a step each."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve_of(folder: pathlib.Path, name: str = "loss_nats") -> np.ndarray:
    """f64 [steps] of one of the run's metrics."""
    return np.array([line[name] for line in metrics_of(folder)])


def differences(one: pathlib.Path, other: pathlib.Path) -> tuple[str, ...]:
    """What differs between two finished runs: losses of every step, and the final state."""
    found = list(_unequal(metrics_of(one), metrics_of(other), OF_THE_RUN))
    states = [training.final_state(folder) for folder in (one, other)]
    leaves = [jax.tree_util.tree_flatten_with_path(state)[0] for state in states]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        if np.asarray(a).tobytes() != np.asarray(b).tobytes():
            found.append(jax.tree_util.keystr(path))
    return tuple(found)


def departures(
    moved: pathlib.Path, start: pathlib.Path, resumed_at: int, band: Band
) -> tuple[str, ...]:
    """Where a run that went on on another mesh is not what it would have been, but for noise.

    Args:
      moved: its folder, at its end.
      start: an undisturbed run's on the mesh it began on: up to the checkpoint that it went on
        from, all must be equal to the bit.
      resumed_at: that checkpoint's step.
      band: of undisturbed runs on all meshes: where losses behind it must lie.
    """
    mine, theirs = metrics_of(moved), metrics_of(start)
    found = list(_unequal(mine, theirs, OF_THE_STEP))
    found += _unequal(mine[:resumed_at], theirs[:resumed_at], OF_THE_RUN)
    if len(mine) == len(theirs):
        found += [
            f"step {resumed_at + 1 + i}: a loss {share:.1f} times as far off as noise reaches"
            for i, share in enumerate(band.shares(curve_of(moved), resumed_at))
            if share > 1
        ]
    return tuple(found)


def _unequal(one: list[dict], other: list[dict], names: Sequence[str]) -> Iterator[str]:
    if len(one) != len(other):
        yield f"{len(one)} and {len(other)} lines of metrics"
    for a, b in zip(one, other, strict=False):
        yield from (f"step {a['step']}: {name}" for name in names if a[name] != b[name])


def moments(times: int, seed: int) -> list[float]:
    """When runs are killed, as shares of a run: uniform over all of it."""
    draw = random.Random(seed)
    return [draw.random() for _ in range(times)]
