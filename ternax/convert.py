"""Post-training quantization: any float model under any scheme, one weight at a time."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.calibrate import SAME_INPUTS, Calibration, LayerStream, block_of
from ternax.edit import assemble, check_float_model, float_linears
from ternax.errors import UsageError
from ternax.models import Decoder
from ternax.nn.linear import QuantLinear
from ternax.quant import Scheme, make_scheme
from ternax.quant.fit import matmul
from ternax.quant.inputs import INPUTS
from ternax.quant.integer import Unquantized
from ternax.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class TensorError:
    """What converting one weight W to V lost.

    Attributes:
      name: "layers.3.mlp.up".
      shape: (K, N).
      relative_error: |W - V| / |W|, Frobenius norms; 0 for a zero W that stays zero.
      output_snr_db: 20 log10(|X W| / |X W - X V|) over the calibration's inputs X; None
        without calibration, or where one of the two is zero.
      nonzero_share: of the codes.
      bits_per_weight: stored bits, scales included.
      seconds: of quantizing it; the first of a shape compiles.
    """

    name: str
    shape: tuple[int, int]
    relative_error: float
    output_snr_db: float | None
    nonzero_share: float
    bits_per_weight: float
    seconds: float


def convert(
    model: Decoder,
    scheme: str | None = None,
    *,
    calibration: Calibration | None = None,
    packed: bool = True,
    inputs: str | None = None,
    seed: int = 0,
    embed_dtype: str = "int8",
    head_dtype: str = "int8",
    backend: str | None = None,
    watch: Callable[[TensorError], None] = lambda error: None,
) -> tuple[Decoder, list[TensorError]]:
    """Quantizes every projection, in place, layer by layer; returns the model and its errors.

    What is approximated is the weight that the model multiplies by now: under scheme "none"
    its floats, under another one what that makes of them.

    Args:
      model: a float Decoder.
      scheme: a spec as for `make_scheme`; None keeps the model's own schemes, trained Params
        included, and converts their latent weights.
      calibration: tokens whose X^T X the scheme sees, and the errors at the output are over;
        None leaves both out.
      packed: True packs projections and tables, as `pack_model` does. False puts the
        dequantized floats in place, for what no kernel takes, or to train on; then the
        model's scheme is "none,dtype=f32" and its tables stay.
      inputs: how activations are quantized from now on, and in the calibration; None keeps
        what the model has.
      seed: of schemes that own Params.
      embed_dtype, head_dtype, backend: as for `pack_model`; they belong to packed=True.
      watch: called with each error as soon as it is known.

    Raises:
      UsageError: a packed model, a scheme or format that cannot be used, tokens out of range.
      NumericCheckFailed: a weight that is not finite, by name.
    """
    config = model.config
    inputs = config.inputs if inputs is None else inputs
    check_float_model(model, embed_dtype, head_dtype)
    if inputs not in INPUTS:
        raise UsageError(f"inputs must be one of {', '.join(INPUTS)}, found {inputs!r}")
    check_scheme(model, scheme, packed=packed)
    stream = None if calibration is None else LayerStream(model, calibration)
    errors: list[TensorError] = []
    stacks: dict[str, list] = {part: [] for parts in SAME_INPUTS.values() for part in parts}
    for layer in range(config.num_layers):
        block = block_of(model, layer)
        grams = {} if stream is None else stream.observe(block, inputs)
        for pattern, linear in _linears(block):
            quantized, error = _convert_one(
                linear, scheme, f"layers.{layer}.{pattern}", grams.get(pattern), seed
            )
            errors.append(error)
            watch(error)
            part = pattern.rpartition(".")[2]
            dense = quantized.dequantize()
            stacks[part].append(quantized.pack(part) if packed else dense)
            if calibration is not None and calibration.feed == "quantized":
                _set_dense(linear, dense, inputs)
        if stream is not None and layer + 1 < config.num_layers:
            stream.advance(block)

    def stacked(part):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks.pop(part))

    for pattern, linear in float_linears(model):
        linear.inputs = inputs
        if not packed:
            _set_dense(linear, stacked(pattern.rpartition(".")[2]), inputs)
    if packed:
        assemble(model, lambda _, part: stacked(part), embed_dtype, head_dtype, backend)
    kept = "none,dtype=f32" if not packed else scheme or config.scheme
    model.config = dataclasses.replace(config, scheme=kept, inputs=inputs)
    return model, errors


def _linears(block):
    """("mlp.up", its QuantLinear) of each projection of a block, in the order they run."""
    for branch, sources in SAME_INPUTS.items():
        for part in sources:
            yield f"{branch}.{part}", getattr(getattr(block, branch), part)


def _set_dense(linear: QuantLinear, weight: jax.Array, inputs: str) -> None:
    """Makes `linear` multiply by `weight` (f32 [K, N], or a stack of them) as it is."""
    linear.kernel.set_value(weight)
    linear.scheme = Unquantized(weight.shape[-2:], dtype="f32")
    linear.inputs = inputs


def check_scheme(model: Decoder, scheme: str | None, *, packed: bool) -> None:
    """Raises UsageError for a scheme that does not take every weight; computes nothing."""

    def first_layer():
        for _, linear in _linears(block_of(model, 0)):
            quantized = _target(linear, scheme, seed=0).quantize(linear.kernel[...])
            yield quantized.pack() if packed else quantized

    jax.eval_shape(lambda: list(first_layer()))


def _target(linear: QuantLinear, scheme: str | None, seed: int) -> Scheme:
    """The scheme that `linear` is converted to: its own, or a new one."""
    if scheme is None:
        return linear.scheme
    k_size, n = linear.kernel.shape
    return make_scheme(scheme, (k_size, n), rngs=nnx.Rngs(seed))


def _convert_one(
    linear: QuantLinear, scheme: str | None, name: str, gram: jax.Array | None, seed: int
) -> tuple[Quantized, TensorError]:
    """Quantizes the weight of one layer's projection and measures what that lost."""
    start = time.perf_counter()
    target, own = _target(linear, scheme, seed), scheme is None
    quantized, numbers = _quantize(*nnx.split(linear), *nnx.split(target), gram, own)
    numbers = jax.device_get(numbers)
    seconds = time.perf_counter() - start
    return quantized, error_of(name, quantized.shape, numbers, quantized.bits_per_weight, seconds)


def error_of(name, shape, numbers, bits_per_weight, seconds) -> TensorError:
    """The TensorError of what `losses` found, and of signal and noise where they are there."""
    found = {key: float(value) for key, value in numbers.items()}
    snr = None
    if found.get("signal", 0) > 0 and found["noise"] > 0:
        snr = 10 * math.log10(found["signal"] / found["noise"])
    relative = found["error"] / found["norm"] if found["norm"] > 0 else float(found["error"] > 0)
    return TensorError(name, shape, relative, snr, found["density"], bits_per_weight, seconds)


def losses(weight: jax.Array, quantized: Quantized) -> dict[str, jax.Array]:
    """Norms of W [K, N] and of W - V, and the share of codes that are not zero."""
    return {
        "norm": jnp.linalg.norm(weight),
        "error": jnp.linalg.norm(weight - quantized.dequantize()),
        "density": quantized.density(),
    }


@functools.partial(jax.jit, static_argnums=(0, 2, 5))
def _quantize(graph, state, scheme_graph, scheme_state, gram, own):
    """(Quantized, sums): own converts the latent weight, else what the model makes of it."""
    linear, scheme = nnx.merge(graph, state), nnx.merge(scheme_graph, scheme_state)
    kernel = linear.kernel[...]
    weight = kernel if own else linear.scheme.fake_quant(kernel)
    quantized = scheme.quantize(weight, gram)
    sums = losses(weight, quantized)
    if gram is not None:
        lost = weight - quantized.dequantize()
        sums |= {
            "signal": jnp.sum(weight * matmul(gram, weight)),
            "noise": jnp.sum(lost * matmul(gram, lost)),
        }
    return quantized, sums
