"""The folder of a training run: whose it is, and the lines of its metrics."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator

from ternax import processes
from ternax.errors import OutputError, UsageError


@contextlib.contextmanager
def claimed(directory: pathlib.Path) -> Iterator[None]:
    """The folder as this run's own, for as long as the block lasts or its first process lives."""
    if not processes.is_first():
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / "lock", "w")  # noqa: SIM115  (held as long as the claim)
    except OSError as error:
        raise OutputError(f"{directory} cannot be used: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another run is going on in {directory}: wait for it, or give another --output_dir"
            ) from error
        yield


def append_line(path: pathlib.Path, values: dict) -> None:
    """Appends values as a line of JSON. OutputError where that cannot be."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def cut_metrics(path: pathlib.Path, step: int) -> None:
    """Drops the lines behind `step`: the resumed run writes them again."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        draft = path.with_suffix(".draft")
        draft.write_text("".join(f"{line}\n" for line in kept))
        os.replace(draft, path)


def differences(theirs, mine, path: str = "") -> Iterator[str]:
    """Which values of two trees of dicts differ, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            inner = f"{path}.{name}" if path else name
            yield from differences(theirs.get(name), mine.get(name), inner)
    elif theirs != mine:
        yield f"{path} is {theirs!r} there, {mine!r} asked"
