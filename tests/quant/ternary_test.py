"""The ternary schemes against closed forms, brute force and their papers' formulas."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.quant import make_scheme

# A million samples: sampling error of the figures below is under 0.001.
SIDE = 1000


@functools.cache
def samples(distribution: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    draw = {
        "gaussian": rng.normal,
        "laplace": rng.laplace,
        "uniform": functools.partial(rng.uniform, -1),
    }
    return draw[distribution](size=(SIDE, SIDE)).astype(np.float32)


@functools.cache
def quantized(scheme: str, distribution: str):
    """(codes, scale, cosine to the weight) of a whole matrix under one scale."""
    w = samples(distribution)
    found = jax.jit(make_scheme(f"{scheme},granularity=tensor", w.shape).quantize)(w)
    codes = np.asarray(found.codes[0], np.float64)
    return codes, float(found.scale[0, 0, 0]), cosine(codes, w)


def cosine(a, b):
    return float(
        (a * b).sum() / np.sqrt((a.astype(float) ** 2).sum() * (b.astype(float) ** 2).sum())
    )


# With every |w| over t E|w| kept: cosine = E[|w|; kept] / sqrt(P(kept) E[w^2]).


def gaussian_cosine(t):
    edge = t * math.sqrt(2 / math.pi)
    return math.sqrt(2 / math.pi) * math.exp(-(edge**2) / 2) / math.sqrt(gaussian_kept(t))


def gaussian_kept(t):
    return math.erfc(t / math.sqrt(math.pi))


def laplace_cosine(t):
    return (t + 1) * math.exp(-t / 2) / math.sqrt(2)


@pytest.mark.parametrize(
    "scheme, distribution, closed_form, known",
    [
        ("absmean", "gaussian", gaussian_cosine(0.5), 0.887),
        ("twn", "gaussian", gaussian_cosine(0.7), 0.899),
        ("optimal", "gaussian", gaussian_cosine(0.7665), 0.8996),
        ("sign", "gaussian", gaussian_cosine(0), 0.798),
        ("absmean", "laplace", laplace_cosine(0.5), 0.826),
        ("twn", "laplace", laplace_cosine(0.7), 0.847),
        ("optimal", "laplace", laplace_cosine(1), 0.858),
    ],
)
def test_cosine_of_a_known_distribution(scheme, distribution, closed_form, known):
    assert closed_form == pytest.approx(known, abs=0.0005)
    assert quantized(scheme, distribution)[2] == pytest.approx(closed_form, abs=0.001)


@pytest.mark.parametrize("scheme, t, known", [("absmean", 0.5, 0.31), ("twn", 0.7, 0.423)])
def test_zeros_of_a_gaussian(scheme, t, known):
    assert 1 - gaussian_kept(t) == pytest.approx(known, abs=0.001)
    zeros = np.mean(quantized(scheme, "gaussian")[0] == 0)
    assert zeros == pytest.approx(1 - gaussian_kept(t), abs=0.0015)


def test_scales_of_a_gaussian():
    mean = np.abs(samples("gaussian")).mean(dtype=np.float64)
    assert quantized("absmean", "gaussian")[1] == pytest.approx(mean, rel=1e-5)
    assert quantized("sign", "gaussian")[1] == pytest.approx(mean, rel=1e-5)
    # Mean of |w| above 0.7 of its mean, in units of that mean.
    assert quantized("twn", "gaussian")[1] == pytest.approx(1.483 * mean, rel=2e-3)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "uniform"])
def test_no_threshold_beats_the_optimum(distribution):
    w = samples(distribution)
    magnitude = np.sort(np.abs(w).ravel())[::-1].astype(np.float64)
    # Cosine of keeping the k largest: (sum of them) / sqrt(k), over the norm of w.
    gain = np.cumsum(magnitude) / np.sqrt(np.arange(1, magnitude.size + 1))
    best = gain.max() / np.linalg.norm(magnitude)
    assert quantized("optimal", distribution)[2] == pytest.approx(best, rel=1e-6)
    for other in ("absmean", "twn", "sign"):
        assert quantized(other, distribution)[2] < quantized("optimal", distribution)[2]


def brute_force(w):
    """Least error of any a T, over every T of the k largest |w| and its best a."""
    order = np.sort(np.abs(w).ravel())[::-1].astype(np.float64)
    return min(
        (w.astype(float) ** 2).sum() - order[:k].sum() ** 2 / k for k in range(1, w.size + 1)
    )


def error(w, found):
    return float(((np.asarray(w, float) - np.asarray(found.dequantize(), float)) ** 2).sum())


def test_optimum_is_that_of_all_ternary_matrices():
    # Truly all 3^6 of them: that the k largest are to be kept is itself part of the claim.
    optimal = make_scheme("optimal", (3, 2))
    for seed in range(20):
        w = np.random.default_rng(seed).normal(size=(3, 2)).astype(np.float32)
        best = float((w.astype(float) ** 2).sum())
        for trits in itertools.product((-1, 0, 1), repeat=6):
            t = np.reshape(trits, (3, 2))
            if t.any():
                best = min(best, (w.astype(float) ** 2).sum() - (w * t).sum() ** 2 / (t * t).sum())
        found = error(w, optimal.quantize(w))
        assert found == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert best == pytest.approx(brute_force(w), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "values",
    [[1, 1, 1, 1], [1, 1, -1, 0], [5, 1, 1, 1], [3, 3, 1, -1], [0, 0, 0, -2], [4, 2, 2, 2]],
)
def test_optimum_keeps_all_or_none_of_equal_weights(values):
    w = np.array(values, np.float32).reshape(4, 1)
    found = make_scheme("optimal", (4, 1)).quantize(w)
    assert error(w, found) == pytest.approx(brute_force(w), abs=1e-5)


def test_optimum_is_found_per_block():
    w = np.random.default_rng(3).standard_t(3, (48, 5)).astype(np.float32)
    by_row = make_scheme("optimal,granularity=row", w.shape).quantize(w)
    assert error(w, by_row) == pytest.approx(sum(brute_force(w[:, n]) for n in range(5)), rel=1e-5)
    grouped = make_scheme("optimal,granularity=group,group_size=16", w.shape).quantize(w)
    cuts = itertools.product(range(0, 48, 16), range(5))
    best = sum(brute_force(w[k : k + 16, n]) for k, n in cuts)
    assert error(w, grouped) == pytest.approx(best, rel=1e-5)


# --- The formulas, written again in numpy ------------------------------------------------


def blocks(w, granularity):
    """Views of w, each under one scale: [(index, values)]."""
    if granularity == "tensor":
        return [np.s_[:, :]]
    if granularity == "row":
        return [np.s_[:, n] for n in range(w.shape[1])]
    return [np.s_[k : k + 16, n] for k in range(0, w.shape[0], 16) for n in range(w.shape[1])]


def absmean(w):
    gamma = np.abs(w).mean()
    return np.clip(np.rint(w / gamma), -1, 1) * gamma


def twn(w):
    kept = np.abs(w) > 0.7 * np.abs(w).mean()
    return np.sign(w) * kept * np.abs(w)[kept].mean()


def sign(w):
    return np.where(w >= w.mean(), 1, -1) * np.abs(w).mean()


def absmax(high, w):
    scale = np.abs(w).max() / high
    return np.rint(w / scale) * scale


FORMULAS = {
    "absmean": absmean,
    "twn": twn,
    "sign": sign,
    "int8": functools.partial(absmax, 127),
    "int4": functools.partial(absmax, 7),
}


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("name", FORMULAS)
def test_schemes_are_their_formula(name, granularity):
    w = np.random.default_rng(4).normal(0.1, 1, (48, 5)).astype(np.float32)
    option = "group,group_size=16" if granularity == "group" else granularity
    found = make_scheme(f"{name},granularity={option}", w.shape).quantize(jnp.asarray(w))
    expected = np.empty(w.shape)
    for index in blocks(w, granularity):
        expected[index] = FORMULAS[name](w[index].astype(np.float64))
    np.testing.assert_allclose(found.dequantize(), expected, rtol=1e-5, atol=1e-6)


def test_absmean_rounds_half_to_even():
    # mean |w| = 1: 0.5 and 2.5 lie on the grid's edges, and go to 0 and, clipped, to 1.
    w = jnp.array([[0.5, -0.5, 2.5, 0.5], [-1.0, 1.0, 1.0, 1.0]])
    found = make_scheme("absmean", (2, 4)).quantize(w)
    assert float(found.scale[0, 0, 0]) == 1.0
    assert found.codes[0].tolist() == [[0, 0, 1, 0], [-1, 1, 1, 1]]


def test_int4_groups_fit_the_matrix():
    # 128 where it divides K, else the largest of 64, 32, 16 that does, else one scale a row.
    for k_size, groups in ((256, 2), (192, 3), (96, 3), (48, 3), (20, 1)):
        w = jnp.ones((k_size, 2))
        assert make_scheme("int4", (k_size, 2)).quantize(w).scale.shape == (1, groups, 2)
