"""Files and directories that are there whole or not at all, whatever ends the program."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from ternax.errors import OutputError


@contextlib.contextmanager
def whole_file(path, what: str) -> Iterator[BinaryIO]:
    """A file to write; it gets its name, and replaces what had it, once it is on disk.

    OutputError where it cannot be written, naming `what`; what was there stays as it was.
    """
    path = pathlib.Path(os.path.abspath(path))
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    with _told(path, what):
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path, what: str) -> Iterator[pathlib.Path]:
    """A directory to fill, as `whole_file`; every file in it is synced."""
    path = pathlib.Path(os.path.abspath(path))
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    with _told(path, what):
        try:
            draft.mkdir(parents=True)
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as synced:
                        os.fsync(synced.fileno())
            _put_in_place(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _told(path: pathlib.Path, what: str) -> Iterator[None]:
    """Errors of the disk as OutputError; all others are what they are."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{path}: {what} cannot be written: {why}") from error


def _put_in_place(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the draft its name. A directory cannot replace a full one, so that steps aside."""
    if not path.exists():
        os.replace(draft, path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.replace(path, old)
    try:
        os.replace(draft, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
