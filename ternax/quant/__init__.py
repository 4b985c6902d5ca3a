"""Quantization schemes by name. `make_scheme("absmean,granularity=row", (K, N))`."""

import inspect

from flax import nnx

from ternax.errors import UsageError
from ternax.options import named_class, parse_options
from ternax.quant import codebook, gptq, integer, least_squares, ternary, trit_planes
from ternax.quant.scheme import Scheme

SCHEMES: dict[str, type[Scheme]] = {
    "absmean": ternary.AbsMean,
    "twn": ternary.TWN,
    "optimal": ternary.Optimal,
    "sign": ternary.Sign,
    "ls": least_squares.LeastSquares,
    "gptq": gptq.GPTQ,
    "ptqtp": trit_planes.TritPlanes,
    "int8": integer.Int8,
    "int4": integer.Int4,
    "nf4": codebook.NF4,
    "nvfp4": codebook.NVFP4,
    "none": integer.Unquantized,
}


def scheme_class(name: str) -> type[Scheme]:
    """The class called `name`: a key of SCHEMES, or "package.module:Class"."""
    return named_class("scheme", name, SCHEMES, Scheme)


def parse_scheme(spec: str) -> tuple[type[Scheme], dict]:
    """ "name,key=value,..." -> (class, options); options are checked against its __init__."""
    name = spec.partition(",")[0]
    found = scheme_class(name)
    signature = inspect.signature(found.__init__).parameters
    legal = [key for key in signature if key not in ("self", "shape", "rngs")]
    options = parse_options("scheme", spec, legal)
    for key, value in options.items():
        default = signature[key].default
        if type(default) in (int, float, str, bool) and type(value) is not type(default):
            raise UsageError(
                f"scheme {name!r}: {key} must be {type(default).__name__}, found {str(value)!r}"
            )
    return found, options


def make_scheme(spec: str, shape: tuple[int, int], *, rngs: nnx.Rngs | None = None) -> Scheme:
    """One scheme instance for a weight of `shape` (K, N)."""
    found, options = parse_scheme(spec)
    return found(shape, rngs=rngs, **options)


__all__ = ["SCHEMES", "Scheme", "make_scheme", "parse_scheme", "scheme_class"]
