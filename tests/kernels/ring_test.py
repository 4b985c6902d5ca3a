"""Programs over rings multiply what they say, as often as they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ternax.kernels import ring


def dot(x, w):
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def test_rings_are_larger_than_a_cache_and_programs_are_not_endless():
    assert ring.layers_of(117_440_512) == 5 and ring.layers_of(1 << 30) == 2
    for nbytes in (1 << 20, 1 << 24, 1 << 27):
        layers = ring.layers_of(nbytes)
        assert layers * nbytes >= ring.RING_BYTES
        calls = layers * ring.repeats_of(layers, nbytes)
        assert 3e-3 <= calls * (nbytes / 4e12 + 2e-6) <= 8e-3


@pytest.mark.parametrize("times", [1, 3])
def test_every_matrix_has_its_product(times):
    x = jnp.asarray(ring.host_rows(2, 64))
    matrices = tuple(ring.random_bits((48, 64), jnp.int8, seed) for seed in range(3))
    program = ring.matrices(dot, x, matrices, 2)
    assert program.calls == 6
    program.compile().run(times)
    after, ys = program.carry
    np.testing.assert_array_equal(after, ring.host_rows(2, 64))  # and x was not used up
    for y, w in zip(ys, matrices, strict=True):
        expected = np.asarray(x, np.int64) @ np.asarray(w, np.int64).T
        np.testing.assert_array_equal(y, expected)


def test_every_layer_of_a_stack_has_its_product():
    x, stack = jnp.asarray(ring.host_rows(3, 32)), ring.random_bits((4, 16, 32), jnp.int8)
    program = ring.products(lambda x, w, layer: dot(x, w[layer]), x, stack, 4, 1).lower()
    program.compile().run(1)
    for layer, y in enumerate(program.carry[1]):
        expected = np.asarray(x, np.int64) @ np.asarray(stack[layer], np.int64).T
        np.testing.assert_array_equal(y, expected)


def test_additions_meet_in_one_output():
    x, stack = jnp.asarray(ring.host_rows(2, 32)), ring.random_bits((3, 16, 32), jnp.int8)

    def add(x, w, layer, out):
        out[...] += dot(x, w[layer])

    program = ring.additions(add, x, jnp.zeros((2, 16), jnp.int32), stack, 3, 2)
    program.compile().run(2)
    once = np.asarray(x, np.int64) @ np.asarray(stack, np.int64).sum(0).T
    np.testing.assert_array_equal(program.carry[1], 4 * once)  # two repeats, run twice


def test_a_sample_is_the_time_of_a_call_alone(monkeypatch):
    clock = [0.0]

    class Made:
        calls = 10

        def run(self, times):
            clock[0] += 0.5 + times * self.calls * 0.25  # half a second to start and to wait

    monkeypatch.setattr(ring.time, "perf_counter", lambda: clock[0])
    assert ring.sample_s(Made()) == pytest.approx(0.25)


def test_random_bits_are_of_their_type():
    floats = ring.random_bits((5, 7), jnp.bfloat16)
    size = np.abs(np.asarray(floats, np.float64))
    assert floats.shape == (5, 7) and size.min() >= 0.5 and size.max() < 2
    codes = ring.random_bits((1000,), jnp.int8)
    assert len(np.unique(np.asarray(codes))) > 200
    assert (ring.random_bits((1000,), jnp.int8, 1) != codes).any()
    words = ring.random_bits((1000,), jnp.uint32)
    assert words.dtype == jnp.uint32 and len(np.unique(np.asarray(words))) == 1000
    assert isinstance(words, jax.Array)
