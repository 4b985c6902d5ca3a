"""Lines along size and training as text for a screen of 100 columns, and as a picture."""

import pathlib
import textwrap

import numpy as np

from ternax import drawing
from ternax.noise_axes import Response
from ternax.noise_lines import LEVEL, Findings, Line
from ternax.regression import FTest
from ternax.table import rate

WIDTH = 100
CELL = 26

LEGEND = textwrap.wrap(
    "An observation is a trained model. Level: at the models' mean place; a strength, or bits per "
    "byte. Slopes are for each doubling along the axis, with 95 % intervals (Student's t): bits "
    "per byte, or doublings of the strength. Fit: chance of so bad a line, if it is one. "
    "Differences are taken within a model, or within a pair of arms. An interval that holds 0 does "
    "not say that two are equal, only how far apart they may be.",
    WIDTH,
)


def lines(found: Findings) -> list[str]:
    """Everything on a screen."""
    tables = [line for part in _arms(found) for line in part]
    return [*models(found), *tables, *comparisons(found), "", *LEGEND]


def models(found: Findings) -> list[str]:
    """What there is, and what could not be used."""
    first = found.arms[0]
    spans = [
        f"{axis} {rate(min(values))} to {rate(max(values))}"
        for axis in found.along
        for values in [[one.axes[axis] for one in first]]
    ]
    places = len({tuple(one.axes[axis] for axis in found.along) for one in first})
    arms = " an arm" if len(found.arms) > 1 else ""
    said = f"{len(first)} models{arms} at {places} places: {', '.join(spans)}"
    out = textwrap.wrap(said, WIDTH)
    every = len(first) * len(found.arms)
    for response, count in found.left_out.items():
        out += textwrap.wrap(f"left out: {response}: {count} of {every} models tell it", WIDTH)
    return out


def _arms(found: Findings) -> list[list[str]]:
    if not found.others:
        return [table(found.lines, found.along, "level and slopes")]
    return [
        table(found.lines, found.along, "--combine: level and slopes"),
        table(found.others, found.along, "--against: level and slopes"),
    ]


def table(of: list[Line], along: tuple[str, ...], title: str) -> list[str]:
    """A row a response."""
    heads = "".join(f" {axis:>{CELL}}" for axis in along)
    out = ["", title, f"{'noise':20} {'what':>8} {'level':>8}{heads} {'fit':>5}"]
    for line in of:
        response = line.response
        level = line.fit.coefficient(0).value
        shown = f"{level:.4f}" if response.loss is None else f"{2**level:.3g}"
        slopes = "".join(f" {interval(line, 1 + i):>{CELL}}" for i in range(len(along)))
        out.append(
            f"{response.noise or 'none':20.20} {what(response):>8} {shown:>8}{slopes} "
            f"{'' if line.lack_of_fit is None else chance(line.lack_of_fit):>5}".rstrip()
        )
    return out


def what(response: Response) -> str:
    """ "0.05 at": the strength that costs it; "at 0.01": the rise there; "loss": the clean one."""
    if response.loss is not None:
        return f"{response.loss:g} at"
    return "loss" if response.strength is None else f"at {response.strength:g}"


def interval(line: Line, coefficient: int) -> str:
    """ "0.177 [0.130, 0.225]"; bits per byte to four places; fewer where numbers are large."""
    found, digits = line.fit.coefficient(coefficient), 4 if line.response.loss is None else 3
    longest = max(len(f"{end:.0f}".lstrip("-")) for end in (found.low, found.high))
    digits = max(digits - 2 * (longest - 1), 0)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def chance(test: FTest) -> str:
    return f"{test.p_value:.3f}" if test.p_value >= 0.0005 else "<.001"


def comparisons(found: Findings) -> list[str]:
    """Are they equal? Differences with intervals, and the F test of all of a group."""
    if not found.comparisons:
        return []
    out = ["", f"{'equal?':52} {'difference':>{CELL}} {'F (degrees)':>13} {'p':>5}"]
    terms = (LEVEL, *found.along)
    for one in found.comparisons:
        out.append(f"{one.title:.{WIDTH}}")
        for term, test in one.tests.items():
            out.append(f"  {term:68}{tested(test)}".rstrip())
            if term in terms:
                for line in one.differences:
                    name = f"{line.response.noise or 'none'} less {line.less}"
                    out.append(f"    {name:48.48} {interval(line, terms.index(term)):>{CELL}}")
    return out


def tested(test: FTest | None) -> str:
    if test is None:
        return f"{'too few, or alike':>22}"
    degrees = f"{test.ratio:.3g} ({test.degrees:g}, {test.error_degrees:g})"
    return f"{degrees:>22} {chance(test):>5}"


def page(found: Findings, flags_text: str, picture: pathlib.Path | None) -> str:
    """The screen as Markdown, and the picture beside it."""
    shown = [f"![]({picture.name})", ""] if picture else []
    title = f"# Noise along {' and '.join(found.along)}"
    return "\n".join([title, "", f"`{flags_text}`", "", *shown, "```", *lines(found), "```", ""])


def draw(found: Findings, target: pathlib.Path) -> pathlib.Path | None:
    """Clean loss and tolerated strengths along each axis: points, lines, and the lines' bands.

    Points stand where the line puts the model when the other axis is at its mean, with the
    model's own distance from it. None without matplotlib.
    """
    pyplot = drawing.pyplot()
    if pyplot is None:
        return None
    losses = sorted({line.response.loss for line in found.lines if line.response.loss is not None})
    rows = [None, *losses]
    figure, grid = pyplot.subplots(
        len(rows),
        len(found.along),
        figsize=(5 * len(found.along), 3.2 * len(rows)),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    for arm, of in enumerate((found.lines, found.others)):
        for panels, loss in zip(grid, rows, strict=True):
            here = [one for one in of if (one.response.strength, one.response.loss) == (None, loss)]
            for number, line in enumerate(here):
                for axis, panel in enumerate(panels):
                    _draw_line(panel, found, line, axis, f"C{number}", arm)
    for panels, loss in zip(grid, rows, strict=True):
        what = "clean bits per byte" if loss is None else f"strength that costs {loss:g} bits/byte"
        panels[0].set_ylabel(what)
        for panel in panels:
            panel.set_xscale("log", base=2)
            if loss is not None:
                panel.set_yscale("log")
    for panel, name in zip(grid[-1], found.along, strict=True):
        panel.set_xlabel(name.replace("_", " "))
    figure.legend(*grid[-1][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _draw_line(panel, found: Findings, line: Line, axis: int, color: str, arm: int) -> None:
    """One response along one axis, the other at its mean; the other arm's in outline."""
    x = found.logarithms
    centre = x.mean(axis=0)
    along = np.linspace(x[:, axis].min(), x[:, axis].max(), 50)
    row = np.zeros((len(along), 1 + x.shape[1]))
    row[:, 0], row[:, 1 + axis] = 1, along - centre[axis]
    fits = [line.fit.at(r) for r in row]
    rest = np.delete(x - centre, axis, axis=1) @ np.delete(line.fit.coefficients[1:], axis)
    shown = (lambda y: y) if line.response.loss is None else np.exp2
    name = (line.response.noise or "none") + (", --against" if arm else "")
    look = {"color": color, "markerfacecolor": "none" if arm else color, "markersize": 4}
    panel.plot(2 ** x[:, axis], shown(line.values - rest), "o", label=name, **look)
    panel.plot(
        2**along, shown(np.array([f.value for f in fits])), "--" if arm else "-", color=color
    )
    ends = [shown(np.array([getattr(f, end) for f in fits])) for end in ("low", "high")]
    panel.fill_between(2**along, *ends, color=color, alpha=0.15, linewidth=0)
