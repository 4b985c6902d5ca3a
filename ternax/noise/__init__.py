"""Noise models by name. `make_noise("sign_flip,rate=0.1")(key, codes) -> (codes, changed)`."""

import dataclasses

from ternax.errors import UsageError
from ternax.noise import trits
from ternax.noise.model import NoiseModel
from ternax.options import parse_options

NOISES: dict[str, type[NoiseModel]] = {
    "sign_flip": trits.SignFlip,
    "trit_other": trits.TritOther,
    "trit_resample": trits.TritResample,
    "stuck": trits.Stuck,
}


def make_noise(spec: str) -> NoiseModel:
    """The noise "name,option=value,...", as "sign_flip,rate=0.1".

    Raises:
      UsageError: unknown name or option, or a value out of its range.
    """
    name = spec.partition(",")[0]
    if name not in NOISES:
        raise UsageError(f"noise: expected one of {', '.join(NOISES)}, found {name!r}")
    legal = [field.name for field in dataclasses.fields(NOISES[name])]
    options = parse_options("noise", spec, legal)
    if "rate" not in options:
        raise UsageError(f"noise {name!r}: expected a rate, as in {name},rate=0.01; found none")
    return NOISES[name](**options)


__all__ = ["NOISES", "NoiseModel", "make_noise"]
