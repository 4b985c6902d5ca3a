"""Schemes that read X^T X, and trit-planes, against their definitions in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.quant import make_scheme
from ternax.quant.fit import fit_scales
from ternax.quant.gptq import gptq_codes
from ternax.quant.trit_planes import improve
from ternax.quantized import Quantized

GROUP = "group,group_size=16"
GRANULARITIES = ("tensor", "row", GROUP)


def weights(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(k_size, seed=0, tokens=None):
    """Tokens whose entries are correlated and of unequal size, as a model's are: [tokens, K]."""
    rng = np.random.default_rng(seed + 100)
    mix = rng.normal(size=(k_size, k_size)) * np.exp(rng.normal(size=k_size))
    return rng.normal(size=(tokens or 4 * k_size, k_size)) @ mix / k_size


def gram(x):
    return jnp.asarray(x.T @ x, jnp.float32)


# --- Scales --------------------------------------------------------------------------------


def lstsq_scales(codes, w, x, granularity):
    """The least-squares scales of one plane, by numpy on the outputs themselves: [G, 1 or N]."""
    groups = 3 if granularity == GROUP else 1
    size = len(w) // groups
    design = np.stack(
        [
            x[:, g * size : (g + 1) * size] @ codes[g * size : (g + 1) * size].astype(float)
            for g in range(groups)
        ]
    )  # [G, tokens, N]
    target = x @ w.astype(float)
    if granularity == "tensor":
        found, *_ = np.linalg.lstsq(design.reshape(1, -1).T, target.ravel(), rcond=None)
        return found[:, None]
    columns = [
        np.linalg.lstsq(design[:, :, n].T, target[:, n], rcond=None)[0] for n in range(w.shape[1])
    ]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_ls_scales_are_those_of_lstsq(granularity):
    w, x = weights((48, 5)), inputs(48)
    scheme = make_scheme(f"ls,granularity={granularity}", w.shape)
    plain, calibrated = scheme.quantize(w), scheme.quantize(w, gram(x))
    np.testing.assert_array_equal(plain.codes, calibrated.codes)
    absmean = make_scheme(f"absmean,granularity={granularity}", w.shape).quantize(w)
    np.testing.assert_array_equal(plain.codes, absmean.codes)
    codes = np.asarray(plain.codes[0])
    expected = lstsq_scales(codes, w, np.eye(48), granularity)
    np.testing.assert_allclose(plain.scale[0], expected, rtol=1e-5)
    expected = lstsq_scales(codes, w, x, granularity)
    np.testing.assert_allclose(calibrated.scale[0], expected, rtol=1e-3)


def test_a_group_without_codes_keeps_its_scale():
    w = weights((32, 2))
    w[:16] *= 1e-3  # below the threshold, so codes of this block are all zero
    codes = jnp.asarray(np.sign(w) * (np.abs(w) > 0.1), jnp.int8)[None]
    assert (codes[:, :16] == 0).all()
    start = jnp.full((1, 2, 2), 0.25)
    found = fit_scales(codes, jnp.asarray(w), gram(inputs(32)), start)
    np.testing.assert_allclose(found[0, 0], 0.25)
    assert (np.abs(found[0, 1] - 0.25) > 0.1).all()
    assert np.isfinite(fit_scales(codes * 0, jnp.asarray(w), jnp.zeros((32, 32)), start)).all()


# --- GPTQ ----------------------------------------------------------------------------------


def gptq_in_numpy(w, h, scale, damping):
    """The published loop, one input at a time, with the inverse of H formed and factored.

    scale: [K, N], one for each weight.
    """
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    h[np.diag_indices(len(h))] += damping * np.diag(h).mean()
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros(w.shape, int)
    for k in range(len(w)):
        codes[k] = np.clip(np.rint(w[k] / scale[k]), -1, 1)
        error = (w[k] - codes[k] * scale[k]) / upper[k, k]
        w[k:] -= np.outer(upper[k, k:], error)
    return codes


@pytest.mark.parametrize("k_size", [48, 128, 200])  # in one block, exactly one, padded to two
def test_gptq_codes_are_those_of_the_plain_loop(k_size):
    w, h = weights((k_size, 7)), gram(inputs(k_size))
    groups = k_size // 8
    scale = np.random.default_rng(1).uniform(0.7, 1.3, (groups, 7)).astype(np.float32)
    group = np.arange(k_size) // 8
    found = np.asarray(gptq_codes(w, h, scale, group, 0.01))
    expected = gptq_in_numpy(w, np.asarray(h), scale[group], 0.01)
    # f32 may put a weight on the other side of a rounding edge, and what follows with it.
    same = (found == expected).all(0)
    assert same.mean() >= 6 / 7 and (found == expected).mean() > 0.97
    assert (found != np.clip(np.rint(w / scale[group]), -1, 1)).mean() > 0.1


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gptq_is_the_loop_on_the_optimal_grid(granularity, act_order):
    w, x = weights((48, 6)), inputs(48)
    h = gram(x)
    scheme = make_scheme(f"gptq,granularity={granularity},act_order={act_order}", w.shape)
    grid = make_scheme(f"optimal,granularity={granularity}", w.shape).quantize(w)
    scale = np.repeat(
        np.broadcast_to(grid.scale[0], (grid.scale.shape[1], 6)), 48 // grid.scale.shape[1], 0
    )
    order = np.argsort(-np.diag(h)) if act_order else np.arange(48)
    expected = np.zeros((48, 6), int)
    expected[order] = gptq_in_numpy(
        w[order], np.asarray(h)[np.ix_(order, order)], scale[order], 0.01
    )
    found = scheme.quantize(w, h)
    assert (np.asarray(found.codes[0]) == expected).mean() > 0.97
    fitted = lstsq_scales(np.asarray(found.codes[0]), w, x, granularity)
    np.testing.assert_allclose(found.scale[0], fitted, rtol=2e-3)


def test_gptq_without_calibration_is_the_nearest_ternary_matrix():
    w = weights((48, 6))
    found = make_scheme("gptq", w.shape).quantize(w)
    expected = make_scheme("optimal,granularity=row", w.shape).quantize(w)
    np.testing.assert_array_equal(found.codes, expected.codes)
    # The optimum leaves every weight at the nearest of its three levels.
    np.testing.assert_array_equal(found.codes[0], np.clip(np.rint(w / found.scale[0]), -1, 1))
    # Inputs without correlation pass no error on.
    white = make_scheme("gptq", w.shape).quantize(w, jnp.eye(48))
    np.testing.assert_array_equal(white.codes, found.codes)


def test_inputs_that_are_never_used_do_no_harm():
    w, x = weights((48, 6)), inputs(48)
    x[:, 10:20] = 0
    for name in ("ls", "gptq", "ptqtp,steps=2"):
        quantize = jax.jit(make_scheme(name, w.shape).quantize)
        for h in (gram(x), jnp.zeros((48, 48))):
            assert np.isfinite(quantize(w, h).dequantize()).all()


def test_gptq_refuses_no_damping():
    with pytest.raises(UsageError, match="damping must lie between 0 and 10, found 0.0"):
        make_scheme("gptq,damping=0.0", (48, 6))


# --- Trit-planes ---------------------------------------------------------------------------


def squared(w, planes, scales):
    return float(((w - np.asarray((planes * scales).sum(0), np.float64)) ** 2).sum())


@pytest.mark.parametrize("axes", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("seed", range(3))
def test_no_turn_makes_trit_planes_worse(axes, seed):
    w = jnp.asarray(weights((3, 16, 5), seed))
    shape = (2, 3, 1, 5) if axes == (1,) else (2, 1, 1, 1)
    planes, scales = jnp.stack([jnp.sign(w), jnp.sign(w)]), jnp.full(shape, 0.4)
    errors = [squared(w, planes, scales)]
    for _ in range(12):
        planes, scales = improve(w, planes, scales, axes)
        errors.append(squared(w, planes, scales))
        assert set(np.unique(planes)) <= {-1, 0, 1} and (scales >= 0).all()
    assert all(
        after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:], strict=False)
    )
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_two_planes_are_at_rest_and_beat_one(granularity):
    w = weights((48, 5))
    found = make_scheme(f"ptqtp,granularity={granularity},steps=60", w.shape).quantize(w)
    one = make_scheme(f"optimal,granularity={granularity}", w.shape).quantize(w)
    assert found.codes.shape == (2, 48, 5)

    def error(q):
        return np.linalg.norm(np.asarray(q.dequantize()) - w)

    assert error(found) < 0.6 * error(one)
    # Every weight is at the nearest of its nine sums, tried one by one.
    scale = np.repeat(
        np.broadcast_to(found.scale, (2, found.scale.shape[1], 5)), 48 // found.scale.shape[1], 1
    )
    sums = [a * scale[0] + b * scale[1] for a in (-1, 0, 1) for b in (-1, 0, 1)]
    nearest = np.min(np.abs(w - np.stack(sums)), axis=0)
    np.testing.assert_allclose(np.abs(w - np.asarray(found.dequantize())), nearest, atol=1e-6)
    # And the scales are those of least squares.
    if granularity == "row":
        for n in range(5):
            design = np.asarray(found.codes[:, :, n], float).T
            best, *_ = np.linalg.lstsq(design, w[:, n], rcond=None)
            np.testing.assert_allclose(found.scale[:, 0, n], best, rtol=1e-4, atol=1e-6)


def test_groups_fit_the_matrix():
    for k_size, groups in ((256, 2), (192, 3), (48, 3), (20, 1)):
        w = jax.ShapeDtypeStruct((k_size, 2), jnp.float32)
        found = jax.eval_shape(make_scheme("ptqtp", w.shape).quantize, w)
        assert found.scale.shape == (2, groups, 2)


# --- What calibration is for ---------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["ls", "gptq", "ptqtp"])
def test_calibrated_outputs_are_nearer(name, granularity):
    scheme = make_scheme(f"{name},granularity={granularity}", (64, 12))
    w = np.stack([weights((64, 12), seed) for seed in range(5)])
    x = np.stack([inputs(64, seed) for seed in range(5)])
    h = jnp.stack([gram(each) for each in x])
    plain, found = jax.jit(jax.vmap(lambda w, h: (scheme.quantize(w), scheme.quantize(w, h))))(w, h)
    before, after = (
        np.linalg.norm(
            x @ (np.asarray(jax.vmap(Quantized.dequantize)(q), np.float64) - w), axis=(1, 2)
        )
        for q in (plain, found)
    )
    assert (after <= before * (1 + 1e-5)).all(), after / before
    if name == "gptq":
        assert (after < 0.9 * before).all(), after / before
