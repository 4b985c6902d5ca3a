"""Trits as GPU kernels read them, for tests."""

import jax.numpy as jnp
import numpy as np

from ternax.kernels import packing
from ternax.kernels.packing import Packed
from ternax.kernels.pallas import tiles


def tiled(values, scale=None, zero=None) -> Packed:
    """values: int8 [L, P, K, N]."""
    leaf = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    scale = np.ones((*values.shape[:2], 1, 1)) if scale is None else scale
    data = jnp.asarray(packing.pack_numpy(values, "trit2"))
    return tiles.repack(Packed(data, leaf(scale), leaf(zero), shape=values.shape[-2:]))
