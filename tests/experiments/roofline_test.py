"""`experiments.roofline` as a user runs it."""

import pathlib
import re

import pytest

from ternax import page
from ternax.experiments import roofline
from ternax.record import read_records

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_what_is_printed_is_what_is_kept(tmp_path, capsys):
    flags = ["--config=8b", "--device=l40s", "--batch=8", "--efficiency=0.5", "--devices=2"]
    assert roofline.main([*flags, f"--output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    records = read_records(tmp_path / "results.jsonl")
    assert {(r.kind, r.experiment, r.phase) for r in records} == {
        ("predicted", "roofline", "decode")
    }
    first = records[0]
    m = first.metrics
    assert (first.note, first.device, first.scheme) == ("as set", "2 x l40s", "trit2")
    printed = float(re.search(r"rate +([\d,.]+) tokens/s", out)[1].replace(",", ""))
    assert printed == pytest.approx(m["tokens_per_s"], rel=5e-3)
    # The step's equation can be done again from what is printed.
    gb, gb_per_s, extra = (
        float(x)
        for x in re.search(
            r"max\(([\d.]+) GB / ([\d.]+) GB/s.*all-reduces ([\d.]+) ms", out, re.S
        ).groups()
    )
    assert 8 / (gb / gb_per_s + extra / 1e3) == pytest.approx(m["tokens_per_s"], rel=5e-3)
    assert m["tokens_per_s"] == pytest.approx(m["share_of_bound"] * m["bound_tokens_per_s"])
    levers = {r.note.partition(":")[0] for r in records}
    assert levers == {"as set", "quantization", "active", "device", "batch", "speculation"}
    rows = [
        line for line in out.splitlines() if re.match(r"  (quant|active|device|batch|spec)", line)
    ]
    assert len(rows) == len(records) - 1


def test_the_page(tmp_path, capsys):
    target = tmp_path / "mine.html"
    flags = ["--config=8b", "--batch=4", f"--page={target}", f"--output_dir={tmp_path / 'o'}"]
    assert roofline.main(flags) == 0
    assert f"page     {target}" in capsys.readouterr().out
    assert target.read_text() == page.build(model="8b", batch=4, efficiency=1.0)
    assert roofline.main(["--config=tiny-llama", "--context=64", *flags[1:]]) == 2
    assert "the page's model must be one of" in capsys.readouterr().err


def test_the_page_in_docs_is_this_one():
    """After a change: python -m experiments.roofline --page=docs/roofline.html"""
    assert (ROOT / "docs" / "roofline.html").read_text() == page.build(efficiency=1.0)


def test_the_plot_names_the_records_behind_each_point(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert roofline.main([f"--output_dir={tmp_path}"]) == 0
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    assert "roofline.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--device=h1000"], "no device is named 'h1000'; nearest: h100"),
        (["--config=71b"], "no model is named '71b'"),
        (["--config=2b4t", "--context=5000"], "at most 4096, what bitnet-2b4t was made for"),
        (["--weights=int3"], "no format is named 'int3'"),
        (["--efficiency=1.5"], "efficiency must be above 0 and at most 1, found 1.5"),
        (["--device=m1-pro", "--devices=2"], "m1-pro has no link to another"),
    ],
)
def test_mistakes_are_one_line(flags, says, tmp_path, capsys):
    assert roofline.main([*flags, f"--output_dir={tmp_path / 'none'}"]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "none").exists()
