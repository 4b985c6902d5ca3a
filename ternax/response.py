"""What errors in a model's products cost its loss, foreseen from gradients alone.

To second order the rise in loss under an error d of everything that products multiply is

    <g, d> + 1/2 E[<s, d>^2],

g being the gradient of the text's loss, s that of the loss of targets which the model draws
itself: E[s s'] is the Fisher information, which is also the Gauss-Newton matrix of cross-entropy.
An error's mean enters both terms, and its variance the second one. Errors of an input reach the
loss through the matrix that multiplies them, and errors of a weight through all tokens of a
sequence, so one formula serves noises on weights and at reads.

Gradients pass quantizers of inputs straight through.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import taps
from ternax.edit import stored_order
from ternax.evaluate import batches, log_softmax, of_targets
from ternax.gather import whole_model
from ternax.models import Decoder
from ternax.nn.sensed import Nudge, SensedLinear
from ternax.noise import NoiseModel
from ternax.noise.predict import has_moments
from ternax.noise.reads import ReadNoise
from ternax.noise.trits import TritNoise
from ternax.robustness import Clean
from ternax.targets import EVERYTHING, selected

# Targets drawn for each token, and the edge of blocks that fail together.
SAMPLES, BLOCK = 2, 16
_NODES = (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down"))
_NUDGE_BYTES = 1 << 28
_TRITS = np.array([-1.0, 0.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Terms:
    """What an error does to the loss, in bits per byte of the text, at one place or at many.

    Attributes:
      slope: <g, mean error>.
      pulls: f64 [drawn sequences], <s, mean error>, so scaled that half their squares' sum counts.
      spread: what the error's variance costs.
    """

    slope: float
    pulls: np.ndarray
    spread: float

    @property
    def rise(self) -> float:
        """Bits per byte, to second order."""
        return self.slope + 0.5 * float(np.square(self.pulls).sum()) + self.spread


def total(terms: Iterable[Terms]) -> Terms:
    """Of errors at several places, drawn apart: their means pull together, variances add up."""
    found = list(terms)
    return Terms(
        sum(t.slope for t in found),
        sum((t.pulls for t in found), np.zeros(1)),
        sum(t.spread for t in found),
    )


@dataclasses.dataclass(frozen=True)
class Weights:
    """How the loss answers to errors of one projection's trits, by their value -1, 0, +1.

    Attributes:
      inputs: weights of an output.
      density: share of trits that are not 0.
      slopes: f64 [3], g summed over the trits of each value.
      pulls: f64 [drawn sequences, 3], s likewise.
      squares: unit -> f64 [3, 3], E of products of s summed over what fails together: for an
        "element" its diagonal alone is not 0.
      by_row: f64 [N, 3], the diagonal of "element", output by output.
    """

    inputs: int
    density: float
    slopes: np.ndarray
    pulls: np.ndarray
    squares: dict[str, np.ndarray]
    by_row: np.ndarray

    def under(self, noise: NoiseModel) -> Terms:
        """Raises KeyError for blocks of another edge than BLOCK."""
        mean, variance = noise.moments(self.density)
        shift = mean - _TRITS
        if isinstance(noise, TritNoise) and noise.unit != "element":
            mean, variance = noise.with_strength(1.0).moments(self.density)
            gap, rate = _TRITS - mean, noise.rate
            unit = noise.unit if noise.unit != "block" else f"block {noise.block}"
            spread = rate * (1 - rate) * float(gap @ self.squares[unit] @ gap)
            spread += rate * float(variance @ np.diag(self.squares["element"]))
        else:
            spread = float(variance @ np.diag(self.squares["element"]))
        return Terms(
            float(shift @ self.slopes), self.pulls @ shift, spread / 2 / self._gain(shift) ** 2
        )

    def _gain(self, shift: np.ndarray) -> float:
        """What is left of a trit in the mean: errors count against what they hide."""
        return max(1 + float(shift[2] - shift[0]) / 2, 0.1)


@dataclasses.dataclass(frozen=True)
class Response:
    """How the loss of a text answers to errors of a model.

    Attributes:
      weights: "layers.0.attn.q" -> of its trits.
      reads: noise at read time -> "layers.0.attn.qkv" -> what it does there.
    """

    weights: dict[str, Weights]
    reads: dict[NoiseModel, dict[str, Terms]]

    def foresees(self, noise: NoiseModel) -> bool:
        """Whether `under` has an answer."""
        if isinstance(noise, ReadNoise):
            return noise in self.reads
        other = isinstance(noise, TritNoise) and noise.unit == "block" and noise.block != BLOCK
        return has_moments(noise) and not other

    def under(self, noise: NoiseModel, names: Sequence[str]) -> Terms:
        """All of `names`, projections, under a noise."""
        if isinstance(noise, ReadNoise):
            nodes = {_node_of(name) for name in names}
            return total(terms for node, terms in self.reads[noise].items() if node in nodes)
        return total(self.weights[name].under(noise) for name in names)


def measure(clean: Clean, reads: Sequence[ReadNoise] = ()) -> Response:
    """Two passes back through the model for each token, and one more for the text's own targets.

    A model on a mesh is put together on this process's first device: products whose sums are
    split over devices have no gradient.

    Args:
      clean: whose projections are all trits, and whose text it is.
      reads: noises at read time that answers are wanted for; weights' need not be known.
    """
    # Before leaves of it are held: names look for rows in stored order, whose memory tiles give up.
    model, (n, length) = stored_order(_whole(clean.model)), clean.losses.shape
    batch = max(1, min(8, _NUDGE_BYTES // _nudge_bytes(model, length)))
    graph, nudges, rest = _sensed(model, batch, length)
    per_byte = 1 / (math.log(2) * float(clean.text.num_bytes.sum()))
    books = {name: _WeightBook(clean.codes[name]) for name in clean.codes}
    read_books = {noise: {node: _ReadBook() for node in _nodes(model)} for noise in reads}
    for first, (tokens, count) in zip(
        range(0, n, batch), batches(clean.text.tokens, batch), strict=True
    ):
        inputs = taps.projection_inputs(model, tokens[:, :-1])
        for sample in range(SAMPLES + 1):
            key = jax.random.fold_in(jax.random.key(first), sample)
            drawn = _drawn(key, jnp.asarray(clean.logits[first : first + count]))
            own = sample == SAMPLES
            targets = np.zeros((batch, length), np.int32)
            targets[:count] = tokens[:count, 1:] if own else drawn
            slopes = _slopes(graph, nudges, rest, tokens[:, :-1], targets)
            for node, layer, at_input, at_output in _by_node(model, slopes):
                parts = _parts(model, node)
                x = inputs[parts[0][0]].reshape(batch, length, -1)[:count]
                for name, rows, scale in parts:
                    g = at_output[layer, :count, :, rows] * scale[layer]
                    books[name].add(x, g, own)
                for noise, book in read_books.items():
                    book[node].add(noise, x, at_input[layer, :count], at_output[layer, :count], own)
    return Response(
        {name: book.closed(per_byte) for name, book in books.items()},
        {
            noise: {node: book.closed(per_byte) for node, book in found.items()}
            for noise, found in read_books.items()
        },
    )


def _whole(model: Decoder) -> Decoder:
    if model.layout is None:
        return model
    graph, state = nnx.split(whole_model(model))
    return nnx.merge(graph, jax.device_put(state, jax.local_devices()[0]))


class _WeightBook:
    """`Weights` in the making: sums over the sequences seen so far, in nats."""

    def __init__(self, codes: np.ndarray):
        self.codes = jnp.asarray(codes)
        self.density = float(np.mean(codes != 0))
        self.slopes = np.zeros(3)
        self.pulls: list[np.ndarray] = []
        self.squares: dict[str, np.ndarray] = {}
        self.by_row = np.zeros((codes.shape[1], 3))

    def add(self, x: np.ndarray, g: np.ndarray, own: bool) -> None:
        """x: f32 [b, T, K], read; g: f32 [b, T, N], gradients of its products in units of scale."""
        sums, squares, by_row = _by_trit(x, g, self.codes)
        if own:
            self.slopes += np.asarray(sums, np.float64).sum(axis=0)
            return
        self.pulls.append(np.asarray(sums, np.float64))
        self.by_row += np.asarray(by_row, np.float64)
        for unit, found in squares.items():
            self.squares[unit] = self.squares.get(unit, 0.0) + np.asarray(found, np.float64)

    def closed(self, per_byte: float) -> Weights:
        each = per_byte / SAMPLES
        return Weights(
            len(self.codes),
            self.density,
            self.slopes * per_byte,
            np.concatenate(self.pulls) * math.sqrt(each),
            {unit: found * each for unit, found in self.squares.items()},
            self.by_row * each,
        )


class _ReadBook:
    """`Terms` of one noise at read time in the making, at one place."""

    def __init__(self):
        self.slope, self.spread = 0.0, 0.0
        self.pulls: list[np.ndarray] = []

    def add(self, noise: ReadNoise, x, at_input, at_output, own: bool) -> None:
        """x: f32 [b, T, K], read; gradients f32 [b, T, K] and, in units of scale, [b, T, N]."""
        mean, variance = noise.read_moments(x.reshape(-1, x.shape[-1]).astype(np.float64))
        moved = np.asarray(mean).reshape(x.shape) - x
        pulls = (at_input * moved).sum(axis=(1, 2), dtype=np.float64)
        if own:
            self.slope += float(pulls.sum())
            return
        hit = at_input if noise.domain == "inputs" else at_output
        power = np.square(hit).sum(axis=-1, dtype=np.float64)
        self.pulls.append(pulls)
        self.spread += 0.5 * float((np.asarray(variance).reshape(power.shape) * power).sum())

    def closed(self, per_byte: float) -> Terms:
        each = per_byte / SAMPLES
        pulls = np.concatenate(self.pulls) * math.sqrt(each)
        return Terms(self.slope * per_byte, pulls, self.spread * each)


@jax.jit
def _by_trit(x, g, codes):
    """Gradients by a matrix' trits, x' g of each sequence, summed over the trits of each value.

    Returns:
      Sums f32 [b, 3], unit -> f32 [3, 3] and f32 [N, 3], the latter two of all sequences.
    """
    k_size, n = codes.shape
    masks = jnp.stack([codes == value for value in (-1, 0, 1)])
    pad = [(0, 0), (0, -k_size % BLOCK), (0, -n % BLOCK)]

    def one(pair):
        by = jnp.where(masks, pair[0].T @ pair[1], 0)  # [3, K, N]
        blocks = jnp.pad(by, pad)
        blocks = blocks.reshape(3, blocks.shape[1] // BLOCK, BLOCK, -1, BLOCK).sum(axis=(2, 4))
        together = {
            "row": by.sum(axis=2),
            "column": by.sum(axis=1),
            f"block {BLOCK}": blocks.reshape(3, -1),
        }
        squares = {unit: sums @ sums.T for unit, sums in together.items()}
        each = jnp.square(by).sum(axis=1)
        squares["element"] = jnp.diag(each.sum(axis=1))
        return by.sum(axis=(1, 2)), squares, each.T

    sums, squares, by_row = jax.lax.map(one, (x, g))
    return sums, {unit: found.sum(axis=0) for unit, found in squares.items()}, by_row.sum(axis=0)


@jax.jit
def _drawn(key, logits):
    """int32 [b, T]: targets as the model itself would have them."""
    return jax.random.categorical(key, logits)


@functools.partial(jax.jit, static_argnums=0)
def _slopes(graph, nudges, rest, tokens, targets):
    """Gradient of the sum of all targets' nats by the nudges."""

    def loss(nudges):
        merged = nnx.merge(graph, nudges, rest)
        return of_targets(log_softmax(*nnx.split(merged), tokens)[1], targets).sum()

    return jax.grad(loss)(nudges)


def _nudge_bytes(model: Decoder, length: int) -> int:
    """Of one sequence."""
    widths = sum(sum(_linear(model, *node).shape) for node in _NODES)
    return 4 * model.config.num_layers * length * widths


def _linear(model: Decoder, branch: str, name: str):
    return getattr(getattr(model.layers, branch), name)


def _sensed(model: Decoder, batch: int, length: int):
    """(graph, nudges, all other leaves) of the model with SensedLinear projections."""
    sensed = nnx.merge(*nnx.split(model))
    for branch, name in _NODES:
        inner = _linear(sensed, branch, name)
        wrapped = SensedLinear(inner, model.config.num_layers, batch, length)
        setattr(getattr(sensed.layers, branch), name, wrapped)
    return nnx.split(sensed, Nudge, ...)


def _nodes(model: Decoder) -> list[str]:
    """ "layers.0.attn.qkv" and so on."""
    layers = range(model.config.num_layers)
    return [f"layers.{layer}.{branch}.{name}" for layer in layers for branch, name in _NODES]


def _node_of(name: str) -> str:
    """ "layers.0.attn.q" -> "layers.0.attn.qkv"."""
    head, _, part = name.rpartition(".")
    fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    return f"{head}.{fused.get(part, part)}"


def _parts(model: Decoder, node: str) -> list[tuple[str, slice, np.ndarray]]:
    """(name, columns of the node's outputs, f32 [L, 1 or N] scales) of each matrix of a node."""
    found = []
    for target in selected(model, EVERYTHING):
        for name in target.names():
            if _node_of(name) == node:
                columns = slice(target.first, target.first + target.width)
                scale = np.asarray(target.node.packed.scale)[:, 0, 0]
                found.append((name, columns, scale[:, columns] if scale.shape[1] > 1 else scale))
    return found


def _by_node(model: Decoder, slopes) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """(node, layer, gradients by its inputs f32 [L, B, T, K] and by its outputs [L, B, T, N])."""
    for branch, name in _NODES:
        node = slopes["layers"][branch][name]
        at_input, at_output = (np.asarray(node[at].get_value()) for at in ("at_input", "at_output"))
        for layer in range(model.config.num_layers):
            yield f"layers.{layer}.{branch}.{name}", layer, at_input, at_output
