"""Layouts as text for a screen of 100 columns, and as a picture."""

import pathlib

from ternax import drawing, planner
from ternax.formats import get_format
from ternax.planner import Efficiency, Layout
from ternax.table import rate, row

PARTS = ("weights", "head", "kv", "activations", "compute", "collectives", "launches")


def price_source(one: Layout) -> str:
    """Who asked it and when."""
    if one.terms.usd_per_h is not None:
        return "--usd_per_hour"
    return one.setting.device.price_source.partition(" (")[0]


def detail(one: Layout, efficiency: dict[str, Efficiency]) -> list[str]:
    """One layout for a screen: memory, rate, step, use of the device, cost."""
    at, step = one.setting, one.step
    gib = {part: size / 2**30 for part, size in one.bytes.items()}
    memory = " + ".join(f"{part} {size:.2f}" for part, size in gib.items() if size >= 0.005)
    parts = [(part, getattr(step, f"{part}_s")) for part in PARTS]
    shares = [f"{part} {1e3 * s:.3g}" for part, s in parts if s > step.total_s / 2000]
    lines = [
        row("plan", f"{at.shape.name} on {planner.name(one)}, context {at.context}: predicted"),
        row("model", _model(one)),
        row(
            "memory",
            f"{memory} = {one.resident_bytes / 2**30:.2f} GiB a device, of "
            f"{one.memory_bytes / 2**30:.2f}: {'fits' if one.fits else 'DOES NOT FIT'}",
        ),
        row(
            "rate",
            f"{rate(one.tokens_per_s)} tokens/s, {rate(one.tokens_per_s_each)} for each sequence; "
            f"bound {rate(one.replicas * one.bound.tokens_per_s)}; first token of a prompt of "
            f"{at.context} after {rate(1e3 * one.ttft_s)} ms at least",
        ),
        row(
            "expects",
            f"{100 * at.efficiency:.3g} % of both limits: {efficiency[at.device.name].source}",
        ),
        row("step", f"{' + '.join(shares)} = {1e3 * step.total_s:.4g} ms"),
        row("uses", f"{100 * one.mbu:.1f} % of the bandwidth (MBU), {100 * one.mfu:.2g} % (MFU)"),
    ]
    price = "no price known"
    if one.usd_per_million_tokens is not None:
        price = (
            f"${one.usd_per_million_tokens:.3g} a million tokens at ${one.usd_per_h:.3g}/h "
            f"({price_source(one)})"
        )
    lines.append(row("cost", f"{price}; {one.joules_per_token:.3g} J/token at full rated power"))
    return lines


def _model(one: Layout) -> str:
    """How large, and what of a mixture of experts a token uses."""
    shape = one.setting.shape
    bits = get_format(one.setting.weights).bits_per_weight
    active = getattr(shape, "active_parameters", None)
    used = f", {active:,} active" if active else ""
    return (
        f"{shape.parameters:,} parameters{used}; {shape.num_layers} layers, "
        f"{shape.projection_parameters:,} in their projections at {bits:g} bits"
    )


def names(found: list[Layout]) -> list[str]:
    """Of layouts, the model in front where there are several."""
    several = len({one.setting.shape.name for one in found}) > 1
    return [
        f"{one.setting.shape.name}: {planner.name(one)}" if several else planner.name(one)
        for one in found
    ]


def comparison(found: list[Layout]) -> list[str]:
    """Several layouts as a table of at most 100 columns."""
    lines = [
        f"  {'layout: copies x (devices of each)':40}{'tokens/s':>9}{'each':>7}{'ms':>8}{'GiB':>7}"
        f"{'MBU':>6}{'MFU':>6}{'$/Mtok':>9}{'J/tok':>7}"
    ]
    for one, named in zip(found, names(found), strict=True):
        dollars = one.usd_per_million_tokens
        cells = (
            f"{' ' if one.fits else '!'} {named:40}{rate(one.tokens_per_s):>9}"
            f"{rate(one.tokens_per_s_each):>7}{rate(1e3 * one.step.total_s):>8}"
            f"{one.resident_bytes / 2**30:>7.1f}{100 * one.mbu:>5.0f}%{100 * one.mfu:>5.0f}%"
            f"{'' if dollars is None else f'{dollars:.3g}':>9}{one.joules_per_token:>7.3g}"
        )
        lines.append(cells)
    if not all(one.fits for one in found):
        lines.append("! does not fit")
    return lines


def weights(found: list[Layout]) -> str:
    """The weights by format, tables included, as a file holds them; and how much smaller."""
    sizes: dict[str, float] = {}
    for one in found:
        parts = sum(one.bytes[part] for part in ("projections", "head", "embedding"))
        sizes.setdefault(one.setting.weights, parts * one.setting.devices)
    first, largest = next(iter(sizes.items()))
    told = [f"{first} {largest / 1e9:.4g} GB"]
    told += [
        f"{name} {size / 1e9:.4g} ({largest / size:.3g}x smaller)"
        if size < largest
        else f"{name} {size / 1e9:.4g}"
        for name, size in list(sizes.items())[1:]
    ]
    return f"{', '.join(told)}; tables in {found[0].setting.tables} included"


def needed(one: Layout, target: float) -> str:
    """The inverse: what a single device would have to read."""
    need = planner.bandwidth_needed_gb_per_s(one, target)
    return (
        f"{rate(need)} GB/s of one device for {target:g} tokens/s of each sequence in "
        f"{one.setting.weights}, batch {one.setting.batch}, at this efficiency; "
        f"{rate(need * one.setting.efficiency)} if all of it were reached"
    )


def compiled_line(one: Layout, told) -> str:
    """The compiler's bytes (`ahead.Compiled`) beside the planned ones, and what devices say."""
    planned = one.resident_bytes - one.bytes["activations"]
    sent = [f"{each.times} x {each.kind} of {each.nbytes:,} bytes" for each in told.found]
    return (
        f"arguments {told.argument_bytes / 2**30:.2f} GiB a device, "
        f"{100 * (planned / told.argument_bytes - 1):+.2f} % planned; temporaries of prefill "
        f"{told.prefill_bytes / 2**30:.3f}, of a step {told.decode_bytes / 2**30:.3f} GiB; "
        f"{', '.join(sent) or 'no collectives'}"
    )


def draw(found: list[Layout], target: pathlib.Path) -> pathlib.Path | None:
    """A step of each layout by part, as bars; None without matplotlib."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return None
    height = 1.4 + 0.35 * len(found)
    figure, axis = pyplot.subplots(figsize=(9, height), layout="constrained")
    left = [0.0] * len(found)
    for part in PARTS:
        width = [1e3 * getattr(one.step, f"{part}_s") for one in found]
        if max(width):
            axis.barh(range(len(found)), width, left=left, label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
    axis.set_yticks(range(len(found)), names(found), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("predicted ms per step")
    models = ", ".join(dict.fromkeys(one.setting.shape.name for one in found))
    axis.set_title(f"{models}, context {found[0].setting.context}", loc="left")
    axis.legend(fontsize=7)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target
