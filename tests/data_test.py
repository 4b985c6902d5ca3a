"""A corpus: split by name, deduplicated, batches that depend on (seed, step) alone."""

import hashlib

import numpy as np
import pytest

from ternax import data
from ternax.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    """Forty small files, two of them equal, one not UTF-8, one empty, one with a zero byte."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"file{i:02}.txt").write_text(f"This is file {i}. " * 20)
    (text / "same.txt").write_text("This is file 7. " * 20)
    (text / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (text / "empty.txt").write_bytes(b"")
    (text / "binary.txt").write_bytes(b"a\0b")
    return text


def corpus_of(folder, tmp_path, **options):
    return data.open_corpus(str(folder), cache_dir=str(tmp_path / "cache"), **options)


def test_files_are_split_once_each(folder, tmp_path):
    corpus = corpus_of(folder, tmp_path)
    names = corpus.train.names + corpus.held_out.names
    assert sorted(names) == sorted(set(names))
    assert set(names) == {f"file{i:02}.txt" for i in range(40)}  # same.txt repeats file07
    assert corpus.held_out.names
    for part in (corpus.train, corpus.held_out):
        expected = b"".join((folder / name).read_bytes() + b"\0" for name in part.names)
        assert bytes(np.asarray(part.tokens, np.uint8)) == expected
        assert part.num_bytes == len(expected) - len(part.names)


def test_a_files_side_depends_on_its_name_alone(folder, tmp_path):
    before = corpus_of(folder, tmp_path)
    (folder / "zzz.txt").write_text("something new")
    after = corpus_of(folder, tmp_path)
    assert set(before.held_out.names) <= set(after.held_out.names)
    assert set(before.train.names) <= set(after.train.names)
    assert before.sha256 != after.sha256


def test_the_split_is_the_documented_hash(folder, tmp_path):
    corpus = corpus_of(folder, tmp_path)
    limit = 2**256 * data.HELD_OUT_PER_MILLE // 1000
    for name in corpus.train.names:
        assert int(hashlib.sha256(name.encode()).hexdigest(), 16) >= limit


def test_the_cache_is_read_again(folder, tmp_path):
    first, second = corpus_of(folder, tmp_path), corpus_of(folder, tmp_path)
    assert isinstance(second.train.tokens, np.memmap)
    assert first.sha256 == second.sha256 and len(list((tmp_path / "cache").iterdir())) == 1


def part_of(length):
    return data.Part((), np.arange(length) % 251, length)


def test_batches_are_a_function_of_seed_and_step():
    part = part_of(5000)
    one = data.batch(part, 7, batch=4, length=32, seed=3)
    data.batch(part, 900, batch=4, length=32, seed=5)  # another epoch, another seed
    np.testing.assert_array_equal(one, data.batch(part, 7, batch=4, length=32, seed=3))
    assert (one != data.batch(part, 7, batch=4, length=32, seed=4)).any()
    assert one.shape == (4, 33) and one.dtype == np.int32


def test_an_epoch_sees_every_window_once():
    part = data.Part((), np.arange(1000), 1000)
    windows = (1000 - 1 - 31) // 32
    rows = data.batch(part, 0, batch=2 * windows, length=32, seed=0)
    for epoch in (rows[:windows], rows[windows:]):
        starts = np.sort(epoch[:, 0])
        assert (np.diff(starts) == 32).all() and starts[-1] + 33 <= 1000
        np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(33))
    assert (rows[:windows] != rows[windows:]).any()


def test_batches_split_as_one_would():
    part = part_of(5000)
    whole = data.batch(part, 1, batch=8, length=16, seed=0)
    halves = [data.batch(part, step, batch=4, length=16, seed=0) for step in (2, 3)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))


def test_sequences_score_each_target_once():
    tokens = np.arange(100, dtype=np.uint8)
    found = data.sequences(tokens, 10)
    assert found.shape == (9, 11)
    np.testing.assert_array_equal(found[:, 1:].ravel(), np.arange(1, 91))


def test_the_standard_library_has_no_tests_in_it():
    corpus = data.open_corpus()
    names = corpus.train.names + corpus.held_out.names
    assert "argparse.py" in names and len(names) > 300
    assert not [name for name in names if {"test", "tests", "encodings"} & {*name.split("/")}]
    assert corpus.train.num_bytes > 5e6


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "found neither"),
        (lambda path: path.mkdir(), "found none"),
        (lambda path: path.write_bytes(b""), "found none"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "found none"),
    ],
)
def test_text_that_is_none(tmp_path, make, words):
    path = tmp_path / "text"
    make(path)
    with pytest.raises(UsageError, match=words):
        corpus_of(path, tmp_path)


def test_text_shorter_than_a_sequence():
    with pytest.raises(UsageError, match="at least 128 tokens"):
        data.batch(part_of(100), 0, batch=1, length=64, seed=0)
    with pytest.raises(UsageError, match="more than 64"):
        data.sequences(np.zeros(64, np.uint8), 64)


def test_a_tokenizer_that_is_none(folder, tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        corpus_of(folder, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="cannot be read"):
        corpus_of(folder, tmp_path, tokenizer=str(tmp_path / "nothing.json"))
