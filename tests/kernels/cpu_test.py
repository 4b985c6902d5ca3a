"""The C++ kernels against numpy integers and a float64 attention, on every instruction set."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["trit2", "int4"])
@pytest.mark.parametrize("rowwise", [False, True])
def test_one_token_of_groups_that_are_whole_vectors(isa, format, rowwise):
    """The short way through many groups, for one and three digits, ends of N included."""
    random = np.random.default_rng(5)
    fmt, n, groups = FORMATS[format], 39, 6
    k_size = groups * 512 // fmt.bits  # 64 bytes a group
    values = random.integers(fmt.low, fmt.high + 1, (2, 1, k_size, n)).astype(np.int8)
    scale, zero = random.random((2, 2, 1, groups, n if rowwise else 1)).astype(np.float32)
    data = jnp.asarray(pack_numpy(values, format))
    for zeros in (None, zero):
        held = None if zeros is None else jnp.asarray(zeros)
        w = Packed(data, jnp.asarray(scale), held, format, shape=(k_size, n))
        shift = 0 if zeros is None else zeros[1, 0][:, None].astype(np.float64)
        grouped = (values[1, 0].reshape(groups, -1, n) + shift) * scale[1, 0][:, None]
        dense = grouped.reshape(k_size, n)
        x = random.standard_normal((1, k_size)).astype(np.float32)
        x8, x_scale = random.integers(-128, 128, (1, k_size)).astype(np.int8), np.float32([[0.1]])
        config = {"isa": isa, "threads": 2}
        call = dict(layer=1, out_dtype=jnp.float32, backend="cpu", config=config)
        for found, right in (
            (ternary_matmul(jnp.asarray(x), w, **call), x @ dense),
            (ternary_matmul(jnp.asarray(x8), w, x_scale=x_scale, **call), 0.1 * x8 @ dense),
        ):
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * np.abs(right).max())


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


def entered(x, norm, gate, eps):
    """What enters a product, float64: codes before rounding, scale [M, 1]."""
    x = x.astype(np.float64)
    if gate is not None:
        first, second = np.split(x, 2, axis=-1)
        act = first / (1 + np.exp(-first)) if gate == "silu" else np.maximum(first, 0) ** 2
        x = act * second
    if norm is not None:
        x = norm * (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))
    peak = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    return x / peak * 127, peak / 127


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gate", cpu.GATES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_a_projection_with_all_that_stands_round_it(isa, gate, with_norm):
    """Against float64. A code that float32 may round either way may come out either way."""
    random = np.random.default_rng(5)
    for (rows, k_size, n), format in zip(RAGGED, (*FORMATS, *FORMATS, *FORMATS), strict=False):
        values, w = packed(format, k_size, n, random)
        x = random.standard_normal((rows, k_size * (1 if gate is None else 2))).astype(np.float32)
        x[0] *= 1e-20  # below the floor of the scale, where no norm lifts it
        x[-1, -1] = 1e6
        norm = random.random(k_size).astype(np.float32) if with_norm else None
        residual = random.standard_normal((rows, n)).astype(np.float32) if rows % 2 else None
        found = cpu.project(
            jnp.asarray(x),
            norm,
            w,
            residual,
            jnp.int32(1),
            gate=gate,
            eps=1e-5,
            config={"isa": isa, "threads": 2},
        )
        codes, scale = entered(x, norm, gate, 1e-5)
        either = np.abs(codes - np.floor(codes) - 0.5) < 2e-4
        dense = values[1, 0] * np.asarray(w.scale, np.float64)[1, 0]
        expected = (np.rint(codes) * scale) @ dense
        slack = ((either + 2e-6 * np.abs(codes)) * scale) @ np.abs(dense)
        if residual is not None:
            expected += residual
            slack += 1e-6 * np.abs(residual)
        off = np.abs(found - expected)
        assert (off <= slack + 1e-30).all(), f"{rows}x{k_size}x{n}: {(off - slack).max()}"


def rotated(x, cosine, sine):
    """x [B, T, H, E], tables [B, T, 1, E / 2]: float64."""
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], -1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("store", ["f32", "bf16", "int8"])
@pytest.mark.parametrize(
    "tokens, width, length, share",
    [(1, 128, 37, 3), (3, 20, 0, 3), (35, 66, 5, 3), (1, 128, 301, 4), (3, 64, 130, 8)],
)
def test_a_step_rotates_stores_and_attends(isa, store, tokens, width, length, share):
    random = np.random.default_rng(6)
    layers, batch, groups, layer = 2, 3, 2, 1
    slots, heads = length + tokens + 4, groups * share
    shape = layers, batch, groups, slots, width
    scales = [None, None]
    if store == "int8":
        leaves = random.integers(-128, 128, (2, *shape)).astype(np.int8)
        scales = list(random.random((2, *shape[:-1])).astype(np.float32) / 50)
    else:
        leaves = random.standard_normal((2, *shape)).astype(np.float32)
        if store == "bf16":
            leaves = np.asarray(float_to_bits(jnp.asarray(leaves), "bf16"))
    columns = (heads + 2 * groups) * width
    qkv = random.standard_normal((batch, tokens, columns)).astype(np.float32)
    angles = random.random((batch, tokens, 1, width // 2)).astype(np.float32) * 6
    rope = np.cos(angles), np.sin(angles)
    start = np.array([0, length, length + tokens + 1], np.int32)  # the last row sees nothing

    found, *after = cpu.step(
        jnp.asarray(qkv),
        tuple(map(jnp.asarray, rope)),
        *map(jnp.asarray, leaves),
        *(None if s is None else jnp.asarray(s) for s in scales),
        jnp.asarray(start),
        jnp.int32(length),
        jnp.int32(layer),
        config={"isa": isa, "threads": 2},
    )

    parts = qkv.reshape(batch, tokens, -1, width)
    new = rotated(parts[:, :, heads:-groups], *rope), parts[:, :, -groups:]
    written = np.zeros((layers, batch, groups, slots), bool)
    written[layer, :, :, length : length + tokens] = True
    wide = []
    for i in range(2):
        leaf, scale = np.asarray(after[i]), after[2 + i]
        np.testing.assert_array_equal(leaf[~written], leaves[i][~written])
        values, close = leaf, 1e-6
        if store == "bf16":
            values, close = (leaf.astype(np.uint32) << 16).view(np.float32), 2.0**-8
        elif store == "int8":
            scale = np.asarray(scale)
            np.testing.assert_array_equal(scale[~written], scales[i][~written])
            values, close = leaf * scale[..., None], 0.5 / 127
        there = values[layer, :, :, length : length + tokens]
        wanted = new[i].swapaxes(1, 2)
        bound = 1.001 * close * np.abs(wanted).max(-1, keepdims=True)
        assert (np.abs(there - wanted) <= bound).all()
        wide.append(values[layer])
    expected = attention_oracle(rotated(parts[:, :, :heads], *rope), *wide, start, length)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    np.testing.assert_array_equal(found[2], 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gone_wrong", ["query", "k_scale", "v_scale"])
def test_attention_over_int8_shows_what_is_not_finite(isa, gone_wrong):
    """Integers have no NaN: the scales beside them carry it to the output of that row alone."""
    batch, groups, share, slots, width = 2, 1, 4, 130, 64
    random = np.random.default_rng(8)
    kv = random.integers(-127, 128, (2, 1, batch, groups, slots, width)).astype(np.int8)
    qkv = random.standard_normal((batch, 1, (share + 2) * width)).astype(np.float32)
    scales = np.full((2, 1, batch, groups, slots), 0.01, np.float32)
    if gone_wrong == "query":
        qkv[1, 0, 3 * width + 5] = np.nan
    else:
        scales[int(gone_wrong == "v_scale"), 0, 1, 0, 7] = np.nan
    half = np.zeros((batch, 1, 1, width // 2), np.float32)
    out, *_ = cpu.step(
        jnp.asarray(qkv),
        (jnp.asarray(half + 1), jnp.asarray(half)),
        *map(jnp.asarray, kv),
        *map(jnp.asarray, scales),
        jnp.zeros(batch, jnp.int32),
        jnp.int32(slots - 1),
        jnp.int32(0),
        config={"isa": isa, "threads": 2},
    )
    finite = np.isfinite(np.asarray(out)).all(-1)[:, 0]
    assert finite[0].all()
    assert finite[1].tolist() == [gone_wrong == "query"] * 3 + [False]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "case, width, used",
    [
        ("lowest codes", 256, 300),
        ("lowest codes", 192, 129),
        ("one slot", 64, 1),
        ("one loud value", 128, 200),
        ("scores under -1e30", 64, 33),
        ("scores under -1e30", 20, 33),
    ],
)
def test_attention_over_int8_at_extremes(isa, case, width, used):
    """Against float64, each column by the size of what is summed in it."""
    random = np.random.default_rng(9)
    groups, share = 2, 4
    k, v = random.integers(-127, 128, (2, 1, groups, used, width)).astype(np.int8)
    k_scale, v_scale = random.uniform(0.005, 0.01, (2, 1, groups, used)).astype(np.float32)
    q = random.standard_normal((1, 1, groups * share, width)).astype(np.float32)
    new = random.standard_normal((2, 1, 1, groups, width)).astype(np.float32)
    if case == "lowest codes":
        k, v, q = np.full_like(k, -128), np.full_like(v, -128), -np.abs(q)
    elif case == "one loud value":  # 0 in every column but one
        v[:, :, 7, 1:], v[:, :, 7, 0], v_scale[:, :, 7] = 0, 127, 1e9
    elif case == "scores under -1e30":  # slot 5 has the highest, by more than exp tells from 0
        k[..., 0], k_scale[:], k_scale[..., 5], q[:] = 127, 1e30, 5e29, 0
        q[..., 0], new[0, ..., 0] = -np.sqrt(width), 127e30
    half = np.zeros((1, 1, 1, width // 2), np.float32)
    out, *after = cpu.step(
        jnp.asarray(np.concatenate([q, *new], 2).reshape(1, 1, -1)),
        (jnp.asarray(half + 1), jnp.asarray(half)),
        *(jnp.asarray(x[None]) for x in (k, v, k_scale, v_scale)),
        jnp.zeros(1, jnp.int32),
        jnp.int32(used - 1),
        jnp.int32(0),
        config={"isa": isa, "threads": 2},
    )
    k, v, k_scale, v_scale = (np.asarray(x[0], np.float64) for x in after)
    k, v = k * k_scale[..., None], v * v_scale[..., None]
    expected, size = (attention_oracle(q, k, x, [0], used - 1) for x in (v, np.abs(v)))
    off = np.abs(out - expected)
    assert (off <= 1e-5 * size).all(), (off / size).max()


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


def test_who_starts_together_compiles_once(tmp_path, monkeypatch):
    compiler, compiled = tmp_path / "c++", tmp_path / "compiled"
    compiler.write_text(
        "#!/bin/sh\n"
        'test "$1" = --version && exec echo c++ 1.0\n'
        f"echo once >> {compiled}\n"
        'while test "$1" != -o; do shift; done\n'
        'sleep 0.3; echo library > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TERNAX_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor() as pool:
        paths = [call.result() for call in [pool.submit(build.build) for _ in range(4)]]
    assert len(set(paths)) == 1 and paths[0].read_text() == "library\n"
    assert compiled.read_text() == "once\n"
