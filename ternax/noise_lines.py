"""Lines along size and training through what several studies say, and whether they are equal.

Responses are regressed on the logarithms of the axes, so that a slope is a change for each
doubling. Noises are compared within a model and arms within a pair of models, by their differences:
what both share, such as the luck of a seed, drops out, and no test takes them for independent.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ternax import noise_meta, regression
from ternax.errors import UsageError
from ternax.estimate import named
from ternax.noise_axes import Model, Response, design, logarithms, model
from ternax.noise_point import HOW
from ternax.noise_summary import LOSSES
from ternax.record import Record
from ternax.regression import Fit, FTest

LEVEL = "level"
_ARMS = ("the first arm", "the other arm")
# Metrics of an FTest, in the order of its fields.
_F_TEST = ("f_ratio", "f_degrees", "f_error_degrees", "p_value")


@dataclasses.dataclass(frozen=True)
class Line:
    """One response of all models of an arm, or its difference from another's, and the fit.

    Attributes:
      response: whose.
      less: what was taken off: another noise, "the other arm", or "".
      values: f64 [n], in the order of the models.
      fit: coefficients are LEVEL, at the axes' mean, and then one for each axis.
      lack_of_fit: against a mean of its own for each setting of the axes; None without repeats.
    """

    response: Response
    less: str
    values: np.ndarray
    fit: Fit
    lack_of_fit: FTest | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Whether noises, or two arms, are equal.

    Attributes:
      title: in what.
      differences: of each noise from the first, or of our arm from the other.
      tests: whether all of them may be zero, in LEVEL, along an axis, or along all axes (joined by
        " and "); None where the models are too few for it, or differ in nothing.
    """

    title: str
    differences: list[Line]
    tests: dict[str, FTest | None]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything together.

    Attributes:
      along: the axes.
      arms: the models: ours, and the other arm's where there is one.
      lines: of our arm.
      others: of the other arm.
      comparisons: of arms, or of noises.
      left_out: responses that not all models have -> how many do.
    """

    along: tuple[str, ...]
    arms: tuple[list[Model], ...]
    lines: list[Line]
    others: list[Line]
    comparisons: list[Comparison]
    left_out: dict[Response, int]

    @property
    def logarithms(self) -> np.ndarray:
        """f64 [n, axes]: log2 of each model's place."""
        return logarithms(self.arms[0], self.along)


def find(along: Sequence[str], folders: Sequence[str], against: Sequence[str] = ()) -> Findings:
    """Lines, differences and tests, of studies in folders.

    Args:
      along: one or two of AXES.
      folders: finished studies, a model each.
      against: of as many others; each is held against the one at its place in `folders`, of a
        model at the same place on the axes.

    Raises:
      UsageError: studies of other texts, that do not tell the axes, or too few for a slope.
    """
    along = tuple(along)
    noise_meta.check_pairs(folders, against)
    arms = tuple([model(f, along) for f in names] for names in (folders, against) if names)
    every = [one for arm in arms for one in arm]
    texts = sorted({one.text for one in every})
    if len(texts) > 1:
        raise UsageError(f"--combine: studies are of other texts: {texts[0]!r} and {texts[1]!r}")
    for ours, theirs in zip(arms[0], arms[-1], strict=True):
        for axis in along:
            if ours.axes[axis] != theirs.axes[axis]:
                raise UsageError(
                    f"--against: pairs need equal {axis}, found {ours.axes[axis]:g} and "
                    f"{theirs.axes[axis]:g}"
                )
    columns = design(arms[0], along)
    counts = {r: sum(r in one.responses for one in every) for one in every for r in one.responses}
    shared = [r for r, count in counts.items() if count == len(every)]
    values = [{r: np.array([m.responses[r] for m in arm]) for r in shared} for arm in arms]
    lines = [[_line(columns, r, y) for r, y in of.items()] for of in values]
    pairs = _between_arms(*values) if against else _between_noises(values[0])
    return Findings(
        along,
        arms,
        lines[0],
        lines[1] if against else [],
        [_comparison(title, columns, group, along) for title, group in pairs.items()],
        {r: count for r, count in counts.items() if count < len(every)},
    )


def _line(columns: np.ndarray, response: Response, values: np.ndarray, less: str = "") -> Line:
    _, cell = np.unique(columns, axis=0, return_inverse=True)
    cells = np.eye(cell.max() + 1)[cell.reshape(-1)]
    lack = regression.nested(cells, columns, values)
    return Line(response, less, values, regression.fit(columns, values), lack)


def _between_arms(ours: dict, theirs: dict) -> dict:
    """Title -> (response, what is taken off, differences) of each response."""
    same = {r: np.isclose(y, theirs[r], rtol=1e-12, atol=0) for r, y in ours.items()}  # rounding
    return {
        str(r): [(r, "the other arm", np.where(same[r], 0.0, y - theirs[r]))]
        for r, y in ours.items()
    }


def _between_noises(values: dict) -> dict:
    """Of the strengths tolerated for a loss, each noise's from the first one's."""
    found = {}
    for loss in LOSSES.values():
        same = [r for r in values if r.loss == loss]
        if len(same) > 1:
            title = f"strengths that cost {loss:g} bits per byte, {len(same)} noises"
            found[title] = [(r, same[0].noise, values[r] - values[same[0]]) for r in same[1:]]
    return found


def _comparison(title: str, columns: np.ndarray, group, along: Sequence[str]) -> Comparison:
    """group: (response, what is taken off, f64 [n]) of each difference."""
    terms = {LEVEL: [0]} | {axis: [1 + i] for i, axis in enumerate(along)}
    if len(along) > 1:
        terms[" and ".join(along)] = list(range(1, 1 + len(along)))
    values = np.stack([y for *_, y in group], axis=1)
    return Comparison(
        title,
        [_line(columns, response, y, less) for response, less, y in group],
        {
            term: regression.nested(columns, np.delete(columns, tested, axis=1), values)
            for term, tested in terms.items()
        },
    )


def records(found: Findings, flags_text: str = "") -> list[Record]:
    """A record a model, then one a line and term, then one a test."""
    out = [
        dataclasses.replace(
            one.record,
            metrics=one.axes | {"bits_per_byte_clean": one.responses[Response()]},
            note=f"model {number} of {_ARMS[arm]}; {one.record.note.split(HOW, 1)[-1]}",
            flags=flags_text,
        )
        for arm, models in enumerate(found.arms)
        for number, one in enumerate(models, 1)
    ]
    names = {one.config.partition("(")[0] for one in out}
    shared = dataclasses.replace(
        out[0], layers=0, config=names.pop() if len(names) == 1 else "several"
    )
    models = len(found.arms[0])
    of_arms = zip(_ARMS, (found.lines, found.others), strict=True)
    labelled = [(arm if len(found.arms) > 1 else "", line) for arm, of in of_arms for line in of]
    labelled += [("", line) for one in found.comparisons for line in one.differences]
    for arm, line in labelled:
        for i, term in enumerate((LEVEL, *found.along)):
            name = LEVEL if term == LEVEL else "slope"
            metrics = {"models": models, "deviation": line.fit.deviation}
            metrics |= named(name, line.fit.coefficient(i))
            if line.lack_of_fit is not None:
                metrics["lack_of_fit_p_value"] = line.lack_of_fit.p_value
            note = f"{line.response}{f', less {line.less}' if line.less else ''}: {term}"
            out.append(
                dataclasses.replace(
                    shared,
                    metrics=metrics,
                    samples=tuple(line.values.tolist()),
                    sample_unit=line.response.unit,
                    note=f"{note}{f', {arm}' if arm else ''}",
                )
            )
    for one in found.comparisons:
        for term, test in one.tests.items():
            metrics = {"models": models}
            if test is not None:
                metrics |= dict(zip(_F_TEST, test, strict=True))
            note = f"{one.title}: equal in {term}"
            out.append(dataclasses.replace(shared, metrics=metrics, samples=(), note=note))
    return out
