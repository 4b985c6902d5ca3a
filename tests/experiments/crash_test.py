"""experiments.crash: a real run, killed and resumed."""

import pytest

from ternax.experiments import crash
from ternax.record import read_records


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 40)
    return folder


def test_a_killed_run_is_told_to_end_as_the_other(corpus, tmp_path, capsys):
    words = ["--times=1", "--steps=20", "--batch=2", "--length=16", "--save_every=3"]
    code = crash.main([*words, f"--corpus={corpus}", f"--output_dir={tmp_path / 'out'}"])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "1 of 1 runs ended as the one that was not killed" in said.out
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    assert record.metrics == {"steps": 20, "kills": 1, "identical_count": 1}
    assert 0 <= record.samples[0] <= 20


def test_a_killed_run_goes_on_on_another_mesh(corpus, tmp_path, capsys):
    words = ["--times=1", "--steps=12", "--batch=2", "--length=16", "--save_every=3"]
    words += ["--meshes=data:1;data:2", f"--corpus={corpus}", f"--output_dir={tmp_path / 'out'}"]
    code = crash.main(words)
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "1 of 1 runs went on on another mesh" in said.out
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    m = record.metrics
    assert (m["steps"], m["kills"], m["within_noise_count"]) == (12, 1, 1)
    assert "data:1 to data:2 at " in record.note and 0 <= record.samples[0] <= 12


@pytest.mark.parametrize(
    "meshes, why",
    [
        ("data:2", "two or more that differ"),
        ("data:1;fsdp:1", "two or more that differ"),
        ("data:1;model:2", "expected sizes of data, fsdp"),
    ],
)
def test_what_is_nothing_to_change_to(meshes, why, capsys):
    assert crash.main([f"--meshes={meshes}"]) == 2
    assert why in capsys.readouterr().err
