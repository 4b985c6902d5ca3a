"""The law across sizes on made steps whose law is known, and against numpy's least squares."""

import numpy as np
import pytest

from ternax.sizes import Timed, fit, leave_one_out

# Bound in seconds and layers, as 1b, 8b, 13b and 70b have them at 60 GB/s.
MODELS = {"1b": (8e-3, 16), "8b": (38e-3, 32), "13b": (57e-3, 40), "70b": (303e-3, 80)}


def steps(efficiency, layer_s, noise=lambda name: 1.0) -> dict[str, list[Timed]]:
    return {
        name: [Timed((bound / efficiency + layers * layer_s) * noise(name), bound, layers)]
        for name, (bound, layers) in MODELS.items()
    }


def test_each_model_is_foretold_by_the_others():
    """A layer's own 50 us is a tenth of 1b's step and a hundredth of 70b's: one share of the
    bound for all would be 8 % off."""
    made = steps(0.9, 50e-6)
    for name, law in leave_one_out(made).items():
        assert law.efficiency == pytest.approx(0.9) and law.layer_s == pytest.approx(50e-6)
        assert law.step_s(*MODELS[name]) == pytest.approx(made[name][0].step_s)


def test_a_model_takes_no_part_in_its_own_law():
    made = steps(0.9, 50e-6)
    slow = made | {"70b": [Timed(1.0, *MODELS["70b"])]}
    assert leave_one_out(slow)["70b"] == leave_one_out(made)["70b"]
    assert leave_one_out(slow)["8b"] != leave_one_out(made)["8b"]


def test_steps_weigh_by_shares():
    """Against numpy's, each equation divided by its own time."""
    random = np.random.default_rng(0)
    noisy = steps(0.8, 1e-4, lambda _: random.normal(1, 0.02))
    made = [step for found in noisy.values() for step in found]
    rows = np.array([[s.bound_s, s.layers] for s in made])
    times = np.array([s.step_s for s in made])
    expected = np.linalg.lstsq(rows / times[:, None], np.ones(len(made)), rcond=None)[0]
    law = fit(made)
    assert [1 / law.efficiency, law.layer_s] == pytest.approx(expected)
    # Noise of 2 % on four steps leaves each within 10 % when the others foretell it.
    for name, law in leave_one_out(noisy).items():
        assert law.step_s(*MODELS[name]) == pytest.approx(noisy[name][0].step_s, rel=0.1)


def test_what_steps_do_not_tell_is_left_out():
    one = Timed(0.1, 0.08, 10)
    assert (fit([one]).efficiency, fit([one]).layer_s) == (pytest.approx(0.8), 0.0)
    # As many bytes a layer: depths of one model.
    deep = fit([one, Timed(0.22, 0.16, 20)])
    assert deep.layer_s == 0 and 0.16 / 0.22 < deep.efficiency < 0.8
    # A layer's time below zero is noise.
    noise = fit([Timed(0.01, 0.01, 10), Timed(0.3, 0.2, 10)])
    assert noise.layer_s == 0 and noise.efficiency == pytest.approx((1 + 2 / 3) / 2)
    assert leave_one_out({"1b": [one]}) == {}
