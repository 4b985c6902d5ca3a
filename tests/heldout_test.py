"""The committed held-out text, and texts as sequences with their bytes and files."""

import hashlib
import importlib.util
import json
import pathlib
import platform

import numpy as np
import pytest

from ternax import data, heldout
from ternax.errors import UsageError

BOX = heldout.PATH.parent
ABOUT = json.loads((BOX / "heldout.json").read_text())
TEXT = heldout.PATH.read_bytes()


# --- The committed text ----------------------------------------------------------------------


def test_the_text_is_the_one_named():
    assert hashlib.sha256(TEXT).hexdigest() == heldout.SHA256 == ABOUT["sha256"]
    assert [len(piece) for piece in TEXT.split(b"\0")] == [size for _, size in ABOUT["files"]]
    assert 150_000 < len(TEXT) <= 200_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (BOX / "LICENSE-PSF.txt").read_text()


def test_every_name_is_held_out_by_the_rule_of_data():
    names = [name for name, _ in ABOUT["files"]]
    # "argparse.py" is a name of the other side; without one, a file would have to change sides.
    assert data._held_out([*names, "argparse.py"]) == frozenset(names)


def test_no_window_of_it_is_in_this_pythons_training_files():
    files = list(data._files(data.STDLIB))
    held_out = data._held_out([name for name, _ in files])
    training = b"\0".join(text for name, text in files if name not in held_out)
    assert training[5000:5200] in training and len(training) > 5e6
    starts = np.random.default_rng(0).integers(0, len(TEXT) - 200, 300)
    windows = [TEXT[start : start + 200] for start in starts.tolist()]
    assert [w for w in windows if w in training] == []


def test_the_maker_makes_these_bytes():
    if platform.python_version() != ABOUT["python"]:
        pytest.skip(f"made by Python {ABOUT['python']}, whose library this one's is not")
    path = pathlib.Path(__file__).parent / "goldens" / "make_heldout.py"
    spec = importlib.util.spec_from_file_location("make_heldout", path)
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    files = maker.chosen()
    assert [[name, len(text)] for name, text in files] == ABOUT["files"]
    assert b"\0".join(text for _, text in files) == TEXT


# --- As tokens -------------------------------------------------------------------------------


def test_bytes_are_tokens_and_files_end():
    text = heldout.open_text()
    assert bytes(text.tokens.astype(np.uint8)) == TEXT + b"\0"
    assert (text.num_bytes == 1).all() and text.vocab_size == 256
    last = np.append(np.diff(text.files), 1) == 1
    assert np.array_equal(text.tokens == data.END, last)
    assert text.files[-1] + 1 == len(ABOUT["files"])


def test_windows_score_every_target_once(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"abcdef\0\0ghij\0klmnopq")
    text = heldout.open_text(str(path))
    cut = heldout.windows(text, 4)
    assert cut.tokens.shape == (4, 5) and cut.tokens.dtype == np.int32
    assert bytes(cut.tokens[:, 1:].astype(np.uint8).ravel()) == b"bcdef\0ghij\0klmno"
    assert cut.num_bytes.tolist() == [4, 4, 4, 4]
    assert cut.files.tolist() == [0, 0, 1, 2]  # of the first target: b, f, j, m


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of few merges, so that letters of several bytes fall apart."""
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.ByteLevelBPETokenizer()
    found.train_from_iterator(["the cat sat on the mat " * 20], vocab_size=280, min_frequency=2)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    found.save(str(path))
    return path


def test_a_tokenizers_bytes_sum_to_the_texts(tokenizer, tmp_path):
    pieces = ["the cat — mat €€", "  the œuf\n", "on"]
    path = tmp_path / "text"
    path.write_bytes("\0".join(pieces).encode())
    text = heldout.open_text(str(path), tokenizer=str(tokenizer))
    for i, piece in enumerate(pieces):
        assert text.num_bytes[text.files == i].sum() == len(piece.encode()) + 1
    assert text.num_bytes.min() >= 0 and len(text.tokens) < sum(len(p.encode()) + 1 for p in pieces)
    assert text.vocab_size > text.tokens.max() and str(tokenizer) in text.tokenizer
    scored = 4 * ((len(text.tokens) - 1) // 4)
    assert heldout.windows(text, 4).num_bytes.sum() == text.num_bytes[1 : 1 + scored].sum()


@pytest.mark.parametrize(
    "content, why",
    [
        (None, "cannot be read: No such file"),
        (b"", "expected a text, found an empty file"),
        (b"\0\0", "expected a text, found an empty file"),
        (b"ab\xff", "expected UTF-8, found byte 255 at 2"),
    ],
)
def test_texts_that_are_none(tmp_path, content, why):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=why):
        heldout.open_text(str(path))


def test_a_folder_and_a_short_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        heldout.open_text(str(tmp_path))
    (tmp_path / "text").write_bytes(b"abc")
    with pytest.raises(UsageError, match="more than 256 tokens, found 4; shorten --length"):
        heldout.windows(heldout.open_text(str(tmp_path / "text")), 256)
