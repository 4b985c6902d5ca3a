"""How well a model predicts a text, alone and beside a reference; with what the text leaves open.

Every interval here is over the text: it says what other files of the same kind would give for
this one model. It holds no spread of training seeds, for which `estimate.t_interval` takes
the results of several models.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import watchdog
from ternax.edit import fit_kernels
from ternax.errors import NumericCheckFailed, UsageError
from ternax.estimate import Interval
from ternax.models import Decoder
from ternax.models.decoder import logits_of
from ternax.resample import MIN_GROUPS, bootstrap_ratio, clustered_share
from ternax.sharding import fetch

# Sequences that go through the model together, where the caller does not say.
BATCH = 8
# Runs of neighbouring sequences that stand in for files where a text has too few of them.
BLOCKS = 24


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model on a text. Intervals hold what the text leaves open, never training seeds.

    Attributes:
      bits_per_byte: bits of all targets over the bytes they stand for.
      loss_nats: nats of a target, mean.
      perplexity: exp(loss_nats), of a token.
      per_sequence: f64 [n], bits per byte of each sequence.
    """

    bits_per_byte: Interval
    loss_nats: Interval
    perplexity: Interval
    per_sequence: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model beside a reference on the same targets.

    Attributes:
      model, reference: each on its own.
      difference: bits per byte, the model's less the reference's, pair by pair.
      kl_bits: mean KL(reference || model) of a target's distribution, in bits.
      top1_agreement: share of targets where both have the same likeliest token.
      logit_cosine: mean cosine between both logits of a target.
    """

    model: Evaluation
    reference: Evaluation
    difference: Interval
    kl_bits: Interval
    top1_agreement: Interval
    logit_cosine: float


def token_losses(
    model: Decoder,
    sequences: np.ndarray,
    *,
    batch: int = BATCH,
    advance: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Nats of every target: f32 [n, T].

    Args:
      model: float, whose projections are then fake-quantized, or packed.
      sequences: int32 [n, T + 1]; inputs and targets overlap by one.
      batch: sequences that run together. One shape is compiled: the last batch is padded.
      advance: called with the number of sequences done after each batch.

    Raises:
      UsageError: tokens that the model does not have, or sequences longer than its context.
    """
    _check(model, sequences)
    graph, leaves = nnx.split(fit_kernels(model))
    found = []
    for tokens, count in batches(sequences, batch):
        found.append(fetch(_losses(graph, leaves, tokens))[:count])
        if advance:
            advance(count)
    return np.concatenate(found)


def bits_per_byte(losses, num_bytes) -> float:
    """All losses, in nats, as bits over the number of bytes that their targets stand for."""
    return float(np.sum(losses, dtype=np.float64) / math.log(2) / np.sum(num_bytes))


def evaluate(
    model: Decoder,
    sequences: np.ndarray,
    *,
    num_bytes=None,
    files=None,
    batch: int = BATCH,
    advance: Callable[[int], object] | None = None,
) -> Evaluation:
    """The model on sequences.

    Args:
      model, sequences, batch, advance: as for `token_losses`.
      num_bytes: int [n], bytes of each sequence's targets; None: a target is a byte.
      files: int [n], the file of each sequence, see `groups`; None: not known.
    """
    losses = token_losses(model, sequences, batch=batch, advance=advance)
    return summary(losses, num_bytes=num_bytes, files=files)


def compare(
    model: Decoder,
    reference: Decoder,
    sequences: np.ndarray,
    *,
    num_bytes=None,
    files=None,
    batch: int = BATCH,
    advance: Callable[[int], object] | None = None,
) -> Comparison:
    """The model beside a reference; arguments as for `evaluate`.

    Batch by batch, so that no more than one batch of either's logits is held.

    Raises:
      UsageError: as for `token_losses`, and vocabularies that differ.
    """
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"reference: expected the model's vocabulary of {sizes[0]}, found {sizes[1]} in "
            f"{reference.config.name}"
        )
    _check(model, sequences)
    _check(reference, sequences)
    parts, other_parts = (nnx.split(fit_kernels(one)) for one in (model, reference))
    found = []
    for tokens, count in batches(sequences, batch):
        rows = _contrast(parts[0], parts[1], other_parts[0], other_parts[1], tokens)
        found.append([fetch(row)[:count] for row in rows])
        if advance:
            advance(count)
    ours, theirs, kl, same, cosine = (np.concatenate(rows) for rows in zip(*found, strict=True))
    known = {"num_bytes": num_bytes, "files": files}
    targets, sizes_bytes, group = _denominators(ours, **known)
    return Comparison(
        model=summary(ours, **known),
        reference=summary(theirs, **known),
        difference=bootstrap_ratio(_bits(ours) - _bits(theirs), sizes_bytes, groups=group),
        kl_bits=bootstrap_ratio(_bits(kl), targets, groups=group),
        top1_agreement=clustered_share(same.sum(axis=1), targets, groups=group),
        logit_cosine=float(cosine.mean(dtype=np.float64)),
    )


def summary(losses: np.ndarray, *, num_bytes=None, files=None) -> Evaluation:
    """What `token_losses` [n, T] amount to. NumericCheckFailed where one is not finite."""
    finite = np.isfinite(losses)
    if not finite.all():
        row, place = np.argwhere(~finite)[0]
        raise NumericCheckFailed(
            f"evaluate: expected finite losses, found {losses[row, place]} at target {place} of "
            f"sequence {row}; the model's weights or logits are not finite"
        )
    targets, sizes, group = _denominators(losses, num_bytes, files)
    nats = bootstrap_ratio(losses.sum(axis=1, dtype=np.float64), targets, groups=group)
    bits = _bits(losses)
    return Evaluation(
        bootstrap_ratio(bits, sizes, groups=group), nats, nats.map(math.exp), bits / sizes
    )


def groups(files, count: int) -> np.ndarray:
    """Which of `count` sequences are drawn together: int [count].

    Those of one file, since they are alike. Where files are not known or fewer than
    MIN_GROUPS, runs of neighbours, BLOCKS of them or as many as there are sequences: then the
    interval is for more of the same files.
    """
    if files is not None and len(np.unique(files)) >= MIN_GROUPS:
        return np.asarray(files)
    return np.arange(count) * min(BLOCKS, count) // count


def _denominators(losses, num_bytes, files):
    """(targets [n], bytes [n], group [n]) of the sequences."""
    count, length = losses.shape
    targets = np.full(count, length)
    sizes = targets if num_bytes is None else np.asarray(num_bytes)
    return targets, sizes, groups(files, count)


def _bits(nats: np.ndarray) -> np.ndarray:
    """[n, T] nats -> [n] bits."""
    return nats.sum(axis=1, dtype=np.float64) / math.log(2)


def batches(sequences: np.ndarray, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """([batch, ...] of [n, ...], how many rows of it count), the last one padded."""
    for first in range(0, len(sequences), batch):
        watchdog.tick()
        rows = sequences[first : first + batch]
        yield np.pad(rows, ((0, batch - len(rows)), *[(0, 0)] * (rows.ndim - 1))), len(rows)


def _check(model: Decoder, sequences: np.ndarray) -> None:
    config = model.config
    if sequences.ndim != 2 or not len(sequences) or sequences.shape[1] < 2:
        raise UsageError(
            f"sequences must be [n, T + 1] with n and T at least 1, found {sequences.shape}"
        )
    if sequences.min() < 0 or sequences.max() >= config.vocab_size:
        raise UsageError(
            f"sequences: expected tokens in [0, {config.vocab_size}), {config.name}'s "
            f"vocabulary; found {sequences.min()} .. {sequences.max()}"
        )
    if sequences.shape[1] - 1 > config.max_context:
        raise UsageError(
            f"sequences: expected at most {config.max_context} tokens, {config.name}'s context; "
            f"found {sequences.shape[1] - 1}"
        )


def log_softmax(graph, leaves, inputs):
    """(logits, log-probabilities), f32 [B, T, V] each."""
    logits = logits_of(graph, leaves, inputs)
    return logits, jax.nn.log_softmax(logits, axis=-1)


def of_targets(log_probabilities: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of each target: f32 [B, T], from f32 [B, T, V] and int32 [B, T]."""
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def divergence(logits, log_p, reference, log_q) -> tuple[jax.Array, jax.Array]:
    """KL(reference || model) in nats, and the cosine of both logits: f32 [B, T] each.

    logits, log_p: the model's and their log-softmax, f32 [B, T, V]; reference, log_q: likewise.
    """
    kl = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    lengths = jnp.linalg.norm(logits, axis=-1) * jnp.linalg.norm(reference, axis=-1)
    return kl, jnp.sum(logits * reference, axis=-1) / jnp.where(lengths > 0, lengths, 1)


@functools.partial(jax.jit, static_argnums=0)
def _losses(graph, leaves, tokens):
    """int32 [B, T + 1] -> f32 [B, T]."""
    _, log_p = log_softmax(graph, leaves, tokens[:, :-1])
    return of_targets(log_p, tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=(0, 2))
def _contrast(graph, leaves, reference_graph, reference_leaves, tokens):
    """int32 [B, T + 1] -> losses of both, KL in nats, equal top 1, cosine: [B, T] each."""
    logits, log_p = log_softmax(graph, leaves, tokens[:, :-1])
    clean, log_q = log_softmax(reference_graph, reference_leaves, tokens[:, :-1])
    same = logits.argmax(axis=-1) == clean.argmax(axis=-1)
    kl, cosine = divergence(logits, log_p, clean, log_q)
    targets = tokens[:, 1:]
    return of_targets(log_p, targets), of_targets(log_q, targets), kl, same, cosine
