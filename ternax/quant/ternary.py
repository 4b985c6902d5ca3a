"""Ternary and binary schemes: absmean (BitNet b1.58), TWN, the optimum, and sign."""

import jax.numpy as jnp

from ternax.quant.scheme import EPS, BlockScheme


def mean_abs(w, axes):
    return jnp.mean(jnp.abs(w), axis=axes, keepdims=True)


def kept_mean(w, kept, axes):
    """Mean of |w| where `kept`: the least-squares scale of sign(w) on `kept`."""
    count = jnp.sum(kept, axis=axes, keepdims=True, dtype=jnp.float32)
    total = jnp.sum(jnp.abs(w) * kept, axis=axes, keepdims=True)
    return total / jnp.maximum(count, 1)


class AbsMean(BlockScheme):
    """BitNet b1.58: T = clip(round(W / g), -1, 1), scale g = mean|W|, rounding half to even.

    Source: arXiv:2402.17764.
    """

    def quantize_blocks(self, w, axes):
        scale = jnp.maximum(mean_abs(w, axes), EPS)
        return jnp.clip(jnp.round(w / scale), -1, 1), scale


class TWN(BlockScheme):
    """Ternary weight networks: zero under 0.7 mean|W|, scale the mean of |W| kept.

    Source: arXiv:1605.04711.
    """

    def quantize_blocks(self, w, axes):
        kept = jnp.abs(w) > 0.7 * mean_abs(w, axes)
        return jnp.sign(w) * kept, jnp.maximum(kept_mean(w, kept, axes), EPS)


class Optimal(BlockScheme):
    """The ternary matrix nearest W in least squares, exactly.

    Keeping the k largest |W| with their mean as scale leaves the error
    |W|^2 - (sum of the k largest)^2 / k; the best k is found over the sorted
    magnitudes, O(n log n).
    """

    def quantize_blocks(self, w, axes):
        magnitude = jnp.abs(w)
        flat = magnitude.reshape(1, -1, 1) if len(axes) == 3 else magnitude
        falling = jnp.flip(jnp.sort(flat, axis=1), axis=1)
        counts = jnp.arange(1, flat.shape[1] + 1, dtype=jnp.float32)[None, :, None]
        best = jnp.argmax(jnp.cumsum(falling, axis=1) ** 2 / counts, axis=1, keepdims=True)
        threshold = jnp.take_along_axis(falling, best, axis=1)
        kept = (magnitude >= threshold) & (magnitude > 0)
        return jnp.sign(w) * kept, jnp.maximum(kept_mean(w, kept, axes), EPS)


class Sign(BlockScheme):
    """Binary BitNet: sign(W - mean W), never zero; scale mean|W|. Source: arXiv:2310.11453."""

    codes_follow_sign = False

    def quantize_blocks(self, w, axes):
        centred = w - jnp.mean(w, axis=axes, keepdims=True)
        return jnp.where(centred >= 0, 1, -1), jnp.maximum(mean_abs(w, axes), EPS)
