"""Noise models by name. `make_noise("sign_flip,rate=0.1")(key, codes) -> (codes, changed)`."""

import dataclasses

from ternax.errors import UsageError
from ternax.noise import analog, bits, cells, memory, reads, trits
from ternax.noise.model import NoiseModel
from ternax.options import named_class, parse_options

NOISES: dict[str, type[NoiseModel]] = {
    # Trits.
    "sign_flip": trits.SignFlip,
    "trit_other": trits.TritOther,
    "trit_resample": trits.TritResample,
    "stuck": trits.Stuck,
    "stuck_cells": cells.StuckCells,
    # Stored bits.
    "bitflip": bits.BitFlip,
    "byte_fault": bits.ByteFault,
    "scale_bits": bits.ScaleBits,
    "norm_bits": bits.NormBits,
    "cache_bits": memory.CacheBits,
    "memory_bits": memory.MemoryBits,
    # Analog weights.
    "gaussian": analog.Gaussian,
    "pcm": analog.Pcm,
    "reram": analog.Reram,
    # Each read.
    "read_gaussian": reads.ReadGaussian,
    "input_gaussian": reads.InputGaussian,
    "input_clip": reads.InputClip,
    "input_grid": reads.InputGrid,
}


def make_noise(spec: str, *, strength: float | None = None) -> NoiseModel:
    """The noise "name,option=value,...", as "sign_flip,rate=0.1", or "package.module:Class,...".

    strength: stands for the first option, as a sweep over it gives it.

    Raises:
      UsageError: unknown name or option, a value out of its range, a strength missing or twice.
    """
    name = spec.partition(",")[0]
    kind = named_class("noise", name, NOISES, NoiseModel)
    legal = [field.name for field in dataclasses.fields(kind)]
    options = parse_options("noise", spec, legal)
    first = kind.strength_field()
    if strength is not None:
        if first in options:
            raise UsageError(f"noise {name!r}: {first} is swept over, leave it out of {spec!r}")
        options[first] = strength
    if first not in options:
        article = "an" if first[0] in "aeiou" else "a"
        raise UsageError(
            f"noise {name!r}: expected {article} {first}, as in {name},{first}=0.01; found none"
        )
    return kind(**options)


__all__ = ["NOISES", "NoiseModel", "make_noise"]
