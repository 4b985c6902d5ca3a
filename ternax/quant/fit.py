"""Scales fitted to the outputs of a calibration set instead of to the weights.

For codes t_i (one for each plane and group, zero elsewhere) and H = X^T X, the scales a that
minimise |X (W - sum a_i t_i)|^2 solve A a = b with A_ij = t_i^T H t_j and b_i = t_i^T H w.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST
# Ridge of the solve, in units of the largest A_ii. Codes that agree but for a few weights
# make A singular in f32 before that.
_RIDGE = 1e-6


def fit_scales(codes: jax.Array, w: jax.Array, h: jax.Array, start: jax.Array) -> jax.Array:
    """The scales of `codes` with the least error at the output, all of a column jointly.

    What the ridge pulls towards is `start`, so the result is never worse than `start`.

    Args:
      codes: int8 [P, K, N].
      w: f32 [K, N].
      h: f32 [K, K], X^T X up to a factor.
      start: f32 [P, G, 1] (one scale for all columns) or [P, G, N].

    Returns:
      f32 like `start`.
    """
    planes, groups, columns = start.shape
    k_size, n = w.shape
    size, unknowns = k_size // groups, planes * groups
    trits = codes.astype(jnp.float32).reshape(planes, groups, size, n)

    def project(v):
        """t_i^T v of every plane and group. v: [K, N] -> [P G, N or 1]."""
        found = jnp.einsum("pgkn,gkn->pgn", trits, v.reshape(groups, size, n))
        found = found.reshape(unknowns, n)
        return found if columns > 1 or n == 1 else found.sum(1, keepdims=True)

    def row(i):
        plane, group = i // groups, i % groups
        band = jax.lax.dynamic_slice_in_dim(h, group * size, size, axis=1)
        return project(matmul(band, trits[plane, group]))

    a = jnp.moveaxis(jax.lax.map(row, jnp.arange(unknowns)), -1, 0)  # [N or 1, P G, P G]
    b = project(matmul(h, w)).T
    first = start.reshape(unknowns, -1).T
    left = b - jnp.einsum("nij,nj->ni", a, first, precision=HIGHEST)
    diagonal = jnp.diagonal(a, axis1=1, axis2=2)
    # A code that is zero everywhere has a row of zeros and keeps its start.
    ridge = _RIDGE * diagonal.max(1, keepdims=True) + (diagonal <= 0)
    step = jnp.linalg.solve(a + ridge[:, :, None] * jnp.eye(unknowns), left[..., None])
    return (first + step[..., 0]).T.reshape(start.shape)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in full f32, also where the platform would round the factors."""
    return jnp.matmul(a, b, precision=HIGHEST)
