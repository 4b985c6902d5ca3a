"""The step against a plain loop, and what must not change it: parts, remat, devices, resume."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ternax
from ternax import data, edit
from ternax.errors import NumericCheckFailed, UsageError
from ternax.optimizer import learning_rate
from ternax.quant import make_scheme
from ternax.train import Trainer, TrainSpec

TEXT = (b"def add(a, b):\n    return a + b\n\n" * 400)[:8000]
CORPUS = data.Corpus(
    "text",
    "0" * 64,
    256,
    data.Part(("a",), np.frombuffer(TEXT, np.uint8), len(TEXT)),
    data.Part(("b",), np.frombuffer(TEXT[:2000], np.uint8), 2000),
)
SPEC = dict(steps=6, batch=4, length=16, warmup_steps=2)


def trainer(config="tiny-bitnet", seed=0, teacher=None, **changed):
    model = ternax.load(config, packed=False, seed=seed)
    return Trainer(model, TrainSpec(**SPEC | changed), teacher=teacher)


def trained(**changed):
    found = trainer(**changed)
    losses = []
    found.run(CORPUS, log_every=1, watch=lambda report: losses.append(report.loss_nats))
    return found, losses


def flat(found):
    leaves = jax.tree_util.tree_flatten_with_path(found.state["params"])[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(one, other, **tolerance):
    for name, leaf in flat(one).items():
        np.testing.assert_allclose(leaf, flat(other)[name], err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def plain():
    return trained()


def test_against_a_plain_loop(plain):
    model = ternax.load("tiny-bitnet", packed=False)
    spec = TrainSpec(**SPEC)
    rate = learning_rate("bitnet", peak=3e-3, warmup_steps=2, steps=6)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    nnx.map_state(lambda path, _: path[-1] == "kernel" or path[0] == "embedding", params)
    moments = optax.scale_by_adam(b1=0.9, b2=0.95)
    state = moments.init(params)

    def loss(params, rows):
        logits = nnx.merge(graph, params, rest)(rows[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)
        return -picked.mean()

    for step in range(6):
        rows = jnp.asarray(data.batch(CORPUS.train, step, batch=4, length=16, seed=0))
        value, gradients = jax.value_and_grad(loss)(params, rows)
        assert value == pytest.approx(plain[1][step], rel=1e-4)
        shrink = 1 / max(float(optax.global_norm(gradients)) / spec.clip, 1)
        gradients = jax.tree.map(functools.partial(jnp.multiply, shrink), gradients)
        updates, state = moments.update(gradients, state)
        decay, size = 0.1 if step < 3 else 0.0, float(rate(jnp.float32(step)))

        def moved(path, p, u, decay=decay, size=size):
            name = jax.tree_util.keystr(path)
            decays = "kernel" in name or "embedding" in name
            return p - size * (u + decays * decay * p)

        params = jax.tree_util.tree_map_with_path(moved, params, updates)
    expected = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))[0]
    }
    found = flat(plain[0])
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        # Adam's first steps divide small numbers by small ones: a weight may stray by a step.
        assert np.abs(leaf - found[name]).mean() < 1e-5, name


def test_it_learns(plain):
    _, losses = trained(steps=60)
    assert losses[-1] < 0.5 * losses[0]


def test_parts_of_a_batch_add_up(plain):
    found, losses = trained(accumulate=2)
    np.testing.assert_allclose(losses[:2], plain[1][:2], rtol=1e-5)
    # A weight on the edge between two trits may fall the other way from then on.
    np.testing.assert_allclose(losses, plain[1], rtol=5e-3)


def test_remat_changes_the_memory_and_not_the_step(plain):
    found, losses = trained(remat=True)
    np.testing.assert_allclose(losses, plain[1], rtol=5e-3)
    big = dict(batch=16, length=128, steps=1)
    assert trainer(remat=True, **big).planned_bytes() < 0.8 * trainer(**big).planned_bytes()


def test_a_run_can_be_repeated_to_the_bit(plain):
    assert_same(plain[0], trained()[0], rtol=0, atol=0)


def test_going_on_from_a_state_is_going_on(plain):
    first = trainer()
    first.run(CORPUS, until=3)
    second = trainer()
    second.state, second.step = jax.device_get(first.state), first.step
    second.run(CORPUS)
    assert_same(plain[0], second, rtol=0, atol=0)


def test_noise_is_new_each_step_and_the_same_each_run():
    spec = dict(noise="sign_flip,rate=0.2", gradient="stochastic", learning_rate=0.0)
    (one, losses), (_, again) = trained(**spec), trained(**spec)
    assert losses == again
    rows = data.batch(CORPUS.train, 0, batch=4, length=16, seed=0)
    struck = [float(one.advance(rows)[0]) for _ in range(3)]
    assert len(set(struck)) == 3  # nothing was learnt and the text is the same


def test_annealing_goes_from_the_float_model_to_the_quantized():
    _, losses = trained(anneal_steps=4, learning_rate=0.0, steps=8)  # nothing is learnt
    floats = ternax.load("tiny-bitnet", packed=False)
    for _, linear in edit.float_linears(floats):
        linear.scheme = make_scheme("none", linear.kernel.shape[1:])
    models = {"float": floats, "quantized": ternax.load("tiny-bitnet", packed=False)}
    for step, nearest in ((0, "float"), (4, "quantized"), (7, "quantized")):
        rows = jnp.asarray(data.batch(CORPUS.train, step, batch=4, length=16, seed=0))
        found = {
            name: float(
                optax.softmax_cross_entropy_with_integer_labels(
                    model(rows[:, :-1]), rows[:, 1:]
                ).mean()
            )
            for name, model in models.items()
        }
        far = abs(found["float"] - found["quantized"])
        assert abs(losses[step] - found[nearest]) < 0.05 * far, (step, losses[step], found)


def test_a_teacher_that_is_the_student_teaches_nothing():
    found = trainer(teacher=ternax.load("tiny-bitnet", packed=False), distill=1.0)
    loss, norm = found.advance(data.batch(CORPUS.train, 0, batch=4, length=16, seed=0))
    assert abs(float(loss)) < 1e-6 and float(norm) < 1e-4
    other = trainer(teacher=ternax.load("tiny-bitnet", packed=False, seed=1), distill=1.0)
    assert float(other.advance(data.batch(CORPUS.train, 0, batch=4, length=16, seed=0))[0]) > 0.01


def test_the_trained_model_is_whole_and_packs(plain):
    model = plain[0].model()
    kernel = model.layers.mlp.up.kernel[...]
    np.testing.assert_array_equal(kernel, plain[0].state["params"]["layers"]["mlp"]["up"]["kernel"])
    # Activations on an edge may fall either way; most tokens have none.
    rows = jnp.asarray(data.batch(CORPUS.train, 9, batch=32, length=8, seed=0)[:, :-1])
    expected = model(rows)
    packed = ternax.pack_model(model, embed_dtype="f32", head_dtype="f32")
    difference = np.abs(packed(rows) - expected).max(axis=(1, 2))
    assert np.median(difference) < 1e-3 < float(jnp.std(expected))


def test_a_loss_that_is_not_finite_names_its_step():
    found = trainer(steps=50)
    found.run(CORPUS, until=2)
    found.state["params"]["norm"]["weight"] = jnp.full((64,), jnp.nan)
    with pytest.raises(NumericCheckFailed, match="the loss of step 3 is nan"):
        found.run(CORPUS)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UsageError, match="expected float weights"):
        Trainer(ternax.load("tiny-bitnet"), TrainSpec(**SPEC))
    with pytest.raises(UsageError, match="multiple of accumulate"):
        TrainSpec(steps=1, batch=3, accumulate=2)
    with pytest.raises(UsageError, match="needs a teacher"):
        trainer(distill=0.5)


DEVICES = """
import sys; sys.path.insert(0, {root!r})
import jax
from tests.train_test import trained
assert jax.device_count() == 2
found, losses = trained()
assert found._place.mesh.size == 2
print(*losses)
"""


def test_two_devices_take_the_same_steps(plain):
    done = subprocess.run(
        [sys.executable, "-c", DEVICES.format(root=os.getcwd())],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in done.stdout.split()]
    np.testing.assert_allclose(losses[:2], plain[1][:2], rtol=1e-5)
    np.testing.assert_allclose(losses, plain[1], rtol=5e-3)
