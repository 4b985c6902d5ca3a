"""`decode` with weights that are stored: in the box under a name, or in a directory."""

import dataclasses

import pytest

import ternax
from ternax.engine import generate
from ternax.experiments import decode
from ternax.interop.saving import save
from ternax.interop.tokenizer import ByteTokenizer, printable
from ternax.record import read_records
from ternax.workload import Workload
from tests.checkpoint import stored

NAME = "tiny-bitnet"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    return stored.in_a_box(NAME, tmp_path, monkeypatch)


def run(tmp_path, capsys, *flags) -> tuple[int, str, str]:
    output = tmp_path / "out"
    code = decode.main([*flags, f"--output_dir={output}", "--num_tokens=6", "--backend=reference"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_box_is_decoded_by_name(trained, tmp_path, capsys):
    code, out, err = run(tmp_path, capsys, f"--config={NAME}", "--prompt=def main(")
    assert (code, err) == (0, "")
    assert " of trained weights, from ternax/box/tiny-bitnet, in " in out
    tokens = Workload(prompt="def main(", prompt_length=9).tokens(trained.config)
    expected = generate(trained, tokens, max_new_tokens=6)[0, 9:].tolist()
    end = expected.index(0) if 0 in expected else None
    text = printable(ByteTokenizer().decode(expected[:end])).removesuffix("\ufffd")
    assert f"text     def main({text}" in out
    assert "--scheme=int8" not in out, "the next command must be one that works"
    create = next(
        r for r in read_records(tmp_path / "out" / "results.jsonl") if r.phase == "create"
    )
    assert create.note == "trained weights, from ternax/box/tiny-bitnet"


def test_a_directory_is_decoded(trained, tmp_path, capsys):
    path = tmp_path / "box" / NAME
    code, out, err = run(tmp_path, capsys, f"--config={path}", "--layers=2")
    assert (code, err) == (0, "")
    joined = "".join(out.split())  # a long path breaks the line
    assert f"ofweightsfrom{path},in" in joined
    assert f"next: python -m experiments.decode --config={path}" in out


@pytest.mark.parametrize("format", ["hf", "gguf:F16"])
def test_another_programs_model_is_decoded(trained, tmp_path, capsys, format):
    path = tmp_path / ("m.gguf" if "gguf" in format else "m")
    config = dataclasses.replace(trained.config, activation="silu")
    save(ternax.load(config, seed=3), path, format)
    code, out, err = run(tmp_path, capsys, f"--config={path}", "--prompt=ab", "--inputs=none")
    assert (code, err) == (0, "")
    assert "text     ab" in out and f"ofweightsfrom{path},in" in "".join(out.split())
    record = read_records(tmp_path / "out" / "results.jsonl")[-1]
    assert (record.config, record.inputs) == ("m", "none")


def test_a_file_that_is_no_model_is_one_line(tmp_path, capsys):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    code, _, err = run(tmp_path, capsys, f"--config={tmp_path / 'm.gguf'}")
    assert code == 4 and "expected 4 bytes more of the header, found 0" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--weights=random"], ["--config.num_layers=2"]])
def test_random_weights_are_called_so(trained, tmp_path, capsys, flags):
    code, out, _ = run(tmp_path, capsys, f"--config={NAME}", *flags)
    assert code == 0 and "of random weights, packed from birth" in out


@pytest.mark.parametrize(
    "flag, why",
    [
        ("--scheme=twn", "scheme=twn: the weights in tiny-bitnet are made with absmean"),
        ("--inputs=none", "inputs=none: the weights in tiny-bitnet are made with int8"),
        ("--embed_dtype=bf16", "embed_dtype=bf16: the weights in tiny-bitnet are made with int8"),
    ],
)
def test_stored_weights_are_what_they_are(trained, tmp_path, capsys, flag, why):
    code, _, err = run(tmp_path, capsys, f"--config={NAME}", flag)
    assert code == 2 and why in err and "weights=random" in err
    assert err.count("\n") == 1


def test_a_directory_without_a_model(tmp_path, capsys):
    code, _, err = run(tmp_path, capsys, f"--config={tmp_path}")
    assert code == 4 and "manifest.json: missing" in err
