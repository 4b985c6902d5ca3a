"""`NoiseModel`: the protocol of every noise. A noise is a pure function of (key, value)."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import numpy as np

from ternax.errors import UsageError

# What a noise may strike, and what its value then is.
DOMAINS = {
    "codes": "a quantizer's trits, int8 [..., K, N] in {-1, 0, +1}",
    "packed": "the bits that codes are stored in: a kernels.packing.Packed",
    "scale": "the bits that scales are stored in: f32 of any shape",
    "norms": "the bits that weights of norms are stored in: f32 of any shape",
    "weights": "analog weights in units of the largest: f32 [..., K, N] in [-1, 1]",
    "inputs": "what a projection multiplies, one token a row: f32 [..., K]",
    "accumulator": "a projection's outputs in units of scale |x|: f32 [..., N]",
    "cache": "keys or values, slots of heads: f32 [..., T, G, E]",
    "memory": "all that its `parts` strike",
}


@dataclasses.dataclass(frozen=True)
class NoiseModel:
    """What happens to a value, at a strength. At strength 0 it comes back as it was, to the bit.

    Subclasses are frozen dataclasses whose first field is the strength.

    Attributes:
      domain: a key of DOMAINS.
      when: "program", once and for all, or "read", anew at each call.
      bounded: whether the strength is a probability, in [0, 1], and not any number from 0 up.
      statistic: what `strength`'s draw must know of the whole value: "density", "peak" or None.
    """

    domain: ClassVar[str] = "codes"
    when: ClassVar[str] = "program"
    bounded: ClassVar[bool] = True
    statistic: ClassVar[str | None] = None

    def __post_init__(self):
        found, name = self.strength, self.strength_name
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not number or not math.isfinite(found) or found < 0 or (self.bounded and found > 1):
            legal = "lie in [0, 1]" if self.bounded else "be finite and at least 0"
            raise UsageError(f"noise {name} must {legal}, found {found!r}")

    @property
    def has_law(self) -> bool:
        """Whether `moments` are known, if the class has them at all."""
        return True

    @classmethod
    def strength_field(cls) -> str:
        """The name of the strength: "rate", "sigma", ..."""
        return dataclasses.fields(cls)[0].name

    @property
    def strength_name(self) -> str:
        return self.strength_field()

    @property
    def strength(self) -> float:
        return getattr(self, self.strength_field())

    def with_strength(self, strength: float) -> "NoiseModel":
        """The same noise at another strength."""
        change: dict[str, Any] = {self.strength_field(): strength}
        return dataclasses.replace(self, **change)

    def parts(self) -> tuple["NoiseModel", ...]:
        """The noises that it is made of, each on its own domain, one behind the other; itself."""
        return (self,)

    def __call__(self, key: jax.Array, value):
        """value -> (the noisy value, int32 []: how many elements differ from before)."""
        return self.apply(key, value, self.strength)

    def apply(self, key: jax.Array, value, strength):
        """`__call__` at a strength that may be traced, f32 []: a sweep compiles once."""
        raise NotImplementedError

    def moments(self, density: float) -> tuple[np.ndarray, np.ndarray]:
        """(mean, variance) of a noisy weight given the clean trit -1, 0 or +1: f64 [3] each.

        density: share of trits that are not 0. Noises that no formula is known for, or that
        strike something else than weights, leave it out.
        """
        raise NotImplementedError


def check_choice(noise: str, field: str, found, legal) -> None:
    """UsageError unless `found` is among `legal`."""
    if found not in legal:
        choices = ", ".join(map(str, legal))
        raise UsageError(f"{noise}: {field} must be one of {choices}, found {found!r}")


@functools.partial(jax.jit, static_argnums=0)
def apply(noise: NoiseModel, key: jax.Array, value, strength):
    """`noise.apply`, compiled; for all strengths once, if `noise` is handed in at strength 0."""
    return noise.apply(key, value, strength)
