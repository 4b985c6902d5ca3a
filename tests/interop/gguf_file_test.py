"""The GGUF container against the gguf package: what one writes, the other reads."""

import gguf
import numpy as np
import pytest

from ternax.errors import BadModelFile, UsageError
from ternax.interop import gguf_file
from ternax.interop.files import Plan

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.wide": 1 << 40,
    "llama.eps": 0.5,
    "flag": True,
    "tokenizer.ggml.tokens": ["a", "é", "", "\n"],
    "tokenizer.ggml.scores": [0.0, -1.5],
    "tokenizer.ggml.token_type": [1, 3, 6],
    "tokenizer.ggml.merges": [],
}


def plan(name: str, array: np.ndarray, kind: str = "F32", shape=None) -> Plan:
    return Plan(name, shape or array.shape, kind, array.nbytes, lambda: [array])


def write(path, tensors, metadata=METADATA):
    with open(path, "wb") as file:
        gguf_file.write(file, metadata, tensors)
    return path


def test_gguf_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 8)).astype(np.float32)
    norm = rng.normal(size=3).astype(np.float32)
    trits = rng.integers(0, 256, (4, 66), dtype=np.uint8)
    tensors = [
        plan("a.weight", table),
        plan("b.weight", norm),
        plan("c.weight", trits, "TQ2_0", (4, 256)),
    ]
    reader = gguf.GGUFReader(write(tmp_path / "m.gguf", tensors))
    found = {tensor.name: tensor for tensor in reader.tensors}
    np.testing.assert_array_equal(found["a.weight"].data, table)
    np.testing.assert_array_equal(found["b.weight"].data, norm)
    np.testing.assert_array_equal(found["c.weight"].data, trits)
    assert found["c.weight"].tensor_type == gguf.GGMLQuantizationType.TQ2_0
    assert found["c.weight"].shape.tolist() == [256, 4]
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert {key: values[key] for key in METADATA if METADATA[key] != []} == {
        key: value for key, value in METADATA.items() if value != []
    }


def test_reads_what_gguf_writes(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(0.25)
    writer.add_token_list(["x", "y"])
    writer.add_custom_alignment(64)
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("token_embd.weight", table)
    writer.add_tensor("output_norm.weight", table[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, file = gguf_file.read(path)
    assert metadata["llama.block_count"] == 2 and metadata["general.alignment"] == 64
    assert metadata["tokenizer.ggml.tokens"] == ["x", "y"]
    assert {name: entry.shape for name, entry in file.entries.items()} == {
        "token_embd.weight": (3, 4),
        "output_norm.weight": (4,),
    }
    np.testing.assert_array_equal(
        file.read("token_embd.weight").view(np.float32).reshape(3, 4), table
    )
    row = file.read("token_embd.weight", 16, 16).view(np.float32)
    np.testing.assert_array_equal(row, table[1])


def test_own_round_trip_keeps_metadata(tmp_path):
    metadata, file = gguf_file.read(write(tmp_path / "m.gguf", []))
    assert metadata == METADATA and file.entries == {}


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="odd cannot hold dict"):
        write(tmp_path / "m.gguf", [], {"odd": {}})
    short = Plan("a", (4,), "F32", 16, lambda: [b"12"])
    with pytest.raises(ValueError, match="planned 16 bytes, produced 2"):
        write(tmp_path / "m.gguf", [short])


def test_a_file_that_shrinks_is_told(tmp_path):
    path = write(tmp_path / "m.gguf", [plan("a", np.ones(64, np.float32))])
    _, file = gguf_file.read(path)
    with open(path, "r+b") as opened:
        opened.truncate(path.stat().st_size - 100)
    with pytest.raises(BadModelFile, match="cut short"):
        file.read("a")


@pytest.mark.parametrize(
    "kind, shape, nbytes",
    [
        ("TQ2_0", (3, 512), 3 * 2 * 66),
        ("TQ1_0", (3, 512), 3 * 2 * 54),
        ("I2_S", (3, 128), 3 * 32 + 32),
        ("Q6_K", (2, 256), 420),
        ("TQ2_0", (3, 128), None),
        ("I2_S", (1, 3), None),
    ],
)
def test_bytes_of_a_kind(kind, shape, nbytes):
    assert gguf_file.kind_bytes(kind, shape) == nbytes
