"""Schedules against their formulas; one optimizer's step by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.optimizer import OPTIMIZERS, SCHEDULES, learning_rate, make_optimizer


def rates(name, steps=1000, warmup=100, peak=2.0):
    rate = learning_rate(name, peak=peak, warmup_steps=warmup, steps=steps)
    return np.array([float(rate(jnp.float32(step))) for step in range(steps)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_and_never_rises_again(name):
    found = rates(name)
    assert found[0] == pytest.approx(2.0 / 100, rel=1e-3)
    assert found.max() == pytest.approx(2.0, rel=0.11)
    assert (np.diff(found[100:]) <= 1e-6).all()


def test_formulas():
    at = 750
    assert rates("constant")[at] == 2.0
    assert rates("linear")[at] == pytest.approx(2.0 * 0.25)
    assert rates("cosine")[at] == pytest.approx(1 + np.cos(0.75 * np.pi))
    assert rates("bitnet")[at] == pytest.approx(2.0 * 0.25 * 2 / 3)
    assert rates("bitnet")[499] == pytest.approx(2.0 * 0.501)  # the drop is at half


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_ends_and_spares_what_does_not_decay(name):
    params = {"kernel": jnp.ones(3), "norm": jnp.ones(3)}
    optimizer = make_optimizer(
        name,
        rate=lambda step: 0.5,
        weight_decay=0.1,
        decay_until=2,
        clip=1.0,
        decayed={"kernel": True, "norm": False},
    )
    state, zero = optimizer.init(params), {"kernel": jnp.zeros(3), "norm": jnp.zeros(3)}
    for wanted in (-0.05, -0.05, 0.0):
        updates, state = optimizer.update(zero, state, params)
        np.testing.assert_allclose(updates["kernel"], wanted, atol=1e-7)
        np.testing.assert_array_equal(updates["norm"], 0)


def test_clipping_is_by_the_global_norm():
    optimizer = make_optimizer(
        "sgd", rate=lambda step: 1.0, weight_decay=0, decay_until=0, clip=1.0, decayed=False
    )
    gradient = jnp.array([3.0, 4.0])
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(updates, [-0.6, -0.8], rtol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="schedule: expected one of bitnet"):
        learning_rate("exponential", peak=1, warmup_steps=1, steps=1)
    with pytest.raises(UsageError, match="optimizer: expected one of adamw"):
        make_optimizer(
            "adam2", rate=lambda s: 1, weight_decay=0, decay_until=0, clip=0, decayed=False
        )
