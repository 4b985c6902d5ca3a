"""The GGUF container, versions 2 and 3, little-endian: metadata and tensors, in and out.

    "GGUF" | u32 version | u64 tensors | u64 pairs | pairs | tensor infos | padding | data

Source: docs/gguf.md of ggml. Every count is held against the bytes that are left before
anything is made of it, and every mistake is one BadModelFile.
"""

import pathlib
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

from ternax.errors import BadModelFile, UsageError
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

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_KEY = 1 << 16
_MAX_STRING = 1 << 24
_MAX_PAIRS, _MAX_TENSORS = 1 << 16, 1 << 20

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _I32, _F32, _U64 = 4, 5, 6, 10

# id -> (name, elements a block, bytes a block), of ggml.h. I2_S is bitnet.cpp's own.
KINDS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    8: ("Q8_0", 32, 34),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    36: ("I2_S", 4, 1),
}
_IDS = {name: number for number, (name, _, _) in KINDS.items()}
_TAIL_BYTES = {"I2_S": 32}
# Kinds that llama.cpp has and this does not read, for the message alone.
_OTHERS = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}


def kind_bytes(kind: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None where its last size is no whole number of blocks."""
    _, block, nbytes = KINDS[_IDS[kind]]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    if kind == "I2_S":
        elements = rows * shape[-1]
        return None if elements % block else elements // block + _TAIL_BYTES[kind]
    if shape[-1] % block:
        return None
    return rows * (shape[-1] // block) * nbytes


def is_one(path) -> bool:
    """Whether a file begins as GGUF files do, whatever it is called."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path) -> tuple[dict[str, Any], TensorFile]:
    """(metadata, tensors) of a GGUF file. BadModelFile where it is not whole and plain."""
    path = pathlib.Path(path)
    size = file_size(path)
    with open(path, "rb") as file:
        header = _Header(path, file, size)
        if header.take(4) != MAGIC:
            raise BadModelFile(path, "byte 0", "expected GGUF, found something else")
        version = header.number("<I")
        if version not in (2, 3):
            raise BadModelFile(path, "byte 4", f"expected GGUF version 2 or 3, found {version}")
        tensors = header.count("tensors", 24, _MAX_TENSORS)
        pairs = header.count("metadata pairs", 13, _MAX_PAIRS)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = header.text(_MAX_KEY)
            if key in metadata:
                raise BadModelFile(path, key, "is there twice")
            metadata[key] = header.value(header.number("<I"))
        infos: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        for _ in range(tensors):
            name, shape, kind, offset, nbytes = header.info()
            if name in infos:
                raise BadModelFile(path, name, "is there twice")
            infos[name] = shape, kind, offset, nbytes
        alignment = metadata.get("general.alignment", ALIGNMENT)
        legal = type(alignment) is int and 8 <= alignment <= _MAX_ALIGNMENT
        if not legal or alignment & (alignment - 1):
            raise BadModelFile(
                path, "general.alignment", f"expected a power of two from 8, found {alignment!r}"
            )
        first = -(-header.at // alignment) * alignment
    entries = {}
    for name, (shape, kind, offset, nbytes) in infos.items():
        if offset % alignment:
            raise BadModelFile(path, name, f"its offset {offset} is no multiple of {alignment}")
        entries[name] = Entry(shape, kind, first + offset, nbytes)
    check_places(path, entries, first, size)
    return metadata, TensorFile(path, entries)


class _Header:
    """Reads what comes next, and never more than there is."""

    def __init__(self, path, file: BinaryIO, size: int):
        self.path, self.file, self.size, self.at = path, file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise BadModelFile(
                self.path,
                f"byte {self.at}",
                f"expected {count} bytes more of the header, found {self.size - self.at}",
            )
        found = self.file.read(count)
        if len(found) < count:
            raise BadModelFile(self.path, f"byte {self.at}", "cut short while it was read")
        self.at += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, least: int, most: int) -> int:
        """How many follow, each of at least `least` bytes."""
        found = self.number("<Q")
        if found > most or found * least > self.size - self.at:
            raise BadModelFile(
                self.path, f"byte {self.at - 8}", f"{found} {what} in a file of {self.size} bytes"
            )
        return found

    def text(self, most: int = _MAX_STRING) -> str:
        at = self.at
        try:
            return self.take(self.count("bytes of text", 1, most)).decode()
        except UnicodeDecodeError as error:
            raise BadModelFile(self.path, f"byte {at}", "expected UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of = self.number("<I")
            if of == _STRING:
                return [self.text() for _ in range(self.count("texts", 8, _MAX_STRING))]
            form = self._form(of)
            count = self.count("values", struct.calcsize(form), 1 << 31)
            raw = self.take(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form[1]}", raw))
        found = self.number(self._form(kind))
        return bool(found) if kind == _BOOL else found

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise BadModelFile(
                self.path, f"byte {self.at - 4}", f"expected a type of value, found {kind}"
            )
        return _SCALARS[kind]

    def info(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """(name, shape rows first, kind, offset in the data, bytes) of the next tensor."""
        name = self.text(_MAX_KEY)
        check_name(self.path, name)
        dims = self.number("<I")
        if not 1 <= dims <= 4:
            raise BadModelFile(self.path, name, f"expected 1 to 4 dimensions, found {dims}")
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]
        check_shape(self.path, name, shape)
        number, offset = self.number("<I"), self.number("<Q")
        if number not in KINDS:
            known = ", ".join(kind for kind, _, _ in KINDS.values())
            other = _OTHERS.get(number, "unknown")
            raise BadModelFile(self.path, name, f"is of type {number} ({other}); read are {known}")
        kind = KINDS[number][0]
        nbytes = kind_bytes(kind, shape)
        if nbytes is None:
            raise BadModelFile(
                self.path, name, f"{list(shape)} is no whole number of blocks of {kind}"
            )
        return name, shape, kind, offset, nbytes


def write(file: BinaryIO, metadata: dict[str, Any], tensors: Sequence[Plan]) -> None:
    """Writes a GGUF file, tensor by tensor.

    metadata: bool, int (u32), float (f32), str, or a list of str, of int (i32) or of float.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _value(key, value)]
    offset = 0
    for plan in tensors:
        dims = plan.shape[::-1]
        head += [
            _text(plan.name),
            struct.pack("<I", len(dims)),
            struct.pack(f"<{len(dims)}Q", *dims),
        ]
        head.append(struct.pack("<IQ", _IDS[plan.kind], offset))
        offset += -(-plan.nbytes // ALIGNMENT) * ALIGNMENT
    _padded(file, b"".join(head))
    for plan in tensors:
        for piece in pieces(plan):
            file.write(piece)
        file.write(bytes(-plan.nbytes % ALIGNMENT))


def _padded(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.write(bytes(-len(data) % ALIGNMENT))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        wide = value >= 1 << 32
        return struct.pack("<IQ" if wide else "<II", _U64 if wide else _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        kinds = {str: _STRING, int: _I32, float: _F32}
        of = {type(each) for each in value} or {str}
        if len(of) == 1 and next(iter(of)) in kinds:
            kind = kinds[of.pop()]
            head = struct.pack("<IIQ", _ARRAY, kind, len(value))
            if kind == _STRING:
                return head + b"".join(map(_text, value))
            return head + struct.pack(f"<{len(value)}{_SCALARS[kind][1]}", *value)
    raise UsageError(f"gguf: {key} cannot hold {type(value).__name__}")
