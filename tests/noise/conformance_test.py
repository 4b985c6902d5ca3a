"""What every noise of NOISES keeps to: identity at 0, true counts, one draw a key, jit, vmap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ternax.errors import UsageError
from ternax.kernels.packing import Packed, pack
from ternax.noise import NOISES, make_noise
from ternax.noise.model import DOMAINS

RNG = np.random.default_rng(0)
CODES = RNG.choice([-1, 0, 1], p=[0.3, 0.4, 0.3], size=(72, 40)).astype(np.int8)
PACKED = Packed(pack(jnp.asarray(CODES), "trit2"), jnp.ones((1, 1)), shape=CODES.shape)
VALUES = {
    "codes": jnp.asarray(CODES),
    "packed": PACKED,
    "scale": jnp.asarray(RNG.uniform(0.1, 2, (3, 1, 400)), jnp.float32),
    "norms": jnp.asarray(RNG.uniform(0.5, 2, (400,)), jnp.float32),
    "weights": jnp.asarray(CODES, jnp.float32),
    "inputs": jnp.asarray(RNG.normal(size=(5, 72)), jnp.float32),
    "cache": jnp.asarray(RNG.normal(size=(2, 9, 2, 8)), jnp.float32),
    "accumulator": jnp.asarray(RNG.normal(size=(5, 40)), jnp.float32),
}
# Every name, and every option of theirs, at least once.
SPECS = {
    "sign_flip": ("", "unit=row,block=16"),
    "trit_other": ("unit=block,block=8",),
    "trit_resample": ("", "density=uniform,unit=column,block=16"),
    "stuck": ("at=1", "at=-1,unit=row,block=16"),
    "stuck_cells": ("", "ones=0.2,repair=zero", "repair=sign"),
    "bitflip": (
        *(f"policy={name}" for name in ("zero", "saturate", "nearest", "detect", "raw")),
        *(f"storage={name}" for name in ("tq1_0", "tq2_0", "i2_s_arm")),
        "burst=5",
        "burst=3,storage=tq1_0",
    ),
    "byte_fault": ("policy=raw", "storage=tq1_0"),
    "scale_bits": ("", "dtype=bf16", "dtype=f16,secded=True,policy=raw"),
    "norm_bits": ("", "dtype=f16,secded=True,policy=raw"),
    "gaussian": ("", "kind=multiplicative"),
    "pcm": ("", "seconds=3600.0,compensate=False"),
    "reram": ("", "seconds=86400"),
    "read_gaussian": ("",),
    "input_gaussian": ("",),
    "input_clip": ("",),
    "input_grid": ("",),
    "cache_bits": ("", "dtype=int8", "dtype=int8,scale=False,policy=raw"),
}
# Made of parts, which strike what they are of: tests/noise/memory_test.py.
OF_PARTS = {"memory_bits": ("policy=raw,cache=int8",)}
CASES = [",".join(filter(None, (name, option))) for name, all_ in SPECS.items() for option in all_]


def of(spec, strength):
    noise = make_noise(spec, strength=strength)
    return noise, VALUES[noise.domain]


def leaf(value):
    return np.asarray(value.data if isinstance(value, Packed) else value)


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("spec", CASES)
def test_contract(spec):
    noise, value = of(spec, 0.2)
    key = jax.random.key(0)
    struck = jax.jit(noise.apply)
    found, changed = struck(key, value, 0.2)
    assert leaf(found).shape == leaf(value).shape and leaf(found).dtype == leaf(value).dtype
    # Counts are true.
    old, new = leaf(value), leaf(found)
    if isinstance(value, Packed):
        old, new = ((data[..., None] >> np.arange(0, 8, 2)) & 3 for data in (old, new))
    differing = (
        old.view(np.uint32) != new.view(np.uint32) if old.dtype == np.float32 else old != new
    )
    assert int(changed) == differing.sum() > 0
    # A key gives one draw, and another key another.
    same(struck(key, value, 0.2), (found, changed))
    if spec.partition(",")[0] not in ("input_clip", "input_grid"):
        assert (leaf(struck(jax.random.key(1), value, 0.2)[0]) != leaf(found)).any()
    # Strength 0 is the identity, and its count is 0.
    clean, none = struck(key, value, 0.0)
    same(clean, value)
    assert int(none) == 0
    if noise.domain in ("codes", "packed", "scale"):
        rates = (0.005, 0.02, 0.06) if noise.domain == "scale" else (0.02, 0.2, 0.6)
        counts = [int(struck(key, value, rate)[1]) for rate in rates]
        assert 0 < counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("spec", ["trit_resample", "scale_bits", "gaussian", "input_gaussian"])
def test_vmap_is_one_after_the_other(spec):
    noise, value = of(spec, 0.2)
    keys = jax.random.split(jax.random.key(2), 3)
    together = jax.jit(jax.vmap(noise, (0, None)))(keys, value)
    for i, key in enumerate(keys):
        one = jax.jit(noise)(key, value)
        if noise.domain in ("codes", "scale", "norms"):
            same(jax.tree.map(lambda a, i=i: a[i], together), one)
        else:  # floats: XLA may round otherwise
            np.testing.assert_allclose(together[0][i], one[0], rtol=1e-5, atol=1e-6)


def test_every_noise_and_option_is_tried():
    specs = {**SPECS, **OF_PARTS}
    assert set(specs) == set(NOISES)
    for name, kind in NOISES.items():
        options = {field.name for field in dataclasses.fields(kind)[1:]}
        tried = {part.partition("=")[0] for option in specs[name] for part in option.split(",")}
        assert options == tried - {""}, name
        assert kind.domain in DOMAINS


@pytest.mark.parametrize("name", NOISES)
def test_bad_strengths_are_one_line(name):
    first = NOISES[name].strength_field()
    for bad in (-0.1, float("nan"), float("inf"), "x", True, None):
        with pytest.raises(UsageError, match=f"{first} must|expected an? {first}"):
            make_noise(name, strength=bad)
    if NOISES[name].bounded:
        with pytest.raises(UsageError, match=r"lie in \[0, 1\], found 1.5"):
            make_noise(name, strength=1.5)
    with pytest.raises(UsageError, match="swept over"):
        make_noise(f"{name},{first}=0.1", strength=0.1)
