"""Which models decode in chains, asked of a GPU that is not here."""

import dataclasses

import jax
import pytest

from ternax.configs import get_config
from ternax.edit import fit_kernels
from ternax.kernels import target
from ternax.kernels.pallas import backend
from ternax.nn import chained
from ternax.random_weights import abstract_model

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax is too old for the kernels", allow_module_level=True)

H200 = target.Target("gpu", "NVIDIA H200", "9.0", 132, present=False)


@pytest.mark.parametrize(
    "changes, rows, reason",
    [
        ({}, 1, None),
        ({}, 17, "a chain takes 16 rows, found 17"),
        # 6 + 2 * 1 heads of 64: q, k and v are as wide as the stream.
        (dict(hidden_size=512, num_heads=6, num_kv_heads=1, head_dim=64), 1, "as wide as the"),
        (dict(inputs="none"), 1, "chains take trits in one plane, one scale along K, and int8"),
    ],
)
def test_what_runs_as_chains(changes, rows, reason):
    config = dataclasses.replace(get_config("1b"), **changes)
    with target.compiling_for(H200):
        found = chained.why_not(fit_kernels(abstract_model(config)).layers, rows)
    assert found is None if reason is None else reason in found
