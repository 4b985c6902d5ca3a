"""How a scheme stores the matrices of a model, known before any is made: what a format cannot hold
is refused by it, before anything long runs."""

from typing import NamedTuple

from ternax.config import ModelConfig
from ternax.interop.foreign import is_matrix, shapes


class Form(NamedTuple):
    """One matrix of a layer.

    Attributes:
      name: ours, "layers.0.attn.q".
      shape: (N, K).
      format: of codes, as in `Quantized`.
      planes: trit-planes.
      zero: whether a zero point stands beside the scale.
      groups: scales along K.
      rows: whether each row has scales of its own.
    """

    name: str
    shape: tuple[int, int]
    format: str
    planes: int
    zero: bool
    groups: int
    rows: bool


def forms(config: ModelConfig) -> list[Form]:
    """The matrices of the first layer, whose like all others are. UsageError: an unknown scheme."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ternax.quant import make_scheme

    found, quantized = [], {}
    for name, shape in shapes(config).items():
        if not name.startswith("layers.0.") or not is_matrix(name, shape):
            continue
        n, k = shape
        if (k, n) not in quantized:

            def quantize(w):
                return make_scheme(config.scheme, w.shape, rngs=nnx.Rngs(0)).quantize(w)

            quantized[k, n] = jax.eval_shape(quantize, jax.ShapeDtypeStruct((k, n), jnp.float32))
        q = quantized[k, n]
        planes, (groups, rows) = q.codes.shape[0], q.scale.shape[-2:]
        found.append(Form(name, (n, k), q.format, planes, q.zero is not None, groups, rows > 1))
    return found


def single_plane(form: Form, scheme: str) -> str | None:
    """None where codes and scales are all there is; else why no other program's file holds it."""
    if form.planes == 1 and not form.zero:
        return None
    return (
        f"{form.name}: {scheme} has two trit-planes or a zero point, which no file of another "
        "program holds: save it as orbax"
    )
