"""Several studies of one noise sweep together: models that differ in their training's seed or arm.

The rise in loss varies with the draw of the noise, with the text, and with the seed a model was
trained from; each has its own standard error, since more of one takes nothing from the others.
"""

import dataclasses
import math
import pathlib
import statistics
import textwrap
from collections.abc import Sequence

import numpy as np

from ternax.errors import UsageError
from ternax.estimate import named, paired_difference, t_interval
from ternax.noise_point import HOW
from ternax.record import Record, read_records
from ternax.table import columns

LEGEND = textwrap.wrap(
    "rise: bits per byte more than clean, mean of models, draws and text; +-: its standard errors, "
    "of draws of the noise, of the text and of models, each alone (0 where models differ by no "
    "more than draws do); brackets: 95 % intervals over pairs of models.",
    100,
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A mean rise and where its error comes from, in bits per byte.

    Attributes:
      value: mean of models, draws and sequences.
      noise_error, text_error, training_error: standard errors that the draws, the sequences and
        the models leave; None where there are fewer than two. What draws bring to the spread of
        models is taken off.
    """

    value: float
    noise_error: float | None
    text_error: float | None
    training_error: float | None


def parts(rises: Sequence[np.ndarray]) -> Parts:
    """rises: of each model f64 [draws, sequences], the same sequences in all."""
    means = [found.mean(axis=1) for found in rises]  # of each draw
    models, draws = len(rises), min(map(len, means))
    by_text = np.mean([found.mean(axis=0) for found in rises], axis=0)
    noise = training = text = None
    within = 0.0
    if draws > 1:
        within = statistics.fmean(float(m.var(ddof=1)) / len(m) for m in means)
        noise = math.sqrt(within / models)
    if len(by_text) > 1:
        text = float(by_text.std(ddof=1)) / math.sqrt(len(by_text))
    if models > 1:
        between = statistics.variance([float(m.mean()) for m in means])
        training = math.sqrt(max(between - within, 0.0) / models)
    return Parts(float(np.mean([m.mean() for m in means])), noise, text, training)


def combine(
    folders: Sequence[str], against: Sequence[str] = (), flags_text: str = ""
) -> list[Record]:
    """One record a noise and strength that all studies have.

    Args:
      folders: of finished or interrupted studies.
      against: of as many others, in the same order of seeds: differences are taken pair by pair.
      flags_text: what was asked for.

    Raises:
      UsageError: folders without draws, of other texts or selections, or unlike in number.
    """
    check_pairs(folders, against)
    ours, theirs = [draws(read(f), f) for f in folders], [draws(read(f), f) for f in against]
    shared = [point for point in ours[0] if all(point in found for found in [*ours, *theirs])]
    if not shared:
        raise UsageError("--combine: the studies have no noise and strength in common")
    found = [
        _together(point, [arm[point] for arm in ours], [arm[point] for arm in theirs])
        for point in shared
    ]
    names = list(dict.fromkeys(_point(record)[0] for record in found))
    found.sort(key=lambda r: (names.index(_point(r)[0]), r.metrics["noise_strength"]))
    return [dataclasses.replace(record, flags=flags_text) for record in found]


def check_pairs(folders: Sequence[str], against: Sequence[str]) -> None:
    """UsageError where there are two arms, unlike in number."""
    if against and len(against) != len(folders):
        raise UsageError(
            f"--against: pairs need as many studies of each, found {len(folders)} and "
            f"{len(against)}"
        )


def read(folder: str) -> list[Record]:
    """A study's records. UsageError where there are none."""
    path = pathlib.Path(folder) / "results.jsonl"
    if not path.is_file():
        raise UsageError(f"--combine: expected a study's folder, found no {path}")
    return read_records(path)


def draws(records: Sequence[Record], folder: str) -> dict[str, list[Record]]:
    """ "bitflip at 0.01 on layers..*" -> its draws. UsageError where a study has none."""
    found: dict[str, list[Record]] = {}
    for record in records:
        title, how = (record.note.split(HOW, 1) + [""])[:2]
        title, _, number = title.rpartition(", draw ")
        select = how.rpartition("; select ")[2].rpartition(", rows ")[0]
        if select and not title.endswith(f" on {select}"):
            continue  # a projection struck alone
        if record.phase == "evaluate" and number.isdigit() and ": " not in title:
            found.setdefault(title, []).append(record)
    if not found:
        raise UsageError(f"--combine: {folder} holds no draws of a study of noises")
    return found


def _together(point: str, ours: list[list[Record]], theirs: list[list[Record]]) -> Record:
    every = [record for draws in [*ours, *theirs] for record in draws]
    texts = {(len(r.samples), r.context) for r in every}
    if len(texts) > 1:
        if any(not samples for samples, _ in texts):
            raise UsageError(f"--combine: {point} has draws that are not finite")
        raise UsageError(f"--combine: {point} was measured on other texts: {sorted(texts)}")
    errors = parts([np.array([r.samples for r in found]) for found in ours])
    rises = [mean(found, "bits_per_byte_rise") for found in ours]
    metrics = {
        "noise_strength": ours[0][0].metrics["noise_strength"],
        "models": len(ours),
        "bits_per_byte_clean": statistics.fmean(clean(found) for found in ours),
        **named("bits_per_byte_rise", t_interval(rises)),
    }
    for name in ("noise", "text", "training"):
        error = getattr(errors, f"{name}_error")
        if error is not None:
            metrics[f"rise_{name}_error"] = error
    note = f"{point}: {len(ours)} studies together"
    if theirs:
        others = [mean(found, "bits_per_byte_rise") for found in theirs]
        metrics |= named("rise_difference", paired_difference(rises, others))
        losses = [clean(found) for found in ours], [clean(found) for found in theirs]
        metrics |= named("bits_per_byte_difference", paired_difference(*losses))
        one, other = ([mean(f, "bits_per_byte") for f in arm] for arm in (ours, theirs))
        metrics |= named("bits_per_byte_struck_difference", paired_difference(one, other))
        note += f", less {len(theirs)} others, seed by seed"
    return dataclasses.replace(
        ours[0][0],
        phase="noise",
        metrics=metrics,
        samples=tuple(rises),
        sample_unit="bits/byte",
        note=note,
    )


def mean(found: list[Record], name: str) -> float:
    return statistics.fmean(record.metrics[name] for record in found)


def clean(found: list[Record]) -> float:
    """Bits per byte without noise, of a point's draws."""
    return mean(found, "bits_per_byte") - mean(found, "bits_per_byte_rise")


def lines(records: list[Record]) -> list[str]:
    """A row a point: the rise, and the standard errors of noise, text and training apart; below,
    seed by seed, what the arm has more than the other one."""
    heads = (
        *(("noise", 26), ("strength", 8), ("clean", 7), ("rise", 8), ("+-noise", 8)),
        *(("+-text", 8), ("+-training", 10)),
    )
    names = ("bits_per_byte_clean", "bits_per_byte_rise", "rise_noise_error", "rise_text_error")
    rows = []
    for record in records:
        m = record.metrics
        numbers = (f"{m[n]:.4f}" if n in m else "" for n in (*names, "rise_training_error"))
        rows.append([*_point(record), *numbers])
    found = columns(heads, rows)
    m = records[0].metrics
    if "bits_per_byte_difference" not in m:
        return [*found, "", *LEGEND]
    less = (
        ("less the other arm's", 26),
        ("strength", 8),
        ("rise", 25),
        ("loss under the noise", 25),
    )
    both = ("rise_difference", "bits_per_byte_struck_difference")
    rows = [[*_point(r), *(difference(r.metrics, name) for name in both)] for r in records]
    clean = difference(m, "bits_per_byte_difference")
    last = f"clean loss, less the other arm's: {clean}"
    return [*found, "", *columns(less, rows), last, "", *LEGEND]


def _point(record: Record) -> tuple[str, str]:
    return record.note.partition(" at ")[0], f"{record.metrics['noise_strength']:g}"


def difference(metrics: dict, name: str) -> str:
    """ "-0.100 [-0.120, -0.080]": the first arm less the other, in bits per byte."""
    if name not in metrics:
        return ""
    if f"{name}_low" not in metrics:
        return f"{metrics[name]:.3f}"
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{metrics[name]:.3f} [{low:.3f}, {high:.3f}]"
