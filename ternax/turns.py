"""Contexts of one model in one process, decoding in turn: how speed falls as the cache fills.

Runs apart meet a shared machine's memory at different speeds, which move by more than contexts
differ. Here every context is prefilled once; then rounds go by in which each decodes a few
tokens, in an order of its own, a fraction of a second after the others.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence

from ternax import estimate, measure
from ternax.config import ModelConfig
from ternax.engine import CHUNK_TOKENS
from ternax.errors import DoesNotFit, UsageError
from ternax.record import Record
from ternax.table import binary
from ternax.workload import Workload, backend_name, first_device


@dataclasses.dataclass(frozen=True)
class Turns:
    """What takes turns.

    Attributes:
      contexts: cache slots in use after the last round, of each.
      rounds: turns that each takes.
      num_tokens: tokens of a turn, timed together.
      workload: all that contexts share; its prompt's length and tokens are not read.
    """

    contexts: tuple[int, ...]
    rounds: int
    num_tokens: int
    workload: Workload

    def __post_init__(self):
        if not 1 <= self.num_tokens <= CHUNK_TOKENS:
            raise UsageError(
                f"--num_tokens must be 1 to {CHUNK_TOKENS} in turn, one call of the loop on the "
                f"device; found {self.num_tokens}"
            )
        need = self.rounds * self.num_tokens + 2
        if min(self.contexts) < need:
            raise UsageError(
                f"{self.rounds} rounds of {self.num_tokens} tokens behind a prompt and a warm-up "
                f"token take {need}, a context of {min(self.contexts)} holds less: give fewer"
            )

    def of(self, context: int) -> Workload:
        """A prompt that leaves room for the warm-up and all rounds."""
        new = 1 + self.rounds * self.num_tokens
        return dataclasses.replace(
            self.workload, prompt_length=context - new, num_tokens=new, prompt=None
        )


def check_fits(config: ModelConfig, turns: Turns) -> None:
    """DoesNotFit where weights and the caches of all contexts are more than there is."""
    plans = [turns.of(context).plan(config) for context in turns.contexts]
    caches = [plan.bytes["cache"] for plan in plans]
    rest = max(plan.total_bytes - cache for plan, cache in zip(plans, caches, strict=True))
    need, free = rest + sum(caches), plans[0].available_bytes
    if free is not None and need > free:
        raise DoesNotFit(
            f"{config.name} with caches of contexts {', '.join(map(str, turns.contexts))} needs "
            f"{binary(need)}, available {binary(free)}: give fewer or shorter ones"
        )


def run(
    config: ModelConfig,
    turns: Turns,
    *,
    flags_text: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Decodes in turn.

    Returns:
      A measured Record a context, seconds a token of each round as samples; and one a context
      but the shortest, of the ratios of speeds round by round.

    Raises:
      UsageError, DoesNotFit: before anything is allocated.
    """
    from ternax.random_weights import random_model
    from ternax.steps import Steps

    work = turns.workload
    check_fits(config, turns)
    model = random_model(
        config, seed=work.seed, embed_dtype=work.embed_dtype, head_dtype=work.head_dtype
    )
    steps, states = {}, {}
    taken: dict[int, list[float]] = {}
    for context in turns.contexts:
        say(f"prefill of {context}")
        steps[context] = Steps(model, turns.of(context))
        steps[context].compile_prefill()
        steps[context].compile_decode()
        state = steps[context].prefill(steps[context].new_cache())
        _, states[context] = steps[context].decode(state, 1)
        taken[context] = []
    order, shuffled = list(turns.contexts), random.Random(work.seed)
    bandwidths = [measure.read_bandwidth(seconds=0.5).median]
    for number in range(turns.rounds):
        shuffled.shuffle(order)
        for context in order:
            start = time.perf_counter()
            _, states[context] = steps[context].decode(states[context], turns.num_tokens)
            taken[context].append((time.perf_counter() - start) / turns.num_tokens)
        times = ", ".join(f"{1e3 * taken[c][-1]:.4g} ms at {c}" for c in turns.contexts)
        say(f"round {number + 1}  {times}")
    bandwidths.append(measure.read_bandwidth(seconds=0.5).median)
    return records(config, turns, taken, bandwidths, flags_text)


def records(
    config: ModelConfig,
    turns: Turns,
    taken: dict[int, list[float]],
    bandwidths_gb_per_s: Sequence[float],
    flags_text: str = "",
) -> list[Record]:
    """taken: context -> seconds a token, round by round."""
    device, first = first_device(), min(turns.contexts)
    beside = ", ".join(f"{b:.3g}" for b in bandwidths_gb_per_s)
    found = []
    for context in turns.contexts:
        middle = estimate.median(taken[context])
        common = Record(
            experiment="scaling",
            config=config.name,
            scheme=config.scheme,
            inputs=config.inputs,
            backend=backend_name(turns.workload.backend, device),
            device=measure.device_name(device),
            layers=config.num_layers,
            batch=turns.workload.batch,
            context=context,
            phase="decode",
            kind="measured",
            samples=tuple(taken[context]),
            sample_unit="s/token",
            metrics={
                "tokens_per_s": turns.workload.batch / middle.value,
                "tpot_ms_p50": 1e3 * middle.value,
            },
            seed=turns.workload.seed,
            flags=flags_text,
            note=f"context {context}, in turn, {turns.rounds} rounds of {turns.num_tokens} tokens; "
            f"read bandwidth before and after: {beside} GB/s",
        )
        found.append(common)
        if context != first:
            ratios = [a / b for a, b in zip(taken[first], taken[context], strict=True)]
            found.append(
                dataclasses.replace(
                    common,
                    samples=tuple(ratios),
                    sample_unit="ratio",
                    metrics=estimate.named("speed_ratio", estimate.median(ratios)),
                    note=f"speed at context {context} over {first}, round by round in turn",
                )
            )
    return found
