"""The steps of a run, their share of its minutes, and the process each has.

A step that hangs is ended with all it started, and the next begins: only what it had not told
yet is lost. Minutes that a step leaves are shared by those behind it.
"""

import contextlib
import dataclasses
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from ternax.errors import UsageError
from ternax.gpu import made
from ternax.record import Record

# What a step may take beyond its seconds: a program being compiled, a model being let go.
GRACE_S = 20.0
# Less than this is no use to a step that starts Python, JAX and a CUDA context.
LEAST_S = 10.0
_LOG_BYTES = 2 << 20
# Of the device's memory for JAX: a model's step takes it at once, the others share with torch.
_ALONE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
# Products of the same activations, which XLA would make one of: the weights side by side, copied.
_DOTS_APART = "--xla_gpu_dot_merger_threshold_mb=0"
GRAPHS_OFF = "--xla_gpu_enable_command_buffer="


@dataclasses.dataclass(frozen=True)
class Planned:
    """One step.

    Attributes:
      name: what --steps calls it.
      seconds: planned, on an H200.
      what: it finds out, in a few words.
      graphs: whether it is run again without CUDA graphs where that is asked for.
    """

    name: str
    seconds: int
    what: str
    graphs: bool = False

    def environment(self, graphs: bool) -> dict[str, str]:
        """What its process finds beside the user's; graphs: whether CUDA graphs are on."""
        kind = self.name.partition("-")[0]
        words = [os.environ.get("XLA_FLAGS", "")]
        words += [_DOTS_APART] if kind in ("kernels", "gemlite") else []
        words += [] if graphs else [GRAPHS_OFF]
        memory = _ALONE if kind in ("decode", "batches", "prefill") else _SHARED
        return {**memory, "XLA_FLAGS": " ".join(filter(None, words))}


# In the order of their worth.
STEPS: tuple[Planned, ...] = (
    Planned("facts", 8, "device, driver, clocks and throttling as found; versions"),
    Planned("bandwidth", 30, "best read and copy rate of 1, 4, 16 GiB, by XLA and torch"),
    Planned("exactness", 30, "up to 16 rows against integer products, small and real shapes"),
    Planned("exactness-matrix", 25, "the same of 17 to 2048 rows"),
    Planned("exactness-attention", 12, "one token over caches, against the reference"),
    Planned("chain", 35, "a layer's projections in one launch: right? how fast?"),
    Planned("kernels-70b", 65, "kernels alone at 70b's shapes, beside XLA and torch", graphs=True),
    Planned("tune", 40, "settings of the decode kernel, into tuned/<device>.json"),
    Planned("decode-70b", 60, "70b, 80 layers, batch 1, contexts of 1k and 8k", graphs=True),
    Planned("batches-70b", 55, "the same at batch 64, 16 and 4, int8 cache", graphs=True),
    Planned("prefill-70b", 40, "prompts of 2048 and 512 tokens"),
    Planned("attention", 25, "one token over caches of 1k and 8k slots, by itself"),
    Planned("decode-2b4t", 25, "2b4t, batch 1, context of 1k", graphs=True),
    Planned("decode-8b", 25, "8b, batch 1, context of 1k", graphs=True),
    Planned("kernels-8b", 30, "kernels alone at 8b's shapes"),
    Planned("kernels-2b4t", 30, "kernels alone at 2b4t's shapes"),
    Planned("gemlite", 35, "70b's shapes by gemlite, where it is installed"),
)


def chosen(names: str | None) -> list[Planned]:
    """Steps by name, in their own order; "kernels" stands for all that begin so. None: all."""
    if not names:
        return list(STEPS)
    words = [word.strip() for word in names.split(",")]
    for word in words:
        if not any(_is(step, word) for step in STEPS):
            known = ", ".join(step.name for step in STEPS)
            raise UsageError(f"--steps: there are {known}, and their first words; found {word!r}")
    return [step for step in STEPS if any(_is(step, word) for word in words)]


def _is(step: Planned, word: str) -> bool:
    return word in (step.name, step.name.partition("-")[0])


def with_graphs(steps: Sequence[Planned], graphs: Sequence[str]) -> list[tuple[Planned, bool]]:
    """(step, with CUDA graphs): those that graphs change once for each of "on", "off"."""
    found = [(step, "on" in graphs or not step.graphs) for step in steps]
    if tuple(graphs) != ("on",):
        again = [(step, False) for step in steps if step.graphs]
        found = [pair for pair in found if pair[1]] + again
    return found


def share_s(left_s: float, planned: Sequence[Planned]) -> float:
    """Seconds of the first of `planned`, if each takes of what is left by its plan.

    The grace of one step is kept back, so that the last one can end well.
    """
    share = planned[0].seconds / sum(step.seconds for step in planned)
    return max(LEAST_S, (left_s - GRACE_S) * share)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a step's process ended. code: None where it was ended for taking too long."""

    code: int | None
    seconds: float
    said: str = ""


def run(
    words: Sequence[str],
    environment: dict[str, str],
    limit_s: float,
    keep: Callable[[Record], None],
    say: Callable[[str], None],
    log: pathlib.Path,
) -> Ended:
    """Runs `python -m ternax.experiments.gpu_day words`, for `limit_s` seconds at most.

    keep, say: get its records and other lines as they come; log: what it says on stderr is
    added there.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "ternax.experiments.gpu_day", *words]
    path = os.pathsep.join(filter(None, sys.path))
    with open(log, "ab") as stderr:
        begin = stderr.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            process_group=0,
            env={**os.environ, "PYTHONPATH": path, **compiled_where(), **environment},
        )
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    late = False
    try:
        while True:
            left = start + limit_s - time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, left))
            except queue.Empty:
                late = True
                break
            if line is None:
                break
            record = made.told(line)
            if record is None:
                say(line)
            else:
                keep(record)
    finally:
        _end(process, kill=late or sys.exc_info()[0] is not None)
    return Ended(
        None if late else process.returncode, time.monotonic() - start, _last_words(log, begin)
    )


def _read(stdout, lines: "queue.Queue[str | None]") -> None:
    for line in stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _end(process: subprocess.Popen, kill: bool) -> None:
    """Waits for a process that has closed its stdout; one that is late is killed."""
    if not kill:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that the driver holds in the kernel is waited for no longer.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_S)


def _last_words(log: pathlib.Path, begin: int) -> str:
    """The last line that a step said on stderr: its own error, where there is one."""
    with open(log, "rb") as file:
        file.seek(max(begin, log.stat().st_size - _LOG_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line] or [""])[-1][:300]


def compiled_where() -> dict[str, str]:
    """One cache of compiled programs for all steps, unless the user has one."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"ternax-gpu-day-{os.getuid()}"
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    return {name: os.environ.get(name, value) for name, value in own.items()}
