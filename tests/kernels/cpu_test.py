"""The C++ kernels against numpy integers and a float64 attention, on every instruction set."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.kernels import attention
from ternax.kernels.cpu import backend as cpu
from ternax.kernels.cpu import build
from ternax.kernels.packing import FORMATS, Packed, float_to_bits, pack_numpy
from ternax.kernels.ternary_matmul import ternary_matmul

REASON = cpu.why_not(jax.default_backend(), None, None)
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the cpu backend cannot run: {REASON}")
ISAS = () if REASON else tuple(build.instruction_sets())
RAGGED = [
    (1, 1, 1),
    (1, 16, 4),
    (3, 33, 5),
    (2, 100, 67),
    (5, 257, 9),
    (17, 1000, 13),
    (40, 64, 70),
]


def packed(format, k_size, n, random, layers=2):
    fmt = FORMATS[format]
    values = random.integers(fmt.low, fmt.high + 1, (layers, 1, k_size, n)).astype(np.int8)
    scale = random.random((layers, 1, 1, n)).astype(np.float32)
    data = jnp.asarray(pack_numpy(values, format))
    return values, Packed(data, jnp.asarray(scale), None, format, shape=(k_size, n))


def test_this_machine_has_more_than_the_portable_path():
    assert "portable" in ISAS and len(set(ISAS)) == len(ISAS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_accumulators_are_exact_over_ragged_shapes_and_extremes(isa, format):
    random = np.random.default_rng(0)
    for rows, k_size, n in RAGGED:
        values, w = packed(format, k_size, n, random)
        extremes = np.full((rows, k_size), -128, np.int8)
        for x in (random.integers(-128, 128, (rows, k_size)).astype(np.int8), extremes, ~extremes):
            y = ternary_matmul(
                jnp.asarray(x),
                w,
                layer=1,
                out_dtype=jnp.int32,
                backend="cpu",
                config={"isa": isa, "threads": 2},
            )
            expected = x.astype(np.int64) @ values[1, 0].astype(np.int64)
            np.testing.assert_array_equal(y, expected, err_msg=f"{rows}x{k_size}x{n}")


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_codes_meet_extreme_activations(isa):
    """All +127 on all +1, at K where int16 sums would wrap; also the invalid code 3, as +2."""
    k_size, n = 4096, 6
    for byte, value in ((0b10101010, 1), (0b00000000, -1), (0b11111111, 2)):
        data = jnp.full((1, 1, n, k_size // 4), byte, jnp.uint8)
        w = Packed(data, jnp.ones((1, 1, 1, 1)), None, "trit2", shape=(k_size, n))
        for activation in (127, -128):
            x = jnp.full((2, k_size), activation, jnp.int8)
            y = ternary_matmul(
                x, w, layer=0, out_dtype=jnp.int32, backend="cpu", config={"isa": isa, "threads": 1}
            )
            np.testing.assert_array_equal(y, activation * value * k_size)


@pytest.mark.parametrize("format", FORMATS)
def test_scaled_products_have_the_references_bits(format):
    """Same accumulators, same float operations: equal bits, for int8 and for float inputs."""
    random = np.random.default_rng(1)
    _, w = packed(format, 320, 70, random)
    floats = jnp.asarray(random.standard_normal((3, 320)), jnp.float32)
    codes = jnp.asarray(random.integers(-128, 128, (3, 320)), jnp.int8)
    scale = jnp.asarray(random.random((3, 1)), jnp.float32)
    for x, x_scale in ((floats, None), (codes, scale)):
        found, expected = (
            ternary_matmul(x, w, layer=1, x_scale=x_scale, out_dtype=jnp.float32, backend=name)
            for name in ("cpu", "reference")
        )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_groups_zero_points_and_planes(format):
    random = np.random.default_rng(2)
    fmt, k_size, n, groups, planes = FORMATS[format], 256, 21, 4, 2
    values = random.integers(fmt.low, fmt.high + 1, (1, planes, k_size, n)).astype(np.int8)
    scale, zero = random.random((2, 1, planes, groups, n)).astype(np.float32)
    w = Packed(
        jnp.asarray(pack_numpy(values, format)),
        jnp.asarray(scale),
        jnp.asarray(zero),
        format,
        shape=(k_size, n),
    )
    x = random.integers(-128, 128, (5, k_size)).astype(np.int8)
    x_scale = random.random((5, 1)).astype(np.float32)
    y = ternary_matmul(
        jnp.asarray(x),
        w,
        layer=0,
        x_scale=jnp.asarray(x_scale),
        out_dtype=jnp.float32,
        backend="cpu",
    )
    grouped = values[0].reshape(planes, groups, -1, n) + zero[0][:, :, None].astype(np.float64)
    dense = (grouped * scale[0][:, :, None]).sum(0).reshape(k_size, n)
    expected = (x * x_scale.astype(np.float64)) @ dense
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_any_number_of_threads_gives_the_same_bits():
    random = np.random.default_rng(3)
    _, w = packed("trit2", 640, 500, random)
    x = jnp.asarray(random.standard_normal((4, 640)), jnp.float32)
    results = [
        ternary_matmul(
            x,
            w,
            layer=0,
            out_dtype=jnp.float32,
            backend="cpu",
            config={"isa": ISAS[0], "threads": threads},
        )
        for threads in range(1, 9)
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def attention_oracle(q, k, v, start, length):
    """float64 softmax attention, one query at a time. k, v: [B, G, S, E]."""
    batch, tokens, heads, width = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(tokens):
            for h in range(heads):
                g = h // (heads // k.shape[1])
                slots = slice(start[b], length + t + 1)
                scores = k[b, g, slots] @ q[b, t, h].astype(np.float64) * width**-0.5
                weights = np.exp(scores - scores.max()) if scores.size else scores
                out[b, t, h] = (weights / weights.sum() if scores.size else weights) @ v[
                    b, g, slots
                ]
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("store", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("tokens, width", [(1, 128), (3, 20)])
def test_attention_over_the_cache(isa, store, tokens, width):
    random = np.random.default_rng(4)
    layers, batch, groups, slots, heads, length = 2, 2, 2, 48, 6, 37
    k, v = random.standard_normal((2, layers, batch, groups, slots, width)).astype(np.float32)
    scales = None, None
    if store == "int8":
        scales = tuple(np.abs(a).max(-1) / 127 for a in (k, v))
        leaves = [
            np.round(a / s[..., None]).astype(np.int8) for a, s in zip((k, v), scales, strict=True)
        ]
        k, v = (a * s[..., None] for a, s in zip(leaves, scales, strict=True))
    elif store == "bf16":
        leaves = [np.asarray(float_to_bits(jnp.asarray(a), "bf16")) for a in (k, v)]
        k, v = ((a.astype(np.uint32) << 16).view(np.float32) for a in leaves)
    else:
        leaves = [k, v]
    q = random.standard_normal((batch, tokens, heads, width)).astype(np.float32)
    start = np.array([0, 30], np.int32)
    given = [jnp.asarray(a) for a in (q, *leaves)]
    given += [None if s is None else jnp.asarray(s, jnp.float32) for s in scales]
    given += [jnp.asarray(start), jnp.int32(length), jnp.int32(1)]
    expected = attention_oracle(q, k[1], v[1], start, length)
    found = cpu.attend(*given, config={"isa": isa, "threads": 2})
    np.testing.assert_allclose(found, expected, atol=3e-6)
    np.testing.assert_allclose(attention.reference(*given), expected, atol=3e-6)


def test_a_row_without_a_slot_in_use_attends_to_nothing():
    q = jnp.ones((1, 1, 2, 8))
    k = v = jnp.ones((1, 1, 1, 16, 8))
    found = cpu.attend(q, k, v, None, None, jnp.array([5]), jnp.int32(0), jnp.int32(0))
    np.testing.assert_array_equal(found, 0)


def test_a_layer_out_of_range_is_refused_not_read():
    w = packed("trit2", 32, 4, np.random.default_rng(0))[1]
    x = jnp.zeros((1, 32), jnp.int8)
    with pytest.raises(Exception, match="layer out of range"):
        jax.block_until_ready(
            ternary_matmul(x, w, layer=jnp.int32(2), out_dtype=jnp.int32, backend="cpu")
        )


@pytest.mark.parametrize(
    "cxx, said", [("/nonexistent/c++", "no C++ compiler found"), ("false", "failed")]
)
def test_without_a_working_compiler_the_reason_is_one_line(tmp_path, cxx, said):
    """And the platform's order goes on to the reference backend."""
    script = (
        "from ternax.kernels.backends import choose\n"
        "from ternax.kernels.cpu import backend\n"
        "print(backend.why_not('cpu', None, None))\n"
        "print(choose('cpu').name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "CXX": cxx, "TERNAX_CACHE": str(tmp_path), "PYTHONPATH": "."},
    )
    reason, name = done.stdout.splitlines()
    assert said in reason and name == "reference"
    assert not list(tmp_path.glob("*.so"))


def test_the_library_is_built_once(monkeypatch):
    first, run = build.build(), subprocess.run

    def only_version(command, **options):
        assert "--version" in command, "compiled again"
        return run(command, **options)

    monkeypatch.setattr(build.subprocess, "run", only_version)
    assert build.build() == first
