"""TrainCheckpoints: bit for bit, whole or not there, and never a leaf that nobody asked for."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ternax.checkpoint.training import TrainCheckpoints
from ternax.errors import BadModelFile, OutputError, UsageError

ROOT = pathlib.Path(__file__).resolve().parents[2]


class State(NamedTuple):
    params: dict
    opt: optax.OptState
    step: jax.Array
    key: jax.Array


def state_of(seed: int) -> State:
    """NamedTuples, optax states, scalars, bf16, int8, -0, NaN, infinity and a denormal."""
    random = np.random.default_rng(seed)
    odd = np.array([-0.0, np.nan, np.inf, 1e-42, seed], np.float32)
    params = {
        "layers": {"up": jnp.asarray(random.normal(size=(3, 8, 4)).astype(np.float32))},
        "norm": jnp.asarray(odd),
    }
    half = {
        "half": jnp.asarray(random.normal(size=(5, 3)), jnp.bfloat16),
        "codes": jnp.asarray(random.integers(-127, 128, (7,)), jnp.int8),
    }
    key = jax.random.key_data(jax.random.key(seed))
    return State(
        params | half, optax.adamw(1e-3).init({"up": params["layers"]["up"]}), jnp.int32(seed), key
    )


def abstract(state):
    return jax.eval_shape(lambda: state)


def bits(tree) -> list[tuple]:
    return [
        (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)
    ]


def test_a_state_comes_back_bit_for_bit(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        for step in (10, 20):
            checkpoints.save(step, state_of(step), {"step": step, "corpus": {"files": [1, 2.5]}})
        assert checkpoints.latest() == 20
    with TrainCheckpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            state, meta = checkpoints.restore(step, abstract(state_of(0)))
            assert jax.tree.structure(state) == jax.tree.structure(state_of(step))
            assert bits(state) == bits(state_of(step))
            assert meta == {"step": step, "corpus": {"files": [1, 2.5]}}


def test_only_the_newest_stay(tmp_path):
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, {"x": jnp.full((4,), step)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_buffers_may_be_donated_at_once(tmp_path):
    update = jax.jit(lambda x: x * -1 + 1, donate_argnums=0)
    x = jnp.arange(1 << 20, dtype=jnp.float32)
    with TrainCheckpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            expected = np.array(x)
            checkpoints.save(step, {"x": x}, {})
            for _ in range(3):
                x = update(x)
            x.block_until_ready()
            like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
            saved = checkpoints.restore(step, like)[0]["x"]
            np.testing.assert_array_equal(saved, expected)


def test_a_step_is_saved_once(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(7, {"x": jnp.ones(3)}, {})
        with pytest.raises(UsageError, match="step 7 is in .* already: continue behind step 7"):
            checkpoints.save(7, {"x": jnp.zeros(3)}, {})
        state, _ = checkpoints.restore(7, {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert state["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "like, where, why",
    [
        ({"a": ((3, 2), jnp.float32)}, "b", "unknown to this run"),
        ({"a": ((3, 2), jnp.float32), "b": ((4,), jnp.int8), "c": ((), jnp.int32)}, "c", "missing"),
        (
            {"a": ((3, 2), jnp.bfloat16), "b": ((4,), jnp.int8)},
            "a",
            r"expected bfloat16 \(3, 2\), found float32 \(3, 2\)",
        ),
        (
            {"a": ((3, 2), jnp.float32), "b": ((5,), jnp.int8)},
            "b",
            r"expected int8 \(5,\), found int8 \(4,\)",
        ),
        ({"a": {"deeper": ((3, 2), jnp.float32)}, "b": ((4,), jnp.int8)}, "a.deeper", "missing"),
    ],
)
def test_another_state_is_refused_by_name(tmp_path, like, where, why):
    """orbax would cast float32 to bfloat16 and int8 without a word."""
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(*leaf), like, is_leaf=is_leaf)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones((3, 2)), "b": jnp.ones(4, jnp.int8)}, {})
        with pytest.raises(BadModelFile, match=why) as refused:
            checkpoints.restore(1, like)
    assert refused.value.where == where
    assert "\n" not in str(refused.value)


def test_a_step_that_is_not_there(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
        with pytest.raises(BadModelFile, match="step 2: not there; steps found: 1"):
            checkpoints.restore(2, {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_typed_keys_and_names_that_meet(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="key is a typed random key"):
            checkpoints.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(ValueError, match="two leaves of the state are called a.b"):
            checkpoints.save(1, {"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "d/*"])
def test_a_damaged_step_is_one_line(tmp_path, file):
    like = abstract(state_of(0))
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {})
    for path in (tmp_path / "1" / "state").rglob(file):
        path.write_bytes(path.read_bytes()[:-20])
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(BadModelFile) as refused:
            checkpoints.restore(1, like)
    assert "cannot be read, it is damaged" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        TrainCheckpoints(tmp_path / "file" / "checkpoints")


def test_a_save_that_cannot_be_written_is_told(tmp_path):
    """Here or at the next wait, but never lost."""
    checkpoints = TrainCheckpoints(tmp_path / "run")
    os.rename(tmp_path / "run", tmp_path / "gone")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError) as refused:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
        checkpoints.wait()
    assert "\n" not in str(refused.value)


# --- Other processes ------------------------------------------------------------------------

SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from ternax.checkpoint.training import TrainCheckpoints
with TrainCheckpoints(sys.argv[1], keep=2) as checkpoints:
    step = (checkpoints.latest() or 0) + 1
    while True:
        state = {f"x{i}": jnp.full((1 << 15,), step * 10 + i) for i in range(8)}
        checkpoints.save(step, state, {"step": step})
        print(step, flush=True)
        step += 1
"""


def python(code: str, *args, **environment) -> dict:
    return dict(
        args=[sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
        text=True,
    )


def test_kill_9_leaves_the_latest_whole(tmp_path):
    """Three lives of one run, each killed at another place of a save."""
    like = {f"x{i}": jax.ShapeDtypeStruct((1 << 15,), jnp.int32) for i in range(8)}
    before = 0
    for life in range(3):
        process = subprocess.Popen(**python(SAVE_FOREVER, tmp_path), stdout=subprocess.PIPE)
        for _ in range(4):
            begun = int(process.stdout.readline())
        time.sleep(0.013 * life)
        process.send_signal(signal.SIGKILL)
        begun = max([begun, *map(int, process.stdout.read().split())])
        assert process.wait() == -signal.SIGKILL
        with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
            latest = checkpoints.latest()
            # The last save may have got no further than its name being printed.
            assert before < latest and begun - 2 <= latest <= begun + 1
            state, meta = checkpoints.restore(latest, like)
        assert meta == {"step": latest}
        for i in range(8):
            assert (np.asarray(state[f"x{i}"]) == latest * 10 + i).all()
        before = latest
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(before + 9, {"x": jnp.zeros(1)}, {})
    assert [path.name for path in tmp_path.iterdir() if not path.name.isdigit()] == []


RESHARD = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ternax.checkpoint.training import TrainCheckpoints
assert jax.device_count() == 2
sharding = NamedSharding(Mesh(jax.devices(), ("data",)), P("data"))
with TrainCheckpoints(sys.argv[1]) as checkpoints:
    like = {"x": jax.ShapeDtypeStruct((6, 4), np.float32, sharding=sharding)}
    state, meta = checkpoints.restore(1, like)
    assert state["x"].sharding == sharding and meta == {"devices": 1}
    assert [shard.data.shape for shard in state["x"].addressable_shards] == [(3, 4)] * 2
    np.testing.assert_array_equal(state["x"], np.arange(24, dtype=np.float32).reshape(6, 4))
    checkpoints.save(2, {"x": state["x"] + 1}, {"devices": 2})
"""


def test_another_sharding(tmp_path):
    """One device to two, and back."""
    x = jnp.arange(24, dtype=jnp.float32).reshape(6, 4)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, {"devices": 1})
    flag = "--xla_force_host_platform_device_count=2"
    subprocess.run(**python(RESHARD, tmp_path, XLA_FLAGS=flag), check=True, timeout=120)
    with TrainCheckpoints(tmp_path) as checkpoints:
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        state, meta = checkpoints.restore(2, like)
    assert meta == {"devices": 2}
    np.testing.assert_array_equal(state["x"], np.asarray(x) + 1)
    assert len(state["x"].devices()) == 1


def test_meta_is_plain_json(tmp_path):
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {"tokens": 2**40})
    assert json.loads((tmp_path / "1" / "meta" / "metadata").read_text()) == {"tokens": 2**40}
