"""Files that are no models: each is one BadModelFile that names the file, a place, and why.

Crafted one by one, then thousands by chance. Nothing else is raised, nothing hangs, and no count
in a header is believed before it is held against the bytes that are there.
"""

import json
import pathlib
import pickle
import struct
import subprocess
import sys

import pytest

import ternax
from ternax.errors import BadModelFile
from ternax.interop import gguf_file, safetensors_file
from ternax.interop.opening import open_foreign
from tests.interop import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
FUZZED = 2000
MEMORY_BYTES = 4 << 30


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(bytes of a GGUF file, a Hugging Face directory) of one small model."""
    folder = tmp_path_factory.mktemp("good")
    model = models.packed(models.BITNET, embed_dtype="f32", head_dtype="f32")
    ternax.save(model, folder / "m.gguf", "gguf:TQ2_0")
    ternax.save(model, folder / "hf", "hf")
    return (folder / "m.gguf").read_bytes(), folder / "hf"


def refused(path, why: str | None = None, load: bool = True):
    with pytest.raises(BadModelFile, match=why) as caught:
        model = open_foreign(path)
        if load:
            from ternax.interop.loading import load as read

            read(model)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- GGUF: header fields at known places ------------------------------------------------------

U32, U64 = "<I", "<Q"


def at(offset, form, value):
    return lambda raw: (
        raw[:offset] + struct.pack(form, value) + raw[offset + struct.calcsize(form) :]
    )


def at_text(text: bytes, offset, form, value):
    """A number `offset` bytes behind the first place of a text."""

    def edit(raw):
        place = raw.index(text) + len(text) + offset
        return at(place, form, value)(raw)

    return edit


def swap(old: bytes, new: bytes, count: int = 1):
    assert len(old) == len(new)
    return lambda raw: raw.replace(old, new, count)


NAME = b"blk.0.attn_q.weight"  # behind it: u32 dims, two u64 sizes, u32 type, u64 offset
GGUF = {
    "empty": (lambda raw: b"", "expected 4 bytes more"),
    "a few bytes": (lambda raw: raw[:3], "expected 4 bytes more"),
    "another magic": (swap(b"GGUF", b"GGJT"), "expected GGUF"),
    "big endian": (at(4, ">I", 3), "version 2 or 3"),
    "version 1": (at(4, U32, 1), "version 2 or 3, found 1"),
    "version 99": (at(4, U32, 99), "version 2 or 3"),
    "tensors 2^63": (at(8, U64, 1 << 63), "tensors in a file of"),
    "tensors more than bytes": (at(8, U64, 1 << 19), "tensors in a file of"),
    "tensors none": (at(8, U64, 0), "token_embd.weight"),
    "one tensor less": (at(8, U64, 19), "inside the header|missing|offset"),
    "pairs 2^64 - 1": (at(16, U64, (1 << 64) - 1), "metadata pairs in a file"),
    "pairs none": (at(16, U64, 0), ""),
    "key of 2^40": (at(24, U64, 1 << 40), "bytes of text"),
    "key of 2^63": (at(24, U64, 1 << 63), "bytes of text"),
    "no utf-8": (swap(b"general.architecture", b"general.\xff\xferchitectur"), "UTF-8"),
    "type 13": (at_text(b"general.architecture", 0, U32, 13), "expected a type of value, found 13"),
    "array in array": (at_text(b"tokenizer.ggml.tokens", 4, U32, 9), "type of value, found 9"),
    "array of 2^62": (at_text(b"tokenizer.ggml.token_type", 8, U64, 1 << 62), "values in a file"),
    "texts 2^62": (at_text(b"tokenizer.ggml.tokens", 8, U64, 1 << 62), "texts in a file"),
    "key twice": (swap(b"general.file_type", b"bitnet.vocab_size"), "twice"),
    "architecture": (swap(b"\x06\0\0\0\0\0\0\0bitnet", b"\x06\0\0\0\0\0\0\0falcon"), "falcon"),
    "no dims": (at_text(NAME, 0, U32, 0), "1 to 4 dimensions, found 0"),
    "5 dims": (at_text(NAME, 0, U32, 5), "1 to 4 dimensions, found 5"),
    "2^31 dims": (at_text(NAME, 0, U32, 1 << 31), "dimensions"),
    "size 0": (at_text(NAME, 4, U64, 0), "sizes of at least 1"),
    "size 2^63": (at_text(NAME, 4, U64, 1 << 63), ""),
    "sizes that wrap": (at_text(NAME, 12, U64, 1 << 62), ""),
    "size -1": (at_text(NAME, 4, U64, (1 << 64) - 1), ""),
    "no whole block": (at_text(NAME, 4, U64, 255), "no whole number of blocks of TQ2_0"),
    "another shape": (at_text(NAME, 4, U64, 512), ""),
    "type 999": (at_text(NAME, 20, U32, 999), r"type 999 \(unknown\)"),
    "type Q4_K": (at_text(NAME, 20, U32, 12), r"type 12 \(Q4_K\); read are"),
    "offset unaligned": (at_text(NAME, 24, U64, 1), "no multiple of 32"),
    "offset beyond": (at_text(NAME, 24, U64, 1 << 40), "cut short"),
    "offset 2^64 - 32": (at_text(NAME, 24, U64, (1 << 64) - 32), "cut short"),
    "overlap": (at_text(NAME, 24, U64, 0), "overlaps"),
    "name with a path": (swap(NAME, b"../../../etc/passwd"), "tensor's name"),
    "absolute name": (swap(NAME, b"/etc/passwd12345678"), "tensor's name"),
    "name with dots": (swap(NAME, b"blk..0attn_q.weight"), "tensor's name"),
    "name with nul": (swap(NAME, b"blk.0.attn_q.weigh\0"), "tensor's name"),
    "name unknown": (swap(NAME, b"blk.0.attn_x.weight"), "missing|unknown"),
    "name twice": (swap(NAME, b"blk.0.attn_k.weight"), "twice"),
    "cut in the header": (lambda raw: raw[:300], ""),
    "cut in the tokens": (lambda raw: raw[:2000], ""),
    "cut in the data": (lambda raw: raw[: len(raw) // 2], "cut short"),
    "last byte missing": (lambda raw: raw[: -(len(raw) % 32 or 33)], "cut short"),
    "heads 0": (at_text(b"bitnet.attention.head_count", 4, U32, 0), "positive count"),
    "heads 2^31": (at_text(b"bitnet.attention.head_count", 4, U32, 1 << 31), "positive count"),
    "layers 2^30": (at_text(b"bitnet.block_count", 4, U32, 1 << 30), "too few tensors"),
    "width 0": (at_text(b"bitnet.embedding_length", 4, U32, 0), "positive count"),
    "context 0": (at_text(b"bitnet.context_length", 4, U32, 0), "positive count"),
    "eps NaN": (at_text(b"layer_norm_rms_epsilon", 4, "<f", float("nan")), "norm_eps"),
    "eps negative": (at_text(b"layer_norm_rms_epsilon", 4, "<f", -1.0), "norm_eps"),
    "theta infinite": (at_text(b"rope.freq_base", 4, "<f", float("inf")), "rope_theta"),
}


@pytest.mark.parametrize("case", GGUF)
def test_crafted_gguf(good, tmp_path, case):
    edit, why = GGUF[case]
    raw = edit(good[0])
    assert raw != good[0]
    (tmp_path / "m.gguf").write_bytes(raw)
    refused(tmp_path / "m.gguf", why or None)


def data_edit(good, tmp_path, name, first, new: bytes):
    """The good file with bytes of a tensor's data replaced."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good[0])
    _, file = gguf_file.read(path)
    place = file.entries[name].offset + first
    path.write_bytes(good[0][:place] + new + good[0][place + len(new) :])
    return path


@pytest.mark.parametrize(
    "name, first, new, why",
    [
        ("blk.1.ffn_up.weight", 0, b"\xff", "code 3 4 times"),
        ("blk.0.attn_q.weight", 64, struct.pack("<e", float("nan")), "scale is not finite"),
        ("blk.0.attn_q.weight", 64, struct.pack("<e", float("inf")), "scale is not finite"),
        ("blk.0.attn_norm.weight", 0, struct.pack("<f", float("nan")), "1 of 256 values"),
        ("token_embd.weight", 0, struct.pack("<f", float("-inf")), "1 of .* values are not finite"),
    ],
)
def test_weights_that_cannot_be(good, tmp_path, name, first, new, why):
    refused(data_edit(good, tmp_path, name, first, new), f"{name}: .*{why}")


def test_every_length_of_a_header_is_refused(good, tmp_path):
    """Cut at each byte of the first 600, and at steps behind."""
    path = tmp_path / "m.gguf"
    for length in [*range(0, 600, 7), *range(600, len(good[0]), len(good[0]) // 40)]:
        path.write_bytes(good[0][:length])
        refused(path, load=False)


# --- safetensors and its directory -------------------------------------------------------------


def header_of(raw: bytes) -> dict:
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def with_header(edit):
    """Edits the JSON of a safetensors file."""

    def whole(raw):
        header = header_of(raw)
        text = edit(header)
        text = json.dumps(header).encode() if text is None else text
        return struct.pack("<Q", len(text)) + text + raw[8 + struct.unpack("<Q", raw[:8])[0] :]

    return whole


Q = "model.layers.0.self_attn.q_proj.weight"


def entry(**changes):
    return with_header(lambda header: header[Q].update(changes))


def renamed(new: str):
    return with_header(lambda header: header.update({new: header.pop(Q)}))


SAFETENSORS = {
    "empty": (lambda raw: b"", "expected a header"),
    "seven bytes": (lambda raw: raw[:7], "expected a header"),
    "header of 2^63": (lambda raw: struct.pack("<Q", 1 << 63) + raw[8:], "a header of"),
    "header longer": (lambda raw: struct.pack("<Q", len(raw)) + raw[8:], "a header of"),
    "no JSON": (with_header(lambda header: b"{" * 64), "expected JSON"),
    "deep JSON": (with_header(lambda header: b"[" * 100000), "expected JSON"),
    "a list": (with_header(lambda header: b"[]"), "expected an object"),
    "not UTF-8": (with_header(lambda header: b'{"\xff": 1}'), "expected JSON"),
    "a name twice": (
        with_header(lambda header: json.dumps(header).encode()[:-1] + b', "x": 1, "x": 2}'),
        "twice",
    ),
    "no offsets": (
        with_header(lambda header: header[Q].pop("data_offsets") and None),
        "expected dtype",
    ),
    "an entry of text": (with_header(lambda header: header.update({Q: "x"})), "expected dtype"),
    "dtype I2": (entry(dtype="I2"), "'I2'; read are"),
    "dtype of a number": (entry(dtype=7), "'7'; read are"),
    "shape of text": (entry(shape="x"), "whole numbers"),
    "shape of floats": (entry(shape=[64.0, 256]), "whole numbers"),
    "shape of booleans": (entry(shape=[True, 256]), "whole numbers"),
    "negative shape": (entry(shape=[-64, 256]), "whole numbers"),
    "shape 0": (entry(shape=[0, 256]), "at least 1"),
    "shape that wraps": (entry(shape=[1 << 62, 256]), "by its shape"),
    "five sizes": (entry(shape=[1, 1, 1, 64, 256]), "up to 4 sizes"),
    "offsets reversed": (entry(data_offsets=[100, 0]), "by its shape"),
    "offsets negative": (entry(data_offsets=[-16384, 0]), "whole numbers"),
    "offsets beyond": (entry(data_offsets=[1 << 40, (1 << 40) + 16384]), "cut short|hold more"),
    "three offsets": (entry(data_offsets=[0, 1, 2]), "by its shape"),
    "overlap": (entry(data_offsets=[0, 16384]), "overlaps"),
    "another dtype": (entry(dtype="F16", shape=[32, 256]), "expected U8"),
    "another shape": (entry(shape=[32, 512]), "expected U8"),
    "a path": (renamed("../../etc/passwd"), "tensor's name"),
    "no name": (renamed(""), "tensor's name"),
    "an endless name": (renamed("x" * 5000), "tensor's name"),
    "missing": (renamed("model.layers.0.self_attn.z_proj.weight"), "q_proj.weight: missing"),
    "truncated": (lambda raw: raw[:-1], "cut short"),
    "bytes behind": (lambda raw: raw + b"x", "hold more"),
    "code 3": (lambda raw: raw, "code 3"),
}


def directory(good, tmp_path) -> pathlib.Path:
    path = tmp_path / "m"
    path.mkdir()
    for file in good[1].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("case", SAFETENSORS)
def test_crafted_safetensors(good, tmp_path, case):
    path = directory(good, tmp_path)
    file = path / "model.safetensors"
    edit, why = SAFETENSORS[case]
    raw = edit(file.read_bytes())
    if case == "code 3":
        place = safetensors_file.read(file).entries[Q].offset
        raw = raw[:place] + b"\x03" + raw[place + 1 :]
    file.write_bytes(raw)
    with pytest.raises(BadModelFile, match=why):
        ternax.load(path)


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("config.json", b"", "expected JSON"),
        ("config.json", b"[1]", "expected an object"),
        ("config.json", b'{"model_type": "gpt2"}', "model_type 'gpt2'"),
        ("config.json", b"[" * 100000, "expected JSON"),
        ("model.safetensors", None, "missing, and so is"),
        ("model.safetensors.index.json", b"{}", "expected a weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "expected a weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}', "of this"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.bin"}}', "of this directory"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.safetensors"}}', "missing"),
        ("tokenizer.json", b"{}", "tokenizer.json: cannot be read"),
        ("tokenizer_config.json", b"{", "cannot be read"),
    ],
)
def test_crafted_directories(good, tmp_path, name, content, why):
    from ternax.checkpoint import box

    path = directory(good, tmp_path)
    if "index" in name:
        (path / "model.safetensors").unlink()
    if name == "tokenizer_config.json":
        (path / "tokenizer.json").write_text("{}")
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    with pytest.raises(BadModelFile, match=why):
        found = box.find(str(path))
        found.tokenizer()


class _Trap:
    def __reduce__(self):
        return (print, ("a pickle ran",))


def test_a_pickle_is_never_opened(good, tmp_path, capsys):
    path = directory(good, tmp_path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))
    refused(path, "a pickle can run code and is never opened")
    refused(path / "pytorch_model.bin", "a pickle can run code and is never opened")
    (path / "model.safetensors").write_bytes(pickle.dumps(_Trap()))
    refused(path)
    assert capsys.readouterr().out == ""


def test_what_is_not_there_or_no_file(tmp_path):
    refused(tmp_path / "no.gguf", "missing")
    (tmp_path / "dir.gguf").mkdir()
    with pytest.raises(BadModelFile):
        open_foreign(tmp_path / "dir.gguf")


# --- By chance ---------------------------------------------------------------------------------

_CHILD = """
import json, pathlib, resource, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from ternax.errors import BadModelFile
from ternax.interop.opening import open_foreign, tokenizer_of
folder, count, limit = pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = {"refused": 0, "taken": 0, "slowest": 0.0}
for file in ("m.gguf", "hf/model.safetensors", "hf/config.json"):
    good = (folder / file).read_bytes()
    path = folder / file
    rng = np.random.default_rng(len(file))
    head = 4096 if file.endswith("gguf") else min(len(good), 8192)
    for i in range(count // 3 + 1):
        raw = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            place = int(rng.integers(0, head))
            kind = rng.integers(0, 4)
            if kind == 0:
                raw[place % len(raw)] ^= 1 << int(rng.integers(0, 8))
            elif kind == 1:
                raw[place : place + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
            elif kind == 2:
                raw[place : place + 8] = [b"\\xff" * 8, bytes(8), b"\\x7f" + b"\\xff" * 7][i % 3]
            else:
                raw = raw[: max(1, int(rng.integers(0, len(raw))))]
        path.write_bytes(raw)
        start = time.perf_counter()
        try:
            tokenizer_of(open_foreign(folder / "hf" if "hf" in file else path))
            found["taken"] += 1
        except BadModelFile:
            found["refused"] += 1
        found["slowest"] = max(found["slowest"], time.perf_counter() - start)
    path.write_bytes(good)
print(json.dumps(found))
"""


def test_mutated_headers(good, tmp_path):
    """2,000 of them, in a process whose memory is limited: refused as bad files, or whole."""
    (tmp_path / "m.gguf").write_bytes(good[0])
    (tmp_path / "hf").mkdir()
    for file in good[1].iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    command = [sys.executable, "-c", _CHILD, ROOT, tmp_path, FUZZED, MEMORY_BYTES]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["refused"] + found["taken"] >= FUZZED
    assert found["refused"] > FUZZED // 2 and found["slowest"] < 2
