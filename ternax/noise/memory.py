"""Noise on what is stored beside weights: keys and values, and all of a model's memory at once."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from ternax.counter_hash import mix
from ternax.noise.bits import BitFlip, NormBits, ScaleBits
from ternax.noise.model import NoiseModel, check_choice
from ternax.noise.reads import ReadNoise, token_hash
from ternax.noise.words import bit_flips


@dataclasses.dataclass(frozen=True)
class CacheBits(ReadNoise):
    """Bits of cached keys and values flip at the rate, once for all that read them.

    Value f32 [..., T, G, E], slots of heads; keys rotated, as the cache has them. A slot's flips
    are drawn from it and from all slots before it, so that no two places err alike, and a place
    errs alike in whatever batch it comes.

    Attributes:
      dtype: what the cache holds: "bf16", or "int8", codes in units of max|x| / 127 of the slot.
      policy: "zero" reads what is not finite, and int8's lowest code, as 0; "raw" as it is.
      scale: of int8, whether the f32 scale of each slot is struck as well.
    """

    rate: float
    dtype: str = "bf16"
    policy: str = "zero"
    scale: bool = True
    domain: ClassVar[str] = "cache"
    bounded: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_choice("cache_bits", "dtype", self.dtype, ("bf16", "int8"))
        check_choice("cache_bits", "policy", self.policy, ("zero", "raw"))
        check_choice("cache_bits", "scale", self.scale, (True, False))

    def noisy(self, key, value, strength):
        before = jnp.cumsum(mix(token_hash(value)), axis=-3, dtype=jnp.uint32)
        slot = mix(before)  # [..., T, G, 1]
        place = slot + jnp.arange(value.shape[-1], dtype=jnp.uint32)
        if self.dtype == "bf16":
            flips = bit_flips(key, place, 16, strength)
            stored = lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)
            read = lax.bitcast_convert_type(stored ^ flips.astype(jnp.uint16), jnp.bfloat16)
            found, hit = read.astype(jnp.float32), flips != 0
        else:
            flips = bit_flips(key, place, 8, strength)
            unit = jnp.maximum(jnp.max(jnp.abs(value), axis=-1, keepdims=True), 1e-8) / 127
            code = jnp.round(value / unit).astype(jnp.int8) ^ flips.astype(jnp.int8)
            if self.policy == "zero":
                code = jnp.where(code == -128, 0, code)
            hit, read = flips != 0, unit
            if self.scale:
                struck = bit_flips(key, ~slot, 32, strength)
                word = lax.bitcast_convert_type(unit, jnp.uint32) ^ struck
                read, hit = lax.bitcast_convert_type(word, jnp.float32), hit | (struck != 0)
            found = code * read
        if self.policy == "zero":
            found = jnp.where(jnp.isfinite(found), found, 0)
        # What nothing hit is what it was, whatever the cache would round it to.
        return jnp.where(hit, found, value)


@dataclasses.dataclass(frozen=True)
class MemoryBits(NoiseModel):
    """Every bit that a decode step reads flips at one rate: weights, tables, scales, norms, cache.

    What a pattern selects of these: projections alone select no table and no last norm.

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
