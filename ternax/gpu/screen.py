"""What was found, in 100 columns: a record as it comes, and all of a run."""

import statistics
import textwrap
from collections.abc import Sequence

from ternax.gpu.goals import GOALS, OFF, best_read, kernel, share_of_best, wrong
from ternax.record import Record
from ternax.table import rate

WIDTH = 100
# Columns of the table of kernels, behind ours.
_OTHERS = ("XLA bf16", "XLA int8", "torch bf16", "torch int8")


def said(record: Record) -> list[str]:
    """A record in a line, as it comes; none for the many exact ones."""
    m, name = record.metrics, f"{record.config} x {record.batch}, {record.backend}"
    if record.phase == "device" and record.samples:
        return [f"{record.note.partition(', in one')[0]}: {rate(max(m.values()))} GB/s"]
    if record.phase == "kernel" and "call_us" in m:
        share = f", {100 * m['share_of_read']:.0f} % of reading" if "share_of_read" in m else ""
        return [f"{name}: {rate(m['call_us'])} us, {rate(m['gb_per_s'])} GB/s{share}"]
    if record.phase == "kernel" and record.sample_unit == "us":
        return textwrap.wrap(f"{name}: {record.note}", WIDTH, subsequent_indent="  ")
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
        [line for record in records if record.sample_unit == "us" for line in said(record)],
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
        if r.phase == "kernel" and r.note.startswith("K ") and (OFF not in r.note) == graphs
    ]
    if not mine:
        return []
    gemlite = {r.backend for r in mine if r.backend.startswith("gemlite")}
    others = [name for name in (*_OTHERS, *sorted(gemlite)) if any(r.backend == name for r in mine)]
    best = best_read(records)
    head = f"kernels alone{'' if graphs else ', ' + OFF}; us a call, and over ours"
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
        if r.phase in ("decode", "prefill") and r.samples and (OFF not in r.note) == graphs
    ]
    if not decodes:
        return []
    lines = [
        f"models{'' if graphs else ', ' + OFF}",
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
