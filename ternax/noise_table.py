"""What a study of noises found, as text for a screen of 100 columns, and as a picture."""

import pathlib
import textwrap

from ternax import drawing
from ternax.record import Record
from ternax.table import columns

WIDTH = 100

LEGEND = textwrap.wrap(
    "rise: bits per byte more than clean, mean of draws +- half its 95 % interval over draws; in "
    "brackets its interval over the text. Predicted from gradients, by what the noise does to "
    "weights or inputs in the mean; where errors are large, along the curve of Gaussian weights. "
    "cos: of a projection's clean and noisy outputs on real inputs, mean of projections: measured, "
    "predicted from the layer's own weights and inputs (plug-in), predicted for random symmetric "
    "ones (closed form). top-1: likeliest byte as without noise.",
    WIDTH,
)


def lines(records: list[Record]) -> list[str]:
    """Everything on a screen."""
    parts = (table, depth, tolerances, budgets, alone, controls)
    found = [line for part in parts for line in part(records)]
    return [*found, "", *LEGEND]


def table(records: list[Record]) -> list[str]:
    """A line a noise and strength."""
    heads = (
        *(("noise", 22), ("strength", 8), ("rise", 15), ("over the text", 14), ("predict", 7)),
        *(("cos", 5), ("plug-in", 7), ("closed", 6), ("top-1", 5)),
    )
    rows = []
    predicted = {r.note: r.metrics for r in records if r.kind == "predicted"}
    for record in records:
        m, p = record.metrics, predicted.get(record.note, {})
        if record.kind != "measured" or not {"noise_draws", "noise_strength"} <= m.keys():
            continue
        if is_control(record):
            continue
        numbers = (
            (p, "bits_per_byte_rise", 4),
            (m, "product_cosine", 3),
            (p, "product_cosine", 4),
            (p, "product_cosine_closed_form", 4),
            (m, "top1_agreement", 3),
        )
        rows.append(
            [
                *(title(record), f"{m['noise_strength']:g}", spread(m), over_text(m)),
                *(cell(of, name, 0, digits) for of, name, digits in numbers),
            ]
        )
    return columns(heads, rows)


def is_control(record: Record) -> bool:
    return ": " in title(record)


def title(record: Record) -> str:
    """The noise of a record, as the user wrote it."""
    return record.note.partition(" at ")[0].partition(" on ")[0]


def cell(metrics: dict, name: str, width: int, digits: int = 4) -> str:
    return f"{metrics[name]:>{width}.{digits}f}" if name in metrics else " " * width


def spread(metrics: dict) -> str:
    """ "0.0512 +-0.0030"; a rise that is not finite is "not finite"."""
    if "bits_per_byte_rise" not in metrics:
        return "not finite"
    text = bits(metrics["bits_per_byte_rise"], 4)
    if "bits_per_byte_rise_low" in metrics:
        reach = metrics["bits_per_byte_rise_high"] - metrics["bits_per_byte_rise_low"]
        text += f" +-{bits(reach / 2, 4)}"
    return text


def bits(value: float, digits: int) -> str:
    """Logits of a model that is lost reach any size."""
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.1e}"


def over_text(metrics: dict) -> str:
    if "bits_per_byte_rise_text_low" not in metrics:
        return ""
    low, high = (metrics[f"bits_per_byte_rise_text_{end}"] for end in ("low", "high"))
    return f"[{bits(low, 3)}, {bits(high, 3)}]"


def depth(records: list[Record]) -> list[str]:
    """How far from clean is what layers read, of deep models eight of them; then the logits."""
    found = [record for record in records if record.sample_unit == "cosine"]
    if not found:
        return []
    count = len(found[0].samples)
    shown = sorted({round(i * (count - 1) / 7) for i in range(8)}) if count > 8 else range(count)
    heads = [("read by layer", 22), ("strength", 8), *((str(i), 6) for i in shown), ("logits", 6)]
    rows = [
        [
            *(title(r), f"{r.metrics['noise_strength']:g}"),
            *(f"{r.samples[i]:.4f}" for i in shown),
            cell(r.metrics, "logit_cosine", 6),
        ]
        for r in found
    ]
    return ["", *columns(heads, rows), "cosine of what the layer reads with the clean model's"]


def tolerances(records: list[Record]) -> list[str]:
    """The headline: which strength costs 0.05 and 0.2 bits per byte; and the area under top-1."""
    heads = (
        *(("strength tolerated", 28), ("for 0.05 bits/byte", 27), ("for 0.2", 25)),
        *(("top-1", 5), ("flips", 9)),
    )
    rows = []
    for record in records:
        m = record.metrics
        if "noise_draws" in m and "noise_strength" not in m:
            flips = ""
            if "stored_bits" in m and "tolerated_005" in m and m["stored_bits"]:
                flips = f"{m['tolerated_005'] * m['stored_bits']:,.3g}"
            cells = (tolerated(m, name) for name in ("005", "020"))
            rows.append([title(record), *cells, cell(m, "top1_area", 5, 3).strip(), flips])
    return ["", *columns(heads, rows)]


def budgets(records: list[Record]) -> list[str]:
    """What may be spent, foreseen: the model's strength, and the frailest projection's at an equal
    share; with SECDED, or until a refresh."""
    found = [r for r in records if r.kind == "predicted" and ": budget for " in r.note]
    if not found:
        return []
    out = ["", f"{'budget, predicted':22} {'loss':>5} {'model':>9} {'frailest projection':>32}"]
    for record in found:
        m, (loss, names) = record.metrics, _budget(record)
        name = next(key for key in ("tolerated_005", "tolerated_020") if key in m)
        line = f"{title(record).partition(' on ')[0]:22.22} {loss:>5} {m[name]:>9.3g}"
        if record.samples:
            least = min(record.samples)
            line += f" {names[record.samples.index(least)]:>21} {least:>10.3g}"
        if f"{name}_secded" in m:
            line += f"; {m[f'{name}_secded']:.3g} with SECDED"
        seconds = m.get(f"refresh_{name[-3:]}_s")
        if seconds is not None:
            line += f"; refresh after {duration(seconds)}"
        out.append(line)
    return out


def _budget(record: Record) -> tuple[str, list[str]]:
    """(loss, projections) of a budget's note."""
    words = record.note.partition("; study: ")[0].partition(": budget for ")[2]
    return words.partition(" ")[0], words.rpartition("shares: ")[2].split(", ")


def duration(seconds: float) -> str:
    """ "3.2 days" and the like."""
    for unit, size in (("years", 31557600), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def alone(records: list[Record]) -> list[str]:
    """Projections by what the same noise on each alone costs, the dearest first."""
    found = [record for record in records if "sensitivity" in record.metrics]
    if not found:
        return []
    found.sort(key=lambda record: -record.metrics["bits_per_byte_rise"])
    predicted = {r.note: r.metrics for r in records if r.kind == "predicted"}
    strength = found[0].metrics["noise_strength"]
    head = f"gaussian at {strength:g} on one alone"
    out = ["", f"{head:32} {'rise':>16} {'predict':>8} {'sensitivity':>12}"]
    for record in found:
        name = record.note.split(" on ", 1)[1].split(" ", 1)[0]
        m, p = record.metrics, predicted.get(record.note, {})
        out.append(
            f"{name:32} {spread(m):>16} {cell(p, 'bits_per_byte_rise', 8)} "
            f"{m['sensitivity']:>12.4f}"
        )
    return out


def controls(records: list[Record]) -> list[str]:
    """Each point's controls under it."""
    found = [r for r in records if is_control(r) and "noise_draws" in r.metrics]
    if not found:
        return []
    points = {
        (title(r), r.metrics.get("noise_strength")): r.metrics
        for r in records
        if r.kind == "measured" and "noise_draws" in r.metrics and not is_control(r)
    }
    out = ["", f"{'control':30} {'of':22} {'strength':>8} {'rise':>16} {'changed':>9} {'point':>9}"]
    for record in found:
        m, (name, spec) = record.metrics, title(record).split(": ", 1)
        point = points.get((spec, m["noise_strength"]), {})
        out.append(
            f"{name:30.30} {spec:22.22} {m['noise_strength']:>8g} {spread(m):>16} "
            f"{m['changed_count']:>9} {cell(point, 'bits_per_byte_rise', 9)}".rstrip()
        )
    return out


def tolerated(metrics: dict, name: str) -> str:
    name = f"tolerated_{name}"
    if name not in metrics:
        # Records of before do not say how many draws cost so much.
        reached, draws = metrics.get(f"{name}_draws", 0), metrics["noise_draws"]
        if reached == draws:
            return "below those tried"
        return f"in {reached} of {draws} draws" if reached else "beyond those tried"
    text = f"{metrics[name]:.3g}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3g}, {metrics[f'{name}_high']:.3g}]"
    return text


def draw(records: list[Record], target: pathlib.Path) -> pathlib.Path | None:
    """Rise over strength, and measured over predicted rise; None without matplotlib."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    predicted = {r.note: r.metrics for r in records if r.kind == "predicted"}
    measured = [r for r in records if {"bits_per_byte_rise", "noise_draws"} <= r.metrics.keys()]
    measured = [r for r in measured if r.metrics["bits_per_byte_rise"] > 0]
    marks = "os^vDPX*"
    for number, name in enumerate(dict.fromkeys(map(title, measured))):
        look = {"marker": marks[number // 10 % len(marks)], "markersize": 4}
        mine = [r for r in measured if title(r) == name]
        x = [r.metrics["noise_strength"] for r in mine]
        y = [r.metrics["bits_per_byte_rise"] for r in mine]
        line = left.plot(x, y, label=name, **look)[0]
        pairs = [
            (predicted[r.note]["bits_per_byte_rise"], r.metrics["bits_per_byte_rise"])
            for r in mine
            if "bits_per_byte_rise" in predicted.get(r.note, {})
        ]
        if pairs:
            right.plot(*zip(*pairs, strict=True), linestyle="", color=line.get_color(), **look)
    for loss in (0.05, 0.2):
        left.axhline(loss, color="#9aa5b1", linewidth=1, linestyle="--", zorder=0)
    right.axline((0.01, 0.01), (1, 1), color="#9aa5b1", linewidth=1, zorder=0)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
    left.set_xlabel("strength: rate, or deviation in units of the scale")
    left.set_ylabel("bits per byte more than clean, measured")
    figure.legend(loc="outside right center", fontsize=7)
    right.set_xlabel("predicted from layers' errors and sensitivities")
    right.set_ylabel("measured")
    figure.suptitle(records[0].config, fontsize=10)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target
