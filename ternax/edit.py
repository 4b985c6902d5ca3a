"""Every edit of a model is one visible function here. They replace nodes and return the model."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from ternax.errors import UsageError
from ternax.kernels import target
from ternax.kernels.backends import BACKENDS, ORDER
from ternax.kernels.packing import CANONICAL, Packed
from ternax.kernels.pallas import tiles
from ternax.models import Decoder
from ternax.nn.linear import COMPUTE, PackedLinear, QuantLinear
from ternax.nn.table import TABLE_FORMATS, PackedTable
from ternax.quant.integer import Int4, Int8, Unquantized
from ternax.quant.scheme import BlockScheme, Scheme, check_finite
from ternax.quantized import CODEBOOKS, Quantized
from ternax.sharding import Layout

# What pack_model fuses: one product reads the activations once and one launch does the work.
_FUSED = {
    "attn": {"qkv": ("q", "k", "v"), "o": ("o",)},
    "mlp": {"gate_up": ("gate", "up"), "down": ("down",)},
}


def linear_names(model: Decoder) -> list[str]:
    """Per-layer names of all projections, "layers.{i}.mlp.up", whether packed or not."""
    names = []
    for pattern, _ in packed_parts(model) if is_packed(model) else float_linears(model):
        names += [pattern.replace("*", str(i)) for i in range(model.config.num_layers)]
    return names


def is_packed(model: Decoder) -> bool:
    """Whether `pack_model` has been here."""
    return isinstance(model.embedding, PackedTable)


def float_linears(model: Decoder) -> Iterator[tuple[str, QuantLinear]]:
    """("layers.*.mlp.up", the stacked QuantLinear) of each projection."""
    for branch, fused in _FUSED.items():
        for part in (part for parts in fused.values() for part in parts):
            yield f"layers.*.{branch}.{part}", getattr(getattr(model.layers, branch), part)


def packed_parts(model: Decoder) -> Iterator[tuple[str, PackedLinear]]:
    """("layers.*.mlp.up", the stacked PackedLinear that holds it) of each projection."""
    for branch, fused in _FUSED.items():
        for name in fused:
            linear = getattr(getattr(model.layers, branch), name)
            for part, _ in linear.parts:
                yield f"layers.*.{branch}.{part}", linear


def pack_model(
    model: Decoder,
    *,
    embed_dtype: str = "int8",
    head_dtype: str = "int8",
    backend: str | None = None,
) -> Decoder:
    """Quantizes and packs every projection and the tables, in place; returns the model.

    q, k, v become one `qkv` and gate, up one `gate_up`; parts keep their names, widths
    and scales. Also right on an abstract model, under `nnx.eval_shape`.

    Args:
      model: a float Decoder. Its latent weights are gone afterwards.
      embed_dtype, head_dtype: "f32", "bf16", "int8" (a scale a row) or "int4" (a scale
        for each group of a row). A tied table exists once, so the two must agree.
      backend: pins the kernel backend of every product; None chooses by platform.

    Raises:
      UsageError: tied tables asked for in two formats; an unknown format.
      NumericCheckFailed: a weight that is not finite, by name.
    """
    check_float_model(model, embed_dtype, head_dtype)
    return assemble(model, _pack_stack, embed_dtype, head_dtype, backend)


def fit_kernels(model: Decoder) -> Decoder:
    """Puts packed projections, in place, into the order that the kernels here read; the model.

    That is the canonical one on processors, and tiles on a GPU that has a kernel for them.
    Canonical bytes are given up: who shares them with another model copies them first.
    """
    if model.layout is not None:
        return model  # parts of a split model run in their own order
    for node in _packed_linears(model):
        packed = node.packed
        if packed.layout != CANONICAL or packed.format != "trit2":
            continue
        platform = target.current().platform
        for name in (node.backend,) if node.backend else ORDER.get(platform, ()):
            backend = BACKENDS[name]
            if backend.repack is None:
                continue
            like = jax.eval_shape(backend.repack, packed)
            if backend.why_not(platform, None, like) is None:
                tiled = like if _is_abstract(packed.data) else backend.repack(packed)
                node.data.set_value(tiled.data)
                node.layout = tiled.layout
                break
    return model


def stored_order(model: Decoder) -> Decoder:
    """Puts packed projections, in place, back into canonical order; the model.

    In it files and noises have rows. The other way is `fit_kernels`.
    """
    for node in _packed_linears(model):
        if node.layout == tiles.LAYOUT:
            node.data.set_value(tiles.canonical_stack(node.packed).data)
            node.layout = CANONICAL
    return model


def _packed_linears(model: Decoder) -> list[PackedLinear]:
    """Projections that run as they are stored; those struck at every read keep their bytes."""
    found = [
        getattr(getattr(model.layers, branch), name, None)
        for branch, fused in _FUSED.items()
        for name in fused
    ]
    return [linear for linear in found if type(linear) is PackedLinear]


def _is_abstract(array) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


def packs(model: Decoder) -> bool:
    """Whether every projection of a float model has a packed form; computes nothing."""

    def stored(linear):
        graph, state = nnx.split(linear)

        def one(leaves):
            layer = nnx.merge(graph, leaves)
            return layer.scheme.quantize(layer.kernel[...])

        return jax.eval_shape(lambda leaves: jax.lax.map(one, leaves), state)

    return all(stored(linear).format not in CODEBOOKS for _, linear in float_linears(model))


def check_float_model(model: Decoder, embed_dtype: str, head_dtype: str) -> None:
    """Raises what `pack_model` raises, while the model is still whole."""
    if is_packed(model):
        raise UsageError("expected a float model, found one that is packed already")
    check_table_dtypes(model.config, embed_dtype, head_dtype)
    _check_finite(model)


def assemble(
    model: Decoder,
    pack: Callable[[QuantLinear, str], Packed],
    embed_dtype: str,
    head_dtype: str,
    backend: str | None,
) -> Decoder:
    """Puts packed projections and tables in the place of float ones; returns the model.

    pack: (a stacked QuantLinear, its part's name) -> its stacked Packed, asked for in turn, so
    that each one's latent weights are gone before the next is packed.
    """
    for branch, fused in _FUSED.items():
        module = getattr(model.layers, branch)
        for name, parts in fused.items():
            linears = [getattr(module, part) for part in parts]
            packed = [pack(*pair) for pair in zip(linears, parts, strict=True)]
            for part in parts:
                delattr(module, part)
            setattr(
                module, name, PackedLinear(fuse(packed), inputs=linears[0].inputs, backend=backend)
            )
    model.layers.attn.backend = backend
    model.embedding = _pack_table(model.embedding, embed_dtype, "embedding", backend)
    if not model.config.tie_embeddings:
        model.head = _pack_table(model.head, head_dtype, "head", backend)
    return model


def check_table_dtypes(config, embed_dtype: str, head_dtype: str) -> None:
    """Raises UsageError unless both are table formats, and equal where the table is tied."""
    for flag, dtype in (("embed_dtype", embed_dtype), ("head_dtype", head_dtype)):
        if dtype not in TABLE_FORMATS:
            raise UsageError(f"{flag} must be one of {', '.join(TABLE_FORMATS)}, found {dtype!r}")
    if config.tie_embeddings and embed_dtype != head_dtype:
        raise UsageError(
            f"config {config.name} ties head and embedding, one table: expected equal "
            f"embed_dtype and head_dtype, found {embed_dtype} and {head_dtype}"
        )


def as_part(part: Decoder, whole: Decoder, layout: Layout) -> Decoder:
    """A model of `layout.local_config` as one device's part of `whole`. Both are packed."""
    part.config, part.layout = layout.config, layout
    part.layers.attn.across = layout.slots_across
    for branch, name in (("attn", "o"), ("mlp", "down")):
        linear = getattr(getattr(part.layers, branch), name)
        groups = getattr(getattr(whole.layers, branch), name).packed.groups
        linear.across, linear.one_scale = layout.across, groups == 1
    for name in ("embedding",) if layout.config.tie_embeddings else ("embedding", "head"):
        getattr(part, name).across = layout.vocab_across
    return part


def fuse(parts: list[Packed]) -> Packed:
    """Joins matrices of equal K along N. Each part keeps its scales, spread over its rows."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        same = (part.format, part.layout, part.shape[0], part.groups, part.zero is None)
        if same != (first.format, first.layout, first.shape[0], first.groups, first.zero is None):
            raise ValueError(
                f"cannot fuse {first.parts} with {part.parts}: they are stored differently"
            )

    def spread(part, leaf):
        return jnp.broadcast_to(leaf, (*leaf.shape[:-1], part.shape[1]))

    def join(leaves):
        return jnp.concatenate([spread(*pair) for pair in zip(parts, leaves, strict=True)], axis=-1)

    return Packed(
        jnp.concatenate([part.data for part in parts], axis=-2),
        join([part.scale for part in parts]),
        None if first.zero is None else join([part.zero for part in parts]),
        first.format,
        first.layout,
        (first.shape[0], sum(part.shape[1] for part in parts)),
        tuple(entry for part in parts for entry in part.parts),
    )


def _check_finite(model: Decoder) -> None:
    """Raises NumericCheckFailed for a weight that is not finite, while the model is still whole."""
    for pattern, linear in float_linears(model):
        kernel = linear.kernel[...]
        if isinstance(kernel, jax.core.Tracer):
            return
        finite = jnp.isfinite(kernel).all(axis=(1, 2))
        for i in range(kernel.shape[0]):
            if not bool(finite[i]):
                check_finite(kernel[i], pattern.replace("*", str(i)))
    for name in ("embedding",) if model.config.tie_embeddings else ("embedding", "head"):
        check_finite(getattr(model, name).weight[...], name)


def _pack_stack(linear: QuantLinear, part: str) -> Packed:
    """A stacked QuantLinear, one layer at a time, as one stacked Packed."""
    graph, state = nnx.split(linear)

    def one(leaves):
        layer = nnx.merge(graph, leaves)
        return layer.scheme.quantize(layer.kernel[...]).pack(part)

    return jax.lax.map(one, state)


def _pack_table(table, dtype: str, name: str, backend: str | None) -> PackedTable:
    return PackedTable(pack_rows(table.weight[...], dtype, name), backend=backend)


def pack_rows(rows: jax.Array, dtype: str, name: str = "") -> Packed:
    """Rows of a table, f32 [n, D], packed as `dtype`; no row depends on another.

    Computed row by row, as they lie: [D, n], which schemes take, would be moved there and back.
    """
    n, k_size = rows.shape
    integers: dict[str, type[BlockScheme]] = {"int8": Int8, "int4": Int4}
    if dtype not in integers:
        weight = Unquantized((k_size, n), dtype=dtype).quantize(rows.T)
        return weight.pack(name)
    scheme = integers[dtype]((k_size, n))
    codes, scale = scheme.quantize_blocks(rows.reshape(n, scheme.groups, -1), (2,))
    codes = codes.reshape(1, n, k_size).astype(jnp.int8)
    scale = scale.reshape(1, n, scheme.groups)
    quantized = Quantized(codes.swapaxes(1, 2), scale.swapaxes(1, 2), format=scheme.format)
    return quantized.pack(name)


def wrap_schemes(model: Decoder, wrap: Callable[[Scheme], Scheme]) -> Decoder:
    """Replaces the scheme of every projection of a float model by `wrap(scheme)`."""
    for _, linear in float_linears(model):
        linear.scheme = wrap(linear.scheme)
    return model


def set_compute(model: Decoder, compute: str) -> Decoder:
    """What a float model's products are held in: "f32", or "bf16", see `bf16_product`."""
    if compute not in COMPUTE:
        raise UsageError(f"compute must be one of {', '.join(COMPUTE)}, found {compute!r}")
    for _, linear in float_linears(model):
        linear.compute = compute
    return model
