"""The figures that are to be reached, and records picked that tell what was found."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence

from ternax.record import Record

OURS, HEAD = "mosaic", "head"
OFF = "CUDA graphs off"


# --- Records, picked ---------------------------------------------------------------------------


def best_read(records: Iterable[Record]) -> float | None:
    """The best median rate at which memory was only read, GB/s."""
    rates = [
        r.metrics["read_bandwidth_gb_per_s"]
        for r in records
        if r.phase == "device" and "read_bandwidth_gb_per_s" in r.metrics
    ]
    return max(rates, default=None)


def wrong(records: Iterable[Record]) -> list[Record]:
    """Checks of exactness that failed."""
    return [r for r in records if r.note.startswith("exactness") and _is_wrong(r)]


def _is_wrong(record: Record) -> bool:
    return "WRONG" in record.note or "FAILED" in record.note


def kernel(
    records: Iterable[Record], shape: str, batch: int, name: str = OURS, graphs: bool = True
) -> Record | None:
    """The last record of a contender at a shape, "70b:o", by itself. Ours of a head is HEAD."""
    name = HEAD if name == OURS and shape.endswith(":head") else name
    found = [
        r
        for r in records
        if (r.phase, r.config, r.batch, r.backend) == ("kernel", shape, batch, name)
        and r.note.startswith("K ")
        and (OFF not in r.note) == graphs
    ]
    return found[-1] if found else None


def model(
    records: Iterable[Record],
    phase: str,
    config: str,
    batch: int,
    context: int,
    graphs: bool = True,
) -> Record | None:
    """The last decode or prefill of a model at about this context."""
    found = [
        r
        for r in records
        if (r.phase, r.config, r.batch) == (phase, config, batch)
        and 0.75 <= r.context / context <= 1.33
        and not r.incomplete
        and r.samples
        and (OFF not in r.note) == graphs
    ]
    return found[-1] if found else None


# --- Goals -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure to be reached on an H200.

    Attributes:
      what: it is.
      levels: at least, goal, moonshot.
      find: records -> what was found, or None.
      lower: whether less is better.
    """

    what: str
    levels: tuple[float, float, float]
    find: Callable[[Sequence[Record]], float | None]
    lower: bool = False

    def reached(self, found: float) -> str:
        """The highest level that `found` reaches, in a word."""
        words = ("at least", "goal", "moonshot")
        met = [
            word
            for word, level in zip(words, self.levels, strict=True)
            if (found <= level if self.lower else found >= level)
        ]
        return met[-1] if met else "below"


PARTS = ("qkv", "o", "gate_up", "down")


def _share(part: str):
    def find(records):
        found, best = kernel(records, f"70b:{part}", 1), best_read(records)
        return found.metrics["gb_per_s"] / best if found and best else None

    return find


def _seconds(records, batch: int, name: str = OURS) -> float | None:
    """A layer's four products."""
    found = [kernel(records, f"70b:{part}", batch, name) for part in PARTS]
    if any(record is None for record in found):
        return None
    return sum(statistics.median(record.samples) for record in found if record)


def _over_one(batch: int):
    def find(records):
        many, one = _seconds(records, batch), _seconds(records, 1)
        return many / one if many and one else None

    return find


def _against_bf16(records) -> float | None:
    theirs, ours = _seconds(records, 1, "XLA bf16"), _seconds(records, 1)
    return theirs / ours if theirs and ours else None


def _tokens(batch: int, context: int):
    def find(records):
        found = model(records, "decode", "70b", batch, context)
        return found.metrics["tokens_per_s"] if found else None

    return find


def _prefill(tokens: int):
    def find(records):
        found = model(records, "prefill", "70b", 1, tokens)
        return found.metrics["prefill_tokens_per_s"] if found else None

    return find


def share_of_best(record: Record, records: Sequence[Record]) -> float | None:
    """A decode's share of what its bytes allow at the best rate that memory was read at."""
    m = record.metrics
    best = max(best_read(records) or 0, m.get("read_bandwidth_gb_per_s", 0))
    if "share_of_bound" not in m or not best:
        return None
    return m["share_of_bound"] * m["read_bandwidth_gb_per_s"] / best


def _share_of_2b4t(records) -> float | None:
    found = model(records, "decode", "bitnet-2b4t", 1, 1024)
    return share_of_best(found, records) if found else None


GOALS: tuple[Goal, ...] = (
    *(
        Goal(f"70b {part}, batch 1: share of the read rate", (0.75, 0.9, 0.95), _share(part))
        for part in ("gate_up", "down", "head")
    ),
    *(
        Goal(f"70b {part}, batch 1: share of the read rate", (0.5, 0.7, 0.85), _share(part))
        for part in ("qkv", "o")
    ),
    *(
        Goal(f"70b's products at batch {n} over batch 1", (1.25, 1.1, 1.05), _over_one(n), True)
        for n in (8, 16)
    ),
    Goal("XLA's bf16 over ours, 70b's products, batch 1", (6, 7, 7.6), _against_bf16),
    Goal("70b, batch 1, context 1k, tokens/s", (140, 190, 210), _tokens(1, 1024)),
    Goal("70b, batch 1, context 8k, tokens/s", (115, 160, 180), _tokens(1, 8192)),
    Goal("70b, batch 16, context 1k, tokens/s", (1600, 2500, 2900), _tokens(16, 1024)),
    Goal("70b, batch 64, context 1k, tokens/s", (3500, 5500, 7000), _tokens(64, 1024)),
    Goal("70b, prefill of 2048, tokens/s", (5000, 8500, 10000), _prefill(2048)),
    Goal("2b4t, batch 1: share of its bound", (0.4, 0.6, 0.75), _share_of_2b4t),
)
