"""Noise on the cache and on all memory: against bits flipped in numpy, and counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ternax
from ternax.errors import UsageError
from ternax.noise import make_noise
from ternax.noise.bits import BitFlip
from ternax.noise.memory import CacheBits, MemoryBits
from ternax.noise.storage import from_halves, to_halves
from ternax.noise_summary import stored_bits

KEY = jax.random.key(3)
SLOTS = jax.random.normal(jax.random.key(1), (4, 50, 2, 64))


def bits_of(x, dtype):
    unsigned = {2: np.uint16, 1: np.uint8}[jnp.dtype(dtype).itemsize]
    return np.asarray(jnp.asarray(x).astype(dtype)).view(unsigned)


def test_equal_slots_err_apart():
    """Memory knows no contents: a value errs otherwise at another place, or behind others."""
    same = jnp.broadcast_to(SLOTS[:1, :1], SLOTS.shape)
    noisy = np.asarray(CacheBits(0.05)(KEY, same)[0])
    for t in range(1, 50):
        assert not np.array_equal(noisy[0, 0], noisy[0, t])
    np.testing.assert_array_equal(noisy[0], noisy[1])  # the same text is the same
    other = np.asarray(CacheBits(0.05)(KEY, same.at[1, 3].set(-1.0))[0])
    np.testing.assert_array_equal(noisy[1, :3], other[1, :3])
    assert all(not np.array_equal(noisy[1, t], other[1, t]) for t in range(3, 50))


def test_bits_of_a_bf16_cache_flip_at_the_rate():
    noisy = CacheBits(0.02, policy="raw")(KEY, SLOTS)[0]
    hit = np.asarray(noisy != SLOTS)
    flips = bits_of(noisy, jnp.bfloat16)[hit] ^ bits_of(SLOTS, jnp.bfloat16)[hit]
    count, most = np.bitwise_count(flips).sum(), SLOTS.size * 16
    assert abs(count - 0.02 * most) < 5 * np.sqrt(0.02 * most)
    each = [(flips >> bit & 1).sum() for bit in range(16)]
    assert min(each) > 0.7 * 0.02 * SLOTS.size and max(each) < 1.3 * 0.02 * SLOTS.size
    # What was not hit is not rounded either.
    assert np.asarray(SLOTS)[~hit].tolist() == np.asarray(noisy)[~hit].tolist()


def test_every_bit_flips_at_rate_one():
    noisy = CacheBits(1.0, policy="raw")(KEY, SLOTS)[0]
    both = bits_of(noisy, jnp.bfloat16) ^ bits_of(SLOTS, jnp.bfloat16)
    finite = np.isfinite(np.asarray(noisy))
    assert (both[finite] == 0xFFFF).all() and finite.mean() > 0.9
    zeroed = CacheBits(1.0)(KEY, SLOTS)[0]
    assert np.isfinite(np.asarray(zeroed)).all()


def test_an_int8_cache_errs_by_codes():
    settings = {"dtype": "int8", "scale": False}
    noisy = np.asarray(CacheBits(0.05, policy="raw", **settings)(KEY, SLOTS)[0])
    slots = np.asarray(SLOTS)
    unit = np.abs(slots).max(-1, keepdims=True) / 127
    code, hit = np.rint(slots / unit).astype(np.int8), noisy != slots
    read = np.rint(noisy / unit).astype(int)
    assert (read[hit] >= -128).all() and (read[hit] <= 127).all()
    flips = np.bitwise_count((read.astype(np.int8) ^ code).view(np.uint8))[hit].sum()
    assert abs(flips - 0.05 * 8 * slots.size) < 5 * np.sqrt(0.05 * 8 * slots.size)
    legal = np.asarray(CacheBits(0.05, **settings)(KEY, SLOTS)[0])
    assert (legal[(read == -128) & hit] == 0).all() and ((read == -128) & hit).any()


def test_scales_of_an_int8_cache_err_too():
    rate = 0.002
    codes, both = (
        np.asarray(CacheBits(rate, dtype="int8", policy="raw", scale=scale)(KEY, SLOTS)[0])
        for scale in (False, True)
    )
    moved = (codes != both).any(-1)  # a scale's flip moves its whole slot
    expected = moved.size * (1 - (1 - rate) ** 32)
    assert abs(moved.sum() - expected) < 5 * np.sqrt(expected)
    finite = np.asarray(CacheBits(0.05, dtype="int8")(KEY, SLOTS)[0])
    assert np.isfinite(finite).all()


def test_a_slot_errs_alike_in_any_batch():
    noise = CacheBits(0.1)
    whole = np.asarray(noise(KEY, SLOTS)[0])
    np.testing.assert_array_equal(whole[2:3, :7], noise(KEY, SLOTS[2:3, :7])[0])


def test_floats_as_halves():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    back = from_halves(to_halves(x), 7)
    np.testing.assert_array_equal(back, np.asarray(x).astype(np.float16).astype(np.float32))
    assert np.asarray(to_halves(x)).view(np.uint16)[0, :7].tolist() == (
        np.asarray(x).astype(np.float16).view(np.uint16)[0].tolist()
    )


@pytest.fixture(scope="module")
def floats():
    return ternax.load("stdlib-bitnet", scheme="none,dtype=f32", seed=1, weights="random")


def weights(model):
    return np.asarray(model.layers.mlp.down.packed.data).view(np.float32)


def test_bits_of_halves_flip_at_the_rate_and_the_rest_stays(floats):
    noise = BitFlip(0.01, policy="raw", storage="f16")
    noisy, counts = ternax.perturb(floats, noise, KEY, select=".*mlp.down", copy=True)
    clean, struck = weights(floats), weights(noisy)
    halves = [x.astype(np.float16).view(np.uint16) for x in (clean, struck)]
    hit = clean != struck
    flips = (halves[0] ^ halves[1])[hit & np.isfinite(struck)]
    each = [(flips >> bit & 1).sum() for bit in range(16)]
    # Of 1,966 expected, less those of what is not finite any more.
    assert min(each) > 1700 and max(each) < 2200
    assert sum(counts.values()) == hit.sum()
    clamped, _ = ternax.perturb(
        floats, BitFlip(0.01, policy="saturate", storage="f16"), KEY, select=".*mlp.down", copy=True
    )
    for layer in range(len(clean)):
        assert np.abs(weights(clamped)[layer]).max() <= np.abs(clean[layer]).max()


def test_trits_are_no_halves():
    with pytest.raises(UsageError, match="storage f16 is of floats, found layers"):
        ternax.perturb(ternax.load("stdlib-bitnet"), BitFlip(0.1, storage="f16"), KEY)


TOKENS = np.arange(24)[None] + 97


def test_noise_on_the_cache_is_of_the_layers_selected_and_at_zero_none(tmp_path):
    model = ternax.load("stdlib-bitnet")
    clean = np.asarray(model(TOKENS))
    for layers, strength, same in ((None, 0.0, True), (range(2, 3), 0.05, False)):
        noise = make_noise("cache_bits,dtype=int8", strength=strength)
        noisy, counts = ternax.perturb(model, noise, KEY, layers=layers, copy=True)
        assert set(counts.values()) == {0}
        assert "layers.2.attn.cache" in counts and len(counts) == (1 if layers else 3)
        if layers:
            assert noisy.layers.attn.memory.strength[...].tolist() == [0, 0, np.float32(strength)]
        assert np.array_equal(noisy(TOKENS), clean) == same
    with pytest.raises(UsageError, match="the cache is under a noise already"):
        ternax.perturb(noisy, noise, KEY)
    with pytest.raises(UsageError, match="in full passes, model"):
        ternax.generate(noisy, TOKENS, max_new_tokens=2)
    for format in ("orbax", "hf", "gguf:TQ2_0"):
        with pytest.raises(UsageError, match="layers.attn.memory is read with noise, which no"):
            ternax.save(noisy, tmp_path / format[:4], format)


def test_all_memory_is_the_sum_of_its_parts():
    model = ternax.load("stdlib-bitnet")
    noise = MemoryBits(0.001, cache="int8")
    noisy, counts = ternax.perturb(model, noise, KEY, select=".*", copy=True)
    expected: dict = {}
    for number, part in enumerate(noise.parts()):
        key = jax.random.fold_in(KEY, number)
        _, found = ternax.perturb(model, part, key, select=".*", copy=True)
        expected = {n: expected.get(n, 0) + found.get(n, 0) for n in expected | found}
    assert counts == expected
    assert counts["embedding"] > 0 and counts["layers.1.mlp.up"] > 0 and "norm" in counts
    assert noisy.layers.attn.memory is not None and model.layers.attn.memory is None


def test_what_cannot_be_struck_whole_is_not_struck_at_all():
    model = ternax.load("stdlib-bitnet")
    before = np.asarray(model.layers.mlp.down.packed.data)
    noise = MemoryBits(0.001)
    with pytest.raises(UsageError, match="noise on norms is on whole norms"):
        ternax.perturb(model, noise, KEY, select=".*", rows=0.5)
    np.testing.assert_array_equal(model.layers.mlp.down.packed.data, before)
    noisy, _ = ternax.perturb(model, noise, KEY, select=".*")
    after = np.asarray(noisy.layers.mlp.down.packed.data)
    with pytest.raises(UsageError, match="the cache is under a noise already"):
        ternax.perturb(noisy, noise, KEY, select=".*")
    np.testing.assert_array_equal(noisy.layers.mlp.down.packed.data, after)


def test_scales_of_floats_are_none(floats):
    _, counts = ternax.perturb(floats, MemoryBits(0.001), KEY, select=".*", copy=True)
    assert counts["layers.0.mlp.down"] > 0
    with pytest.raises(UsageError, match="nothing is named 'nowhere'"):
        ternax.perturb(floats, MemoryBits(0.001), KEY, select="nowhere", copy=True)


def test_bits_that_can_be_struck(floats):
    model, down = ternax.load("stdlib-bitnet"), r"layers\.1\.mlp\.down"
    for storage, of, expected in (
        ("canonical", model, 2 * 256 * 256),
        ("tq1_0", model, 52 * 8 * 256),
        ("f16", floats, 16 * 256 * 256),
        ("canonical", floats, 32 * 256 * 256),
    ):
        assert stored_bits(BitFlip(0.1, storage=storage), of, down) == expected
    assert stored_bits(BitFlip(0.1), model, "embedding") == 8 * 256 * 256
    planes = ternax.load("stdlib-bitnet", scheme="ptqtp", weights="random")
    assert stored_bits(BitFlip(0.1), planes, down) == 2 * 2 * 256 * 256
