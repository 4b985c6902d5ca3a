"""experiments.evaluate: one record a model, a table of 100 columns, and what it refuses."""

import json
import math

import pytest

import ternax
from ternax import evaluate as measured
from ternax import heldout
from ternax.experiments import evaluate
from ternax.record import read_records


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Four files of the held-out text, cut short."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    pieces = heldout.PATH.read_bytes().split(b"\0")[:4]
    path.write_bytes(b"\0".join(piece[:900] for piece in pieces))
    return path


def ran(capsys, directory, *arguments):
    code = evaluate.main([*arguments, f"--output_dir={directory}"])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    assert max(map(len, said.out.splitlines()), default=0) <= 100
    return read_records(directory / "results.jsonl"), said.out


def test_a_model_alone(text, tmp_path, capsys):
    flags = ["--config=tiny-bitnet", f"--text={text}", "--length=32", "--fake_quant"]
    (record,), screen = ran(capsys, tmp_path / "out", *flags)
    cut = heldout.windows(heldout.open_text(str(text)), 32)
    model = ternax.load("tiny-bitnet", packed=False)
    losses = measured.token_losses(model, cut.tokens)
    m = record.metrics
    assert m["bits_per_byte"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)
    assert m["bits_per_byte_low"] < m["bits_per_byte"] < m["bits_per_byte_high"]
    assert m["perplexity"] == pytest.approx(math.exp(m["loss_nats"]))
    assert m["sequences"] == len(record.samples) == len(cut.tokens)
    assert m["scored_bytes"] == m["scored_tokens"] == 32 * len(cut.tokens)
    assert (record.phase, record.kind, record.sample_unit) == ("evaluate", "measured", "bits/byte")
    assert (record.scheme, record.backend, record.context) == ("absmean", "float", 32)
    text_sha = heldout.open_text(str(text)).sha256[:16]
    assert text_sha in record.note and "fake-quantized floats" in record.note
    assert "random weights: tiny-bitnet" in record.note
    assert f"{m['bits_per_byte']:.4f}" in screen and text_sha in screen
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 1


def test_the_model_in_the_box_has_learned_something(text, tmp_path, capsys):
    (record,), _ = ran(capsys, tmp_path / "out", "--config=stdlib-bitnet", f"--text={text}")
    assert record.metrics["bits_per_byte"] < 2.5  # 8 says nothing, 1.9 is the whole text's
    (ours,), _ = ran(capsys, tmp_path / "b", "--config=tiny-bitnet", f"--text={text}")
    assert ours.metrics["bits_per_byte"] > 7


def test_a_scheme_beside_the_same_floats(text, tmp_path, capsys):
    flags = ["--config=tiny-bitnet", "--scheme=int8", f"--text={text}", "--length=32"]
    flags += ["--reference=tiny-bitnet", "--reference_scheme=none"]
    (ours, theirs), screen = ran(capsys, tmp_path / "out", *flags)
    assert (ours.scheme, theirs.scheme) == ("int8", "none")
    assert "packed kernels" in ours.note and ours.backend in ("cpu", "reference")
    m = ours.metrics
    # Other floats would agree nowhere near this.
    assert m["logit_cosine"] > 0.9 and 0 < m["kl_bits"] < 0.5
    assert m["kl_bits_low"] < m["kl_bits"] < m["kl_bits_high"]
    assert m["top1_agreement_low"] < m["top1_agreement"] < m["top1_agreement_high"]
    gap = m["bits_per_byte"] - theirs.metrics["bits_per_byte"]
    assert m["bits_per_byte_difference"] == pytest.approx(gap, abs=1e-9)
    assert "kl_bits" not in theirs.metrics
    assert "KL from the reference" in screen and "same likeliest token" in screen


@pytest.mark.parametrize(
    "arguments, code, why",
    [
        ("--text=no/such/file", 2, "--text 'no/such/file' cannot be read: No such file"),
        ("--text={short}", 2, "text: expected more than 256 tokens, found 10; shorten --length"),
        ("--text={latin}", 2, "expected UTF-8, found byte 233 at 3"),
        ("--length=0", 2, "--length must be at least 1, found 0"),
        (
            "--config=tiny-bitnet --length=257",
            2,
            "expected at most 256 tokens, tiny-bitnet's context; found 257",
        ),
        ("--config=tiny-bitnt", 2, "tiny-bitnt"),
        ("--config=tiny-bitnet --scheme=ternery", 2, "scheme: expected one of absmean, twn"),
        (
            "--config=tiny-bitnet --reference=stdlib-bitnet",
            2,
            "vocabulary of 259, found 256 in stdlib-bitnet",
        ),
        ("--fake_quant", 2, "stdlib-bitnet comes packed, without the float weights"),
        ("--scheme=twn", 2, "absmean"),
        ("--reference_scheme=none", 2, "--reference_scheme is for a --reference, found none"),
        ("--profile_dir=here", 2, "--profile_dir is for experiments.decode"),
        ("--tokenizer=no/such.json", 2, "--tokenizer"),
    ],
)
def test_refusals_are_one_line(arguments, code, why, tmp_path, capsys):
    (tmp_path / "short").write_bytes(b"too short")
    (tmp_path / "latin").write_bytes("café".encode("latin-1") * 300)
    arguments = arguments.format(short=tmp_path / "short", latin=tmp_path / "latin")
    assert evaluate.main([*arguments.split(" "), f"--output_dir={tmp_path / 'out'}"]) == code
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("error: ") and why in said.err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_vocabulary():
    """As a text of such a tokenizer says of itself; the package is not needed for it."""
    import dataclasses

    from ternax.errors import UsageError

    large = dataclasses.replace(heldout.open_text(), vocab_size=300, tokenizer="some.json")
    with pytest.raises(UsageError, match="at most 259 tokens.*tiny-bitnet; found 300 .some.json"):
        evaluate.run(ternax.load("tiny-bitnet", packed=False), large, length=32)


def test_floats_that_do_not_fit_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(evaluate.measure, "memory_available_bytes", lambda: 10_000)
    assert evaluate.main(["--config=tiny-bitnet"]) == 3
    assert "floats need 0.52 MiB, available 9.77 KiB" in capsys.readouterr().err
