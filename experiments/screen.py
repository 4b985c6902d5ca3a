"""Text for the screen that experiments share: rows, amounts, and a plan in words."""

import functools
import shlex
import textwrap

from ternax.cost import MARGIN_BYTES, Plan
from ternax.experiments.config_flag import WIDTH

_LABEL = 9


def row(label: str, text: str) -> str:
    """`text` behind a label, wrapped into a column of its own."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{label:{_LABEL}}", break_on_hyphens=False,
                         subsequent_indent=" " * _LABEL)


def decimal(nbytes: float) -> str:
    """Bytes that are moved, in the powers of ten of a bandwidth: "18.2 GB", "83.4 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= 0.5 * size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def binary(nbytes: float) -> str:
    """Bytes that are held, in the powers of two of a memory: "18.54 GiB", "4.51 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(nbytes) >= 0.1 * size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 2**10:.1f} KiB"


def rate(number: float) -> str:
    """Three significant digits, never an exponent: "0.0123", "62.2", "367,000"."""
    digits = float(f"{number:.3g}")
    return f"{digits:,.0f}" if digits >= 100 else f"{digits:.6f}".rstrip("0").rstrip(".")


def model_name(name: str, layers: int, whole: int) -> str:
    """The model, or which part of it: a number of a part must not read as the model's."""
    return name if layers == whole else f"{name}, the first {layers} of its {whole} layers"


def plan_lines(plan: Plan, whole: int) -> list[str]:
    """The plan: bytes by part, and what a decode step reads. whole: layers of the whole model."""
    config = plan.config
    free = "unknown" if plan.available_bytes is None else binary(plan.available_bytes)
    fits = "fits" if plan.fits else "DOES NOT FIT"
    return [
        row("plan", f"{model_name(config.name, config.num_layers, whole)}: {plan.parameters:,} "
            f"parameters, {plan.ternary_parameters:,} in {config.scheme} at "
            f"{plan.bits_per_weight:.3g} bits"),
        row("", " + ".join(parts(plan))),
        row("", f"= {binary(plan.total_bytes)}; available {free}: {fits}"),
        row("", f"a decode step reads {decimal(plan.bytes_per_step)} (batch {plan.batch}, context "
            f"{plan.context})"),
    ]


def parts(plan: Plan, least: float = 0.0) -> list[str]:
    """"projections 15.94 GiB", ... without those under `least` of the whole."""
    shown = max(least * plan.total_bytes, 1)
    return [f"{name} {binary(size)}" for name, size in plan.bytes.items() if size >= shown]


def refusal(plan: Plan) -> str:
    """One line: the need by part, what is there, and flags with which it would fit."""
    name, need = plan.config.name, plan.total_bytes + MARGIN_BYTES
    ways = []
    if plan.layers_that_fit:
        ways.append(f"--layers={plan.layers_that_fit} (a part of the model)")
    if plan.batch_that_fits:
        ways.append(f"--batch={plan.batch_that_fits}")
    ways.append("--fit=auto (the largest model of its family that does)")
    return (f"{name} does not fit: it needs {binary(need)} ({', '.join(parts(plan, 0.02))}, margin "
            f"{binary(MARGIN_BYTES)}), available {binary(plan.available_bytes or 0)}; would fit: "
            f"{', '.join(ways)}")


def command(experiment: str, args, without=(), **changed) -> str:
    """The command that `args` came from, with flags changed or left out.

    Args:
      experiment: as in `python -m experiments.<experiment>`.
      args: what `flags.Command.parse` returned.
      without: names of flags to leave out.
      changed: flags that get another value.
    """
    values = {"config": args.config.name.partition("(")[0]}
    for name in sorted(args.given - {"config"}):
        path = name.split(".")
        values[name] = functools.reduce(getattr, path, args)
    words = ["python", "-m", f"experiments.{experiment}"]
    for name, value in (values | changed).items():
        if name not in without:
            off = "no" if value is False else ""
            words.append(f"--{off}{name}" if isinstance(value, bool) else f"--{name}={value}")
    return shlex.join(words)
