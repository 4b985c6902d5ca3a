"""What of a packed model a noise can strike, by name, and what it cannot."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from ternax.configs import nearest
from ternax.edit import is_packed, packed_parts, stored_order
from ternax.errors import UsageError
from ternax.gather import columns_of, rows_of, whole_leaf
from ternax.kernels.packing import FLOAT_FORMATS
from ternax.models import Decoder
from ternax.nn.norm import RMSNorm
from ternax.nn.table import PackedTable
from ternax.noise.bits import PackedNoise
from ternax.noise.model import NoiseModel
from ternax.noise.storage import HALF
from ternax.row_order import Rows

# What a pattern selects if it does not say: every projection.
EVERYTHING = r"layers\..*"


@dataclasses.dataclass(frozen=True)
class Target:
    """One matrix of the model, or one stack of them.

    Attributes:
      name: "layers.*.mlp.up", or "embedding", "head".
      node: the module that holds it.
      first, width: its rows among the node's, which may hold several fused.
      columns: K; a norm has one.
      layers: which layers of the stack are selected; (0,) where there is no stack.
      first_layer: the model's number of the stack's first layer.
      rows: of the node where it is split over devices; first, width and columns are then those
        of the whole. None: they are here.
    """

    name: str
    node: Any  # PackedLinear, PackedTable or NoisyLinear
    first: int
    width: int
    columns: int
    layers: tuple[int, ...]
    first_layer: int = 0
    rows: Rows | None = None

    def stored(self) -> Any:
        """Data of its node as a numpy array on this host, whole: [L, P, N, row]."""
        data = self.node.data.get_value()
        return np.asarray(data) if self.rows is None else whole_leaf(data, self.rows, -2)

    def numbers(self) -> list[int]:
        """The selected layers, as the model counts them."""
        return [self.first_layer + layer for layer in self.layers]

    def names(self) -> list[str]:
        return [self.name.replace("*", str(number)) for number in self.numbers()]


def targets(model: Decoder) -> Iterator[Target]:
    """Everything that weights are stored in, all layers of it; put in stored order first."""
    stored_order(model)
    layers = tuple(range(model.config.num_layers))
    layout = model.layout if model.layout is not None and model.layout.across else None
    first: dict[int, int] = {}
    for name, linear in packed_parts(model):
        start, part = first.get(id(linear), 0), name.rpartition(".")[2]
        rows = None if layout is None else rows_of(layout, part, linear)
        width = dict(linear.parts if rows is None else rows.parts)[part]
        columns = linear.shape[0] if layout is None else columns_of(layout, part, linear.shape[0])
        first[id(linear)] = start + width
        yield Target(name, linear, start, width, columns, layers, model.first_layer, rows)
    for name in ("embedding",) if model.config.tie_embeddings else ("embedding", "head"):
        table = getattr(model, name)
        rows = None if layout is None else rows_of(layout, name, table)
        width = table.shape[1] if rows is None else rows.parts[0][1]
        yield Target(name, table, 0, width, table.shape[0], (0,), 0, rows)


def norms(model: Decoder) -> Iterator[Target]:
    """The norms, all layers of them."""
    layers = tuple(range(model.config.num_layers))
    for path, node in nnx.iter_modules(model):
        if isinstance(node, RMSNorm):
            head, *rest = map(str, path)
            stack = head == "layers"
            name = ".".join([head, "*", *rest]) if stack else head
            width = node.weight.get_value().shape[-1]
            yield Target(name, node, 0, width, 1, layers if stack else (0,), model.first_layer)


def caches(model: Decoder) -> Iterator[Target]:
    """What attention stores, all layers of it."""
    layers = tuple(range(model.config.num_layers))
    yield Target("layers.*.attn.cache", model.layers.attn, 0, 0, 0, layers, model.first_layer)


def selected(
    model: Decoder, select: str, layers: range | None = None, domain: str = ""
) -> list[Target]:
    """The targets that a pattern selects, each with its layers: weights, or what `domain` is of.

    Raises:
      UsageError: no packed model, or none of its names match.
    """
    if not is_packed(model):
        raise UsageError("noise: expected a packed model, found a float one: pack_model(model)")
    try:
        pattern = re.compile(select)
    except re.error as error:
        raise UsageError(f"select: {select!r} is no regular expression: {error}") from error
    found, names = [], []
    for target in {"norms": norms, "cache": caches}.get(domain, targets)(model):
        names += target.names()
        kept = tuple(
            layer
            for layer, number, name in zip(
                target.layers, target.numbers(), target.names(), strict=True
            )
            if pattern.fullmatch(name) and (layers is None or number in layers)
        )
        if kept:
            found.append(dataclasses.replace(target, layers=kept))
    if not found:
        near = ", ".join(nearest(select, names)[:4])
        where = "" if layers is None else f" in layers {layers.start} to {layers.stop - 1}"
        raise UsageError(f"select: nothing is named {select!r}{where}; nearest: {near}")
    return found


def there(
    model: Decoder, part: NoiseModel, select: str, layers: range | None = None
) -> list[Target]:
    """What a pattern selects for one of a noise's parts: nothing, or of floats no scales."""
    try:
        found = selected(model, select, layers, part.domain)
    except UsageError:
        return []
    floats = part.domain == "scale"
    return [one for one in found if not (floats and one.node.format in FLOAT_FORMATS)]


def check_study(noise: NoiseModel, model: Decoder, select: str, rows: float) -> None:
    """UsageError where the noise has nothing to strike, or not what it strikes."""
    if noise.parts() == (noise,):
        return check_domain(noise, selected(model, select, domain=noise.domain), rows)
    found = {part: there(model, part, select) for part in noise.parts()}
    if not any(found.values()):
        selected(model, select)  # says what there is
    for part, chosen in found.items():
        if chosen:
            check_domain(part, chosen, rows)


def check_domain(noise: NoiseModel, chosen: list[Target], rows: float = 1.0) -> None:
    """UsageError where a target does not hold what the noise strikes."""
    if noise.domain in ("norms", "cache"):
        if rows < 1:
            whole = "whole norms" if noise.domain == "norms" else "a whole cache"
            raise UsageError(f"noise on {noise.domain} is on {whole}, found rows {rows}")
        return
    for target in chosen:
        format, table = target.node.format, isinstance(target.node, PackedTable)
        what = f"{target.name} in {format}"
        if noise.domain == "codes" and format != "trit2":
            raise UsageError(f"noise on trits: expected weights in trit2, found {what}")
        if isinstance(noise, PackedNoise) and noise.storage != "canonical":
            own, said = ("f32", "floats") if noise.storage == HALF else ("trit2", "trits")
            if format != own:
                raise UsageError(f"noise: storage {noise.storage} is of {said}, found {what}")
        if noise.domain == "scale" and format in FLOAT_FORMATS:
            raise UsageError(f"noise on scales: expected weights with scales, found {what}")
        if noise.domain == "weights" and (format in FLOAT_FORMATS or table):
            raise UsageError(f"analog noise: expected projections of integer codes, found {what}")
        if noise.when == "read" and (table or rows < 1):
            raise UsageError(f"noise at read time is on whole projections, found {what}")
        if noise.when == "read":
            _check_shared_inputs(target, chosen)


def _check_shared_inputs(target: Target, chosen: list[Target]) -> None:
    """Fused parts read one input: all of them are selected in a layer, or none."""
    together = [other for other in chosen if other.node is target.node]
    parts = [part for part, _ in target.node.parts]
    if len(together) < len(parts) or any(other.layers != target.layers for other in together):
        raise UsageError(
            f"noise at read time: {', '.join(parts)} read one input; select all of them, in the "
            f"same layers, or none; found {', '.join(other.name for other in together)}"
        )
