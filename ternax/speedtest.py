"""Requests against an engine or a server: the same workloads, times and fields for both.

A point is a workload at a concurrency. Its first request (for an engine: the first batch) is
cold and kept apart. A point that fails is marked and the test goes on; what is there already is
not asked again.
"""

import concurrent.futures
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

from ternax import measure, roofline
from ternax.endpoint import Endpoint
from ternax.errors import UsageError
from ternax.metrics import METRICS
from ternax.power import power_meter
from ternax.prompts import Workload, filler
from ternax.record import Record, Store
from ternax.reply import Reply

# Requests are numbered, and each point begins at a number of its own.
_NUMBERS_A_POINT = 1000
# A server's tokenizer is tried with so many prompts at most, the first of so many words.
_PROBES, _PROBE_WORDS = 5, 64


class Target(Protocol):
    """What answers requests."""

    @property
    def name(self) -> str:
        """For tables: "program", "layer" or the server's address."""

    @property
    def common(self) -> dict[str, Any]:
        """Fields that all its records share."""

    @property
    def here(self) -> bool:
        """Whether it runs on this machine's devices, whose energy can be read."""

    def ask(self, workload: Workload, concurrency: int, first: int, count: int) -> list[Reply]:
        """`count` requests, so many under way together; `first` numbers them."""

    def bound_tokens_per_s(self, workload: Workload, concurrency: int) -> float | None:
        """Of decoding, where it is known."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """A server behind an Endpoint."""

    endpoint: Endpoint
    common: dict[str, Any]
    here: bool = False
    _words: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.endpoint.url

    def ask(self, workload: Workload, concurrency: int, first: int, count: int) -> list[Reply]:
        """A thread for each request under way. Each prompt begins with its number, so that no
        server has it in its prefix cache."""
        wanted = workload.prompt_tokens
        if workload.text is None and wanted not in self._words:
            self._words[wanted] = self._fitted(wanted, first)

        def one(number: int) -> Reply:
            text = workload.text
            if text is None:
                text = filler(self._words[wanted], number)
            return self.endpoint.complete(f"{number:06d}. {text}", workload.max_tokens)

        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            try:
                return list(pool.map(one, range(first, first + count)))
            except BaseException:  # Ctrl-C: what has not begun is not asked any more
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fitted(self, wanted: int, first: int) -> int:
        """Words of filler that its tokenizer makes `wanted` tokens of, as near as a word allows.

        It counts prompts whose answers are cut to a token; where it does not, words are taken for
        tokens.
        """
        words, counted = min(wanted, _PROBE_WORDS), {}
        for number in range(first + _NUMBERS_A_POINT - _PROBES, first + _NUMBERS_A_POINT):
            reply = self.endpoint.complete(f"{number:06d}. {filler(words, number)}", 1)
            if not reply.prompt_tokens:
                break
            counted[words] = reply.prompt_tokens
            words = max(1, round(words * wanted / reply.prompt_tokens))
            if words in counted:
                break
        return min(counted, key=lambda n: abs(counted[n] - wanted), default=wanted)

    def bound_tokens_per_s(self, workload: Workload, concurrency: int) -> float | None:
        del workload, concurrency  # its machine is unknown
        return None


@dataclasses.dataclass(frozen=True)
class SpeedTest:
    """What is asked.

    Attributes:
      workloads, concurrency: every pair is a point.
      requests: warm ones of a point, at least.
      usd_per_h: of what answers, or None.
      flags_text: what was asked for; a folder holds one test of one target.
    """

    workloads: tuple[Workload, ...]
    concurrency: tuple[int, ...]
    requests: int = 4
    usd_per_h: float | None = None
    flags_text: str = ""


def run(test: SpeedTest, target: Target, store: Store, watch=lambda record: None) -> list[Record]:
    """Asks what the store lacks; a Record for each point, failed ones too, in order.

    Raises UsageError where the store holds another test.
    """
    for record in store.records:
        if record.experiment != "speedtest" or record.flags != test.flags_text:
            raise UsageError(
                f"{store.directory} holds another test ({record.experiment} {record.flags}); "
                "choose another --output_dir"
            )
    found = []
    pairs = itertools.product(test.concurrency, test.workloads)
    for number, (concurrency, workload) in enumerate(pairs):
        label = f"{workload.name}, concurrency {concurrency}, {target.name}; "
        held = [r for r in store.records if r.note.startswith(label) and not r.incomplete]
        if held:
            found.append(held[-1])
            continue
        first = number * _NUMBERS_A_POINT
        found.append(_point(test, target, workload, concurrency, first, label))
        store.append(found[-1])
        watch(found[-1])
    return found


def _point(
    test: SpeedTest, target: Target, workload, concurrency: int, first: int, label: str
) -> Record:
    cold = target.ask(workload, concurrency, first, concurrency)
    count = -(-test.requests // concurrency) * concurrency
    with power_meter() as meter:
        warm = target.ask(workload, concurrency, first + concurrency, count)
    metrics = summary(warm, concurrency)
    errors = dict.fromkeys(reply.error for reply in warm if reply.error)
    answered = [reply for reply in cold if not reply.error]
    # A server whose tokenizer was tried with prompts of this length is not cold any more.
    if answered and (target.here or workload.text is not None):
        metrics["cold_ttft_ms"] = 1e3 * max(reply.ttft_s for reply in answered)
    good = [reply for reply in warm if not reply.error]
    notes = [f"failed: {error}" for error in errors]
    if metrics["completed"]:
        metrics |= _beside(test, target, workload, concurrency, metrics)
        if target.here:  # what another machine uses is not known here
            tokens, seconds = metrics["total_output_tokens"], metrics["duration"]
            metrics |= meter.metrics(tokens=tokens, seconds=seconds)
            notes.append(meter.note)
    return Record(
        experiment="speedtest",
        phase="serve",
        kind="measured",
        batch=concurrency,
        context=max((r.prompt_tokens + r.output_tokens for r in good), default=0),
        samples=tuple(reply.e2el_s for reply in good),
        sample_unit="s",
        metrics=metrics,
        flags=test.flags_text,
        incomplete=not good,
        note=label + "; ".join([*notes, f"{len(good)} warm requests, cold ones apart"]),
        **target.common,
    )


def _beside(test: SpeedTest, target: Target, workload, concurrency: int, metrics: dict) -> dict:
    """The decode rate beside its bound, and what a token costs."""
    found: dict[str, float] = {}
    if "median_tpot_ms" in metrics:
        found["tokens_per_s"] = 1e3 * concurrency / metrics["median_tpot_ms"]
        bound = target.bound_tokens_per_s(workload, concurrency)
        if bound is not None:
            found |= {
                "bound_tokens_per_s": bound,
                "share_of_bound": found["tokens_per_s"] / bound,
            }
    if test.usd_per_h is not None:
        found["usd_per_h"] = test.usd_per_h
        found["usd_per_million_tokens"] = roofline.usd_per_million_tokens(
            test.usd_per_h, metrics["output_throughput"]
        )
    return found


def summary(replies: Sequence[Reply], concurrency: int) -> dict[str, float]:
    """The fields of vLLM's benchmark over the replies that came; counts alone where none did."""
    good = [reply for reply in replies if not reply.error]
    found: dict[str, float] = {
        "max_concurrency": concurrency,
        "completed": len(good),
        "failed": len(replies) - len(good),
    }
    if not good:
        return found
    duration = max(r.end_s for r in good) - min(r.start_s for r in good)
    inputs, outputs = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    found |= {
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    times = {
        "ttft": [r.ttft_s for r in good],
        "tpot": [r.tpot_s for r in good if r.tpot_s is not None],
        "itl": [s for r in good for s in r.itl_s],
        "e2el": [r.e2el_s for r in good],
    }
    for name, seconds in times.items():
        if seconds:
            found |= {
                f"mean_{name}_ms": 1e3 * statistics.fmean(seconds),
                f"median_{name}_ms": 1e3 * statistics.median(seconds),
                f"p99_{name}_ms": 1e3 * measure.percentile(seconds, 99),
            }
    return found


def expectations(text: str | None) -> dict[str, float]:
    """ "median_ttft_ms:140,output_throughput:12" as numbers. UsageError for what is none."""
    found = {}
    for word in (text or "").split(",") if text else []:
        name, _, value = word.strip().partition(":")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        legal = name.endswith("_ms") or name.endswith("throughput") or name == "tokens_per_s"
        if name not in METRICS or not legal or not 0 < number < float("inf"):
            raise UsageError(
                "--expect takes times and rates as median_ttft_ms:140,output_throughput:12, "
                f"found {word!r}"
            )
        found[name] = number
    return found


def verdicts(expected: dict[str, float], records: Sequence[Record]) -> list[Record]:
    """Each expectation against the mean over the points that have it, at the least concurrency.

    Times are met from below, rates from above: the verdict in the note is computed.
    """
    least = min((record.batch for record in records if not record.incomplete), default=0)
    found = []
    for name, wanted in expected.items():
        at = [r for r in records if r.batch == least and name in r.metrics]
        if not at:
            continue
        actual = statistics.fmean(record.metrics[name] for record in at)
        ratio, below = actual / wanted, name.endswith("_ms")
        met = ratio <= 1 if below else ratio >= 1
        word = "most" if below else "least"
        note = (
            f"verdict: {name} expected at {word} {wanted:g}, found {actual:.4g}, mean of "
            f"{len(at)} workloads at concurrency {least}: "
            + ("met" if met else f"missed, {ratio:.2g} times that")
        )
        metrics = {name: actual, "expected": wanted, "expected_ratio": ratio}
        found.append(
            dataclasses.replace(
                at[-1], samples=(), sample_unit="", metrics=metrics, note=note, context=0
            )
        )
    return found
