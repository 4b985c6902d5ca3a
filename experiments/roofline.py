"""How fast could this model decode on that device, what is the limit, and what would move it?

    python -m experiments.roofline --config=70b --device=h100

Everything is predicted by `ternax.prediction`; `--page` writes the same as a page to play with.
"""

import dataclasses
import math
import pathlib
import sys

from ternax import drawing, page, roofline, validation
from ternax.anatomy import Shape
from ternax.checkpoint import whole
from ternax.configs import get_config
from ternax.configs.hardware import get_device
from ternax.errors import UsageError
from ternax.experiments import flags
from ternax.experiments.keeping import RESULTS, format_flags, formats, keep, output_flags
from ternax.formats import get_format
from ternax.levers import FORMATS, Lever, Speculation, levers
from ternax.prediction import Predicted, Setting, predict
from ternax.record import Record
from ternax.table import rate

PARTS = ("weights", "head", "kv", "activations", "compute", "collectives")


def roofline_flags(define):
    define.section("Setting")
    define.string("config", "70b", "the model, by name", form="NAME")
    define.string("device", "h100-sxm", "a device of the catalogue", form="NAME")
    define.string("weights", "trit2", "format of the projections", form="FORMAT")
    format_flags(define)
    define.integer("devices", 1, "how many, tensor-parallel", lower=1)
    define.integer("batch", 1, "sequences together", lower=1)
    define.integer("context", 2048, "tokens each sequence holds", lower=1)
    define.number("efficiency", 1.0, "share of both limits that is reached; 1: a bound")
    define.section("Speculation")
    define.string("draft", "1b", "the model that drafts", form="NAME")
    define.integer("drafted", 4, "tokens it drafts a round", lower=1)
    define.number("acceptance", 0.7, "chance that one is kept", lower=0, upper=1)
    define.section("Page")
    define.string("page", None, "write the page there, starting with this setting", form="FILE")


def run(setting: Setting, speculation: Speculation | None = None, flags_text: str = ""):
    """Predicts a setting and its levers.

    Returns:
      (the prediction, the levers, a `predicted` Record of each; the setting itself comes first).
    """
    found, moved = predict(setting), levers(setting, speculation)
    return found, moved, [_record(lever, flags_text) for lever in moved]


def _record(lever: Lever, flags_text: str) -> Record:
    at = lever.setting
    metrics = {
        "tokens_per_s": lever.tokens_per_s,
        "planned_memory_bytes": round(lever.resident_bytes),
        "available_memory_bytes": round(at.devices * at.device.memory_bytes_at_most),
    }
    if lever.kind not in ("active", "speculation"):
        told = predict(at)
        bound = predict(dataclasses.replace(at, efficiency=1.0)).tokens_per_s
        metrics |= {
            "bound_tokens_per_s": bound,
            "share_of_bound": told.tokens_per_s / bound,
            "bytes_per_step": round(told.step_bytes),
            "intensity": told.intensity,
            "critical_intensity": told.critical_intensity,
            "weight_bytes": round(told.weight_bytes),
            "cache_bytes": round(told.cache_bytes),
            "joules_per_token": told.joules_per_token,
            "bits_per_weight": get_format(at.weights).bits_per_weight,
            "parameters": at.shape.parameters,
        }
        if told.usd_per_million_tokens is not None:
            metrics["usd_per_million_tokens"] = told.usd_per_million_tokens
    count = f"{at.devices} x " if at.devices > 1 else ""
    return Record(
        experiment="roofline",
        config=at.shape.name,
        scheme=at.weights,
        inputs=at.operands,
        backend="",
        device=f"{count}{at.device.name}",
        layers=at.shape.num_layers,
        batch=at.batch,
        context=at.context,
        phase="decode",
        kind="predicted",
        metrics=metrics,
        flags=flags_text,
        note=f"{lever.kind}: {lever.change}" if lever.change else lever.kind,
    )


def screen(setting: Setting, found: Predicted, moved: list[Lever]) -> list[str]:
    """The equation, the point under the roof, the step by part, memory, cost, the levers."""
    at, device = setting, setting.device
    bandwidth = at.devices * at.efficiency * device.bandwidth_gb_per_s
    peak = at.devices * at.efficiency * found.peak_tflops
    reading = roofline.read_s(found.step_bytes, bandwidth)
    computing = found.step_operations / peak / 1e12
    said = "a bound" if at.efficiency == 1 else f"at {100 * at.efficiency:g} % of both limits"
    parts = [(part, getattr(found, f"{part}_s")) for part in PARTS]
    shares = [
        f"{part} {100 * s / found.total_s:.1f} %" for part, s in parts if s > found.total_s / 2000
    ]
    rows = found.critical_batch
    known = "no price known"
    if found.usd_per_million_tokens is not None:
        known = f"${found.usd_per_million_tokens:.3g} a million tokens at ${device.usd_per_h:g}/h"
    lines = [
        f"predicted  {at.shape.name} in {at.weights}, tables {at.tables}, cache {at.kv}, on "
        f"{at.devices} x {device.name}, batch {at.batch}, context {at.context}",
        f"  step       max({found.step_bytes / 1e9:.4g} GB / {bandwidth:.5g} GB/s, "
        f"{found.step_operations / 1e12:.3g} Top / {peak:.5g} Top/s in {found.operands})",
        f"             = max({1e3 * reading:.4g}, {1e3 * computing:.4g}) ms"
        + (f" + all-reduces {1e3 * found.collectives_s:.3g} ms" if found.collectives_s else "")
        + f" = {1e3 * found.total_s:.4g} ms",
        f"  rate       {rate(found.tokens_per_s)} tokens/s, {rate(found.tokens_per_s_each)} for "
        f"each sequence: {said}",
        f"  limit      {found.limit}: {', '.join(shares)}",
        f"  intensity  {found.intensity:.3g} operations a byte; critical "
        f"{found.critical_intensity:.3g}, reached "
        + ("at no batch of this context" if math.isinf(rows) else f"at batch {rows:.3g}"),
        f"  memory     {found.resident_bytes / 2**30:.3g} of {found.memory_bytes / 2**30:.4g} GiB: "
        + (f"fits, {found.batch_that_fits} sequences would" if found.fits else "DOES NOT FIT"),
        f"  cost       {known}; {found.joules_per_token:.3g} J/token at full rated power",
        "",
        f"  {'lever':14}{'change':32}{'tokens/s':>10}{'speed':>9}{'GiB':>9}",
    ]
    for lever in moved[1:]:
        lines.append(
            f"  {lever.kind:14}{lever.change:32}{rate(lever.tokens_per_s):>10}"
            f"{lever.tokens_per_s / found.tokens_per_s:>8.3g}x{lever.resident_bytes / 2**30:>9.3g}"
            + ("" if lever.fits else "  too much")
        )
    return lines


def draw(setting: Setting, own: list[validation.Row], target: pathlib.Path) -> pathlib.Path | None:
    """The device's roof with formats predicted on it, and our measured rates in a file's name
    each, beside the bound their own machine set; None without matplotlib."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return None
    figure, axis = pyplot.subplots(figsize=(10, 6), layout="constrained")
    at, device = setting, setting.device
    bandwidth = at.devices * device.bandwidth_gb_per_s / 1e3
    for name in dict.fromkeys((at.weights, *FORMATS)):
        other = dataclasses.replace(at, weights=name)
        peak = at.devices * other.peak_tflops
        axis.plot(
            [0.3, peak / bandwidth, 3e4],
            [0.3 * bandwidth, peak, peak],
            color="#1b1f27" if name == at.weights else "#c3c9d2",
            zorder=2 if name == at.weights else 1,
        )
        told = predict(other)
        axis.plot(told.intensity, told.attained_tflops, "o", color="#2f5fd0", zorder=3)
        axis.annotate(
            f"{name}, predicted",
            (told.intensity, told.attained_tflops),
            xytext=(8, -10),
            textcoords="offset points",
            fontsize=8,
        )
    marks = "s^vDPX*<>dh"
    for number, (source, rows) in enumerate(_by_source(own).items()):
        marker, colour = marks[number % len(marks)], f"C{number}"
        x = [row.intensity for row in rows]
        y = [row.tokens_per_s * row.operations / 1e12 for row in rows]
        bound = [row.bound_tokens_per_s * row.operations / 1e12 for row in rows]
        axis.plot(x, y, marker, color=colour, markersize=5, label=f"measured: {source}")
        axis.plot(x, bound, "_", color=colour, markersize=10)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations a byte")
    axis.set_ylabel("Tera-op/s")
    axis.set_title(
        f"{at.shape.name} on {at.devices} x {device.title}, batch {at.batch}, "
        f"context {at.context}\nlines: datasheet, dashes: bound of the machine that measured",
        fontsize=9,
        loc="left",
    )
    if own:
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _by_source(rows: list[validation.Row]) -> dict[str, list[validation.Row]]:
    found: dict[str, list[validation.Row]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return found


def _write_page(path: str, setting: Setting) -> str:
    """Writes the page, whole or not at all; the line that says so."""
    text = page.build(
        model=setting.shape.name,
        device=setting.device.name,
        **{
            name: getattr(setting, name)
            for name in ("weights", "tables", "kv", "devices", "batch", "context", "efficiency")
        },
    )
    with whole.whole_file(path, f"--page={path}") as file:
        file.write(text.encode())
    return f"page     {path}, {len(text.encode()) / 1000:.0f} kB"


def roofline_command(args) -> None:
    """The command: predict, print, keep, draw, write the page."""
    config = get_config(args.config)
    if args.context > config.max_context:
        raise UsageError(
            f"--context must be at most {config.max_context}, what {config.name} was made for, "
            f"found {args.context}"
        )
    setting = Setting(
        shape=Shape.of(config),
        device=get_device(args.device),
        weights=get_format(args.weights).name,
        **formats(args),
        devices=args.devices,
        batch=args.batch,
        context=args.context,
        efficiency=args.efficiency,
    )
    draft = Shape.of(get_config(args.draft))
    speculation = Speculation(draft, drafted=args.drafted, acceptance=args.acceptance)
    found, moved, records = run(setting, speculation, args.command_line)
    written = [_write_page(args.page, setting)] if args.page else []
    print("\n".join(screen(setting, found, moved)))
    own = validation.own(RESULTS) if RESULTS.is_dir() else []
    names = ("roofline", setting.shape.name, setting.device.name)
    wrote = keep(args, records, names, lambda target: draw(setting, own, target))
    print(*written, wrote, sep="\n")


COMMAND = flags.Command(
    name="roofline",
    summary="Predicts a decode step by part, its place under the roofline, and what would move it.",
    groups=(roofline_flags, output_flags),
    examples=(
        ("", "70b in trits on one H100"),
        ("--config=8b --device=l40s --batch=64 --efficiency=0.7", "as a program would reach it"),
        ("--page=roofline.html", "a page to play with: one file, no network"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(roofline_command, argv)


if __name__ == "__main__":
    sys.exit(main())
