"""What gradients say of errors, against losses of models that have them."""

import jax
import numpy as np
import pytest

import ternax
from ternax import evaluate, heldout, response, robustness
from ternax.noise import make_noise

LENGTH = 32
READ = make_noise("input_gaussian,sigma=0.02")


@pytest.fixture(scope="module")
def clean():
    text = heldout.windows(heldout.open_text(), LENGTH)
    return robustness.look(ternax.load("stdlib-bitnet"), robustness.spread_windows(text, 40))


@pytest.fixture(scope="module")
def found(clean):
    return response.measure(clean, [READ])


def loss(model, clean):
    losses = evaluate.token_losses(model, clean.text.tokens)
    return evaluate.bits_per_byte(losses, clean.text.num_bytes)


@pytest.mark.parametrize("name, stack", [("layers.2.attn.o", "o"), ("layers.1.mlp.down", "down")])
def test_slopes_are_those_of_the_loss(clean, found, name, stack):
    """A matrix made larger by its scale: the error of each trit is a share of itself."""
    _, layer, branch, _ = name.split(".")
    step, rises = 0.05, []
    for sign in (-1, 1):
        model = ternax.load("stdlib-bitnet")
        scale = getattr(getattr(model.layers, branch), stack).scale
        scale.set_value(scale.get_value().at[int(layer)].multiply(1 + sign * step))
        rises.append(loss(model, clean))
    slope = float(found.weights[name].slopes @ [-1, 0, 1])
    # Inputs behind it are rounded to int8 in both models, which gradients pass straight through.
    assert slope == pytest.approx((rises[1] - rises[0]) / (2 * step), rel=0.25, abs=0.003)


@pytest.mark.parametrize("spec", ["bitflip,rate=0.003", "gaussian,sigma=0.15", "pcm,size=2.5"])
def test_rises_of_noise_on_weights(clean, found, spec):
    noise = make_noise(spec)
    foreseen = found.under(noise, list(clean.codes)).rise
    drawn = [draw(clean, noise, seed) for seed in range(6)]
    error = np.std(drawn, ddof=1) / len(drawn) ** 0.5
    assert abs(foreseen - np.mean(drawn)) < 0.2 * np.mean(drawn) + 2.5 * error


def test_rises_of_noise_on_inputs(clean, found):
    """Errors leave through the matrix, whose strong directions the loss minds most."""
    foreseen = found.under(READ, list(clean.codes)).rise
    drawn = [draw(clean, READ, seed) for seed in range(4)]
    assert foreseen == pytest.approx(np.mean(drawn), rel=0.25)
    one = found.under(READ, ["layers.0.attn.q"]).rise
    assert one == found.under(READ, ["layers.0.attn.q", "layers.0.attn.v"]).rise < foreseen


def draw(clean, noise, seed):
    rises = robustness.point(clean, noise, jax.random.key(seed)).rises
    return float((rises * clean.text.num_bytes).sum() / clean.text.num_bytes.sum())


def test_sums_by_unit_are_of_the_same_gradients():
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (20, 18)).astype(np.int8)
    x, g = random.standard_normal((2, 5, 20)), random.standard_normal((2, 5, 18))
    sums, squares, by_row = response._by_trit(x, g, codes)
    whole = np.einsum("stk,stn->skn", x, g)
    masks = np.stack([codes == value for value in (-1, 0, 1)])
    each = whole[:, None] * masks
    np.testing.assert_allclose(sums, each.sum(axis=(2, 3)), rtol=1e-4)
    np.testing.assert_allclose(by_row, np.square(each).sum(axis=(0, 2)).T, rtol=1e-4)
    for unit, parts in {
        "row": each.sum(axis=3),
        "column": each.sum(axis=2),
        "block 16": np.stack(
            [each[:, :, k : k + 16, n : n + 16].sum(axis=(2, 3)) for k in (0, 16) for n in (0, 16)],
            axis=-1,
        ),
    }.items():
        wanted = np.einsum("scu,sdu->cd", parts, parts)
        np.testing.assert_allclose(squares[unit], wanted, rtol=1e-3, atol=1e-3, err_msg=unit)
    np.testing.assert_allclose(np.diag(squares["element"]), by_row.sum(axis=0), rtol=1e-5)
