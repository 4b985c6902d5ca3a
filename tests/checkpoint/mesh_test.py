"""Checkpoints do not know the mesh they came from: one device and four, both ways, to the bit.

In a process of its own, which has four CPU devices.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

_BEFORE = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
one = SingleDeviceSharding(jax.devices()[0])

def spread(leaf):
    # Along the last axis that four, or else two, devices can share; else a copy on each.
    for axis in reversed(range(len(leaf.shape))):
        for names, count in ((("data", "model"), 4), ("model", 2)):
            if leaf.shape[axis] and leaf.shape[axis] % count == 0:
                return NamedSharding(mesh, P(*[None] * axis, names))
    return NamedSharding(mesh, P())

def bits(tree):
    return [(x.shape, str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]

def devices(tree):
    return max(len(x.sharding.device_set) for x in jax.tree.leaves(tree))
"""

_TRAINING = """
import optax
from flax import nnx
from ternax.checkpoint.training import TrainCheckpoints
from tests.interop import models

params = nnx.state(models.floats(models.BITNET)).to_pure_dict()
state = {"params": params, "opt": optax.adamw(1e-3).init(params)}
whole = jax.device_put(state, one)
shared = jax.tree.map(lambda x: jax.device_put(x, spread(x)), state)
assert devices(whole) == 1 and devices(shared) == 4
for name, saved, place in (("a", whole, spread), ("b", shared, lambda x: one)):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)
    with TrainCheckpoints(f"{sys.argv[1]}/{name}") as checkpoints:
        checkpoints.save(1, saved, {})
        found, _ = checkpoints.restore(1, like)
    for want, leaf in zip(jax.tree.leaves(like), jax.tree.leaves(found), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim), (leaf.sharding, want)
    assert bits(found) == bits(whole), name
print("equal")
"""

_PACKED = """
import ternax
from flax import nnx
from tests.interop import models

model = models.packed(models.BITNET)
graph, state = nnx.split(model)
shared = nnx.merge(graph, jax.tree.map(lambda x: jax.device_put(x, spread(x)), state))
assert devices(model) == 1 and devices(shared) == 4
for name, saved in (("a", model), ("b", shared)):
    ternax.save(saved, f"{sys.argv[1]}/{name}")
    loaded = ternax.load(f"{sys.argv[1]}/{name}")
    placed = jax.tree.map(lambda x: jax.device_put(x, spread(x)), nnx.state(loaded))
    assert bits(loaded) == bits(model) == bits(placed), name
    assert devices(placed) == 4
tokens = np.arange(8, dtype=np.int32)[None]
assert np.array_equal(ternax.load(f"{sys.argv[1]}/b")(tokens), model(tokens))
print("equal")
"""


@pytest.mark.parametrize("script", [_TRAINING, _PACKED], ids=["training", "packed"])
def test_one_device_and_four(tmp_path, script):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", _BEFORE + script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags.strip(), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"
