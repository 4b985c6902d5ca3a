"""Names, directories and the box: which weights a source stands for."""

import numpy as np
import pytest

import ternax
from ternax import configs
from ternax.checkpoint import box
from ternax.errors import BadModelFile, UsageError
from tests.checkpoint import stored

NAME = "tiny-bitnet"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A box that holds tiny-bitnet, of weights that seed 0 does not make."""
    return stored.in_a_box(NAME, tmp_path, monkeypatch)


def test_a_name_in_the_box_is_its_trained_model(trained):
    assert stored.bits(ternax.load(NAME)) == stored.bits(trained)
    np.testing.assert_array_equal(
        ternax.load(NAME, layers=2).layers.mlp.down.data.get_value(),
        trained.layers.mlp.down.data.get_value()[:2],
    )
    found = box.find(NAME)
    assert found.boxed and found.origin == "trained weights, from ternax/box/tiny-bitnet"


def test_random_ones_for_who_asks(trained):
    random = stored.bits(ternax.load(configs.get_config(NAME)))
    assert random != stored.bits(trained)
    assert stored.bits(ternax.load(NAME, weights="random")) == random
    assert stored.bits(ternax.load(NAME, weights="random", seed=99)) == stored.bits(trained)
    assert ternax.load(NAME, packed=False, seed=5).embedding.weight[...].dtype == np.float32
    assert box.find(NAME, "random").origin == "random weights"


@pytest.mark.parametrize(
    "asked, why",
    [
        (dict(scheme="twn"), "scheme=twn: .* made with absmean; .* weights=random"),
        (dict(seed=0), "seed=0 is of random weights, .* weights='random'"),
        (dict(head_dtype="bf16"), "head_dtype=bf16"),
        (dict(weights="best"), "weights must be one of auto, random"),
    ],
)
def test_trained_weights_are_what_they_are(trained, asked, why):
    with pytest.raises(UsageError, match=why):
        ternax.load(NAME, **asked)


def test_a_name_outside_the_box_is_random(tmp_path, monkeypatch):
    monkeypatch.setattr(box, "BOX", tmp_path)
    assert box.find(NAME) == box.Source(NAME, configs.get_config(NAME))
    assert box.find("2b4t").name == "bitnet-2b4t"


def test_directories(trained, tmp_path, monkeypatch):
    path = str(tmp_path / "box" / NAME)
    found = box.find(path)
    assert not found.boxed and found.origin == f"weights from {path}"
    assert found.config == configs.get_config(NAME)
    assert box.find(path, "random").directory is None
    monkeypatch.chdir(tmp_path / "box")
    assert box.find(NAME).boxed, "a name comes before a directory"
    assert not box.find(f"./{NAME}").boxed
    with pytest.raises(BadModelFile, match="nothing there"):
        box.find("runs/nowhere")
    with pytest.raises(UsageError, match="no model is named 'tiny-bitnett'; nearest: tiny-bitnet"):
        box.find("tiny-bitnett")


def test_what_is_in_the_box_is_whole():
    """Each loads, and is the model that its name says."""
    for path in sorted(box.BOX.glob("*/")):
        assert ternax.load(path).config == configs.get_config(path.name)


def test_nothing_there_says_what_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModelFile, match="nothing there: .* it would be hf:org/name$"):
        box.find("org/name")
    with pytest.raises(BadModelFile, match="nothing there: .* or a directory of a model$"):
        box.find(str(tmp_path / "none"))
