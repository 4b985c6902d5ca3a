"""`NoiseModel`: the protocol of every noise. A noise is a pure function of (key, value)."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from ternax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class NoiseModel:
    """What happens to a value, at a rate.

    Attributes:
      rate: probability that an element is struck, in [0, 1]. At 0 the value is returned
        as it came, to the bit.
      domain: what it strikes; "codes" are a `Quantized`'s trits.
    """

    rate: float
    domain: ClassVar[str] = "codes"

    def __post_init__(self):
        rate = self.rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise UsageError(f"noise rate must lie in [0, 1], found {rate!r}")

    def __call__(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """value -> (the noisy value, int32 []: how many elements differ from before)."""
        raise NotImplementedError

    def transition(self, density: float) -> np.ndarray:
        """f64 [3, 3]: P(trit is j - 1 | it was i - 1); density: share of codes that are not 0."""
        raise NotImplementedError
