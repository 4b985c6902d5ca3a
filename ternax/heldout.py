"""Text that models are judged by: the one that comes with ternax, or a file.

`box/heldout.txt` holds files of CPython's standard library whose names are on the held-out side
of `data.open_corpus("stdlib")` under every Python, so that no model trained on the other side
has seen them. Their licence lies beside them, and `tests/goldens/make_heldout.py` made the file.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from ternax.data import BYTES, END, read_tokenizer, sequences
from ternax.errors import UsageError

HELDOUT = "heldout"
PATH = pathlib.Path(__file__).resolve().parent / "box" / "heldout.txt"
SHA256 = "909725534ae526271434c21ce17a3c48d1e327d29e185fc1b07cd843b7c542a5"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as tokens, END behind each file.

    Attributes:
      source: "heldout" or the path that was asked for.
      sha256: of the bytes of the text.
      tokenizer: "bytes", or the tokenizer's file and its sha256.
      vocab_size: tokens lie below it.
      tokens: int32 [n].
      num_bytes: int32 [n], bytes of the text each token stands for; 1 for END.
      files: int32 [n], which file a token is of, from 0.
    """

    source: str
    sha256: str
    tokenizer: str
    vocab_size: int
    tokens: np.ndarray
    num_bytes: np.ndarray
    files: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """A text cut into n sequences, every token but the first a target at most once.

    Attributes:
      tokens: int32 [n, T + 1]; inputs and targets overlap by one.
      num_bytes: int64 [n], bytes of a sequence's T targets.
      files: int32 [n], the file of a sequence's first target.
    """

    tokens: np.ndarray
    num_bytes: np.ndarray
    files: np.ndarray


def open_text(source: str = HELDOUT, *, tokenizer: str | None = None) -> Text:
    """Reads and tokenizes a text. Bytes END part its files, as in `box/heldout.txt`.

    Args:
      source: "heldout", or the path of a UTF-8 file.
      tokenizer: path of a `tokenizer.json`; None is one token a byte.

    Raises:
      UsageError: nothing there, not UTF-8, empty, or a tokenizer that cannot be read.
    """
    path = PATH if source == HELDOUT else pathlib.Path(source)
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"--text {source!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text {source!r}: expected UTF-8, found byte {data[error.start]} at {error.start}"
        ) from error
    pieces = [piece for piece in data.split(bytes([END])) if piece]
    if not pieces:
        raise UsageError(f"--text {source!r}: expected a text, found an empty file")
    if tokenizer is None:
        encode, vocab_size, name = _bytes, BYTES, "bytes"
    else:
        found, sha256 = read_tokenizer(tokenizer)
        vocab_size, name = found.get_vocab_size(), f"{tokenizer}, sha256 {sha256[:16]}"

        def encode(piece):
            return _encode(found, piece)

    encoded = [encode(piece) for piece in pieces]
    return Text(
        source,
        hashlib.sha256(data).hexdigest(),
        name,
        vocab_size,
        np.concatenate([np.append(tokens, END) for tokens, _ in encoded]).astype(np.int32),
        np.concatenate([np.append(sizes, 1) for _, sizes in encoded]).astype(np.int32),
        np.repeat(np.arange(len(pieces)), [len(tokens) + 1 for tokens, _ in encoded]).astype(
            np.int32
        ),
    )


def windows(text: Text, length: int) -> Windows:
    """The sequences of `data.sequences`, `length` targets each, with their bytes and files."""
    tokens = sequences(text.tokens, length)
    targets = slice(1, 1 + len(tokens) * length)
    return Windows(
        tokens,
        text.num_bytes[targets].reshape(-1, length).sum(axis=1, dtype=np.int64),
        text.files[targets].reshape(-1, length)[:, 0],
    )


def _bytes(piece: bytes) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.frombuffer(piece, np.uint8)
    return tokens, np.ones(len(tokens), np.int32)


def _encode(tokenizer, piece: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n], bytes of each [n]), which sum to the piece's, whatever a tokenizer drops.

    A token's bytes are those from the end of the token before to its own end. Of several
    tokens within one character, the first gets its bytes.
    """
    text = piece.decode()
    found = tokenizer.encode(text, add_special_tokens=False)
    if not found.ids:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    # Bytes in front of each character, and of all.
    before = np.cumsum([0, *(len(letter.encode()) for letter in text)])
    ends = np.maximum.accumulate(before[[end for _, end in found.offsets]])
    ends[-1] = len(piece)
    return np.asarray(found.ids), np.diff(ends, prepend=0)
