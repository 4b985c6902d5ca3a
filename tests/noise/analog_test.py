"""Analog and read-time noise: sampled moments against the ones that predictions are made with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.noise import make_noise
from ternax.noise.predict import closed_form, plug_in
from ternax.noise.reads import normal

TRITS = np.random.default_rng(0).choice([-1.0, 0, 1], p=[0.3, 0.4, 0.3], size=(300, 400))
KEY = jax.random.key(1)


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian,sigma=0.2",
        "gaussian,sigma=0.2,kind=multiplicative",
        "pcm,size=1.0",
        "pcm,size=2.0,seconds=86400.0",
        "pcm,size=1.0,seconds=86400.0,compensate=False",
        "reram,size=1.0",
        "reram,size=2.0,seconds=172800",
    ],
)
def test_moments_are_what_is_sampled(spec):
    noise = make_noise(spec)
    found, _ = jax.jit(noise)(KEY, jnp.asarray(TRITS, jnp.float32))
    mean, variance = noise.moments(float(np.mean(TRITS != 0)))
    for trit in (-1, 0, 1):
        sample = np.asarray(found)[trit == TRITS].astype(float)
        error = sample.std() / np.sqrt(len(sample))
        assert abs(sample.mean() - mean[trit + 1]) < 5 * error + 1e-4, trit
        assert sample.var() == pytest.approx(variance[trit + 1], rel=0.05, abs=1e-7), trit


def test_published_deviations():
    """A cell at gmax, in uS: 1.05538 of 25 for PCM; 1.103, 2.651 (a day) of 40 for ReRAM."""
    ones = jnp.ones((400, 400))
    assert float(make_noise("reram,size=1.0")(KEY, ones)[0].std() * 40) == pytest.approx(
        np.hypot(1.103, 0.348 * np.sqrt(0.5 - 0.5 / np.pi)), rel=0.02
    )
    variance = make_noise("reram,size=1.0,seconds=86400").moments(1.0)[1][2]
    assert np.sqrt(variance) * 40 == pytest.approx(
        np.hypot(2.651, 0.701 * np.sqrt(0.5 - 0.5 / np.pi)), rel=1e-3
    )


def test_drift_is_compensated():
    value = jnp.asarray(TRITS, jnp.float32)
    drifted, _ = make_noise("pcm,size=1.0,seconds=1e6,compensate=False")(KEY, value)
    assert float(jnp.abs(drifted).sum()) < 0.75 * np.abs(TRITS).sum()
    restored, _ = make_noise("pcm,size=1.0,seconds=1e6")(KEY, value)
    ratio = float((restored * value).sum() / (drifted * value).sum())
    assert ratio > 1.2


def test_gaussian_closed_form():
    for sigma in (0.1, 0.3, 0.5):
        wanted = 1 / np.sqrt(1 + sigma**2 / 0.6)
        for name in ("gaussian", "read_gaussian"):
            assert closed_form(make_noise(f"{name},sigma={sigma}"), 0.6) == pytest.approx(wanted)


def test_normals_are_normal_and_the_tokens_own():
    tokens = jnp.asarray(np.random.default_rng(1).normal(size=(200, 32)), jnp.float32)
    found = np.asarray(normal(jnp.array([1, 2], jnp.uint32), tokens, 500))
    assert abs(found.mean()) < 0.02 and found.std() == pytest.approx(1, abs=0.02)
    assert np.mean(found**4) == pytest.approx(3, abs=0.15)
    assert np.abs(np.corrcoef(found)[~np.eye(200, dtype=bool)]).mean() < 0.06
    again = normal(jnp.array([1, 2], jnp.uint32), tokens[50:60], 500)
    np.testing.assert_allclose(again, found[50:60], rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        "input_gaussian,sigma=0.05",
        "input_clip,cut=0.3",
        "input_grid,step=0.1",
        "read_gaussian,sigma=0.3",
    ],
)
def test_reads_are_predicted(spec):
    noise, x = make_noise(spec), np.random.default_rng(2).normal(size=(64, 300)) ** 2
    clean = x @ TRITS
    unit = np.linalg.norm(x, axis=-1, keepdims=True)
    if noise.domain == "inputs":
        noisy = np.asarray(noise(KEY, jnp.asarray(x, jnp.float32))[0], float) @ TRITS
    else:
        noisy = np.asarray(noise(KEY, jnp.asarray(clean / unit, jnp.float32))[0]) * unit
    cosine = (clean * noisy).sum() / np.linalg.norm(clean) / np.linalg.norm(noisy)
    expected = plug_in(noise, TRITS.astype(np.int8), x)
    assert expected.cosine == pytest.approx(cosine, abs=0.003)
    power = np.square(noisy - clean).sum() / np.square(clean).sum()
    assert expected.error_power == pytest.approx(power, rel=0.1)


def test_bad_options_are_one_line():
    for spec, words in (
        ("reram,size=1.0,seconds=5", "seconds must be one of 1, 86400, 172800"),
        ("gaussian,sigma=1.0,kind=other", "kind must be one of additive, multiplicative"),
    ):
        with pytest.raises(UsageError, match=words):
            make_noise(spec)
