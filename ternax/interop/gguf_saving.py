"""One of our models as a GGUF file that llama.cpp, or bitnet.cpp, loads. Codes stay codes."""

from collections.abc import Iterable

import numpy as np

from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.interop import gguf_file
from ternax.interop.blocks import from_floats, q4_0, q8_0
from ternax.interop.files import Plan
from ternax.interop.foreign import shapes
from ternax.interop.forms import forms, single_plane
from ternax.interop.gguf import (
    I2_S,
    ROPE_FREQS,
    TRITS,
    rope_factors,
    tensor_name,
    to_halves,
)
from ternax.interop.weights import Weights
from ternax.kernels.transcode import LAYOUTS, LayoutError, from_canonical

FLOATS = ("F32", "F16", "BF16", "Q8_0")
KINDS = (*TRITS, *FLOATS)
# How what is not a ternary matrix is stored: each in the kind that keeps its codes.
_KEEPS = {"int8": "Q8_0", "int4": "Q4_0", "bf16": "BF16", "f32": "F32"}
# general.file_type, of llama.h; I2_S's is bitnet.cpp's.
_FILE_TYPES = dict(F32=0, F16=1, Q4_0=2, Q8_0=7, BF16=32, TQ1_0=36, TQ2_0=37, I2_S=40)
_ROWS = 1024


def architecture(config: ModelConfig) -> str:
    """The architecture under which llama.cpp or bitnet.cpp computes the same; else UsageError."""

    def refuse(what):
        raise UsageError(
            f"gguf: {config.name} has {what}, which no architecture of llama.cpp or bitnet.cpp "
            "computes: save it as hf or orbax"
        )

    if config.family == "llama":
        if config.activation != "silu":
            refuse(f"activation {config.activation} in a llama")
        return "llama"
    if config.num_heads * config.head_dim != config.hidden_size:
        refuse("heads that are not as wide together as the model, in a bitnet")
    if not config.tie_embeddings:
        refuse("a head of its own, in a bitnet")
    if config.rope_scaling is not None:
        refuse("scaled rotary frequencies, in a bitnet")
    return "bitnet" if config.activation == "silu" else "bitnet-b1.58"


def check(config: ModelConfig, kind: str, i2_s: str = "x86") -> None:
    """Raises UsageError for what no file can be, whatever the weights are."""
    if kind not in KINDS or i2_s not in I2_S:
        raise UsageError(f"gguf: expected one of {', '.join(KINDS)}, found {kind!r} ({i2_s})")
    architecture(config)


def check_forms(config: ModelConfig, kind: str, i2_s: str = I2_S[0]) -> None:
    """Raises UsageError where packed weights of this scheme have no place in such a file."""
    for form in forms(config):
        why = single_plane(form, config.scheme)
        if why is not None:
            raise UsageError(f"gguf: {why}")
        stored = kind if form.format == "trit2" else _KEEPS.get(form.format)
        if stored is None:
            raise UsageError(f"gguf: no type of tensor holds {config.scheme}: save it as orbax")
        _bytes(form.name, form.shape, stored, i2_s)
        if stored == "I2_S" and (form.groups > 1 or form.rows):
            raise UsageError(
                f"gguf: {form.name} has scales that differ; I2_S holds one: TQ2_0 does"
            )
        block = 256 if stored in TRITS else 32
        if stored in ("TQ1_0", "TQ2_0", "Q8_0", "Q4_0") and form.shape[1] // block % form.groups:
            raise UsageError(
                f"gguf: {form.name} has a scale for each {form.shape[1] // form.groups} weights; "
                f"{stored} has one for {block}"
            )


def _bytes(name: str, shape: tuple[int, ...], stored: str, i2_s: str) -> int:
    """Bytes of a matrix or table. UsageError where its rows are no whole blocks."""
    nbytes = gguf_file.kind_bytes(stored, shape)
    if stored in TRITS:
        layout = LAYOUTS[_layout(stored, i2_s)]
        block = layout.k_multiple
        if shape[0] % layout.n_multiple:
            raise UsageError(
                f"gguf: {name} has {shape[0]} rows, {layout.n_multiple} of which share a byte"
            )
    else:
        block = next(block for kind, block, _ in gguf_file.KINDS.values() if kind == stored)
    if nbytes is None or shape[-1] % block:
        raise UsageError(
            f"gguf: {name} is {list(shape)}, which {stored} cannot hold: its rows are blocks of "
            f"{block}; take another kind, such as F16"
        )
    return nbytes


def _layout(kind: str, i2_s: str) -> str:
    """The key of LAYOUTS that a kind of TRITS is stored in."""
    return f"i2_s_{i2_s}" if kind == "I2_S" else kind.lower()


def metadata(config: ModelConfig, arch: str, kind: str) -> dict:
    """The key-value pairs that define the model; the vocabulary's come beside them."""
    found = {
        "general.architecture": arch,
        "general.name": config.name,
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[kind],
    }
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    found |= {f"{arch}.{key}": value for key, value in numbers.items()}
    scaling = config.rope_scaling
    if scaling is not None:
        found["ternax.rope_scaling"] = [
            float(scaling.factor),
            float(scaling.low_freq_factor),
            float(scaling.high_freq_factor),
            float(scaling.original_context),
        ]
    return found


def save(weights: Weights, file, kind: str, i2_s: str, vocabulary: dict) -> None:
    """Writes the model to an open file.

    Args:
      kind: of ternary matrices, of KINDS: TRITS keep codes, the scale becomes f16 (f32 in
        I2_S); FLOATS store their values. What is no ternary matrix keeps its own codes.
      i2_s: of I2_S, whose machines read it: "x86" or "arm".
      vocabulary: key-value pairs of the tokenizer.

    Raises UsageError: an architecture, a shape or a format without such a form.
    """
    check(weights.config, kind, i2_s)
    if not weights.packed:
        raise UsageError("gguf: expected a packed model, found latent floats: pack_model first")
    arch = architecture(weights.config)
    plans = [
        _plan(weights, arch, name, shape, kind, i2_s)
        for name, shape in shapes(weights.config).items()
    ]
    scaling = weights.config.rope_scaling
    if scaling is not None:
        factors = rope_factors(weights.config.head_dim, weights.config.rope_theta, scaling)
        factors = factors.astype("<f4")
        plans.append(Plan(ROPE_FREQS, factors.shape, "F32", factors.nbytes, lambda: [factors]))
    gguf_file.write(file, metadata(weights.config, arch, kind) | vocabulary, plans)


def _plan(weights, arch, name, shape, kind, i2_s) -> Plan:
    where = tensor_name(name)
    if len(shape) == 1:
        vector = weights.vector(name)
        return Plan(where, shape, "F32", 4 * shape[0], lambda: [vector.astype("<f4")])
    format = weights.format(name)
    stored = kind if format == "trit2" else _KEEPS[format]
    nbytes = _bytes(name, shape, stored, i2_s)
    order = None
    if arch == "llama" and name.endswith(("attn.q", "attn.k")):
        order = np.argsort(to_halves(shape[0], weights.config.head_dim))

    def produce() -> Iterable:
        if stored in TRITS:
            return [_trits(weights, name, stored, i2_s, shape, order)]
        return _rows(weights, name, stored, shape[0], order)

    return Plan(where, shape, stored, nbytes, produce)


def _trits(weights, name, kind, i2_s, shape, order) -> np.ndarray:
    """The bytes of a ternary matrix."""
    codes, scale = weights.codes(name)
    n, k = shape
    if order is not None:
        codes = codes[order]
    layout = _layout(kind, i2_s)
    try:
        if kind == "I2_S":
            if (scale != scale.flat[0]).any():
                raise UsageError(f"gguf: {name} has scales that differ; I2_S holds one: TQ2_0 does")
            return from_canonical(codes, np.float32(scale.flat[0]), layout, (k, n))
        blocks = k // LAYOUTS[layout].k_multiple
        spread = np.broadcast_to(np.repeat(scale, blocks // scale.shape[0], axis=0), (blocks, n)).T
        spread = spread if order is None else spread[order]
        halves = spread.astype("<f2")
        if not np.isfinite(halves).all() or ((halves == 0) & (spread != 0)).any():
            raise UsageError(f"gguf: {name} has a scale that f16 cannot hold: take F32")
        # llama.cpp's own: a block of zeros has the scale 0. 64 bytes of codes a block.
        halves[(codes.reshape(n, blocks, -1) == 0x55).all(-1)] = 0
        return from_canonical(codes, halves, layout, (k, n))
    except LayoutError as error:
        raise UsageError(f"gguf: {name}: {error}") from error


def _rows(weights, name, kind, total, order) -> Iterable[np.ndarray]:
    """The bytes of any other matrix or table, some rows at a time; integers keep their codes."""
    codes = kind in ("Q8_0", "Q4_0") and weights.format(name) in ("int8", "int4")
    step = _ROWS if order is None else total
    for first in range(0, total, step):
        count = min(step, total - first)
        if not codes:
            rows = weights.floats(name, first, count)
            yield from_floats(rows if order is None else rows[order], kind)
            continue
        values, scale = weights.integers(name, first, count)
        blocks = values.shape[1] // 32
        if blocks % scale.shape[0]:
            raise UsageError(
                f"gguf: {name} has a scale for each {values.shape[1] // scale.shape[0]} weights; "
                f"{kind} has one for 32"
            )
        spread = np.repeat(scale, blocks // scale.shape[0], axis=0)
        spread = np.broadcast_to(spread, (blocks, count)).T
        if order is not None:
            values, spread = values[order], spread[order]
        encode = q8_0 if kind == "Q8_0" else q4_0
        yield encode(values.reshape(-1, 32), spread.reshape(-1))
