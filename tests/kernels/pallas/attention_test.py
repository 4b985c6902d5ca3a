"""Decode attention on Mosaic GPU, interpreted, against XLA's way of it; and when it is taken.

Tolerance: a key or value times one of the three bf16 that a query or weight is split into is
exact in float32, so what differs is how sums round: 2^-24 each, over up to 300 slots and 128
columns, in another order than XLA's. A term lost would be 2^-16 of a query.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ternax.kernels import target
from ternax.kernels.attention import step_attention
from ternax.kernels.pallas import backend

if jax.__version_info__ < backend.MIN_JAX:
    pytest.skip("this jax has no interpreter of Mosaic GPU", allow_module_level=True)

from ternax.kernels.pallas import attention, attention_self_test, attention_settings

TOLERANCE = 4e-6
H200 = target.Target("gpu", "NVIDIA H200", "9.0", 132, present=False)


def arguments(batch, heads, groups, width, slots, start, length, dtype, *, layers=3, tokens=1):
    rng = np.random.default_rng(length)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    qkv = 2 * normal(batch, tokens, (heads + 2 * groups) * width)
    angle = 3 * normal(batch, tokens, 1, width // 2)
    shape = (layers, batch, groups, slots, width)
    scales = None, None
    if dtype == jnp.int8:
        stores = [rng.integers(-127, 128, shape).astype(np.int8) for _ in "kv"]
        scales = [rng.uniform(0.005, 0.02, shape[:-1]).astype(np.float32) for _ in "kv"]
    else:
        stores = [normal(*shape).astype(jnp.bfloat16).view(np.uint16) for _ in "kv"]
    place = np.asarray(start, np.int32), jnp.int32(length), jnp.int32(layers - 2)
    return qkv, (np.cos(angle), np.sin(angle)), *stores, *scales, *place


@functools.partial(jax.jit, static_argnums=0)
def interpreted(settings, *call):
    return attention.step(*call, dict(settings), interpret=True)


@functools.partial(jax.jit, static_argnames="backend")
def xla(*call, backend="reference"):
    return step_attention(*call, backend=backend)


def check(settings, call):
    found, expected = interpreted(tuple(settings.items()), *call), xla(*call)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        if theirs is not None:
            np.testing.assert_array_equal(mine, theirs)  # the cache, to the bit
    largest = float(jnp.abs(expected[0]).max())
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize(
    "shape, start, length, dtype, splits, tile, stages",
    [
        # ((batch, heads, groups, width, slots), ...: one launch, half a tile masked
        ((1, 8, 1, 128, 256), [0], 100, jnp.uint16, 1, 64, 2),
        # Shares are unequal, and a stage is used again.
        ((1, 8, 1, 128, 512), [0], 300, jnp.uint16, 3, 64, 1),
        # Rows begin where they like; some blocks have no work.
        ((2, 10, 2, 64, 512), [0, 170], 300, jnp.uint16, 7, 64, 2),
        # The first token: no slot is in use.
        ((2, 2, 2, 128, 64), [0, 0], 0, jnp.uint16, 2, 64, 2),
        # Whole tiles; a row that begins with its last slot, and one with the new token.
        ((3, 4, 1, 64, 256), [0, 127, 128], 128, jnp.uint16, 2, 64, 2),
        # Twice eight columns of queries; the token takes the last slot there is.
        ((1, 16, 1, 64, 256), [3], 255, jnp.uint16, 2, 64, 2),
        ((2, 8, 2, 128, 256), [3, 130], 200, jnp.int8, 2, 64, 2),
        ((1, 1, 1, 64, 256), [3], 255, jnp.int8, 1, 64, 1),
        ((2, 5, 1, 64, 320), [0, 64], 64, jnp.int8, 3, 64, 2),
        # Larger tiles.
        ((2, 4, 1, 128, 512), [0, 200], 400, jnp.uint16, 1, 128, 2),
        ((1, 2, 1, 64, 256), [5], 130, jnp.int8, 1, 128, 1),
    ],
)
def test_it_is_what_xla_makes_of_it(shape, start, length, dtype, splits, tile, stages):
    check(
        {"splits": splits, "tile": tile, "stages": stages}, arguments(*shape, start, length, dtype)
    )


@pytest.mark.parametrize("fenced", [True, False])
def test_nothing_is_written_while_it_is_read(fenced, monkeypatch, capfd):
    """By the interpreter's race detector, which does see a fence that is left out."""
    races = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", races)
    if not fenced:
        monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    call = arguments(1, 4, 1, 64, 256, [0], 200, jnp.int8)
    jax.block_until_ready(
        attention.step(*call, {"splits": 2, "tile": 64, "stages": 1}, interpret=True)
    )
    assert ("RACE DETECTED" in capfd.readouterr().out) == (not fenced)


def test_a_row_without_slots_is_zero():
    call = arguments(2, 2, 2, 64, 64, [7, 8], 7, jnp.uint16)
    found = np.asarray(interpreted((("splits", 2), ("tile", 64), ("stages", 2)), *call)[0])
    assert found[0].any() and not found[1].any()


def test_large_scores_do_not_overflow():
    qkv, rope, k, *rest = arguments(1, 4, 1, 64, 128, [0], 100, jnp.uint16)
    k = (100 * k.view(jnp.bfloat16)).astype(jnp.bfloat16).view(np.uint16)
    check({"splits": 2, "tile": 64, "stages": 2}, (qkv, rope, k, *rest))


def test_the_self_test_passes_and_would_tell(monkeypatch):
    assert attention_self_test.self_test(interpret=True) is None
    monkeypatch.setattr(attention, "_LOG2E", 1.0)
    monkeypatch.setattr(attention_self_test, "CASES", attention_self_test.CASES[1:2])
    reason = attention_self_test.self_test(interpret=True)
    assert reason.startswith("its self-test failed: outputs differ by 0.")
    assert reason.endswith(
        "with a cache of uint16, heads of 64, 5 to a key head, 1 splits, tiles of 128"
    )


def traced(call):
    with target.compiling_for(H200):
        return str(jax.make_jaxpr(lambda *a: step_attention(*a))(*call))


def test_one_token_takes_it_in_two_launches():
    text = traced(arguments(1, 64, 8, 128, 1024, [0], 9, jnp.uint16))
    assert text.count("ternax_attend") and text.count("ternax_combine")
    # 64 rows of 8 key heads fill 132 processors without splits: one launch.
    text = traced(arguments(64, 8, 8, 64, 64, [0] * 64, 9, jnp.int8, layers=2))
    assert text.count("ternax_attend") and not text.count("ternax_combine")


@pytest.mark.parametrize(
    "shape, more, reason",
    [
        ((1, 2, 1, 64, 64), dict(tokens=2), "it attends with one token a row, found 2"),
        ((1, 2, 1, 80, 64), {}, "it takes heads of 64 or 128, found 80"),
        ((1, 17, 1, 64, 64), {}, "it takes up to 16 query heads to a key head, found 17"),
        ((1, 2, 1, 64, 48), {}, "it reads 64 slots at a time, found 48 in all"),
    ],
)
def test_what_it_cannot_do_goes_to_xla(shape, more, reason):
    call = arguments(*shape, [0], 9, jnp.uint16, **more)
    assert attention_settings.why_not(call[0], call[2]) == reason
    assert "ternax_attend" not in traced(call)


def test_it_names_a_cache_it_does_not_read():
    qkv, _, k, *_ = arguments(1, 2, 1, 64, 64, [0], 9, jnp.uint16)
    assert attention_settings.why_not(qkv, k.astype(np.float32)) == (
        "it reads a cache of bf16 or int8, found float32"
    )
    huge = jax.ShapeDtypeStruct((128, 256, 64, 1024, 64), jnp.int8)
    qkv = jax.ShapeDtypeStruct((256, 1, 3 * 64 * 64), jnp.float32)
    assert attention_settings.why_not(qkv, huge).startswith(
        "it counts slots of all layers and heads in 31"
    )


HERE = dataclasses.replace(H200, present=True)


def test_a_failed_self_test_is_said_aloud(monkeypatch):
    call = arguments(1, 2, 1, 64, 64, [0], 9, jnp.uint16)
    monkeypatch.setattr(attention_self_test, "self_test", lambda: "its self-test failed: 7")
    backend._unusable_attention.cache_clear()
    with target.compiling_for(HERE), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert backend.why_not_attend(call[0], call[2]) == "its self-test failed: 7"
    backend._unusable_attention.cache_clear()
    assert [str(each.message) for each in said] == [
        "kernels of decode attention on Mosaic GPU are not used: its self-test failed: 7"
    ]


def test_the_self_test_runs_while_a_program_is_traced(monkeypatch):
    """The first use is within somebody's jit, scan and shard_map: the kernels run all the same."""
    test, run = attention_self_test.self_test, backend.run
    monkeypatch.setattr(attention_self_test, "CASES", attention_self_test.CASES[1:2])
    monkeypatch.setattr(attention_self_test, "self_test", lambda: test(interpret=True))
    monkeypatch.setattr(backend, "run", lambda *a: run(*a, interpret=True))
    few = {"blocks": 2, "stages": 2, "consumers": 2}
    many = {"blocks": 1, "rows": 48, "strip": 1, "cluster": 1, "units": 1, "slices": 2, "split": 0}

    def small(x, w):
        if w.format == "int8":
            return few | {"slices": 1}
        return few if x.shape[0] <= 16 else many

    monkeypatch.setattr(backend, "heuristic", small)
    call = arguments(1, 2, 1, 64, 64, [0], 9, jnp.uint16)

    def layers(qkv, rope, k, v, *place):
        def layer(carry, index):
            out, *carry = step_attention(qkv, rope, *carry, None, None, *place, index)
            return carry[:2], out

        return lax.scan(layer, [k, v], jnp.arange(3))

    backend._unusable_attention.cache_clear()
    with target.compiling_for(HERE), warnings.catch_warnings():
        warnings.simplefilter("error")
        text = str(jax.make_jaxpr(layers)(*call[:4], *call[6:8]))
    assert "ternax_attend" in text
    assert backend._unusable_attention() is None
    assert {backend._unusable(format) for format in ("trit2", "int8")} == {None}
