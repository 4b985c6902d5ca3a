"""One report of a folder of records: tables by experiment and kind, and where each number is from.

Records that are alike but for their round become one row of medians; a row names the file and
lines it comes from. Measured, extrapolated and predicted numbers stand in tables of their own.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from ternax import roofline, sizes
from ternax.errors import UsageError
from ternax.metrics import METRICS
from ternax.record import Record
from ternax.sizes import Timed
from ternax.table import format_metric

# What a table of an experiment shows; others show what most of their records have.
COLUMNS = {
    "decode": (
        "tokens_per_s",
        "bound_tokens_per_s",
        "share_of_bound",
        "tpot_ms_p50",
        "tpot_ms_p99",
        "ttft_ms",
        "peak_memory_bytes",
        "planned_memory_bytes",
        "joules_per_token",
        "usd_per_million_tokens",
    ),
    "scaling": (
        "tokens_per_s",
        "share_of_bound",
        "tpot_ms_p50",
        "multiplier",
        "fixed_ms",
        "slope_ms",
        "streaming_gb_per_s",
        "reference_tokens_per_s",
        "prediction_error",
        "peak_memory_bytes",
        "planned_memory_bytes",
    ),
    "speedtest": (
        "cold_ttft_ms",
        "median_ttft_ms",
        "p99_ttft_ms",
        "median_tpot_ms",
        "p99_itl_ms",
        "median_e2el_ms",
        "output_throughput",
        "share_of_bound",
        "completed",
        "failed",
        "expected_ratio",
        "usd_per_million_tokens",
    ),
    "plan": (
        "tokens_per_s",
        "bound_tokens_per_s",
        "tpot_ms_p50",
        "device_memory_bytes",
        "mbu_share",
        "mfu_share",
        "usd_per_million_tokens",
        "joules_per_token",
    ),
    "compare": (
        "prefill_tokens_per_s",
        "tokens_per_s",
        "share_of_bound",
        "speed_ratio",
        "speed_ratio_low",
        "speed_ratio_high",
    ),
}
_MOST_COLUMNS = 8
# In place of a machine where numbers come from counting alone.
COMPUTED = "none: predicted"
# What tells rows of a table apart, in the order they show.
_KEY = ("phase", "config", "scheme", "backend", "device", "layers", "batch", "context")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record, and the file and line that it was read from."""

    record: Record
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class Row:
    """Records that are alike but for their round: medians of their metrics."""

    entries: tuple[Entry, ...]

    @property
    def record(self) -> Record:
        """The last of them."""
        return self.entries[-1].record

    @property
    def metrics(self) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for entry in self.entries:
            for name, value in entry.record.metrics.items():
                found.setdefault(name, []).append(value)
        return {name: statistics.median(values) for name, values in found.items()}

    @property
    def place(self) -> str:
        """ "cpu-zen5/decode-70b.jsonl:2, 5": where its numbers are from."""
        lines: dict[str, list[int]] = {}
        for entry in self.entries:
            lines.setdefault(entry.file, []).append(entry.line)
        return "; ".join(f"{file}:{', '.join(map(str, at))}" for file, at in lines.items())


def read_folder(folder: str | pathlib.Path) -> tuple[list[Entry], dict[str, int]]:
    """Every record below a folder, and file -> lines that are none (of other programs).

    A folder that was reported before is not read again: its report holds no results.jsonl.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--results={folder}: expected a folder of records, found none")
    entries, others = [], {}
    for path in sorted(folder.rglob("*.jsonl")):
        name, strange = str(path.relative_to(folder)), 0
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            try:
                entries.append(Entry(Record.from_dict(json.loads(line)), name, number))
            except (ValueError, UsageError):
                strange += bool(line.strip())
        if strange:
            others[name] = strange
    if not entries:
        raise UsageError(f"--results={folder}: expected records in *.jsonl, found none")
    return entries, others


def rows(entries: Sequence[Entry]) -> list[Row]:
    """Those alike in one: rounds are, and records that sum up are not."""
    found: dict[tuple, list[Entry]] = {}
    for entry in entries:
        record = entry.record
        key: tuple = (record.experiment, record.kind, record.flags, record.incomplete, entry.file)
        key += tuple(getattr(record, name) for name in _KEY)
        key += (tuple(sorted(record.metrics)),)
        key += (entry.line,) if "round" not in record.metrics else ()
        found.setdefault(key, []).append(entry)
    return [Row(tuple(group)) for group in found.values()]


def memory_errors(found: Sequence[Row]) -> list[tuple[Row, float]]:
    """(row, planned over measured peak, less 1) of measured decodes that have both."""
    out = []
    for row in found:
        m = row.metrics
        whole = row.record.kind == "measured" and row.record.phase == "decode"
        if whole and {"peak_memory_bytes", "planned_memory_bytes"} <= m.keys():
            out.append((row, m["planned_memory_bytes"] / m["peak_memory_bytes"] - 1))
    return out


def rate_errors(found: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(machine, config) -> predicted over measured rate, less 1, the median of the config's rows:
    each model by the law through the other models of that machine (`ternax.sizes`), whole or in
    part, at any context. A machine is a device within a folder of its own: processors may share
    a name; batches stay apart."""
    steps: dict[str, dict[str, list[Timed]]] = {}
    for row in found:
        record, m = row.record, row.metrics
        ours = record.kind == "measured" and record.phase == "decode" and record.inputs
        if ours and {"share_of_bound", "bound_tokens_per_s"} <= m.keys():
            machine = f"{pathlib.PurePath(row.entries[0].file).parts[0]}: {record.device}"
            machine += f", batch {record.batch}" if record.batch > 1 else ""
            # The rows' medians: of two-speed memories rates and bounds may be of other rounds.
            share = m["share_of_bound"]
            bound_s = record.batch / m["bound_tokens_per_s"]
            timed = Timed(bound_s / share, bound_s, record.layers)
            steps.setdefault(machine, {}).setdefault(record.config, []).append(timed)
    return {
        (machine, config): statistics.median(
            step.step_s / law.step_s(step.bound_s, step.layers) - 1 for step in by_config[config]
        )
        for machine, by_config in steps.items()
        for config, law in sizes.leave_one_out(by_config).items()
    }


def page(
    entries: Sequence[Entry],
    others: dict[str, int],
    title: str,
    usd_per_h: float | None = None,
) -> str:
    """The report as Markdown."""
    found = rows(entries)
    lines = [f"# {title}", "", *_environment(entries)]
    for experiment in dict.fromkeys(row.record.experiment for row in found):
        lines += [f"## {experiment}", ""]
        for kind in ("measured", "extrapolated", "predicted"):
            alike = [r for r in found if (r.record.experiment, r.record.kind) == (experiment, kind)]
            if alike:
                lines += [f"### {experiment}, {kind}", "", *_table(alike, usd_per_h), ""]
    lines += _checks(found)
    if others:
        told = ", ".join(f"{file} ({count})" for file, count in others.items())
        lines += ["## Not records", "", f"Lines of other layouts, left out: {told}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _environment(entries: Sequence[Entry]) -> Iterator[str]:
    """Where and with what: each machine and its versions. A predicted record names the device that
    it is about, on which nothing ran: those stand together."""
    yield from ("## Environment", "", "| device | versions | commits | records | from | to |")
    yield "|---|---|---|---|---|---|"
    groups: dict[tuple[str, str], list[Record]] = {}
    for entry in entries:
        record = entry.record
        device = COMPUTED if record.kind == "predicted" else record.device
        groups.setdefault((device, record.versions), []).append(record)
    for (device, versions), records in groups.items():
        commits = ", ".join(dict.fromkeys(record.commit for record in records))
        times = sorted(record.time_utc for record in records)
        cells = (device, versions, commits, str(len(records)), times[0], times[-1])
        yield _cells(cells)
    yield ""


def _cells(cells: Sequence[str]) -> str:
    safe = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(safe)} |"


def _columns(experiment: str, found: Sequence[Row]) -> list[str]:
    """Metrics to show: those chosen for the experiment, else the commonest, in METRICS' order."""
    used = [name for name in METRICS if any(name in row.metrics for row in found)]
    if experiment in COLUMNS:
        return [name for name in COLUMNS[experiment] if name in used]
    common = sorted(
        (name for name in used if name != "round"),
        key=lambda name: -sum(name in row.metrics for row in found),
    )[:_MOST_COLUMNS]
    return [name for name in used if name in common]


def _table(found: Sequence[Row], usd_per_h: float | None) -> Iterator[str]:
    """One row each; what all share stands above, the metrics' units in the heading."""
    records = [row.record for row in found]
    keys = [name for name in _KEY if len({getattr(record, name) for record in records}) > 1]
    first = records[0]
    shared = [name for name in _KEY if name not in keys and getattr(first, name) not in ("", 0)]
    if shared:
        yield ", ".join(f"{name} {getattr(first, name)}" for name in shared) + "."
        yield ""
    metrics = [dict(row.metrics) for row in found]
    if usd_per_h is not None:
        for m, record in zip(metrics, records, strict=True):
            if record.kind == "measured" and "tokens_per_s" in m:
                cost = roofline.usd_per_million_tokens(usd_per_h, m["tokens_per_s"])
                m.setdefault("usd_per_million_tokens", cost)
    shown = _columns(records[0].experiment, found)
    if usd_per_h is not None and any("usd_per_million_tokens" in m for m in metrics):
        shown = [*(n for n in shown if n != "usd_per_million_tokens"), "usd_per_million_tokens"]
    titles = [f"{name} ({METRICS[name].unit})" if METRICS[name].unit else name for name in shown]
    yield _cells([*keys, *titles, "n", "state", "note", "from"])
    yield "|" + "---|" * (len(keys) + len(shown) + 4)
    for row, m in zip(found, metrics, strict=True):
        named = [str(getattr(row.record, name)) for name in keys]
        cells = [format_metric(name, m.get(name)) for name in shown]
        count = len(row.record.samples) if len(row.entries) == 1 else len(row.entries)
        state = "incomplete" if row.record.incomplete else ""
        yield _cells([*named, *cells, str(count), state, row.record.note, row.place])


def _checks(found: Sequence[Row]) -> Iterator[str]:
    """What was planned against what was measured, over all experiments."""
    memory, rates = memory_errors(found), rate_errors(found)
    if memory:
        yield from ("## Planned against measured peak memory", "")
        yield from ("| config | layers | batch | context | device | planned / peak - 1 | from |",)
        yield "|---|---|---|---|---|---|---|"
        for row, error in memory:
            r = row.record
            names = (r.config, str(r.layers), str(r.batch), str(r.context), r.device)
            yield _cells([*names, f"{100 * error:+.1f} %", row.place])
        worst = max((abs(error) for _, error in memory))
        yield from ("", f"Worst of {len(memory)}: {100 * worst:.1f} %.", "")
    if rates:
        yield from ("## Rates predicted by the other models of a machine", "")
        yield from ("| machine | config | predicted / measured - 1 |", "|---|---|---|")
        for (machine, config), error in rates.items():
            yield _cells([machine, config, f"{100 * error:+.1f} %"])
        worst = max(abs(error) for error in rates.values())
        yield from ("", f"Worst of {len(rates)}: {100 * worst:.1f} %.", "")


def select(entries: Sequence[Entry], keep: Callable[[Record], bool]) -> list[Entry]:
    """The entries whose record is wanted."""
    return [entry for entry in entries if keep(entry.record)]
