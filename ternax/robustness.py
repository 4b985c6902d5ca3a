"""What noise does to a model: to each layer's product, predicted and measured, and to its losses.

A point is one noise at one strength in one draw. It is compared with the clean model target by
target, on the same sequences, so that what the text brings drops out of the rise in loss.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import injection, taps, targets
from ternax.engine import generate
from ternax.errors import UsageError
from ternax.estimate import Interval, t_interval
from ternax.evaluate import (
    BATCH,
    batches,
    bits_per_byte,
    divergence,
    groups,
    log_softmax,
    of_targets,
)
from ternax.heldout import Windows
from ternax.kernels.packing import Packed
from ternax.models import Decoder
from ternax.noise import NoiseModel
from ternax.noise.model import apply
from ternax.noise.predict import closed_form, has_moments, plug_in
from ternax.noise.reads import ReadNoise
from ternax.random_weights import tensor_key
from ternax.resample import bootstrap_ratio
from ternax.sharding import fetch
from ternax.trit_edits import pack_codes, trits, unpack_codes

TOP = 5
# Greedy decode, held against the clean model's: prompts, their tokens, and new ones.
PROMPTS, PROMPT, CONTINUED = 8, 64, 64
_LOGIT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Clean:
    """The model before any noise, and what it says of the text.

    Attributes:
      model: packed; never donated.
      text: the sequences.
      logits: f32 [n, T, V].
      losses: f32 [n, T], nats of each target.
      inputs: of each projection, for the first sequences: "layers.0.attn.q" -> f32 [t, K].
      codes: "layers.0.attn.q" -> int8 [K, N], of projections in trit2.
      continued: int32 [prompts, tokens], what greedy decode makes of the text's beginnings.
    """

    model: Decoder
    text: Windows
    logits: np.ndarray
    losses: np.ndarray
    inputs: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    continued: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.losses, self.text.num_bytes)


@dataclasses.dataclass(frozen=True)
class Point:
    """One draw of a noise at one strength.

    Attributes:
      changed: values struck, of all matrices.
      rises: f64 [n], bits per byte of each sequence, less the clean model's; NaN where logits
        were not finite.
      diverged: tokens of greedy decode before the first that differs from the clean model's, of
        each prompt; all of them where none does. Empty where the context is too short.
      not_finite: the projection whose input was the first that is not finite, None where all is.
      kl_bits, top1, top5, cosine: means over targets: KL(clean || noisy); both have the same
        likeliest token; the clean one is among the noisy model's five; cosine of logits.
    """

    changed: int
    rises: np.ndarray
    diverged: tuple[int, ...]
    not_finite: str | None
    kl_bits: float
    top1: float
    top5: float
    cosine: float


def spread_windows(text: Windows, count: int) -> Windows:
    """`count` sequences, evenly through the text: every file is there as much as it was."""
    if not 0 < count <= len(text.tokens):
        raise UsageError(
            f"sequences: expected 1 .. {len(text.tokens)}, what the text has, found {count}"
        )
    kept = np.arange(count) * len(text.tokens) // count
    return Windows(text.tokens[kept], text.num_bytes[kept], text.files[kept])


def look(model: Decoder, text: Windows, *, tapped: int = 2) -> Clean:
    """Runs the clean model. tapped: sequences whose projections' inputs are kept.

    Raises:
      UsageError: logits of more than 1 GiB.
    """
    n, length = text.tokens.shape[0], text.tokens.shape[1] - 1
    size = 4 * n * length * model.config.vocab_size
    if size > _LOGIT_BYTES:
        fit = _LOGIT_BYTES // (4 * length * model.config.vocab_size)
        raise UsageError(f"sequences: {n} have logits of more than 1 GiB; at most {fit} fit")
    graph, leaves = nnx.split(model)
    found = []
    for tokens, count in batches(text.tokens, BATCH):
        found.append([fetch(rows)[:count] for rows in _clean(graph, leaves, tokens)])
    logits, losses = (np.concatenate(rows) for rows in zip(*found, strict=True))
    return Clean(
        model,
        text,
        logits,
        losses,
        taps.projection_inputs(model, text.tokens[:tapped, :-1]),
        trits(model),
        continued(model, text.tokens),
    )


def point(clean: Clean, noise: NoiseModel, key: jax.Array, **selection) -> Point:
    """One draw. selection: `select`, `layers` and `rows` of `injection.perturb`."""
    noisy, counts = injection.perturb(clean.model, noise, key, copy=True, **selection)
    return contrast(clean, noisy, sum(counts.values()))


def contrast(clean: Clean, noisy: Decoder, changed: int) -> Point:
    """A model of which `changed` values are others, beside the clean one."""
    graph, leaves = nnx.split(noisy)
    found = []
    both = (batches(rows, BATCH) for rows in (clean.text.tokens, clean.logits))
    for (tokens, count), (logits, _) in zip(*both, strict=True):
        out = _contrast(graph, leaves, tokens, logits)
        found.append([fetch(row)[:count] for row in out])
    losses, kl, rank, cosine = (np.concatenate(rows) for rows in zip(*found, strict=True))
    bits = (losses - clean.losses).sum(axis=1, dtype=np.float64) / math.log(2)
    diverged: tuple[int, ...] = ()
    lost = np.flatnonzero(~np.isfinite(bits))
    where = first_not_finite(noisy, clean.text.tokens[lost[:1], :-1]) if lost.size else None
    if not lost.size and noisy.layers.attn.memory is None:  # else there is no decoding it
        pairs = zip(clean.continued, continued(noisy, clean.text.tokens), strict=True)
        diverged = tuple(int((np.append(a == b, False)).argmin()) for a, b in pairs)
    return Point(
        changed,
        bits / clean.text.num_bytes,
        diverged,
        where,
        float(kl.mean(dtype=np.float64)) / math.log(2),
        float((rank == 0).mean()),
        float((rank < TOP).mean()),
        float(cosine.mean(dtype=np.float64)),
    )


def continued(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    """int32 [prompts, CONTINUED]: greedy continuations of the first sequences' beginnings.

    Fewer tokens where the context is too short for them, none of prompts without a token.
    """
    length = min(PROMPT, tokens.shape[1] - 1)
    new = min(CONTINUED, model.config.max_context - length)
    if new < 1:
        return np.zeros((0, 0), np.int32)
    prompts = np.pad(tokens, ((0, max(0, PROMPTS - len(tokens))), (0, 0)), mode="wrap")
    found = generate(model, prompts[:PROMPTS, :length], max_new_tokens=new)
    return found[: len(tokens), length:]


def first_not_finite(model: Decoder, tokens: np.ndarray) -> str | None:
    """The first projection, in the order they run, whose input is not finite on these tokens;
    "head" where only the logits are not, None where all is finite. tokens: int32 [B, T]."""
    for name, x in taps.projection_inputs(model, tokens).items():
        if not np.isfinite(x).all():
            return name
    return None if np.isfinite(np.asarray(model(jnp.asarray(tokens)))).all() else "head"


def by_depth(
    clean: Clean, noise: NoiseModel, keys: Sequence[jax.Array], **selection
) -> list[float]:
    """Cosine of what each layer reads with what it reads in the clean model: mean of the draws.

    Of q's inputs, behind the layer's first norm; selection: as for `point`.
    """
    names = [f"layers.{layer}.attn.q" for layer in range(clean.model.config.num_layers)]
    rows = len(clean.inputs[names[0]]) // (clean.text.tokens.shape[1] - 1)
    found = []
    for key in keys:
        noisy, _ = injection.perturb(clean.model, noise, key, copy=True, **selection)
        seen = taps.projection_inputs(noisy, clean.text.tokens[:rows, :-1])
        found.append([_cosine(clean.inputs[name], seen[name]) for name in names])
    return np.mean(found, axis=0).tolist()


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays as long vectors; 0 where one is nothing."""
    a, b = (x.ravel().astype(np.float64) for x in (a, b))
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0


def rise_of(clean: Clean, points: Sequence[np.ndarray]) -> tuple[Interval, Interval]:
    """Bits per byte more than clean, of draws' `rises`: its interval over draws, and over text.

    The first says what other draws of the noise would give on this text; the second what other
    text would give on the mean of these draws: nothing is known of that where one file, or run
    of neighbours, has more than half of the rise, as where a noise seldom strikes.
    """
    sizes = clean.text.num_bytes.astype(float)
    means = [float((rises * sizes).sum() / sizes.sum()) for rises in points]
    group = groups(clean.text.files, len(sizes))
    total = np.mean(points, axis=0) * sizes
    texts = bootstrap_ratio(total, sizes, groups=group)
    _, place = np.unique(group, return_inverse=True)
    if np.abs(np.bincount(place, total)).max() > abs(total.sum()) / 2:
        texts = dataclasses.replace(texts, low=None, high=None)  # no spread to go by
    return t_interval(means), texts


@dataclasses.dataclass(frozen=True)
class Product:
    """One projection's outputs under a noise, all draws together.

    Attributes:
      name: "layers.0.attn.q".
      measured: cosine with the clean outputs, a draw each.
      snr_db: power of the clean outputs over the error's, a draw each; infinite without an error.
      plug_in, closed_form: predicted cosines; the latter None for noise on inputs.
      error_power: predicted power of the error over that of the outputs.
    """

    name: str
    measured: tuple[float, ...]
    snr_db: tuple[float, ...]
    plug_in: float
    closed_form: float | None
    error_power: float


def products(
    clean: Clean, noise: NoiseModel, keys: Sequence[jax.Array], select: str = targets.EVERYTHING
) -> Iterator[Product]:
    """Every projection selected, in turn, struck as `perturb` strikes it with each of `keys`."""
    for name, codes in clean.codes.items():
        if not re.fullmatch(select, name):
            continue
        x = clean.inputs[name]
        y = x.astype(np.float64) @ codes
        found, snr = [], []
        for key in keys:
            pattern, layer = _pattern(name)
            own = jax.random.fold_in(tensor_key(key, pattern), layer)
            noisy = _struck(noise, own, codes, x)
            found.append(_cosine(y, noisy))
            snr.append(decibels(np.square(y).sum(), np.square(noisy - y).sum()))
        expected = plug_in(noise, codes, x)
        form = None
        if has_moments(noise):
            form = closed_form(noise, float(np.mean(codes != 0)))
        yield Product(name, tuple(found), tuple(snr), expected.cosine, form, expected.error_power)


def decibels(power, error) -> float:
    """10 log10(power / error)."""
    return 10 * math.log10(power / error) if error > 0 and power > 0 else math.inf


def predicts(noise: NoiseModel) -> bool:
    """Whether a product's cosine under the noise has a prediction: scales have none."""
    read = isinstance(noise, ReadNoise) and noise.domain != "cache"
    return read or has_moments(noise)


def _struck(noise: NoiseModel, key, codes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """f64 [T, N]: noisy outputs of one matrix of trits."""
    strength = jnp.float32(noise.strength)
    at_zero = noise.with_strength(0.0)
    if noise.domain == "inputs":
        return np.asarray(apply(at_zero, key, x, strength)[0], np.float64) @ codes
    if noise.domain == "accumulator":
        clean = x.astype(np.float64) @ codes
        unit = np.linalg.norm(x, axis=-1, keepdims=True)
        unit = np.where(unit > 0, unit, 1)
        steps = jnp.asarray(clean / unit, jnp.float32)
        return np.asarray(apply(at_zero, key, steps, strength)[0], np.float64) * unit
    if noise.domain == "packed":
        packed = Packed(pack_codes(codes, "trit2")[None], jnp.ones((1, 1, 1)))
        packed = dataclasses.replace(packed, shape=codes.shape)
        noisy = apply(at_zero, key, packed, strength)[0]
        w = np.asarray(unpack_codes(noisy.data[0], "trit2", codes.shape[0]), np.float64)
    elif noise.domain == "weights":
        value = jnp.asarray(codes, jnp.float32)[None]
        w = np.asarray(apply(at_zero, key, value, strength)[0][0], np.float64)
    else:
        w = np.asarray(apply(at_zero, key, jnp.asarray(codes), strength)[0], np.float64)
    return x.astype(np.float64) @ w


def _pattern(name: str) -> tuple[str, int]:
    """ "layers.2.mlp.up" -> ("layers.*.mlp.up", 2)."""
    head, layer, *rest = name.split(".")
    return ".".join([head, "*", *rest]), int(layer)


@functools.partial(jax.jit, static_argnums=0)
def _clean(graph, leaves, tokens):
    """int32 [B, T + 1] -> logits f32 [B, T, V], nats of each target f32 [B, T]."""
    logits, log_p = log_softmax(graph, leaves, tokens[:, :-1])
    return logits, of_targets(log_p, tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def _contrast(graph, leaves, tokens, clean):
    """Losses, KL in nats, rank of the clean model's likeliest token, cosine of logits: [B, T]."""
    logits, log_p = log_softmax(graph, leaves, tokens[:, :-1])
    kl, cosine = divergence(logits, log_p, clean, jax.nn.log_softmax(clean, axis=-1))
    likeliest = clean.argmax(axis=-1)[..., None]
    own = jnp.take_along_axis(logits, likeliest, axis=-1)
    # Of equal logits the first counts, as argmax has it: a model that says nothing agrees in none.
    before = (logits == own) & (jnp.arange(logits.shape[-1]) < likeliest)
    rank = jnp.sum((logits > own) | before, axis=-1)
    return of_targets(log_p, tokens[:, 1:]), kl, rank, cosine
