"""Predicted cosines against products that were struck, and against formulas derived by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ternax
from ternax.edit import packed_parts
from ternax.kernels.packing import Packed, pack, unpack_numpy
from ternax.noise import make_noise
from ternax.noise.model import apply
from ternax.noise.predict import closed_form, plug_in

RATES = (0.01, 0.05, 0.1, 0.2, 0.3)
SPECS = (
    "sign_flip",
    "trit_other",
    "trit_resample",
    "trit_resample,density=uniform",
    "stuck",
    "stuck,at=1",
    "stuck,at=-1",
    "stuck,unit=column",
    "sign_flip,unit=block",
)
STORED = ("bitflip", "bitflip,policy=saturate", "bitflip,storage=tq1_0", "byte_fault")


@pytest.mark.parametrize("rate", RATES)
def test_closed_forms(rate):
    s, p = 0.6, rate
    by_hand = {
        "sign_flip": 1 - 2 * p,
        "trit_resample": 1 - p,
        "trit_resample,density=uniform": (1 - p) / math.sqrt(1 - p + 2 * p / (3 * s)),
        "stuck": math.sqrt(1 - p),
        "trit_other": s * (1 - 1.5 * p) / math.sqrt(s * (s * (1 - p / 2) + (1 - s) * p)),
    }
    for spec, wanted in by_hand.items():
        assert closed_form(make_noise(f"{spec},rate={p}"), s) == pytest.approx(wanted), spec


def test_tables_are_distributions_and_rate_zero_predicts_one():
    for spec in SPECS:
        table = make_noise(f"{spec},rate=0.3").transition(0.6)
        assert table.min() >= 0
        np.testing.assert_allclose(table.sum(axis=1), 1)
        assert closed_form(make_noise(f"{spec},rate=0"), 0.6) == pytest.approx(1)


def box_layer():
    """int8 [K, N] codes of the last down projection of the model in the box."""
    model = ternax.load("stdlib-bitnet")
    linear = dict(packed_parts(model))["layers.*.mlp.down"]
    packed = linear.packed
    return unpack_numpy(np.asarray(packed.data[-1, 0]), packed.format, packed.shape[0])


@pytest.fixture(scope="module")
def layer():
    codes = box_layer()
    gate, up = np.random.default_rng(1).standard_normal((2, 64, codes.shape[0]))
    return codes, {"symmetric": up, "relu2": np.square(np.maximum(gate, 0))}


@pytest.mark.parametrize("inputs", ["symmetric", "relu2"])
@pytest.mark.parametrize("spec", STORED)
def test_plug_in_of_bits_holds_on_trained_weights(layer, spec, inputs):
    codes, rows = layer
    x, rate = rows[inputs], 0.03
    clean = x @ codes.astype(float)
    packed = Packed(pack(jnp.asarray(codes), "trit2"), jnp.ones((1, 1)), shape=codes.shape)
    noise = make_noise(f"{spec},rate={rate}")
    draws = []
    for seed in range(4):
        noisy = apply(noise.with_strength(0.0), jax.random.key(seed), packed, rate)[0]
        noisy = x @ unpack_numpy(np.asarray(noisy.data), "trit2", len(codes)).astype(float)
        draws.append((clean * noisy).sum() / np.linalg.norm(clean) / np.linalg.norm(noisy))
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(plug_in(noise, codes, x).cosine - np.mean(draws)) < 0.005 + 3 * error


@pytest.mark.parametrize("inputs", ["symmetric", "relu2"])
@pytest.mark.parametrize("spec", SPECS)
def test_plug_in_holds_on_trained_weights(layer, spec, inputs):
    codes, rows = layer
    x = rows[inputs]
    clean = x @ codes.astype(float)
    for rate in RATES[::2]:
        noise = make_noise(f"{spec},rate={rate}")
        draws = []
        for seed in range(4):
            noisy = apply(noise.with_strength(0.0), jax.random.key(seed), codes, rate)[0]
            noisy = x @ np.asarray(noisy).astype(float)
            draws.append((clean * noisy).sum() / np.linalg.norm(clean) / np.linalg.norm(noisy))
        # The prediction is of the mean; one draw of 256 x 256 trits spreads by up to 0.015.
        error = np.std(draws, ddof=1) / math.sqrt(len(draws))
        assert abs(plug_in(noise, codes, x).cosine - np.mean(draws)) < 0.005 + 3 * error, rate


def test_closed_form_fails_where_inputs_have_a_mean(layer):
    codes, rows = layer
    noise = make_noise("stuck,rate=0.1,at=1")
    form = closed_form(noise, float(np.mean(codes != 0)))
    assert abs(form - plug_in(noise, codes, rows["relu2"]).cosine) > 0.02


def test_no_power_and_no_density():
    noise = make_noise("stuck,rate=1")
    assert plug_in(noise, np.ones((4, 2), np.int8), np.ones((1, 4))).cosine == 0
    assert closed_form(noise, 0.5) == 0
    with pytest.raises(ValueError, match="found 0"):
        closed_form(noise, 0)
