"""Schemes round a scheme, for training alone: gradients, warm-up from float, noise.

Each changes `fake_quant` and leaves `quantize` to the scheme inside, so a model packs as it
would without. What changes from step to step comes in through `StepInput` leaves.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.errors import UsageError
from ternax.noise.model import NoiseModel
from ternax.quant.scheme import Scheme


class StepInput(nnx.Variable):
    """A leaf that the trainer sets before each step; neither trained nor saved."""


class Wrapped(Scheme):
    """A scheme that acts as `inner` does, until a subclass says otherwise."""

    def __init__(self, inner: Scheme):
        super().__init__(inner.shape)
        self.inner = inner

    def quantize(self, w, stats=None):
        return self.inner.quantize(w, stats)

    def fake_quant(self, w, *, key=None):
        return self.inner.fake_quant(w, key=key)


class Annealed(Wrapped):
    """From float to quantized: W + strength (fake_quant(W) - W), strength from 0 to 1.

    Source: the warm-up of Llama3-8B-1.58 (HF blog "1_58_llm_extreme_quantization").
    """

    def __init__(self, inner: Scheme, layers: int):
        super().__init__(inner)
        self.strength = StepInput(jnp.ones((layers,), jnp.float32))

    def fake_quant(self, w, *, key=None):
        strength = self.strength[...]
        return jnp.where(
            strength >= 1,
            self.inner.fake_quant(w, key=key),
            w + strength * (self.inner.fake_quant(w, key=key) - w),
        )


class Noisy(Wrapped):
    """Trained under noise: codes are struck anew each step, gradients are the scheme's own."""

    def __init__(self, inner: Scheme, layers: int, noise: NoiseModel):
        super().__init__(inner)
        if noise.domain != "codes":
            raise UsageError(
                f"training strikes codes: expected a noise on trits, found one on {noise.domain}"
            )
        self.noise = noise
        self.key = StepInput(jax.random.split(jax.random.key(0), layers))

    def fake_quant(self, w, *, key=None):
        quantized = self.inner.quantize(jax.lax.stop_gradient(w))
        codes, _ = self.noise(self.key[...], quantized.codes)
        struck = dataclasses.replace(quantized, codes=codes).dequantize() - quantized.dequantize()
        return self.inner.fake_quant(w, key=key) + jax.lax.stop_gradient(struck)


class Clipped(Wrapped):
    """The gradient passes where |W| is at most `limit` times its mean magnitude."""

    limit = 3.0

    def fake_quant(self, w, *, key=None):
        inside = jnp.abs(w) <= self.limit * jnp.mean(jnp.abs(w))
        return self.inner.fake_quant(jnp.where(inside, w, jax.lax.stop_gradient(w)), key=key)


class Tanh(Wrapped):
    """The gradient of g tanh(W / g), g = mean|W|. Source: DoReFa, arXiv:1606.06160."""

    def fake_quant(self, w, *, key=None):
        scale = jax.lax.stop_gradient(jnp.mean(jnp.abs(w)))
        soft = scale * jnp.tanh(w / scale)
        return self.inner.fake_quant(jax.lax.stop_gradient(w - soft) + soft, key=key)


class Stochastic(Wrapped):
    """Rounds up or down at random, right on average: half a step of dither before rounding."""

    def __init__(self, inner: Scheme, layers: int):
        super().__init__(inner)
        self.key = StepInput(jax.random.split(jax.random.key(0), layers))

    def fake_quant(self, w, *, key=None):
        dither = jax.random.uniform(self.key[...], w.shape, minval=-0.5, maxval=0.5)
        step = jax.lax.stop_gradient(jnp.mean(jnp.abs(w)))
        return self.inner.fake_quant(w + dither * step, key=key)


GRADIENTS = ("identity", "clipped", "tanh", "stochastic")


def with_gradient(scheme: Scheme, name: str, layers: int) -> Scheme:
    """The scheme under one of GRADIENTS."""
    if name == "stochastic":
        return Stochastic(scheme, layers)
    if name not in GRADIENTS:
        raise UsageError(f"gradient: expected one of {', '.join(GRADIENTS)}, found {name!r}")
    return {"identity": lambda s: s, "clipped": Clipped, "tanh": Tanh}[name](scheme)
