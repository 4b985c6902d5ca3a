"""What was found, on a screen of 100 columns, and beside the figures that were to be reached."""

import dataclasses
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence

from ternax.record import Record
from ternax.table import rate

WIDTH = 100
OURS, HEAD = "mosaic", "head"
_OFF = "CUDA graphs off"
# Columns of the table of kernels, behind ours.
_OTHERS = ("XLA bf16", "XLA int8", "torch bf16", "torch int8")


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
        and (_OFF not in r.note) == graphs
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
        and (_OFF not in r.note) == graphs
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


# --- The screen --------------------------------------------------------------------------------


def said(record: Record) -> list[str]:
    """A record in a line, as it comes; none for the many exact ones."""
    m, name = record.metrics, f"{record.config} x {record.batch}, {record.backend}"
    if record.phase == "device" and record.samples:
        return [f"{record.note.partition(', in one')[0]}: {rate(max(m.values()))} GB/s"]
    if record.phase == "kernel" and "call_us" in m:
        share = f", {100 * m['share_of_read']:.0f} % of reading" if "share_of_read" in m else ""
        return [f"{name}: {rate(m['call_us'])} us, {rate(m['gb_per_s'])} GB/s{share}"]
    if record.phase == "decode" and "tokens_per_s" in m:
        where = f"{record.config}, batch {record.batch}, context {record.context}"
        return [
            f"{where}: {rate(m['tokens_per_s'])} tokens/s, {rate(m['tpot_ms_p50'])} ms a step, "
            f"{100 * m['share_of_bound']:.0f} % of the bound"
        ]
    if record.phase == "prefill" and "ttft_ms" in m:
        return [
            f"{record.config}, prefill of {m['prompt_tokens']} x {record.batch}: "
            f"{rate(m['prefill_tokens_per_s'])} tokens/s"
        ]
    return []


def table(records: Sequence[Record]) -> list[str]:
    """All of a run, at most WIDTH columns wide."""
    blocks = [
        _facts(records),
        _memory(records),
        _exactness(records),
        *(_kernels(records, graphs) for graphs in (True, False)),
        _lines(records),
        *(_models(records, graphs) for graphs in (True, False)),
        _goals(records),
    ]
    lines = [line.rstrip() for block in blocks if block for line in [*block, ""]]
    return lines[:-1] or ["nothing was found"]


def _facts(records) -> list[str]:
    found = [r for r in records if r.phase == "device" and not r.samples]
    if not found:
        return []
    m = found[-1].metrics
    clocks = ", ".join(f"{name} {rate(m[name])}" for name in m)
    return textwrap.wrap(f"{found[-1].note}; {clocks}", WIDTH, break_on_hyphens=False)


def _memory(records) -> list[str]:
    found = [r for r in records if r.phase == "device" and r.samples]
    if not found:
        return []
    ways: dict[str, dict[str, float]] = {}
    for r in found:
        way, _, rest = r.note.partition(" ")
        size, _, name = rest.partition(", in one")[0].partition(", ")
        ways.setdefault(f"{way}, {name}", {})[size] = max(r.metrics.values())
    sizes = list(dict.fromkeys(size for row in ways.values() for size in row))
    lines = [f"{'memory, GB/s':24}" + "".join(f"{size:>12}" for size in sizes)]
    for name, row in ways.items():
        cells = "".join(f"{rate(row[size]) if size in row else '':>12}" for size in sizes)
        lines.append(f"  {name:22}{cells}")
    best = best_read(records)
    return [*lines, *([f"  best read {rate(best)} GB/s"] if best else [])]


def _exactness(records) -> list[str]:
    checks = [r for r in records if r.note.startswith("exactness")]
    if not checks:
        return []
    bad = wrong(records)
    lines = [f"exactness: {len(checks)} checks, {len(bad)} failed"]
    for r in bad[:10]:
        lines.append(textwrap.shorten(f"  {r.backend}, {r.config}, {r.note}", WIDTH))
    return lines


def _kernels(records, graphs: bool) -> list[str]:
    mine = [
        r
        for r in records
        if r.phase == "kernel" and r.note.startswith("K ") and (_OFF not in r.note) == graphs
    ]
    if not mine:
        return []
    gemlite = {r.backend for r in mine if r.backend.startswith("gemlite")}
    others = [name for name in (*_OTHERS, *sorted(gemlite)) if any(r.backend == name for r in mine)]
    best = best_read(records)
    head = f"kernels alone{'' if graphs else ', ' + _OFF}; us a call, and over ours"
    columns = others[:4]
    lines = [
        head,
        f"  {'':19}{'batch':>6}{'ours':>8}{'GB/s':>7}{'read':>6}"
        + "".join(f"{name:>13}" for name in columns),
    ]
    keys = dict.fromkeys((r.config, r.batch) for r in mine)
    for shape, batch in sorted(keys, key=lambda key: (key[0].partition(":")[0], key[1])):
        ours = kernel(mine, shape, batch, graphs=graphs)
        cells = f"{'':>8}{'':>7}{'':>6}"
        if ours:
            m = ours.metrics
            share = f"{100 * m['gb_per_s'] / best:.0f} %" if best else ""
            cells = f"{rate(m['call_us']):>8}{rate(m['gb_per_s']):>7}{share:>6}"
        for name in columns:
            theirs = kernel(mine, shape, batch, name, graphs)
            cells += f"{_beside(theirs, ours):>13}"
        lines.append(f"  {shape:19}{batch:>6}{cells}".rstrip())
    for name in others[4:]:
        found = [r for r in mine if r.backend == name]
        words = (f"{r.config} x {r.batch} {rate(r.metrics['call_us'])} us" for r in found)
        lines += textwrap.wrap(f"{name}: {', '.join(words)}", WIDTH, subsequent_indent="  ")
    return lines


def _beside(theirs: Record | None, ours: Record | None) -> str:
    """ "182 6.7x": their time, and the median ratio to ours of the same rounds."""
    if theirs is None:
        return ""
    text = rate(theirs.metrics["call_us"])
    if ours is None:
        return text
    pairs = zip(theirs.samples, ours.samples, strict=False)
    ratios = [a / b for a, b in pairs if a > 0 and b > 0]
    return f"{text} {statistics.median(ratios):.2f}x" if ratios else text


def _lines(records) -> list[str]:
    found = [r for r in records if "fixed_us" in r.metrics and r.batch in (1, 16)]
    if not found:
        return []
    lines = ["a call = fixed cost + bytes over a rate, through a model's shapes"]
    for r in found:
        m = r.metrics
        speed = f"{rate(m['streaming_gb_per_s'])} GB/s" if "streaming_gb_per_s" in m else "no rate"
        lines.append(
            f"  {r.config:12}{r.backend:25}batch {r.batch:<4}{m['fixed_us']:>7.2f} us + bytes / "
            f"{speed:11} worst {100 * m['worst_residual_share']:.0f} % off"
        )
    return lines


def _models(records, graphs: bool) -> list[str]:
    decodes = [
        r
        for r in records
        if r.phase in ("decode", "prefill") and r.samples and (_OFF not in r.note) == graphs
    ]
    if not decodes:
        return []
    lines = [
        f"models{'' if graphs else ', ' + _OFF}",
        f"  {'':14}{'batch':>6}{'context':>9}{'tokens/s':>10}{'ms/step':>9}{'bound':>7}"
        f"{'of best':>8}{'J/token':>9}{'W':>6}{'prefill/s':>11}",
    ]
    for r in decodes:
        m, cells = r.metrics, ""
        if r.phase == "decode" and "tokens_per_s" in m:
            share = share_of_best(r, records)
            cells = (
                f"{rate(m['tokens_per_s']):>10}{rate(m['tpot_ms_p50']):>9}"
                f"{100 * m['share_of_bound']:>5.0f} %{100 * share if share else 0:>6.0f} %"
                f"{rate(m['joules_per_token']) if 'joules_per_token' in m else '':>9}"
                f"{rate(m['watts']) if 'watts' in m else '':>6}"
            )
        elif "prefill_tokens_per_s" in m:
            cells = f"{'':>49}{rate(m['prefill_tokens_per_s']):>11}"
        lines.append(f"  {r.config:14}{r.batch:>6}{r.context:>9}{cells}")
    return lines


def _goals(records) -> list[str]:
    found = [(goal, goal.find(records)) for goal in GOALS]
    if all(value is None for _, value in found):
        return []
    lines = [
        f"to be reached, on an H200 {'':23}{'found':>9}{'at least':>10}{'goal':>8}{'moonshot':>10}"
    ]
    for goal, value in found:
        levels = "".join(
            f"{rate(level):>{w}}" for level, w in zip(goal.levels, (10, 8, 10), strict=True)
        )
        cell = "" if value is None else rate(value)
        reached = "not measured" if value is None else goal.reached(value)
        lines.append(f"  {goal.what:47}{cell:>9}{levels}  {reached}")
    return lines
