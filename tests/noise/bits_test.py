"""Bit faults against numpy: what flips, what illegal codes become, what layouts make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.kernels import transcode
from ternax.kernels.packing import Packed, pack, unpack_numpy
from ternax.noise import make_noise, storage
from ternax.noise.words import Matrix, draws, key_words

RNG = np.random.default_rng(0)
CODES = RNG.choice([-1, 0, 1], p=[0.3, 0.4, 0.3], size=(512, 192)).astype(np.int8)
KEY = jax.random.key(3)


def packed(values=CODES, format="trit2"):
    return Packed(
        pack(jnp.asarray(values), format), jnp.ones((1, 1)), None, format, shape=values.shape
    )


def struck(spec, value=None):
    value = packed() if value is None else value
    found, _ = jax.jit(make_noise(spec))(KEY, value)
    return unpack_numpy(np.asarray(found.data), value.format, value.shape[0])


@pytest.mark.parametrize(
    "option",
    [
        "policy=zero",
        "policy=saturate",
        "policy=nearest",
        "policy=detect",
        "policy=raw",
        "burst=3",
        "storage=tq1_0",
    ],
)
def test_transition_tables_are_what_happens(option):
    spec = f"bitflip,rate=0.1,{option}"
    found = struck(spec)
    density = float(np.mean(CODES != 0))
    table = make_noise(spec).transition(density)
    np.testing.assert_allclose(table.sum(axis=1), 1)
    for old in (-1, 0, 1):
        share = np.bincount(found[old == CODES] + 1, minlength=4) / (old == CODES).sum()
        # Five standard errors of 28,000 trits of each kind, doubled where bursts tie them.
        np.testing.assert_allclose(share, table[old + 1], atol=0.02, err_msg=str(old))


def test_bursts_and_bytes_flip_as_often_as_they_say():
    data = packed(np.zeros((2048, 256), np.int8))
    for spec, wanted in (("bitflip,rate=0.03,burst=4", 0.03), ("byte_fault,rate=0.06", 0.03)):
        noisy, _ = jax.jit(make_noise(f"{spec},policy=raw"))(KEY, data)
        flips = np.unpackbits(np.asarray(noisy.data) ^ np.asarray(data.data))
        assert flips.mean() == pytest.approx(wanted, rel=0.1), spec
    # In a burst, a bit's neighbour has flipped three times out of four.
    noisy, _ = jax.jit(make_noise("bitflip,rate=0.01,burst=4,policy=raw"))(KEY, data)
    flips = np.unpackbits(np.asarray(noisy.data) ^ np.asarray(data.data), bitorder="little")
    assert np.mean(flips[1:][flips[:-1] == 1]) == pytest.approx(0.75, abs=0.03)


def test_a_second_implementation_of_independent_flips():
    """Bit by bit in numpy, from the definition of the draws."""
    matrix, rate = Matrix("trit2", CODES.shape[0]), 0.05
    words = np.asarray(matrix.to_words(packed().data))
    index = np.arange(words.size, dtype=np.uint32).reshape(words.shape)
    flips = np.zeros_like(words)
    for bit in range(32):
        drawn = np.asarray(draws(key_words(KEY), jnp.asarray(index), bit, 1), np.uint64)
        flips |= (drawn < np.uint64(np.float32(rate) * 2.0**32)).astype(np.uint32) << np.uint32(bit)
    noisy = (words ^ flips).view(np.uint8)
    wanted = unpack_numpy(noisy, "trit2", CODES.shape[0])
    np.testing.assert_array_equal(struck(f"bitflip,rate={rate},policy=raw"), wanted)
    np.testing.assert_array_equal(struck(f"bitflip,rate={rate}"), np.where(wanted == 2, 0, wanted))


@pytest.mark.parametrize("name", storage.STORAGES[1:])
def test_layouts_are_those_of_transcode(name):
    shape = CODES.shape
    mine = np.asarray(storage.to_bytes(jnp.asarray(CODES.T + 1, jnp.uint8), name))
    layout = transcode.LAYOUTS[name]
    scale = np.ones(layout.scale_shape(shape), layout.scale)
    canonical = np.asarray(packed().data)
    theirs = transcode.from_canonical_numpy(canonical, scale, name, shape).reshape(-1)
    if layout.tail_bytes:
        theirs = theirs[: -layout.tail_bytes]
    else:  # an f16 scale behind each block
        theirs = theirs.reshape(-1, layout.block_bytes)[:, :-2].reshape(-1)
    np.testing.assert_array_equal(mine.reshape(-1), theirs)
    back = storage.from_bytes(jnp.asarray(mine), name, shape[0])
    np.testing.assert_array_equal(back, CODES.T + 1)


def test_one_bit_hurts_several_trits_in_base_3():
    """At equal rate a bit: 2 bits a trit, a trit an error; 1.6 bits, but two or so an error."""
    two = (struck("bitflip,rate=0.001,policy=raw") != CODES).mean() / 2
    base3 = (struck("bitflip,rate=0.001,storage=tq1_0") != CODES).mean() / 1.6
    assert 1.3 < base3 / two < 3


@pytest.mark.parametrize("format, low, high", [("int8", -127, 127), ("int4", -7, 7)])
def test_integer_formats(format, low, high):
    values = RNG.integers(low, high + 1, (64, 96)).astype(np.int8)
    for policy in ("zero", "saturate", "detect"):
        found = struck(f"bitflip,rate=0.05,policy={policy}", packed(values, format))
        assert low <= found.min() and found.max() <= high
    raw = struck("bitflip,rate=0.05,policy=raw", packed(values, format))
    assert raw.min() == low - 1


@pytest.mark.parametrize("format", ["bf16", "f32"])
def test_floats(format):
    from ternax.kernels.packing import bits_to_float, float_to_bits

    values = jnp.asarray(RNG.normal(size=(1, 32, 64)), jnp.float32)
    value = Packed(float_to_bits(values, format), jnp.ones((1, 1, 1)), None, format, shape=(64, 32))
    largest = float(jnp.abs(bits_to_float(value.data)).max())
    for policy in ("zero", "saturate", "detect"):
        noisy, changed = jax.jit(make_noise(f"bitflip,rate=0.05,policy={policy}"))(KEY, value)
        found = np.asarray(bits_to_float(noisy.data))
        assert np.isfinite(found).all() and 0 < changed
        assert (np.abs(found).max() > 1e6) == (policy != "saturate")
        assert policy != "saturate" or np.abs(found).max() <= largest


def test_secded_puts_single_errors_right():
    scale = jnp.ones(20000)
    bare, unprotected = make_noise("scale_bits,rate=0.002,dtype=f16")(KEY, scale)
    _, protected = make_noise("scale_bits,rate=0.002,dtype=f16,secded=True")(KEY, scale)
    assert int(unprotected) == pytest.approx(20000 * (1 - 0.998**16), rel=0.1)
    # Two or more of 22 bits: 22 * 21 / 2 * 4e-6 = 0.0009.
    assert 5 < int(protected) < 40
    assert np.isfinite(bare).all()


@pytest.mark.parametrize(
    "spec, words",
    [
        ("bitflip,rate=0.1,policy=none", "policy must be one of zero, saturate"),
        ("bitflip,rate=0.1,storage=q4", "storage must be one of canonical, tq2_0"),
        ("bitflip,rate=0.1,burst=40", "burst must be 1 .. 32"),
        ("bitflip,rate=0.1,storage=tq1_0,policy=raw", "tq1_0 has no invalid code"),
        ("scale_bits,rate=0.1,dtype=f8", "dtype must be one of f32, bf16, f16"),
    ],
)
def test_bad_options_are_one_line(spec, words):
    with pytest.raises(UsageError, match=words):
        make_noise(spec)


def test_storage_of_trits_refuses_other_weights():
    with pytest.raises(UsageError, match="is of trits, found int8"):
        make_noise("bitflip,rate=0.1,storage=tq2_0")(KEY, packed(CODES, "int8"))
    with pytest.raises(UsageError, match="needs weights in trit2, found int8"):
        make_noise("sign_flip,rate=0.1").apply_packed(KEY, packed(CODES, "int8"), 0.1)
