"""A study of noises: sweeps each over strengths and draws, and writes what it finds as records.

Every draw is a record of its own, so a study that was stopped goes on where it was.
"""

import re
import statistics
from collections.abc import Callable

from ternax import response
from ternax.noise import make_noise
from ternax.noise.predict import has_moments
from ternax.noise.reads import ReadNoise
from ternax.noise_controls import ORDER, Controls
from ternax.noise_forecast import CURVE, PROBE, Forecast
from ternax.noise_point import Study, check, check_folder, point, points, rises
from ternax.noise_summary import PROBE_DRAWS, PROBE_SIGMA, Summary, whole_trits
from ternax.record import Record, Store
from ternax.robustness import Clean


def run(
    study: Study, clean: Clean, store: Store, *, say: Callable[[str], None] = lambda line: None
) -> list[Record]:
    """Fills what the store lacks, then sums up.

    Returns:
      The records that sum up, see `noise_summary`. They are in the store too.

    Raises:
      UsageError: a store of another study, a noise on what the model does not have.
    """
    check(study, clean.model)
    check_folder(study, clean, store)
    found = {}
    for spec, strengths in study.sweeps.items():
        say(spec)
        for strength in strengths:
            found[spec, strength] = points(study, clean, store, spec, strength)
    forecast = None
    if whole_trits(study, clean) and (study.forecast or study.protect):
        say("foreseen from gradients")
        forecast = foresee(study, clean, store)
    summary = Summary(study, clean, forecast if study.forecast else None)
    records: list[Record] = []
    for (spec, strength), draws in found.items():
        records += summary.strength(spec, strength, draws)
    for spec, strengths in study.sweeps.items():
        records.append(summary.tolerance(spec, [found[spec, s] for s in strengths]))
        records += summary.budget(spec)
    if study.sensitivity and whole_trits(study, clean):
        say(f"each projection alone under {PROBE}")
        for name in summary.names:
            alone = [
                point(study, clean, store, PROBE, PROBE_SIGMA, draw, re.escape(name))
                for draw in range(min(study.draws, PROBE_DRAWS))
            ]
            records += summary.alone(name, alone)
    records += _controls(study, clean, store, summary, forecast, say)
    for record in records:
        if not any(_same(record, known) for known in store.records):
            store.append(record)
    return records


def foresee(study: Study, clean: Clean, store: Store) -> Forecast:
    """What gradients say, and the curve of the probe, whose draws the store keeps."""
    noises = [make_noise(spec, strength=s) for spec, sweep in study.sweeps.items() for s in sweep]
    answer = response.measure(clean, [noise for noise in noises if isinstance(noise, ReadNoise)])
    curve = []
    for sigma in CURVE if study.forecast else ():
        probe = make_noise(PROBE, strength=sigma)
        small = answer.under(probe, Summary(study, clean, None).names).rise
        drawn = rises(points(study, clean, store, PROBE, sigma))
        curve.append((small, statistics.fmean(drawn)))
    return Forecast(answer, tuple(curve))


def _controls(study, clean, store, summary, forecast, say) -> list[Record]:
    """The controls of every point, and what keeping the dearest weights buys."""
    records: list[Record] = []
    controls = Controls(study, clean, store)
    if study.controls:
        say("controls")
        records.append(summary.control(ORDER, "nothing", 0.0, controls.order()))
    for spec, strengths in study.sweeps.items():
        for strength in strengths:
            drawn = controls.of(spec, strength) if study.controls else {}
            if study.protect and forecast and has_moments(make_noise(spec, strength=strength)):
                drawn |= controls.keeping(spec, strength, forecast.response)
            records += [
                summary.control(name, spec, strength, draws) for name, draws in drawn.items()
            ]
    return records


def _same(first: Record, second: Record) -> bool:
    """Whether a study that goes on summed up alike before."""
    return all(
        getattr(first, name) == getattr(second, name) for name in ("note", "kind", "metrics")
    )
