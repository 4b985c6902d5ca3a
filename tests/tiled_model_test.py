"""A model whose trits a GPU's kernels have put into tiles is still the same model to all else."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

import ternax
from ternax import edit, response, robustness, trit_edits
from ternax.heldout import Windows
from ternax.interop.weights import Weights
from ternax.kernels import target
from ternax.kernels.pallas import tiles
from ternax.nn.linear import PackedLinear
from ternax.noise import make_noise

H200 = target.Target("gpu", "NVIDIA H200", "9.0", 132, present=False)
OLD = jax.__version_info__ < (0, 11, 2)


def linears(model):
    return [node for _, node in nnx.iter_modules(model) if type(node) is PackedLinear]


def tiled():
    """What `fit_kernels` leaves of a model on a GPU."""
    model = ternax.load("tiny-bitnet")
    for node in linears(model):
        found = tiles.repack_stack(node.packed)
        node.data.set_value(found.data)
        node.layout = found.layout
    return model


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.fixture(scope="module")
def plain():
    return ternax.load("tiny-bitnet")


def test_back_in_stored_order_it_is_what_it_was(plain):
    found = edit.stored_order(tiled())
    assert {node.layout for node in linears(found)} == {"canonical"}
    for one, other in zip(leaves(found), leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", ["trit_resample,rate=0.1", "gaussian,sigma=0.1"])
def test_noise_strikes_the_same_weights(plain, spec):
    key, noise = jax.random.key(3), make_noise(spec)
    expected, counts = ternax.perturb(plain, noise, key, copy=True)
    found, found_counts = ternax.perturb(tiled(), noise, key)
    assert found_counts == counts and sum(counts.values())
    for one, other in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_trits_and_files_hold_the_same(plain, tmp_path):
    for name, w in trit_edits.trits(tiled()).items():
        np.testing.assert_array_equal(w, trit_edits.trits(plain)[name])
    name = "layers.1.mlp.up"
    np.testing.assert_array_equal(Weights(tiled()).codes(name)[0], Weights(plain).codes(name)[0])
    ternax.save(tiled(), tmp_path / "saved")
    for one, other in zip(leaves(ternax.load(tmp_path / "saved")), leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_who_moves_trits_shares_no_memory(plain):
    other = trit_edits.shuffled(plain, jax.random.key(0), r"layers\.0\.attn\.o")
    for one, two in zip(linears(plain), linears(other), strict=True):
        assert one.data.get_value() is not two.data.get_value()


@pytest.mark.skipif(OLD, reason="this jax is too old for the kernels")
def test_kernels_get_tiles_once_and_nothing_is_warned_of(plain):
    model = ternax.load("tiny-bitnet")
    with target.compiling_for(H200), warnings.catch_warnings():
        warnings.simplefilter("error")
        held = [node.data.get_value() for node in linears(edit.fit_kernels(model))]
        again = [node.data.get_value() for node in linears(edit.fit_kernels(model))]
    assert {node.layout for node in linears(model)} == {tiles.LAYOUT}
    assert all(one is two for one, two in zip(held, again, strict=True))
    for one, other in zip(leaves(edit.stored_order(model)), leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_those_of_the_stored_bytes(plain):
    """A greedy continuation leaves tiles behind on a GPU, and gradients come after it."""
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9)).astype(np.int32)
    text = Windows(tokens, np.full(2, 8), np.zeros(2, np.int32))
    clean = robustness.look(plain, text)
    expected = response.measure(clean)
    found = response.measure(dataclasses.replace(clean, model=tiled()))
    for name, one in found.weights.items():
        np.testing.assert_array_equal(one.slopes, expected.weights[name].slopes)
