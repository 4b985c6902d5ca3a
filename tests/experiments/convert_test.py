"""experiments.convert: the records it leaves, what it prints, and what it refuses at once."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import ternax
from ternax import cost, edit
from ternax.checkpoint import manifest
from ternax.experiments import convert
from ternax.interop import gguf_file, safetensors_file
from ternax.interop.gguf import GGUFModel
from ternax.interop.weights import Weights
from ternax.record import read_records
from tests.interop import models

TINY = ["--config=tiny-bitnet", "--config.num_layers=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20)
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory, text):
    """(directory of results, directory of the model) of one calibrated run."""
    folder = tmp_path_factory.mktemp("convert")
    directory, saved = folder / "out", folder / "model"
    flags = [f"--calibrate={text}", "--calibrate_tokens=200", "--calibrate_length=40"]
    arguments = [*TINY, "--scheme=ls", *flags, f"--output_dir={directory}", f"--output={saved}"]
    assert convert.main(arguments) == 0
    return directory, saved


def test_every_weight_is_a_record_and_all_of_them_another(ran):
    *each, total = read_records(ran[0] / "results.jsonl")
    names = [record.note.partition(" ")[0] for record in each]
    assert len(names) == 14 and names[0] == "layers.0.attn.q" and names[-1] == "layers.1.mlp.down"
    for record in (*each, total):
        assert (record.experiment, record.phase, record.kind) == ("convert", "convert", "measured")
        assert (record.scheme, record.inputs, record.layers) == ("ls", "int8", 2)
        assert (record.batch, record.context) == (5, 40)
        assert len(record.samples) == 1 and record.sample_unit == "s"
        assert "calibrated on 200 tokens, fed quantized, of " in record.note
    # Trits of a Gaussian: 1 - cos^2 with 0.8878^2 (closed form) on the weights.
    assert all(0.40 < record.metrics["relative_error"] < 0.52 for record in each)
    assert all(5 < record.metrics["output_snr_db"] < 20 for record in each)
    assert total.metrics["ternary_parameters"] == 119_808 * 2 // 3
    shapes = [record.note.split("[")[1].split("]")[0].split(" x ") for record in each]
    sizes = [int(k_size) * int(n) for k_size, n in shapes]
    for name in ("relative_error", "nonzero_share", "bits_per_weight"):
        mean = sum(n * r.metrics[name] for n, r in zip(sizes, each, strict=True)) / sum(sizes)
        assert total.metrics[name] == pytest.approx(mean)


def test_the_packed_model_is_saved(ran):
    model = ternax.load(ran[1])
    assert edit.is_packed(model) and model.config.scheme == "ls"


def test_screen(capsys, tmp_path):
    arguments = [*TINY, "--layers=1", "--scheme=int8", "--floats", f"--output_dir={tmp_path}"]
    assert convert.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = [line.split() for line in lines if "layers.0.mlp.down" in line]
    assert row[1:4] == ["144", "x", "64"] and 0.001 < float(row[4]) < 0.02  # no dB: not calibrated
    assert len(row) == 8 and float(row[6]) == pytest.approx(8 + 32 / 144, abs=1e-3)
    assert any("weights of tiny-bitnet(num_layers=2) in int8 at 8." in line for line in lines)
    assert not [line for line in lines if "layers.1" in line]


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--scheme=nf4"], 2, "format nf4 cannot be packed"),
        (["--scheme=gptq,damping=0.0"], 2, "damping must lie between"),
        (["--scheme=ls", "--calibrate_tokens=9"], 2, "--calibrate_tokens belongs to --calibrate"),
        (["--scheme=ls", "--calibrate=/no/such"], 2, "expected a file or a directory"),
        (["--scheme=ls", "--config.vocab_size=8", "--calibrate=TEXT"], 2, "has tokens 0 to 7"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(arguments, code, words, capsys, tmp_path, text):
    directory = tmp_path / "out"
    arguments = [argument.replace("TEXT", str(text)) for argument in arguments]
    assert convert.main([*TINY, *arguments, f"--output_dir={directory}"]) == code
    said = capsys.readouterr()
    assert words in said.err and len(said.err.splitlines()) == 1
    assert not list(directory.glob("results.json")) or "tokens 0 to 7" in words


def test_floats_that_do_not_fit_are_refused_before_they_are_made(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "available_bytes", lambda: 3 * 2**30)
    assert convert.main(["--config=1b", "--scheme=ls", f"--output_dir={tmp_path / 'out'}"]) == 3
    assert "1b needs about 6.45 GiB to be converted" in capsys.readouterr().err


def test_a_saved_float_model_is_converted_and_saved(tmp_path, capsys):
    """As it was trained: latent floats under its own scheme, packed as pack_model packs them."""
    model = ternax.load("tiny-bitnet", packed=False, layers=1)
    ternax.save(model, tmp_path / "floats", trained_tokens=4096)
    places = [f"--output={tmp_path / 'packed'}", f"--output_dir={tmp_path / 'out'}"]
    assert convert.main([f"--config={tmp_path / 'floats'}", *places]) == 0, capsys.readouterr().err
    found = nnx.state(ternax.load(tmp_path / "packed"))
    jax.tree.map(np.testing.assert_array_equal, found, nnx.state(edit.pack_model(model)))
    assert "saved floats" in capsys.readouterr().out
    assert manifest.read(tmp_path / "packed").trained_tokens == 4096


def test_a_file_of_floats_is_quantized_as_it_is_read(tmp_path, capsys):
    """From a Hugging Face directory to a GGUF file, with a record for each weight."""
    config = dataclasses.replace(models.LLAMA, scheme="none,dtype=f32", inputs="none")
    model = models.packed(config, embed_dtype="f32", head_dtype="f32")
    ternax.save(model, tmp_path / "floats", "hf")
    places = [f"--output={tmp_path / 'm.gguf'}", f"--output_dir={tmp_path / 'out'}"]
    arguments = [f"--config={tmp_path / 'floats'}", "--scheme=ls", "--format=gguf:TQ2_0"]
    assert convert.main([*arguments, *places]) == 0, capsys.readouterr().err
    *each, total = read_records(tmp_path / "out" / "results.jsonl")
    assert [record.note.partition(" ")[0] for record in each[:2]] == [
        "layers.0.attn.k",
        "layers.0.attn.o",
    ]
    assert len(each) == 14 and all(0.4 < r.metrics["relative_error"] < 0.5 for r in each)
    assert "floats of a file, as they are read" in total.note
    codes, _ = Weights(ternax.load(tmp_path / "m.gguf")).codes("layers.1.mlp.down")
    want = ternax.pack_model(models.floats(dataclasses.replace(models.LLAMA, scheme="ls")))
    np.testing.assert_array_equal(codes, Weights(want).codes("layers.1.mlp.down")[0])


def test_a_packed_model_changes_its_format_and_nothing_else(tmp_path, capsys):
    model = models.packed(models.BITNET, embed_dtype="f32", head_dtype="f32")
    ternax.save(model, tmp_path / "small-bitnet", "hf")
    arguments = [f"--config={tmp_path / 'small-bitnet'}", f"--output={tmp_path / 'm.gguf'}"]
    assert convert.main([*arguments, "--format=gguf:TQ1_0"]) == 0, capsys.readouterr().err
    assert "codes and scales as they are" in capsys.readouterr().out
    assert GGUFModel(tmp_path / "m.gguf").kind("embedding") == "F32"  # as it was
    codes, _ = Weights(ternax.load(tmp_path / "m.gguf")).codes("layers.1.attn.k")
    np.testing.assert_array_equal(codes, Weights(model).codes("layers.1.attn.k")[0])
    assert convert.main([*arguments, "--format=gguf:TQ1_0", "--embed_dtype=int8"]) == 0
    assert GGUFModel(tmp_path / "m.gguf").kind("embedding") == "Q8_0"
    assert convert.main([arguments[0], "--scheme=twn", f"--output_dir={tmp_path / 'o'}"]) == 2
    assert "is packed already, in absmean" in capsys.readouterr().err
    assert convert.main([*arguments, "--format=gguf:TQ1_0", "--calibrate=stdlib"]) == 2
    assert "--calibrate is for what is quantized here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "format, dtype",
    [
        ("hf", "bf16"),
        ("hf,convention=bitlinear", "f32"),
        ("gguf:TQ1_0", "f32"),
        ("gguf:TQ2_0", "int8"),
        ("gguf:I2_S", "bf16"),
    ],
)
def test_there_and_back_every_tensor_is_the_same(tmp_path, format, dtype):
    """Codes, scales, norms and tables."""
    model = models.packed(models.BITNET, embed_dtype=dtype, head_dtype=dtype)
    ternax.save(model, tmp_path / "a", format)
    arguments = [f"--config={tmp_path / 'a'}", f"--output={tmp_path / 'b'}", f"--format={format}"]
    i2_s = ["--i2_s=x86"] if "I2_S" in format else []
    assert convert.main([*arguments, *i2_s]) == 0
    before, after = (tensors(tmp_path / name) for name in "ab")
    assert before == after


def tensors(path) -> dict:
    """Name -> (kind, shape, bytes) of every tensor of a file or directory."""
    if path.is_dir():
        file = safetensors_file.read(path / "model.safetensors")
    else:
        file = gguf_file.read(path)[1]
    return {n: (e.kind, e.shape, file.read(n).tobytes()) for n, e in file.entries.items()}


@pytest.mark.parametrize(
    "arguments, code, why",
    [
        (["--output=m", "--format=ggml"], 2, "format: expected one of orbax"),
        (["--output=m", "--format=gguf:Q4_K"], 2, "gguf: expected one of TQ1_0"),
        (["--output=m", "--format=hf,convention=x"], 2, "hf: expected one of autobitlinear"),
        (["--output=m", "--format=hf", "--scheme=twn,granularity=row"], 2, "scales that differ"),
        (["--output=m", "--format=hf", "--scheme=int8"], 2, "no form of int8"),
        (
            ["--output=m", "--format=gguf:I2_S", "--scheme=ls,granularity=row"],
            2,
            "which I2_S cannot hold",
        ),
        (["--output=m", "--format=gguf:F16", "--scheme=ptqtp"], 2, "two trit-planes"),
        (["--output=m", "--format=gguf:TQ2_0", "--scheme=ls"], 2, "TQ2_0 cannot hold: its rows"),
        (["--output=.", "--format=gguf:F16"], 6, "is there and no saved model"),
        (["--output=m", "--format=gguf:F32", "--floats"], 2, "wants packed weights"),
        (["--format=hf"], 2, "--output says where"),
    ],
)
def test_what_cannot_be_saved_is_told_before_any_work(
    tmp_path, monkeypatch, capsys, arguments, code, why
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("notes")
    assert convert.main([*TINY, *arguments]) == code
    assert why in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
