"""Starts the processes of a run on this machine, and says in one sentence how it ended.

When a process is lost the runtime aborts the others in C++, with a dump and no exception. So
their parent watches them: it finds who went first and why, and ends the rest.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from ternax.errors import PeerFailed, Preempted

# What is left of a run that lost a process may still write; then it is killed.
_GRACE_S = 5.0
_POLL_S = 0.05
# For saving, when told to end.
_SAVE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ended. code: its exit code; sentence: "" where it ended well."""

    code: int
    sentence: str = ""


@dataclasses.dataclass
class Child:
    """One process of the run.

    Attributes:
      index: its number.
      process: the process.
      said: where its stderr goes.
      stopped_since: when it was first seen stopped, by SIGSTOP or a debugger; else None.
    """

    index: int
    process: subprocess.Popen
    said: pathlib.Path
    stopped_since: float | None = None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def is_stopped(self) -> bool:
        try:
            status = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in "Tt"

    def error(self) -> str:
        """The line in which it said itself what was wrong, or ""."""
        lines = re.findall(r"^error: (.*)$", self.said.read_text(errors="replace"), re.MULTILINE)
        return lines[-1] if lines else ""

    def last_words(self) -> str:
        """The last line that it wrote of its own, for one that ended without telling why."""
        lines = [line.strip() for line in self.said.read_text(errors="replace").splitlines()]
        own = [line for line in lines if line and not line.startswith("@")]
        return f": {own[-1][:200]}" if own else ""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    module: str,
    words: Sequence[str],
    processes: int,
    *,
    heartbeat_s: int,
    port: int | None = None,
    folder: str | os.PathLike | None = None,
) -> Ending:
    """Runs `python -m module words` as `processes` processes of one run, to their end.

    What the first one prints comes through. SIGTERM and SIGINT are passed on to all.

    Args:
      heartbeat_s: how long a process may be silent.
      port: that the first process listens on; None takes a free one.
      folder: where each one's stderr is kept; None: it is thrown away after a good end.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ternax-launch-"))
        shared = [
            f"--coordinator=127.0.0.1:{port or free_port()}",
            f"--processes={processes}",
            f"--heartbeat_s={heartbeat_s}",
        ]
        children: list[Child] = []
        stack.callback(lambda: _end(children))
        for index in range(processes):
            said = pathlib.Path(folder) / f"stderr-{index}"
            command = [sys.executable, "-m", module, *words, *shared, f"--process={index}"]
            with open(said, "wb") as stderr:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=None if index == 0 else subprocess.DEVNULL,
                    stderr=stderr,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            children.append(Child(index, process, said))
        with _passing_on(children) as passed:
            return watch(children, heartbeat_s, passed)


def watch(
    children: Sequence[Child], heartbeat_s: float, passed: Sequence[signal.Signals] = ()
) -> Ending:
    """Waits until all ended well, or until one is lost; then the rest is ended.

    passed: signals that all were sent: they may save what they have, and are not lost then.
    """
    now = time.monotonic()
    while not passed:
        before, now = now, time.monotonic()
        for child in children:
            if not child.is_stopped():
                child.stopped_since = None
            elif child.stopped_since is None or now - before > 1:  # this process was stopped too
                child.stopped_since = now
        codes = [child.code for child in children]
        if all(code == 0 for code in codes):
            return Ending(0)
        stalled = any(
            child.stopped_since is not None and now - child.stopped_since > heartbeat_s
            for child in children
        )
        if stalled or any(codes):  # neither None nor 0
            if not stalled:
                _settle(children)
            ending = verdict(children)
            _end(children)
            return ending
        time.sleep(_POLL_S)
    end = time.monotonic() + _SAVE_S
    while time.monotonic() < end and any(child.code is None for child in children):
        time.sleep(_POLL_S)
    _end(children)
    said = next((child.error() for child in children if child.error()), "what was done is kept")
    saved = any(child.code == Preempted.exit_code for child in children)
    code = Preempted.exit_code if saved else 128 + passed[0]
    return Ending(code, f"told to end by {passed[0].name}: {said}")


def _settle(children: Sequence[Child]) -> None:
    """A moment for those who end for the same reason: who tells most is asked first."""
    end = time.monotonic() + 1.0
    while time.monotonic() < end and any(child.code is None for child in children):
        time.sleep(_POLL_S)


def verdict(children: Sequence[Child]) -> Ending:
    """Which process is at fault and why, of those that are there and those that ended."""
    for child in children:
        code = child.code
        if code is not None and code < 0 and -code != signal.SIGABRT:
            name = signal.Signals(-code).name
            return Ending(PeerFailed.exit_code, f"process {child.index} was ended by {name}")
    for child in children:
        if child.stopped_since is not None:
            silent_s = time.monotonic() - child.stopped_since
            return Ending(
                PeerFailed.exit_code,
                f"process {child.index} is stopped and did not answer for {silent_s:.0f} s",
            )
    # By itself, for a reason of its own, which it says; those who only miss a peer come last.
    told = [c for c in children if c.code and c.error()]
    told.sort(key=lambda c: (c.code == PeerFailed.exit_code, "a peer process" in c.error()))
    for child in told:
        return Ending(child.code or 1, f"process {child.index}: {child.error()}")
    gone = [c for c in children if c.code]
    missed = sorted({found for c in gone for found in _missed(c)})
    if missed:
        return Ending(PeerFailed.exit_code, f"process {missed[0]} did not answer its heartbeat")
    first = gone[0]
    return Ending(
        PeerFailed.exit_code, f"process {first.index} ended with {first.code}{first.last_words()}"
    )


def _missed(child: Child) -> list[int]:
    """The tasks that the runtime's dump says are unhealthy."""
    text = child.said.read_text(errors="replace")
    return [int(n) for n in re.findall(r"task:(\d+)[^\n]*(?:heartbeat|unhealthy|stopped)", text)]


def _end(children: Sequence[Child]) -> None:
    """Ends who is still there: asked first, and killed after a while."""
    left = [child for child in children if child.code is None]
    for child in left:
        child.process.send_signal(signal.SIGTERM)
        child.process.send_signal(signal.SIGCONT)  # one that is stopped hears nothing
    end = time.monotonic() + _GRACE_S
    while time.monotonic() < end and any(child.code is None for child in left):
        time.sleep(_POLL_S)
    for child in left:
        if child.code is None:
            child.process.kill()
        child.process.wait()


@contextlib.contextmanager
def _passing_on(children: Sequence[Child]) -> Iterator[list[signal.Signals]]:
    """Hands SIGTERM and SIGINT on; yields those that came."""
    passed: list[signal.Signals] = []

    def pass_on(number, frame):
        passed.append(signal.Signals(number))
        for child in children:
            if child.code is None:
                child.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
