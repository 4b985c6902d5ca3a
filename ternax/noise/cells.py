"""Stuck cells of memories that hold a trit in two: +1 is (1, 0), -1 is (0, 1), 0 is (0, 0).

Repairs are those of ReTern (arXiv:2506.01140), for compute-in-memory of ternary models: 0 is (1, 1)
as well, and a column may be stored with its sign turned, and turned back behind the sum.
"""

import dataclasses
import itertools
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

REPAIRS = ("none", "zero", "sign")


@dataclasses.dataclass(frozen=True)
class StuckCells(WordNoise):
    """Each cell is stuck with probability `rate`, for ever.

    Attributes:
      rate: in [0, 1].
      ones: share of stuck cells that are stuck at 1.
      repair: "none"; "zero": a 0 with one cell stuck at 1 has the other at 1 too; "sign": that, and
        each output's weights are stored with the sign that leaves the smaller error.
    """

    rate: float
    ones: float = 0.5
    repair: str = "none"
    domain: ClassVar[str] = "codes"

    def __post_init__(self):
        super().__post_init__()
        check_choice("stuck_cells", "repair", self.repair, REPAIRS)
        if isinstance(self.ones, bool) or not 0 <= self.ones <= 1:
            raise UsageError(f"stuck_cells: ones must lie in [0, 1], found {self.ones!r}")

    @property
    def has_law(self) -> bool:
        return self.repair != "sign"

    def read(self, code, stuck, held):
        """What cells written for codes 0, 1, 2 (-1, 0, +1) say: codes.

        stuck, held: pairs of bool, of the plus and the minus cell: whether, and at 1.
        """
        plus, minus = (
            jnp.where(bad, at, code == side)
            for bad, at, side in zip(stuck, held, (2, 0), strict=True)
        )
        if self.repair != "none":
            zero = code == 1
            # Whichever cell still can follows the one that is stuck.
            plus = jnp.where(zero & stuck[1] & ~stuck[0], held[1], plus)
            minus = jnp.where(zero & stuck[0] & ~stuck[1], held[0], minus)
        return jnp.uint32(1) + plus.astype(jnp.uint32) - minus.astype(jnp.uint32)

    def _new(self, key, code, index, lane, strength, real, axes):
        """Codes behind the faults; real: bool, what is no padding; axes: along one output."""
        stuck, held = [], []
        for cell in range(2):
            own = key ^ jnp.array([cell, 0], jnp.uint32)
            stuck.append(below(draws(own, index, lane, WHERE), strength))
            held.append(below(draws(own, index, lane, WHAT), self.ones))
        new = self.read(code, stuck, held)
        if self.repair != "sign":
            return new
        turned = 2 - self.read(2 - code, stuck, held)

        def error(found):
            gap = jnp.abs(found.astype(jnp.int32) - code.astype(jnp.int32))
            return jnp.sum(jnp.where(real, gap, 0), axis=axes, keepdims=True)

        return jnp.where(error(turned) < error(new), turned, new)

    def strike(self, key, words, rows, matrix, strength, statistic):
        if matrix.format != "trit2":
            raise UsageError(f"noise on trits needs weights in trit2, found {matrix.format}")
        word = jnp.arange(words.shape[1], dtype=jnp.uint32)[:, None]
        lane = jnp.arange(BLOCK, dtype=jnp.uint32)
        code = (words[..., None] >> (2 * lane)) & 3
        index = rows[..., None] * words_of(matrix.k_size) + word
        real = word * BLOCK + lane_swap(lane) < matrix.k_size
        new = self._new(key, code, index, lane, strength, real, (-2, -1))
        return jnp.sum(new << (2 * lane), axis=-1, dtype=jnp.uint32)

    def apply(self, key, value, strength):
        *lead, k_size, n = value.shape
        k = jnp.arange(k_size, dtype=jnp.uint32)[:, None]
        rows = jnp.arange(int(np.prod(lead)) * n, dtype=jnp.uint32).reshape(*lead, 1, n)
        code = (value + 1).astype(jnp.uint32)
        index, lane = rows * words_of(k_size) + k // BLOCK, lane_swap(k % BLOCK)
        new = self._new(key_words(key), code, index, lane, strength, True, (-2,))
        return (new.astype(jnp.int8) - 1).astype(value.dtype), differing(code, new, 32)

    def moments(self, density):
        if not self.has_law:
            raise NotImplementedError("which sign a column is stored with depends on all of it")
        states = {None: 1 - self.rate, 0: self.rate * (1 - self.ones), 1: self.rate * self.ones}
        table = np.zeros((3, 3))
        for code, plus, minus in itertools.product(range(3), states, states):
            stuck = [jnp.array(state is not None) for state in (plus, minus)]
            held = [jnp.array(bool(state)) for state in (plus, minus)]
            read = int(self.read(jnp.uint32(code), stuck, held))
            table[code, read] += states[plus] * states[minus]
        trits = np.array([-1.0, 0.0, 1.0])
        mean = table @ trits
        return mean, table @ trits**2 - mean**2
