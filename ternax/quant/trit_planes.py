"""`ptqtp`: a weight as the sum of two trit-planes with a scale each."""

import jax
import jax.numpy as jnp

from ternax.quant.fit import fit_scales
from ternax.quant.scheme import fitting_group
from ternax.quant.ternary import Optimal
from ternax.quantized import Quantized

# With 0 the nine sums a1 c1 + a2 c2 that a weight can become.
_PAIRS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
# A second plane whose part that the first does not hold is below this share of it gets no scale.
_COLLINEAR = 1e-6


class TritPlanes(Optimal):
    """PTQTP (arXiv:2509.16989): W ~ a1 T1 + a2 T2, a pair of scales for each group.

    Starts from the best ternary matrix and the best one of what it leaves, so that it is never
    worse than `optimal`; then the pair of scales (least squares in two unknowns) and the pair
    of trits (the nearest of nine sums) are chosen in turn, `steps` times. The paper starts from
    signs and adds a ridge; here a plane that is nearly a multiple of the other gets scale 0.
    With calibration the scales are fitted to the outputs at the end (`fit_scales`).

    Planes are packed at 2 bits a trit each: 4 bits a weight and two scales a group.
    """

    codes_idempotent = False  # the same sums may come from other pairs of planes

    def __init__(
        self,
        shape,
        *,
        granularity: str = "group",
        group_size: int = 128,
        steps: int = 20,
        rngs=None,
    ):
        if granularity == "group" and group_size == 128:
            granularity, group_size = fitting_group(shape[0], group_size)
        super().__init__(shape, granularity=granularity, group_size=group_size, rngs=rngs)
        self.steps = steps

    def quantize(self, w, stats=None):
        k_size, n = w.shape
        w = w.astype(jnp.float32)
        blocks = w.reshape(self.groups, k_size // self.groups, n)
        first, scale = self.quantize_blocks(blocks, self.axes)
        second, rest = self.quantize_blocks(blocks - first * scale, self.axes)
        planes = jnp.stack([first, second])
        scales = jnp.stack([scale, rest])
        planes, scales = jax.lax.fori_loop(
            0, self.steps, lambda _, found: improve(blocks, *found, self.axes), (planes, scales)
        )
        codes = planes.reshape(2, k_size, n).astype(jnp.int8)
        scales = scales[:, :, 0]
        if stats is not None:
            scales = fit_scales(codes, w, stats, scales)
        return Quantized(codes, scales, format=self.format)


def improve(
    w: jax.Array, planes: jax.Array, scales: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """One turn: for each weight the nearest of nine sums, then the best scales of those planes.

    Args:
      w: f32 [G, K / G, N].
      planes: f32 [2, G, K / G, N], trits.
      scales: f32 [2, G or 1, 1, N or 1], none negative.
      axes: what shares a scale.

    Returns:
      (planes, scales), with no larger a squared error and again no negative scale.
    """
    # Distances, not their squares, which overflow for weights past 1e19.
    distance, planes = jnp.abs(w), jnp.zeros_like(planes)
    for pair in _PAIRS:
        other = jnp.abs(w - pair[0] * scales[0] - pair[1] * scales[1])
        nearer = other < distance
        distance = jnp.where(nearer, other, distance)
        planes = jnp.where(nearer, jnp.reshape(jnp.asarray(pair, w.dtype), (2, 1, 1, 1)), planes)
    scales = plane_scales(w, planes, axes)
    return planes * jnp.where(scales < 0, -1, 1), jnp.abs(scales)


def plane_scales(w: jax.Array, planes: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The scales of two planes that fit w best: f32 [2, G or 1, 1, N or 1]."""

    def total(values):
        return jnp.sum(values, axis=axes, keepdims=True)

    first, second = planes
    norm = jnp.maximum(total(first * first), 1)
    shared = total(first * second) / norm
    of_first, of_second = total(w * first), total(w * second)
    # What the second plane has beside its multiple of the first.
    own, size = total(second * second) - shared * shared * norm, total(second * second)
    beside = own > _COLLINEAR * size
    rest = jnp.where(beside, (of_second - shared * of_first) / jnp.where(beside, own, 1), 0)
    return jnp.stack([(of_first - shared * norm * rest) / norm, rest])
