"""A study of noises: sweeps each over strengths and draws, and writes what it finds as records.

Every draw is a record of its own, so a study that was stopped goes on where it was.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ternax import robustness
from ternax.errors import UsageError
from ternax.estimate import t_interval
from ternax.injection import EVERYTHING, check_domain, selected
from ternax.measure import device_name
from ternax.models import Decoder
from ternax.noise import make_noise
from ternax.record import Record, Store
from ternax.robustness import Clean

# Bits per byte that a model may lose: the strength where it does is the headline.
LOSSES = {"005": 0.05, "020": 0.2}
# What a projection's sensitivity is taken with, and the strengths that the curve from error to
# loss is drawn through.
PROBE, PROBE_SIGMA, CURVE = "gaussian", 0.3, (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
PROBE_DRAWS = 3
HOW = "; study: "


@dataclasses.dataclass(frozen=True)
class Study:
    """What is swept over.

    Attributes:
      config: the model's name.
      sweeps: noise spec without its strength -> the strengths, rising, none of them 0.
      draws: of each noise at each strength.
      seed: root of all draws.
      select, rows: as for `injection.perturb`.
      sensitivity: whether each projection's is measured, and the rise in loss predicted from it.
      text: the text in words.
      flags_text: what was asked for.
    """

    config: str
    sweeps: dict[str, tuple[float, ...]]
    draws: int = 5
    seed: int = 0
    select: str = EVERYTHING
    rows: float = 1.0
    sensitivity: bool = True
    text: str = ""
    flags_text: str = ""

    def __post_init__(self):
        for spec, strengths in self.sweeps.items():
            for strength in strengths:
                make_noise(spec, strength=strength)
            if list(strengths) != sorted(set(strengths)) or not strengths or strengths[0] <= 0:
                raise UsageError(
                    f"strengths: expected rising numbers above 0 for {spec}, found {strengths}"
                )

    def how(self, clean: Clean) -> str:
        """What all points of a study share, in words: a folder holds one study."""
        n, length = clean.losses.shape
        return f"{self.text}, {n} sequences of {length}; select {self.select}, rows {self.rows}"


def run(
    study: Study, clean: Clean, store: Store, *, say: Callable[[str], None] = lambda line: None
) -> list[Record]:
    """Fills what the store lacks, then sums up.

    Returns:
      For each noise and strength a measured record and, where there is a prediction, a predicted
      one, and for each noise a record of the strengths it tolerates. They are in the store too.

    Raises:
      UsageError: a store of another study, a noise on what the model does not have.
    """
    check(study, clean.model)
    check_folder(study, clean, store)
    points = {}
    for spec, strengths in study.sweeps.items():
        say(spec)
        for strength in strengths:
            points[spec, strength] = _points(study, clean, store, spec, strength)
    weights: dict[str, float] = {}
    curve: list[tuple[float, float]] = []
    if study.sensitivity and _foreseen(study, clean):
        say(f"sensitivity of each projection, alone under {PROBE}")
        weights = _sensitivities(study, clean, store)
        for sigma in CURVE:
            found = _points(study, clean, store, PROBE, sigma)
            probe = make_noise(PROBE, strength=sigma)
            expected = list(robustness.products(clean, probe, [], study.select))
            curve.append((_load(expected, weights), statistics.fmean(_rises(found))))
    records = []
    for (spec, strength), found in points.items():
        records += _summary(study, clean, spec, strength, found, weights, curve)
    for spec, strengths in study.sweeps.items():
        records.append(_tolerance(study, clean, spec, [points[spec, s] for s in strengths]))
    records += [_alone(study, clean, store, name, weight) for name, weight in weights.items()]
    for record in records:
        if not any(_same(record, known) for known in store.records):
            store.append(record)
    return records


def _same(first: Record, second: Record) -> bool:
    """Whether a study that goes on summed up alike before."""
    return all(
        getattr(first, name) == getattr(second, name) for name in ("note", "kind", "metrics")
    )


def _foreseen(study: Study, clean: Clean) -> bool:
    """Whether there are predictions: of whole projections, and only where all struck are trits."""
    names = [name for target in selected(clean.model, study.select) for name in target.names()]
    return study.rows == 1 and all(name in clean.codes for name in names)


def _points(
    study: Study, clean: Clean, store: Store, spec: str, strength: float, select: str | None = None
) -> list[Record]:
    """All draws; `select` is the study's unless given, and then PROBE_DRAWS at most are taken."""
    draws = study.draws if select is None else min(study.draws, PROBE_DRAWS)
    select = study.select if select is None else select
    return [_point(study, clean, store, spec, strength, draw, select) for draw in range(draws)]


def check(study: Study, model: Decoder) -> None:
    """UsageError where a pattern selects nothing, or a noise is on what the model does not have."""
    targets = selected(model, study.select)
    for spec, strengths in study.sweeps.items():
        check_domain(make_noise(spec, strength=strengths[0]), targets, study.rows)


def check_folder(study: Study, clean: Clean, store: Store) -> None:
    """UsageError where the store holds points of another model, text or selection."""
    mine = (study.config, study.seed, study.how(clean))
    for record in store.records:
        theirs = (record.config, record.seed, record.note.split(HOW, 1)[-1])
        if theirs != mine:
            named = zip(("config", "seed", "study"), mine, theirs, strict=True)
            differ = [f"{name} {b!r}, here {a!r}" for name, a, b in named if a != b]
            raise UsageError(
                f"{store.directory} holds another study ({'; '.join(differ)}): choose another "
                "--output_dir"
            )


def _point(
    study: Study, clean: Clean, store: Store, spec: str, strength: float, draw: int, select: str
) -> Record:
    """One draw: from the store, or measured now."""
    title = f"{spec} at {strength:g} on {select}, draw {draw}"
    for record in store.records:
        if record.note.split(HOW, 1)[0] == title:
            return record
    key = _key(study, draw)
    noise = make_noise(spec, strength=strength)
    found = robustness.point(clean, noise, key, select=select, rows=study.rows)
    metrics = {"noise_strength": strength, "changed_count": found.changed}
    rise = float((found.rises * clean.text.num_bytes).sum() / clean.text.num_bytes.sum())
    if math.isfinite(rise):
        metrics |= {
            "bits_per_byte": clean.bits_per_byte + rise,
            "bits_per_byte_rise": rise,
            "kl_bits": found.kl_bits,
            "top1_agreement": found.top1,
            "top5_agreement": found.top5,
            "logit_cosine": found.cosine,
        }
    record = _record(
        study,
        clean,
        title,
        metrics,
        samples=tuple(found.rises.tolist()) if math.isfinite(rise) else (),
        sample_unit="bits/byte",
    )
    store.append(record)
    return record


def _key(study: Study, draw: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(study.seed), draw)


def _rises(records: Sequence[Record]) -> list[float]:
    """Bits per byte more than clean, of each draw; infinite where logits were not finite."""
    return [record.metrics.get("bits_per_byte_rise", math.inf) for record in records]


def _sensitivities(study: Study, clean: Clean, store: Store) -> dict[str, float]:
    """Rise in bits per byte for a unit of `shape_error` in each projection alone."""
    probe = make_noise(PROBE, strength=PROBE_SIGMA)
    found = {}
    for product in robustness.products(clean, probe, [], study.select):
        rises = _rises(_points(study, clean, store, PROBE, PROBE_SIGMA, re.escape(product.name)))
        found[product.name] = statistics.fmean(rises) / shape_error(product.plug_in)
    return found


def _alone(study: Study, clean: Clean, store: Store, name: str, sensitivity: float) -> Record:
    """A projection's line: the rise with noise on it alone, and its sensitivity."""
    found = _points(study, clean, store, PROBE, PROBE_SIGMA, re.escape(name))
    metrics = {"noise_strength": PROBE_SIGMA, "sensitivity": sensitivity}
    metrics |= named("bits_per_byte_rise", t_interval(_rises(found)))
    return _record(study, clean, f"{PROBE} on {name} alone", metrics, phase="noise")


def shape_error(cosine: float) -> float:
    """1 / cos^2 - 1: the error's power over the outputs', behind the gain that fits best."""
    return 1 / max(cosine, 1e-3) ** 2 - 1


def _load(products: Sequence[robustness.Product], weights: dict[str, float]) -> float:
    """What the plug-in's errors of all projections, each times its sensitivity, add up to."""
    return sum(weights[p.name] * shape_error(p.plug_in) for p in products if p.name in weights)


def interpolated(curve: Sequence[tuple[float, float]], load: float) -> float | None:
    """The rise at a load, along the measured (load, rise) of one noise; None beyond it."""
    loads = [0.0, *(x for x, _ in curve)]
    rises = [0.0, *(y for _, y in curve)]
    return float(np.interp(load, loads, rises)) if load <= loads[-1] else None


def crossing(strengths: Sequence[float], rises: Sequence[float], loss: float) -> float | None:
    """The strength where the rise reaches `loss`, on the logarithm of both; None if it does not.

    Below the least strength the rise is taken to grow in proportion to it.
    """
    for i, (strength, rise) in enumerate(zip(strengths, rises, strict=True)):
        if rise < loss:
            continue
        if i == 0:
            return strength * loss / rise
        low, before = strengths[i - 1], rises[i - 1]
        if before <= 0 or not math.isfinite(rise):
            share = (loss - before) / (rise - before) if math.isfinite(rise) else 0.0
            return low + (strength - low) * share
        share = math.log(loss / before) / math.log(rise / before)
        return low * (strength / low) ** share
    return None


def _summary(study, clean, spec, strength, found, weights, curve) -> list[Record]:
    """A strength over its draws, as measured and as predicted."""
    noise = make_noise(spec, strength=strength)
    title = f"{spec} at {strength:g} on {study.select}, {study.draws} draws"
    measured: dict[str, float] = {"noise_strength": strength, "noise_draws": study.draws}
    rises = _rises(found)
    if all(map(math.isfinite, rises)):
        drawn, texts = robustness.rise_of(clean, [np.array(record.samples) for record in found])
        measured |= named("bits_per_byte_rise", drawn)
        measured |= {
            f"bits_per_byte_rise_text_{end}": value
            for end, value in (("low", texts.low), ("high", texts.high))
            if value is not None
        }
        for name in ("kl_bits", "top1_agreement", "top5_agreement", "logit_cosine"):
            measured[name] = statistics.fmean(record.metrics[name] for record in found)
    measured["changed_count"] = round(statistics.fmean(r.metrics["changed_count"] for r in found))
    predicted: dict[str, float] = {"noise_strength": strength}
    if robustness.predicts(noise) and _foreseen(study, clean):
        keys = [_key(study, draw) for draw in range(study.draws)]
        products = list(robustness.products(clean, noise, keys, study.select))
        means = [statistics.fmean(product.measured) for product in products]
        measured["product_cosine"] = statistics.fmean(means)
        predicted["product_cosine"] = statistics.fmean(p.plug_in for p in products)
        forms = [p.closed_form for p in products if p.closed_form is not None]
        if forms:
            predicted["product_cosine_closed_form"] = statistics.fmean(forms)
        predicted["product_cosine_error"] = max(
            abs(mean - p.plug_in) for mean, p in zip(means, products, strict=True)
        )
        # The curve is the probe's own: of itself it predicts nothing.
        known = bool(curve) and noise != make_noise(PROBE, strength=strength)
        rise = interpolated(curve, _load(products, weights)) if known else None
        if rise is not None:
            predicted["bits_per_byte_rise"] = rise
    records = [
        _record(
            study,
            clean,
            title,
            measured,
            phase="noise",
            samples=tuple(rises) if all(map(math.isfinite, rises)) else (),
            sample_unit="bits/byte",
        )
    ]
    if len(predicted) > 1:
        records.append(_record(study, clean, title, predicted, phase="noise", kind="predicted"))
    return records


def _tolerance(study, clean, spec: str, points) -> Record:
    """The strengths at which the loss has risen by each of LOSSES, draw by draw."""
    strengths = study.sweeps[spec]
    metrics: dict[str, float] = {"noise_draws": study.draws}
    for name, loss in LOSSES.items():
        found = [
            crossing(strengths, [_rises([at[draw]])[0] for at in points], loss)
            for draw in range(study.draws)
        ]
        reached = [math.log(value) for value in found if value is not None]
        if len(reached) == study.draws:  # else the mean would be of the weaker draws alone
            metrics |= named(f"tolerated_{name}", t_interval(reached).map(math.exp))
    title = f"{spec} on {study.select}: strengths tolerated"
    return _record(study, clean, title, metrics, phase="noise")


def named(name: str, found) -> dict[str, float]:
    """A metric and its interval's ends, where it has them."""
    values = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: value for key, value in values.items() if value is not None}


def _record(study: Study, clean: Clean, title: str, metrics: dict, **fields) -> Record:
    config = clean.model.config
    n, length = clean.losses.shape
    return Record(
        **{
            "experiment": "robustness",
            "config": study.config,
            "scheme": config.scheme,
            "inputs": config.inputs,
            "backend": "",
            "device": device_name(jax.devices()[0]),
            "layers": config.num_layers,
            "batch": robustness.BATCH,
            "context": length,
            "phase": "evaluate",
            "kind": "measured",
            "metrics": metrics,
            "seed": study.seed,
            "flags": study.flags_text,
            "note": f"{title}{HOW}{study.how(clean)}",
            **fields,
        }
    )
