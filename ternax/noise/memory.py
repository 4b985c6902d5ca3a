"""Noise on what is stored beside weights: keys and values, and all of a model's memory at once."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from ternax.counter_hash import below, mix
from ternax.noise.bits import BitFlip, NormBits, ScaleBits
from ternax.noise.model import NoiseModel, check_choice
from ternax.noise.reads import ReadNoise, token_hash
from ternax.noise.words import WHERE, draws


@dataclasses.dataclass(frozen=True)
class CacheBits(ReadNoise):
    """Bits of cached keys and values flip at the rate, once for all that read them.

    Value f32 [..., E], a slot of a head: keys rotated, as the cache has them.

    Attributes:
      dtype: what the cache holds: "bf16", or "int8", codes in units of max|x| / 127 of the slot,
        whose scale is not struck.
      policy: "zero" reads what is not finite, and int8's lowest code, as 0; "raw" as it is.
    """

    rate: float
    dtype: str = "bf16"
    policy: str = "zero"
    domain: ClassVar[str] = "cache"
    bounded: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_choice("cache_bits", "dtype", self.dtype, ("bf16", "int8"))
        check_choice("cache_bits", "policy", self.policy, ("zero", "raw"))

    def noisy(self, key, value, strength):
        bits = 16 if self.dtype == "bf16" else 8
        place = mix(token_hash(value)) + jnp.arange(value.shape[-1], dtype=jnp.uint32)
        flips = jnp.zeros(value.shape, jnp.uint32)
        for bit in range(bits):
            hit = below(draws(key, place, bit, WHERE), strength)
            flips |= jnp.where(hit, jnp.uint32(1 << bit), jnp.uint32(0))
        if self.dtype == "bf16":
            stored = lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)
            read = lax.bitcast_convert_type(stored ^ flips.astype(jnp.uint16), jnp.bfloat16)
            found, legal = read.astype(jnp.float32), jnp.isfinite(read)
        else:
            unit = jnp.maximum(jnp.max(jnp.abs(value), axis=-1, keepdims=True), 1e-8) / 127
            code = jnp.round(value / unit).astype(jnp.int8) ^ flips.astype(jnp.int8)
            found, legal = code * unit, code != -128
        if self.policy == "zero":
            found = jnp.where(legal, found, 0)
        # What nothing hit is what it was, whatever the cache would round it to.
        return jnp.where(flips == 0, value, found)


@dataclasses.dataclass(frozen=True)
class MemoryBits(NoiseModel):
    """Every bit that a decode step reads flips at one rate: weights, tables, scales, norms, cache.

    Attributes:
      policy: of all that `parts` strikes: "zero" or "raw".
      cache: as `CacheBits.dtype`.
    """

    rate: float
    policy: str = "zero"
    cache: str = "bf16"
    domain: ClassVar[str] = "memory"

    def __post_init__(self):
        super().__post_init__()
        check_choice("memory_bits", "policy", self.policy, ("zero", "raw"))
        check_choice("memory_bits", "cache", self.cache, ("bf16", "int8"))

    def parts(self):
        return (
            BitFlip(self.rate, policy=self.policy),
            ScaleBits(self.rate, policy=self.policy),
            NormBits(self.rate, policy=self.policy),
            CacheBits(self.rate, self.cache, self.policy),
        )
