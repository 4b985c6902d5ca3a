"""Text as tokens: what a model is trained on, and what it is judged by.

A corpus is a list of files, split by file into a training and a held-out part. Its tokens
lie in one memory-mapped file; a batch is a pure function of (seed, step), so a run that
resumes sees what it would have seen.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ternax.errors import OutputError, UsageError

# Ends each file. No text file of a corpus holds this byte: those that do are left out.
END = 0
BYTES = 256
# Of 1000 names, about this many are held out.
HELD_OUT_PER_MILLE = 50
# Directories of the standard library that are tests, tables or not part of it.
_NOT_STDLIB = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
# What an installation writes for itself; it names the machine it was built on.
_GENERATED = ("_sysconfigdata",)
STDLIB = "stdlib"


@dataclasses.dataclass(frozen=True)
class Part:
    """One side of a corpus's split.

    Attributes:
      names: the files' paths below the corpus's root, sorted.
      tokens: int32 or narrower [n], END behind each file.
      num_bytes: of the text itself; a bit per byte is over these.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of a source, split by file.

    Attributes:
      source: "stdlib" or the path that was asked for.
      sha256: of the file list with each file's own sha256, split included.
      vocab_size: tokens lie below it.
      train, held_out: the two sides. A file's name alone decides its side.
    """

    source: str
    sha256: str
    vocab_size: int
    train: Part
    held_out: Part

    def describe(self) -> str:
        """One line for a record: source, files, bytes, hash."""
        return (
            f"{self.source}: {len(self.train.names)} files, {self.train.num_bytes} bytes to "
            f"train on, {len(self.held_out.names)} files, {self.held_out.num_bytes} bytes held "
            f"out, sha256 {self.sha256[:16]}"
        )


def open_corpus(
    source: str = STDLIB, *, tokenizer: str | None = None, cache_dir: str | None = None
) -> Corpus:
    """Reads, deduplicates, splits and tokenizes a source, once; later calls map the result.

    Args:
      source: "stdlib" (the sources of the standard library of the Python that runs, without
        tests and tables), a text file, or a directory, of which every UTF-8 file is read.
      tokenizer: path of a `tokenizer.json`; None is one token a byte.
      cache_dir: where tokens are kept; by default ~/.cache/ternax/corpora.

    Raises:
      UsageError: nothing there, nothing readable, or a tokenizer that cannot be read.
      OutputError: the cache cannot be written.
    """
    files = list(_files(source))
    if not files:
        raise UsageError(
            f"corpus {source!r}: expected at least one non-empty UTF-8 file, found none"
        )
    held_out = _held_out([name for name, _ in files])
    encode, vocab_size, tokenizer_sha = _encoder(tokenizer)
    listing = [[name, hashlib.sha256(text).hexdigest(), name in held_out] for name, text in files]
    sha256 = hashlib.sha256(json.dumps([tokenizer_sha, listing]).encode()).hexdigest()
    folder = pathlib.Path(cache_dir or _cache_home()) / sha256[:32]
    parts = {}
    for part, inside in (("train", False), ("held_out", True)):
        mine = [(name, text) for name, text in files if (name in held_out) == inside]
        path = folder / f"{part}.npy"
        if not path.is_file():
            _write(path, mine, encode, vocab_size)
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        parts[part] = Part(
            tuple(name for name, _ in mine), tokens, sum(len(text) for _, text in mine)
        )
    return Corpus(source, sha256, vocab_size, **parts)


def batch(part: Part, step: int, *, batch: int, length: int, seed: int) -> np.ndarray:
    """The step's sequences, int32 [batch, length + 1]; inputs and targets overlap by one.

    Windows of length + 1 tokens, `length` apart from a random offset each epoch, are visited
    in a random order, all before one comes again. Depends on the arguments alone.

    Raises:
      UsageError: the part is shorter than one sequence.
    """
    windows = (len(part.tokens) - 1 - (length - 1)) // length
    if windows < 1:
        raise UsageError(
            f"corpus: expected at least {2 * length} tokens for sequences of {length}, found "
            f"{len(part.tokens)}; shorten --length or give more text"
        )
    found = np.empty((batch, length + 1), np.int32)
    order: dict[int, tuple[np.ndarray, int]] = {}
    for row, index in enumerate(range(step * batch, (step + 1) * batch)):
        epoch, place = divmod(index, windows)
        if epoch not in order:
            order[epoch] = _order(seed, epoch, windows, length)
        permutation, offset = order[epoch]
        first = offset + int(permutation[place]) * length
        found[row] = part.tokens[first : first + length + 1]
    return found


_ORDERS: dict[tuple[int, int, int, int], tuple[np.ndarray, int]] = {}


def _order(seed: int, epoch: int, windows: int, length: int) -> tuple[np.ndarray, int]:
    """(a permutation of the windows, the offset of the first), the last two epochs kept."""
    key = (seed, epoch, windows, length)
    if key not in _ORDERS:
        random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        while len(_ORDERS) >= 2:
            del _ORDERS[next(iter(_ORDERS))]
        _ORDERS[key] = random.permutation(windows), int(random.integers(length))
    return _ORDERS[key]


def sequences(tokens: np.ndarray, length: int) -> np.ndarray:
    """All of `tokens` as int32 [n, length + 1], each a target once; what fills no row is cut."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UsageError(
            f"text: expected more than {length} tokens, found {len(tokens)}; shorten --length"
        )
    starts = np.arange(count) * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def _files(source: str) -> Iterable[tuple[str, bytes]]:
    """(name, text) of every file, by name; of equal texts the first."""
    if source == STDLIB:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in root.rglob("*.py") if _in_stdlib(path.relative_to(root))]
    else:
        root = pathlib.Path(source)
        if not root.exists():
            raise UsageError(f"corpus {source!r}: expected a file or a directory, found neither")
        if root.is_file():
            root, paths = root.parent, [root]
        else:
            paths = [path for path in root.rglob("*") if path.is_file()]
    seen = set()
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            text = path.read_bytes()
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise UsageError(
                f"corpus {source!r}: {path} cannot be read: {error.strerror}"
            ) from error
        digest = hashlib.sha256(text).digest()
        if text and END not in text and digest not in seen:
            seen.add(digest)
            yield path.relative_to(root).as_posix(), text


def _in_stdlib(path: pathlib.PurePath) -> bool:
    return _NOT_STDLIB.isdisjoint(path.parts) and not path.name.startswith(_GENERATED)


def _held_out(names: Sequence[str]) -> frozenset[str]:
    """The names on the held-out side: by hash, so that a new file moves no other one.

    Of two or more files at least one is on each side; a single one is all training text.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    limit = HELD_OUT_PER_MILLE * 2**256 // 1000
    found = [
        name
        for name in ranked
        if int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") < limit
    ]
    if len(ranked) > 1:
        found = (found or ranked[:1])[: len(ranked) - 1]
    return frozenset(found)


def _encoder(
    tokenizer: str | None,
) -> tuple[Callable[[bytes], Sequence[int] | np.ndarray], int, str]:
    """(bytes -> tokens, vocabulary, what names it in a hash)."""
    if tokenizer is None:
        return lambda text: np.frombuffer(text, np.uint8), BYTES, "bytes"
    found, sha256 = read_tokenizer(tokenizer)

    def encode(text: bytes) -> Sequence[int]:
        return found.encode(text.decode(), add_special_tokens=False).ids

    return encode, found.get_vocab_size(), sha256


def read_tokenizer(path: str):
    """(the `tokenizers.Tokenizer` of a tokenizer.json, the file's sha256).

    Raises:
      UsageError: the package tokenizers is not there, or the file cannot be read.
    """
    try:
        import tokenizers

        data = pathlib.Path(path).read_bytes()
        found = tokenizers.Tokenizer.from_str(data.decode())
    except ImportError as error:
        raise UsageError(
            "--tokenizer needs the package tokenizers: pip install tokenizers"
        ) from error
    except OSError as error:
        raise UsageError(f"--tokenizer {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the library raises bare Exceptions
        raise UsageError(f"--tokenizer {path}: expected a tokenizer.json: {error}") from error
    return found, hashlib.sha256(data).hexdigest()


def _write(path: pathlib.Path, files, encode, vocab_size: int) -> None:
    dtype = np.uint8 if vocab_size <= BYTES else np.uint16 if vocab_size <= 2**16 else np.uint32
    pieces = []
    for _, text in files:
        pieces += [np.asarray(encode(text), dtype), np.asarray([END], dtype)]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            np.save(file, tokens, allow_pickle=False)
        os.replace(draft, path)
    except OSError as error:
        raise OutputError(f"corpus cache {path} cannot be written: {error.strerror}") from error


def _cache_home() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "ternax" / "corpora"
