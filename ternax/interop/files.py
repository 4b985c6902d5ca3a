"""Files of named tensors: entries checked before a byte is read, and read a piece at a time.

A piece is read into memory of its own and gone with it, where a memory map would keep every
page it has touched resident.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ternax.errors import BadModelFile

# What a name may be: words between dots. Names become places in a model, never paths.
_LEGAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_MAX_NAME = 256
_MAX_DIMS = 4
# A thread copies so many bytes of a cached file in about half a millisecond: less is not shared.
_PART_BYTES = 1 << 22
_PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: `shape`, rows first; `kind`, the file's name of how it is stored
    ("BF16", "TQ2_0"); the `offset` of its first byte in the file; `nbytes`."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One tensor to write: `produce` yields its bytes, `nbytes` in all, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    produce: Callable[[], Iterable]


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A file whose header is read and found good. entries: name -> Entry."""

    path: pathlib.Path
    entries: dict[str, Entry]

    def read(self, name: str, first: int = 0, nbytes: int | None = None, scratch=None):
        """uint8 [nbytes]: bytes of a tensor from its byte `first` on; all of the rest for None.

        They lie in `scratch`, a Scratch, until what is read into it next; None: in memory of
        their own.
        """
        entry = self.entries[name]
        nbytes = entry.nbytes - first if nbytes is None else nbytes
        out = (scratch or Scratch()).take(nbytes)
        try:
            with open(self.path, "rb", buffering=0) as file:
                whole = _read(file.fileno(), entry.offset + first, out.data)
        except OSError as error:
            raise BadModelFile(self.path, name, f"cannot be read: {error.strerror}") from error
        if not whole:
            raise BadModelFile(self.path, name, "cut short while it was read")
        return out


class Scratch:
    """Memory that one read after another lies in: the system clears what it first hands out,
    which takes as long as reading does."""

    def __init__(self):
        self._memory = None

    def take(self, nbytes: int):
        """uint8 [nbytes]: what was taken before is overwritten."""
        import numpy as np

        if self._memory is None or self._memory.size < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes]


def _read(file: int, offset: int, out: memoryview) -> bool:
    """Fills `out` from a file's byte `offset` on, in parts at once; whether the file had it all."""
    parts = min(_PROCESSORS, 1 + len(out) // _PART_BYTES)
    cuts = [len(out) * i // parts for i in range(parts + 1)]

    def fill(i: int) -> bool:
        done = cuts[i]
        while done < cuts[i + 1]:
            count = os.preadv(file, [out[done : cuts[i + 1]]], offset + done)
            if not count:
                return False
            done += count
        return True

    return fill(0) if parts == 1 else all(_readers().map(fill, range(parts)))


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_PROCESSORS, thread_name_prefix="read")


def check_name(path, name: str) -> None:
    """Raises BadModelFile for a tensor's name that is none: empty, endless, or with path parts."""
    if not 0 < len(name) <= _MAX_NAME or not _LEGAL.issuperset(name) or ".." in name:
        raise BadModelFile(
            path, repr(name[:60]), "expected a tensor's name, of letters, digits, and . _ -"
        )


def check_shape(path, name: str, shape: tuple[int, ...]) -> int:
    """The number of elements, in Python's own integers, so that nothing wraps round."""
    if len(shape) > _MAX_DIMS or any(size < 1 for size in shape):
        raise BadModelFile(
            path, name, f"expected up to {_MAX_DIMS} sizes of at least 1, found {list(shape)[:8]}"
        )
    return math.prod(shape)


def check_places(path, entries: dict[str, Entry], first: int, size: int) -> None:
    """Raises BadModelFile unless tensors lie apart from each other within bytes first .. size."""
    end, before = first, ""
    for name, entry in sorted(entries.items(), key=lambda pair: pair[1].offset):
        if entry.offset < end:
            found = f"overlaps {before}" if before else "starts inside the header"
            raise BadModelFile(path, name, f"{found}, at byte {entry.offset}")
        end, before = entry.offset + entry.nbytes, name
        if end > size:
            raise BadModelFile(
                path, name, f"ends at byte {end} of a file of {size}: the file is cut short"
            )


def file_size(path) -> int:
    """Bytes of a regular file. BadModelFile where there is none to read."""
    path = pathlib.Path(path)
    try:
        if not path.is_file():
            raise BadModelFile(path, "file", "missing, or no regular file")
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadModelFile(path, "file", f"cannot be read: {error.strerror}") from error


def pieces(plan: Plan) -> Iterator[memoryview]:
    """What `plan` produces, as bytes, held against what it said."""
    total = 0
    for piece in plan.produce():
        view = memoryview(piece).cast("B")
        total += len(view)
        yield view
    if total != plan.nbytes:
        raise ValueError(f"{plan.name}: planned {plan.nbytes} bytes, produced {total}")
