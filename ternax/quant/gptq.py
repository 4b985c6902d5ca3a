"""`gptq`: trits chosen one input at a time, each error made good by the inputs that follow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ternax.errors import UsageError
from ternax.quant.fit import fit_scales, matmul
from ternax.quant.ternary import Optimal

# Inputs whose errors are passed on among themselves first, then to the rest in one product.
BLOCK = 128


class GPTQ(Optimal):
    """Ternary GPTQ (arXiv:2210.17323): needs calibration; without it this is `optimal`.

    The grid {-a, 0, a} is that of the ternary matrix nearest W, an a for each tensor, row or
    group, fixed before the loop. Input k of all outputs is rounded to it, and what that
    changes in X W is taken out, as far as inputs k + 1 .. allow, by moving their weights. At
    the end the scales are fitted to the outputs (`fit_scales`), with these codes.

    Options:
      damping: added to the diagonal of X^T X, in units of its mean.
      act_order: start with the inputs of the largest mean square.
    """

    def __init__(
        self,
        shape,
        *,
        granularity: str = "row",
        group_size: int = 128,
        damping: float = 0.01,
        act_order: bool = False,
        rngs=None,
    ):
        super().__init__(shape, granularity=granularity, group_size=group_size, rngs=rngs)
        if not 0 < damping < 10:
            raise UsageError(f"damping must lie between 0 and 10, found {damping}")
        self.damping, self.act_order = damping, act_order

    def quantize(self, w, stats=None):
        found = super().quantize(w)
        if stats is None:
            return found
        w, scale = w.astype(jnp.float32), found.scale[0]
        k_size, n = w.shape
        grid = jnp.broadcast_to(scale, (scale.shape[0], n))
        group = jnp.arange(k_size) // (k_size // scale.shape[0])
        order = jnp.argsort(-jnp.diagonal(stats)) if self.act_order else jnp.arange(k_size)
        codes = gptq_codes(w[order], stats[order][:, order], grid, group[order], self.damping)
        codes = jnp.zeros((1, k_size, n), jnp.int8).at[0, order].set(codes)
        return dataclasses.replace(
            found, codes=codes, scale=fit_scales(codes, w, stats, found.scale)
        )


@functools.partial(jax.jit, static_argnames="damping")
def gptq_codes(
    w: jax.Array, h: jax.Array, scale: jax.Array, group: jax.Array, damping: float
) -> jax.Array:
    """The column loop of GPTQ on the grid {-scale, 0, scale}, inputs in the order given.

    Args:
      w: f32 [K, N].
      h: f32 [K, K], X^T X up to a factor.
      scale: f32 [G, N].
      group: int32 [K], the row of `scale` that input k uses.
      damping: added to h's diagonal, in units of its mean.

    Returns:
      int8 [K, N], trits.
    """
    k_size, n = w.shape
    pad = -k_size % BLOCK
    upper = _feedback(h, damping)
    # Padded inputs come last, weigh nothing and have no error to pass on.
    upper = jnp.pad(upper, ((0, pad), (0, pad))) + jnp.diag(jnp.arange(k_size + pad) >= k_size)
    w = jnp.pad(w, ((0, pad), (0, 0)))
    group = jnp.pad(group, (0, pad))

    def one_block(w, i):
        inside = jax.lax.dynamic_slice_in_dim(upper, i * BLOCK, BLOCK)
        square = jax.lax.dynamic_slice_in_dim(inside, i * BLOCK, BLOCK, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(w, i * BLOCK, BLOCK)
        steps = jax.lax.dynamic_slice_in_dim(group, i * BLOCK, BLOCK)

        def one_input(rows, step):
            j, feedback = step
            level = scale[steps[j]]
            code = jnp.clip(jnp.round(rows[j] / level), -1, 1)
            error = (rows[j] - code * level) / feedback[j]
            # feedback is zero for the inputs before j; row j itself becomes its rounded value.
            return rows - feedback[:, None] * error, (code.astype(jnp.int8), error)

        _, (codes, errors) = jax.lax.scan(one_input, rows, (jnp.arange(BLOCK), square))
        return w - matmul(inside.T, errors), codes

    _, codes = jax.lax.scan(one_block, w, jnp.arange((k_size + pad) // BLOCK))
    return codes.reshape(-1, n)[:k_size]


def _feedback(h: jax.Array, damping: float) -> jax.Array:
    """U [K, K], upper triangular, with U^T U the inverse of the damped H.

    With H = R R^T for an upper R, which is the Cholesky factor of H read backwards, U is the
    inverse of R: one triangular solve, and the inverse of H is never formed.
    """
    diagonal = jnp.diagonal(h)
    mean = jnp.mean(diagonal)
    h = h + jnp.diag(jnp.broadcast_to(damping * mean + (mean <= 0), diagonal.shape))
    backwards = jnp.linalg.cholesky(h[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(backwards[::-1, ::-1], jnp.eye(len(h)), lower=False)
