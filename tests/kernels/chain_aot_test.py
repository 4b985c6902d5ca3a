"""Chains as a compiler for an H200 sees them: what the interpreter takes, a GPU may not."""

import json
import pathlib
import subprocess
import sys

import pytest

from ternax.kernels import aot

ROOT = pathlib.Path(__file__).resolve().parents[2]

_SCRIPT = """
import json
import jax, jax.numpy as jnp
from ternax.configs import get_config
from ternax.gpu.chains import links_of
from ternax.kernels import aot
from ternax.kernels.pallas import chain, chain_self_test, tiles

cases = [*chain_self_test.CASES, chain_self_test.Case(links_of(get_config("70b")), 1, 1)]
like = jax.ShapeDtypeStruct
for links, rows, alone in cases:
    padded = chain.padded_rows(rows)
    entered = (link.shape[0] for link in links if link.enter in ("stream", "residual"))
    columns = next(entered, links[-1].shape[1])
    settings = {**chain.heuristic(132), "alone": alone}

    def launch(stream, given, layer, arrays):
        weights = [chain.Weights(*leaves, layer, layer) for leaves in arrays]
        given = given if links[0].enter == "input" else None
        return chain.run(links, weights, stream, given, rows, settings)

    arrays = [
        (
            like((2, 1, *tiles.data_shape(link.shape)), jnp.uint8),
            like((2, link.shape[1]), jnp.float32),
            like((2, link.shape[0]), jnp.float32) if link.normed else None,
        )
        for link in links
    ]
    vectors = (like((padded, size), jnp.float32) for size in (columns, links[0].shape[0]))
    with aot.dumped_kernels() as folder:
        aot.compile_for("h200", launch, *vectors, like((), jnp.int32), arrays)
        print(json.dumps(aot.inspect(folder)))
"""


def test_chains_of_the_self_test_and_of_70b_compile():
    if reason := aot.why_not():
        pytest.skip(reason)
    # A process of its own: jax takes up its CUDA plugin only before it first looks at devices.
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5
    for kernel in found:
        assert kernel["spill_bytes"] == kernel["serialized_wgmma"] == 0
        assert kernel["shared_bytes"] <= 232448
        assert kernel["issued_per_weight"] <= 0.52 and kernel["alu_per_weight"] <= 0.30
