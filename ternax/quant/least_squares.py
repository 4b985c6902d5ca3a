"""`ls`: BitNet's trits with the scale that fits best, to the weights or to the outputs."""

import dataclasses

import jax.numpy as jnp

from ternax.quant.fit import fit_scales
from ternax.quant.scheme import EPS, BlockScheme
from ternax.quant.ternary import kept_mean, mean_abs


class LeastSquares(BlockScheme):
    """T of absmean, scale a = <T, W> / <T, T>, which is the mean of |W| where T is not zero.

    With calibration H = X^T X the scales minimise the error of the outputs X W instead:
    a = (t^T H w) / (t^T H t) for a tensor or a row. Groups of a row are solved together,
    since their inputs are correlated; without H they are independent.
    """

    def quantize_blocks(self, w, axes):
        codes = jnp.clip(jnp.round(w / jnp.maximum(mean_abs(w, axes), EPS)), -1, 1)
        return codes, jnp.maximum(kept_mean(w, codes != 0, axes), EPS)

    def quantize(self, w, stats=None):
        found = super().quantize(w)
        if stats is None:
            return found
        scale = fit_scales(found.codes, w.astype(jnp.float32), stats, found.scale)
        return dataclasses.replace(found, scale=scale)
