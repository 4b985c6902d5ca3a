"""What schemes cost in time: an update of training, a token of decode. All take turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import ternax
from ternax import comparison, edit
from ternax.config import ModelConfig, with_scheme
from ternax.errors import PeerFailed
from ternax.random_weights import abstract_model
from ternax.record import Record
from ternax.train import Trainer, TrainSpec


def packs(config: ModelConfig) -> bool:
    """Whether the config's scheme has a packed form; computes nothing."""
    return edit.packs(abstract_model(config, packed=False))


def update_seconds(
    config: ModelConfig, schemes: Sequence[str], spec: TrainSpec, *, rounds: int, updates: int = 3
) -> dict[str, list[float]]:
    """Scheme -> seconds an update, one number a round.

    All trainers stand ready and take turns, forwards and backwards, on the same tokens; a
    round in front, which warms up, is left out.

    Args:
      config: the model, whatever its scheme.
      schemes: what it trains under.
      spec: how it trains.
      rounds: numbers of each scheme.
      updates: that a number is the mean of.
    """
    order = list(dict.fromkeys(schemes))
    trainers = {
        scheme: Trainer(ternax.load(with_scheme(config, scheme), packed=False), spec)
        for scheme in order
    }
    drawn = np.random.default_rng(0).integers(
        0, config.vocab_size, (spec.batch, spec.length + 1), np.int32
    )
    seconds: dict[str, list[float]] = {scheme: [] for scheme in order}
    for number in range(rounds + 1):
        for scheme in order if number % 2 else order[::-1]:
            started = time.perf_counter()
            for _ in range(updates):
                loss, _ = trainers[scheme].advance(drawn)
            loss.block_until_ready()
            if number:
                seconds[scheme].append((time.perf_counter() - started) / updates)
    return seconds


def decode_records(
    config: ModelConfig,
    schemes: Sequence[str],
    words: Sequence[str],
    *,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Record]:
    """Decodes under each scheme in turn, a process each; yields a Record a scheme.

    Args:
      config: says how each scheme's inputs are quantized.
      schemes: that have a packed form.
      words: further arguments of `experiments.decode`, the model's among them.
      rounds: decodes of each; speed and share of the bound are medians of theirs.
      say: told of a scheme that cannot be decoded.
    """
    found: dict[str, list[Record]] = {scheme: [] for scheme in schemes}
    for number in range(rounds):
        for scheme in list(found) if number % 2 else list(found)[::-1]:
            inputs = with_scheme(config, scheme).inputs
            try:
                records = comparison.decode_apart(
                    [*words, f"--scheme={scheme}", f"--inputs={inputs}"]
                )
            except PeerFailed as error:
                say(f"{scheme} has no speed: {error}")
                del found[scheme]
                continue
            found[scheme].append(next(r for r in records if r.phase == "decode"))
    for records in found.values():
        speeds = [r.metrics["tokens_per_s"] for r in records]
        speed = statistics.median(speeds)
        share = statistics.median(r.metrics["share_of_bound"] for r in records)
        metrics = {
            "tokens_per_s": speed,
            "share_of_bound": share,
            "bound_tokens_per_s": speed / share,
        }
        yield dataclasses.replace(
            records[-1],
            samples=tuple(speeds),
            sample_unit="tokens/s",
            metrics=records[-1].metrics | metrics,
            note=f"random weights; a process a round, {rounds} rounds in turn with other schemes",
        )
