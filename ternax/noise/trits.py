"""Noise on trits. Codes int8 in {-1, 0, +1} and their packed words are struck alike, to the bit."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from ternax.counter_hash import below
from ternax.errors import UsageError
from ternax.kernels.packing import BLOCK
from ternax.noise.model import check_choice
from ternax.noise.words import (
    WHAT,
    WHERE,
    WordNoise,
    differing,
    draws,
    key_words,
    lane_swap,
    words_of,
)

UNITS = ("element", "row", "column", "block")
_TRITS = np.array([-1.0, 0.0, 1.0])


@dataclasses.dataclass(frozen=True)
class TritNoise(WordNoise):
    """Strikes trits at a rate; a subclass says what a struck trit becomes.

    Attributes:
      rate: probability that a trit is struck, in [0, 1].
      unit: what fails together: each "element" alone, a "row" (one input's weights, a word
        line), a "column" (one output's, a bit line), or a "block" of `block` x `block`. A unit
        fails with probability `rate`.
      block: edge of a block.
    """

    rate: float
    unit: str = "element"
    block: int = 16
    domain: ClassVar[str] = "codes"

    def __post_init__(self):
        super().__post_init__()
        check_choice("noise", "unit", self.unit, UNITS)
        if not isinstance(self.block, int) or self.block < 1:
            raise UsageError(f"noise: block must be at least 1, found {self.block!r}")

    def replace(self, code, draw, density):
        """What struck codes, uint32 0, 1, 2 for -1, 0, +1, become.

        draw: uint32, uniform and independent of everything; density: f32 [], of non-zeros.
        """
        raise NotImplementedError

    def replacement(self, density: float) -> np.ndarray:
        """f64 [3, 3]: P(a struck trit becomes j - 1 | it was i - 1)."""
        raise NotImplementedError

    def transition(self, density: float) -> np.ndarray:
        """f64 [3, 3]: P(trit is j - 1 | it was i - 1)."""
        return (1 - self.rate) * np.eye(3) + self.rate * self.replacement(density)

    def moments(self, density):
        table = self.transition(density)
        mean = table @ _TRITS
        return mean, table @ _TRITS**2 - mean**2

    def span(self, k_size: int) -> int:
        """How many neighbouring weights of one output fail together."""
        return {"block": min(self.block, k_size), "column": k_size}.get(self.unit, 1)

    def _new(self, key, code, n, word, lane, k_size, strength, density):
        """The codes at (row n, word, lane), struck. code, n, word: uint32, broadcast."""
        index = n * words_of(k_size) + word
        k = word * BLOCK + lane_swap(lane)
        if self.unit == "element":
            fault = draws(key, index, lane, WHERE)
        elif self.unit == "row":
            fault = draws(key, k, 0, WHERE)
        elif self.unit == "column":
            fault = draws(key, n, 0, WHERE)
        else:
            edge = jnp.uint32(self.block)
            fault = draws(key, n // edge * -(-k_size // self.block) + k // edge, 0, WHERE)
        struck = self.replace(code, draws(key, index, lane, WHAT), density)
        return jnp.where(below(fault, strength), struck, code)

    def strike(self, key, words, rows, matrix, strength, statistic):
        if matrix.format != "trit2":
            raise UsageError(
                f"noise on trits needs weights in trit2, found {matrix.format}; packed bits "
                "(bitflip) can be struck in any format"
            )
        word = jnp.arange(words.shape[1], dtype=jnp.uint32)[:, None]
        lane = jnp.arange(BLOCK, dtype=jnp.uint32)
        code = (words[..., None] >> (2 * lane)) & 3
        place = (rows[..., None], word, lane)
        new = self._new(key, code, *place, matrix.k_size, strength, statistic)
        return jnp.sum(new << (2 * lane), axis=-1, dtype=jnp.uint32)

    def apply(self, key, value, strength):
        *lead, k_size, n = value.shape
        k = jnp.arange(k_size, dtype=jnp.uint32)[:, None]
        rows = jnp.arange(int(np.prod(lead)) * n, dtype=jnp.uint32).reshape(*lead, 1, n)
        code = (value + 1).astype(jnp.uint32)
        density = jnp.sum(value != 0, dtype=jnp.int32).astype(jnp.float32) / value.size
        lane = lane_swap(k % BLOCK)
        args = (code, rows, k // BLOCK, lane, k_size, strength, density)
        new = self._new(key_words(key), *args)
        return (new.astype(jnp.int8) - 1).astype(value.dtype), differing(code, new, 32)


class SignFlip(TritNoise):
    """A struck trit changes its sign; a zero stays one."""

    def replace(self, code, draw, density):
        return 2 - code

    def replacement(self, density):
        return np.eye(3)[::-1]


class TritOther(TritNoise):
    """A struck trit becomes one of the two others, either as likely."""

    def replace(self, code, draw, density):
        moved = code + 1 + (draw & 1)
        return jnp.where(moved > 2, moved - 3, moved)

    def replacement(self, density):
        return (1 - np.eye(3)) / 2


@dataclasses.dataclass(frozen=True)
class TritResample(TritNoise):
    """A struck trit is drawn anew: uniformly, or with the density of non-zeros it had.

    Attributes:
      density: "same" draws non-zeros as often as the matrix has them, either sign as
        likely; "uniform" draws each of the three as often.
    """

    density: str = "same"
    statistic: ClassVar[str | None] = "density"

    def __post_init__(self):
        super().__post_init__()
        check_choice("trit_resample", "density", self.density, ("same", "uniform"))

    def replace(self, code, draw, density):
        share = density if self.density == "same" else 2 / 3
        signs = (draw & 1) * 2
        return jnp.where(below(draw, share), signs, jnp.ones_like(signs))

    def replacement(self, density):
        share = density if self.density == "same" else 2 / 3
        return np.broadcast_to([share / 2, 1 - share, share / 2], (3, 3))


@dataclasses.dataclass(frozen=True)
class Stuck(TritNoise):
    """A struck cell holds one value for ever: `at` is -1, 0 or +1."""

    at: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_choice("stuck", "at", self.at, (-1, 0, 1))

    def replace(self, code, draw, density):
        return jnp.full_like(code, self.at + 1)

    def replacement(self, density):
        return np.broadcast_to(np.eye(3)[self.at + 1], (3, 3))
