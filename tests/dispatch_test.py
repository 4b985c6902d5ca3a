"""Both ways to call a step make the tokens that the engine makes."""

import numpy as np
import pytest

import ternax
from ternax.dispatch import DISPATCHES, Stepper
from ternax.errors import UsageError

PROMPT = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)


@pytest.mark.parametrize("config", ["tiny-llama", "tiny-bitnet"])  # head apart, and tied
def test_tokens_are_the_engines(config):
    model = ternax.load(config)
    expected = ternax.generate(model, PROMPT, max_new_tokens=6)[:, PROMPT.shape[1] :]
    for dispatch in DISPATCHES:
        found = np.stack(list(Stepper(model, dispatch).answer(PROMPT, 6)), axis=1)
        np.testing.assert_array_equal(found, expected, err_msg=dispatch)


def test_refusals():
    model = ternax.load("tiny-llama")
    with pytest.raises(UsageError, match="--dispatch must be one of program, layer"):
        Stepper(model, "token")
    with pytest.raises(UsageError, match="must fit the context of 256 positions"):
        next(Stepper(model).answer(PROMPT, 300))
