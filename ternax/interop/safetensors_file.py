"""The safetensors container: `u64 length | JSON | data`, little-endian, in and out.

Source: README.md of huggingface/safetensors. Stricter than that in one point: no name may hold
what is not a letter, a digit, or one of `. _ -`.
"""

import json
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

from ternax.errors import BadModelFile
from ternax.interop.files import (
    Entry,
    Plan,
    TensorFile,
    check_name,
    check_places,
    check_shape,
    file_size,
    pieces,
)

BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_MAX_HEADER = 100_000_000


def read(path) -> TensorFile:
    """The tensors of a file. BadModelFile where it is not whole and plain."""
    path = pathlib.Path(path)
    size = file_size(path)
    if size < 8:
        raise BadModelFile(path, "byte 0", f"expected a header, found {size} bytes")
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(size - 8, _MAX_HEADER):
            raise BadModelFile(path, "byte 0", f"a header of {length} in a file of {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(path, "header", f"expected JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadModelFile(path, "header", f"expected an object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
    check_places(path, entries, 8 + length, size)
    if 8 + length + sum(entry.nbytes for entry in entries.values()) != size:
        raise BadModelFile(path, "data", f"{size} bytes hold more than the tensors in the header")
    return TensorFile(path, entries)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(path, name: str, info: Any, first: int) -> Entry:
    check_name(path, name)
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise BadModelFile(path, name, "expected dtype, shape and data_offsets")
    kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(kind, str) or kind not in BYTES:
        raise BadModelFile(path, name, f"is of {str(kind)[:20]!r}; read are {', '.join(BYTES)}")
    for values in (shape, offsets):
        whole = isinstance(values, list) and all(type(value) is int for value in values)
        if not whole or any(value < 0 for value in values):
            raise BadModelFile(path, name, "expected lists of whole numbers, shape and offsets")
    nbytes = check_shape(path, name, tuple(shape)) * BYTES[kind]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise BadModelFile(path, name, f"expected {nbytes} bytes by its shape, found {offsets[:3]}")
    return Entry(tuple(shape), kind, first + offsets[0], nbytes)


def write(file: BinaryIO, tensors: Sequence[Plan]) -> None:
    """Writes a file, tensor by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in tensors:
        span = [offset, offset + plan.nbytes]
        header[plan.name] = {"dtype": plan.kind, "shape": list(plan.shape), "data_offsets": span}
        offset += plan.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(struct.pack("<Q", len(raw)) + raw)
    for plan in tensors:
        for piece in pieces(plan):
            file.write(piece)
