"""experiments.loading: what a round measures, and what is refused."""

import pytest

import ternax
from ternax.experiments import loading
from ternax.record import read_records
from tests.interop import models


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "small-bitnet"
    ternax.save(models.packed(models.BITNET), path, "hf")
    return path


def test_a_record_of_all_rounds(stored, tmp_path, capsys):
    assert loading.main([f"--config={stored}", "--rounds=6", f"--output_dir={tmp_path}"]) == 0
    (record,) = read_records(tmp_path / "results.jsonl")
    m = record.metrics
    assert record.experiment == "loading" and record.phase == "create" and record.layers == 2
    assert len(record.samples) == 6 and min(record.samples) > 0
    assert m["file_bytes"] == sum(file.stat().st_size for file in stored.iterdir())
    assert m["weight_bytes"] == sum(leaf.nbytes for leaf in leaves(ternax.load(stored)))
    assert m["load_read_ratio_low"] <= m["load_read_ratio"] <= m["load_read_ratio_high"]
    reads = [float(word) for word in record.note.rpartition(": ")[2].split(", ")]
    assert len(reads) == 6
    found = sorted(load / read for load, read in zip(record.samples, reads, strict=True))
    # The middle of six is the mean of two; the note has five digits.
    assert m["load_read_ratio"] == pytest.approx((found[2] + found[3]) / 2, rel=1e-3)
    assert "times one read of the files" in " ".join(capsys.readouterr().out.split())


def leaves(model):
    import jax

    return jax.tree.leaves(model)


def test_what_is_not_stored_is_refused(capsys):
    assert loading.main([]) == 2
    assert loading.main(["--config=8b"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("error: --config must") for line in said)
