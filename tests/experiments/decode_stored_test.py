"""`decode` with weights that are stored: in the box under a name, or in a directory."""

import pytest

from ternax.engine import generate
from ternax.experiments import decode
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
    assert decode.decoded(expected, as_text=True) in out
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
