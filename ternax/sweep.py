"""Decodes along one axis or over a grid of two, each point a process of its own, resumable.

A point that does not fit says so and the sweep goes on; one that ended badly is marked and
tried again by the next run. A folder holds one sweep.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from ternax import comparison, measure
from ternax.checkpoint import box
from ternax.config import ModelConfig
from ternax.errors import DoesNotFit, Interrupted, PeerFailed, UsageError
from ternax.record import Record, Store
from ternax.table import rate

# The values an axis has when none are given; "all": every layer of the model.
DEFAULTS = {
    "layers": "4,8,10,all",
    "size": "1b,8b,13b,70b",
    "batch": "1,4,16,64",
    "context": "128,512,2048",
    "threads": "",
    "prompt": "16,128,512",
}
# The flag of `experiments.decode` that an axis sets.
FLAGS = {
    "layers": "layers",
    "size": "config",
    "batch": "batch",
    "context": "prompt_length",
    "threads": "threads",
    "prompt": "prompt_length",
}
# The first new token comes from prefill, the second warms up.
UNTIMED_TOKENS = 2


@dataclasses.dataclass(frozen=True)
class Axis:
    """What varies: a name in DEFAULTS, and its values in order: sizes' names, else numbers."""

    name: str
    values: tuple[str, ...]


Point = tuple[tuple[str, str], ...]  # (axis, value) of each axis


def parse_axis(text: str, config: ModelConfig) -> Axis:
    """ "batch" or "batch:1,4,16". UsageError for what is none or cannot be run."""
    name, colon, values = text.partition(":")
    if name not in DEFAULTS:
        raise UsageError(f"--axis must be one of {', '.join(DEFAULTS)}, found {name!r}")
    words = [word.strip() for word in (values if colon else _defaults(name, config)).split(",")]
    if name == "size":
        for word in words:
            box.find(word)
    else:
        words = _numbers(name, words, config)
    if len(set(words)) < 2:
        raise UsageError(f"--axis={name} needs two different values at least, found {text!r}")
    return Axis(name, tuple(dict.fromkeys(words)))


def _defaults(name: str, config: ModelConfig) -> str:
    if name == "layers":
        parts = [word for word in ("4", "8", "10") if int(word) < config.num_layers]
        return ",".join([*(parts or ["1", "2"]), "all"])
    if name == "threads":
        most = measure.threads_available()
        return ",".join(str(n) for n in sorted({1, 2, 4, 8, 16, 32, 64, most}) if n <= most)
    return DEFAULTS[name]


def _numbers(name: str, words: list[str], config: ModelConfig) -> list[str]:
    """Rising numbers within what the model and the machine have."""
    most = {
        "layers": config.num_layers,
        "context": config.max_context,
        "prompt": config.max_context,
        "threads": measure.threads_available(),
    }.get(name)
    words = [str(config.num_layers) if name == "layers" and w == "all" else w for w in words]
    legal = all(word.isascii() and word.isdigit() for word in words)
    if not legal or min(map(int, words)) < 1 or (most and max(map(int, words)) > most):
        upper = f" to {most}" if most else " up"
        raise UsageError(
            f"--axis={name} takes numbers from 1{upper} behind commas, as in {name}:1,2; "
            f"found {','.join(words)!r}"
        )
    return [str(number) for number in sorted(set(map(int, words)))]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One axis, or a grid of two, and what stays the same.

    Attributes:
      axes: what varies.
      words: arguments of `experiments.decode` for all points.
      num_tokens: tokens decoded and timed.
      rounds: times that each point runs.
    """

    axes: tuple[Axis, ...]
    words: tuple[str, ...]
    num_tokens: int = 16
    rounds: int = 3

    def __post_init__(self):
        names = [axis.name for axis in self.axes]
        if not 1 <= len(names) <= 2 or len({FLAGS[name] for name in names}) < len(names):
            raise UsageError(
                f"--axis may be given once or twice, and not twice for one thing; found "
                f"{', '.join(names) or 'none'}"
            )
        if {"size", "layers"} <= set(names):
            raise UsageError("--axis=size and --axis=layers cut models of different depths")
        for name in names:
            given = [word for word in self.words if word.startswith(f"--{FLAGS[name]}=")]
            if given:
                raise UsageError(f"{given[0]} sets what --axis={name} varies: leave it out")

    @property
    def identity(self) -> str:
        """What a folder may hold one of: every setting but the rounds."""
        axes = [f"--axis={axis.name}:{','.join(axis.values)}" for axis in self.axes]
        return " ".join([*axes, *sorted(self.words), f"--num_tokens={self.num_tokens}"])

    @property
    def points(self) -> list[Point]:
        names = [axis.name for axis in self.axes]
        values = itertools.product(*(axis.values for axis in self.axes))
        return [tuple(zip(names, value, strict=True)) for value in values]

    def decode_words(self, point: Point) -> list[str]:
        """Arguments of the decode that measures a point."""
        tokens = self.num_tokens + UNTIMED_TOKENS
        words = [*self.words, f"--num_tokens={tokens}"]
        for name, value in point:
            if name == "context":
                if int(value) <= tokens:
                    raise UsageError(
                        f"--axis=context counts prompt and new tokens: more than {tokens}, "
                        f"found {value}"
                    )
                value = str(int(value) - tokens)
            words.append(f"--{FLAGS[name]}={value}")
        return words


def label(point: Point) -> str:
    """ "layers 4, batch 16"."""
    return ", ".join(f"{name} {value}" for name, value in point)


def of_point(records: Sequence[Record], point: Point) -> list[Record]:
    """A point's records, in the order they were made."""
    return [record for record in records if record.note.startswith(f"{label(point)}; ")]


def is_measured(record: Record) -> bool:
    """A decode of a point that ran to its end."""
    return record.phase == "decode" and "round" in record.metrics and not record.incomplete


def run(sweep: Sweep, store: Store, say: Callable[[str], None] = print) -> list[Record]:
    """Measures what the store lacks: odd rounds forwards, even ones backwards.

    Returns:
      All records of points in the store: for each point and round one, measured; for a point
      that does not fit one, predicted.

    Raises:
      UsageError: the store holds another sweep.
      Interrupted: with all finished points kept.
    """
    for record in store.records:
        if record.experiment != "scaling" or record.flags != sweep.identity:
            raise UsageError(
                f"{store.directory} holds another sweep ({record.experiment} {record.flags}); "
                "choose another --output_dir"
            )
    for point in sweep.points:
        sweep.decode_words(point)  # what cannot be asked for, before anything runs
    done = {
        (point, int(record.metrics["round"]))
        for point in sweep.points
        for record in of_point(store.records, point)
        if is_measured(record)
    }
    too_large = {p for p in sweep.points if any(_is_plan(r) for r in of_point(store.records, p))}
    if done or too_large:
        say(f"resumed  {len(done)} measurements and {len(too_large)} refusals were there")
    for number in range(1, sweep.rounds + 1):
        for point in sweep.points if number % 2 else sweep.points[::-1]:
            if (point, number) in done or point in too_large:
                continue
            try:
                record = _measure(sweep, point, number)
            except KeyboardInterrupt as error:
                raise Interrupted(
                    f"interrupted at {label(point)}, round {number}; {len(done)} measurements are "
                    f"kept in {store.directory}; the same command goes on from there"
                ) from error
            if _is_plan(record):
                too_large.add(point)
            elif is_measured(record):
                done.add((point, number))
            store.append(record)
            say(_line(point, number, record))
    return [r for point in sweep.points for r in of_point(store.records, point)]


def _is_plan(record: Record) -> bool:
    return record.phase == "plan"


def _measure(sweep: Sweep, point: Point, number: int) -> Record:
    """One decode of a point; of one that does not fit its plan, of one that failed a mark."""
    words, place = sweep.decode_words(point), f"{label(point)}; "
    try:
        records = comparison.decode_apart(words)
    except DoesNotFit as error:
        plan = comparison.plan_apart(words)
        return _of_sweep(sweep, plan, plan.metrics, f"{place}{error}")
    except PeerFailed as error:
        plan = comparison.plan_apart(words)
        failed = dataclasses.replace(plan, phase="decode", kind="measured", incomplete=True)
        return _of_sweep(sweep, failed, {"round": number}, f"{place}failed: {error}")
    of = {record.phase: record for record in records}
    prefill = ("ttft_ms", "prefill_tokens_per_s", "prompt_tokens")
    metrics = of["decode"].metrics | {name: of["prefill"].metrics[name] for name in prefill}
    return _of_sweep(
        sweep, of["decode"], metrics | {"round": number}, f"{place}{of['decode'].note}"
    )


def _of_sweep(sweep: Sweep, record: Record, metrics: dict, note: str) -> Record:
    return dataclasses.replace(
        record, experiment="scaling", metrics=metrics, note=note, flags=sweep.identity
    )


def _line(point: Point, number: int, record: Record) -> str:
    m, head = record.metrics, f"round {number}  {label(point)}: "
    if not is_measured(record):
        return head + record.note.partition("; ")[2]
    return (
        f"{head}{rate(m['tokens_per_s'])} tokens/s, {rate(m['tpot_ms_p50'])} ms a step, "
        f"{100 * m['share_of_bound']:.0f} % of the bound"
    )
