"""Axes and grids: what they take, and that a sweep goes on where it stopped."""

import dataclasses

import pytest

from ternax import comparison, sweep
from ternax.configs import get_config
from ternax.errors import Interrupted, PeerFailed, UsageError
from ternax.record import Store
from ternax.sweep import Axis, Sweep, parse_axis

TINY = get_config("tiny-bitnet")
SMALL = ("--config=tiny-bitnet", "--prompt_length=4")


def test_axes_and_their_defaults():
    assert parse_axis("layers", get_config("70b")) == Axis("layers", ("4", "8", "10", "80"))
    assert parse_axis("layers", TINY).values == ("1", "2", "3")
    assert parse_axis("layers:8,2,all", get_config("8b")).values == ("2", "8", "32")
    assert parse_axis("batch", TINY).values == ("1", "4", "16", "64")
    assert parse_axis("size:tiny-llama,tiny-bitnet", TINY).values == ("tiny-llama", "tiny-bitnet")


@pytest.mark.parametrize(
    "text, says",
    [
        ("depth", "must be one of layers, size"),
        ("layers:1,4", "numbers from 1 to 3 behind commas"),
        ("layers:0,2", "numbers from 1 to 3"),
        ("layers:2,²", "numbers from 1 to 3"),
        ("batch:", "numbers from 1 up"),
        ("batch:4,4", "needs two different values at least"),
        ("context:8,99999", "numbers from 1 to 256"),
        ("size:1b,71b", "no model is named '71b'"),
    ],
)
def test_what_is_no_axis(text, says):
    with pytest.raises(UsageError, match=says):
        parse_axis(text, TINY)


@pytest.mark.parametrize(
    "names, words, says",
    [
        ((), (), "once or twice"),
        (("batch", "layers", "threads"), (), "once or twice"),
        (("context", "prompt"), (), "not twice for one thing"),
        (("size", "layers"), (), "different depths"),
        (("batch",), ("--batch=2",), "--batch=2 sets what --axis=batch varies"),
    ],
)
def test_what_is_no_sweep(names, words, says):
    with pytest.raises(UsageError, match=says):
        Sweep(tuple(Axis(name, ("1", "2")) for name in names), words)


def test_the_words_of_a_point():
    study = Sweep((Axis("batch", ("1", "2")), Axis("context", ("32", "64"))), SMALL[:1], 4)
    assert study.points[1] == (("batch", "1"), ("context", "64"))
    assert study.decode_words(study.points[1]) == [
        "--config=tiny-bitnet",
        "--num_tokens=6",
        "--batch=1",
        "--prompt_length=58",
    ]
    with pytest.raises(UsageError, match="more than 6, found 5"):
        study.decode_words((("context", "5"),))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two batches that run and one that no memory holds."""
    study = Sweep((Axis("batch", ("1", "2", "900000000")),), SMALL, num_tokens=2, rounds=1)
    store, said = Store(tmp_path_factory.mktemp("sweep") / "out"), []
    return study, store, sweep.run(study, store, said.append), said


def test_what_does_not_fit_says_why_and_the_sweep_goes_on(ran):
    _, store, records, said = ran
    one, two, large = records
    assert store.records == [one, two, large]
    for record, batch in ((one, 1), (two, 2)):
        assert sweep.is_measured(record) and record.batch == batch and record.samples
        m = record.metrics
        assert m["prompt_tokens"] == 4 and m["ttft_ms"] > 0
        assert m["planned_memory_bytes"] > 0 and m["tokens_per_s"] > 0
    assert (large.phase, large.kind) == ("plan", "predicted")
    assert large.note.startswith("batch 900000000; tiny-bitnet does not fit: it needs")
    assert large.metrics["planned_memory_bytes"] > large.metrics["available_memory_bytes"]
    assert "does not fit" in said[-1]


def test_an_interrupted_sweep_repeats_and_loses_nothing(ran, monkeypatch):
    study, store, _, _ = ran
    lines = store.path.read_bytes().splitlines(keepends=True)
    asked = []

    def none_left(words, timeout_s=None):
        asked.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "decode_apart", none_left)
    # Whole: nothing runs at all.
    assert len(sweep.run(study, Store(store.directory), lambda line: None)) == 3
    assert asked == []
    # With a point missing and half a line behind: that point alone is asked for.
    store.path.write_bytes(lines[0] + lines[2] + lines[1][:50])
    with pytest.raises(Interrupted, match="at batch 2, round 1; 1 measurements are kept"):
        sweep.run(study, Store(store.directory), lambda line: None)
    assert [words[-1] for words in asked] == ["--batch=2"]
    assert store.path.read_bytes() == lines[0] + lines[2]
    # More rounds are the same sweep; other settings are another.
    with pytest.raises(Interrupted):
        sweep.run(dataclasses.replace(study, rounds=2), Store(store.directory), lambda line: None)
    other = dataclasses.replace(study, num_tokens=3)
    with pytest.raises(UsageError, match="holds another sweep .* choose another --output_dir"):
        sweep.run(other, Store(store.directory), lambda line: None)


def test_a_point_that_failed_is_marked_and_tried_again(tmp_path, monkeypatch):
    study = Sweep((Axis("batch", ("1", "2")),), SMALL, num_tokens=2, rounds=1)

    def killed(words, timeout_s=None):
        raise PeerFailed("our decode was ended by SIGKILL")

    monkeypatch.setattr(comparison, "decode_apart", killed)
    found = sweep.run(study, Store(tmp_path), lambda line: None)
    assert len(found) == 2 and not any(map(sweep.is_measured, found))
    assert all(r.incomplete and "failed: our decode was ended" in r.note for r in found)

    def interrupted(words, timeout_s=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "decode_apart", interrupted)
    with pytest.raises(Interrupted, match="at batch 1, round 1; 0 measurements are kept"):
        sweep.run(study, Store(tmp_path), lambda line: None)
