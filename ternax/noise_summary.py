"""What a study's draws say together, as records: each strength, each noise, each projection."""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from ternax import robustness
from ternax.anatomy import Shape
from ternax.estimate import named, t_interval
from ternax.models import Decoder
from ternax.noise import make_noise
from ternax.noise.bits import BitFlip
from ternax.noise.storage import bits_of
from ternax.noise_forecast import PROBE, Forecast, before_secded
from ternax.noise_point import Study, record, rises
from ternax.record import Record
from ternax.robustness import Clean
from ternax.targets import selected

# Bits per byte that a model may lose: the strength where it does is the headline.
LOSSES = {"005": 0.05, "020": 0.2}
# What a noise's headline is called in its note.
TOLERATED = "strengths tolerated"
# What each layer reads, with and without noise, is called so in its note.
BY_DEPTH = "cosine of what each layer reads"
# What each projection is struck with alone, and how often at most.
PROBE_SIGMA, PROBE_DRAWS = 0.3, 3
# Seconds after programming that a refresh of analog cells is looked for in.
MOST_SECONDS = 1e12


@dataclasses.dataclass(frozen=True)
class Summary:
    """Sums up draws of one study."""

    study: Study
    clean: Clean
    forecast: Forecast | None

    @property
    def names(self) -> list[str]:
        """The projections that are struck."""
        found = selected(self.clean.model, self.study.select)
        return [name for target in found for name in target.names()]

    def strength(self, spec: str, strength: float, found: Sequence[Record]) -> Iterator[Record]:
        """Over its draws, as measured and, where anything is foreseen, as predicted."""
        noise, study = make_noise(spec, strength=strength), self.study
        title = f"{spec} at {strength:g} on {study.select}, {study.draws} draws"
        measured: dict[str, float] = {"noise_strength": strength, "noise_draws": study.draws}
        predicted: dict[str, float] = {"noise_strength": strength}
        finite = all(map(math.isfinite, rises(found)))
        if finite:
            measured |= self._spread(found)
        measured["changed_count"] = round(
            statistics.fmean(r.metrics["changed_count"] for r in found)
        )
        snr: tuple[float, ...] = ()
        if robustness.predicts(noise) and whole_trits(study, self.clean):
            keys = [study.key(draw) for draw in range(study.draws)]
            products = list(robustness.products(self.clean, noise, keys, study.select))
            means = [statistics.fmean(product.measured) for product in products]
            measured["product_cosine"] = statistics.fmean(means)
            predicted["product_cosine"] = statistics.fmean(p.plug_in for p in products)
            forms = [p.closed_form for p in products if p.closed_form is not None]
            if forms:
                predicted["product_cosine_closed_form"] = statistics.fmean(forms)
            predicted["product_cosine_error"] = max(
                abs(mean - p.plug_in) for mean, p in zip(means, products, strict=True)
            )
            snr = tuple(statistics.fmean(p.snr_db) for p in products)
            yield from self._snr(title, snr, products)
            rise = None if self.forecast is None else self.forecast.rise(noise, self.names)
            if rise is not None:
                predicted["bits_per_byte_rise"] = rise
        yield self.record(
            title,
            measured,
            samples=tuple(rises(found)) if finite else (),
            sample_unit="bits/byte",
        )
        if len(predicted) > 1:
            yield self.record(title, predicted, kind="predicted")
        if study.depth and finite:
            keys = [study.key(draw) for draw in range(study.draws)]
            where: dict = {"select": study.select, "rows": study.rows}
            cosines = robustness.by_depth(self.clean, noise, keys, **where)
            if all(map(math.isfinite, cosines)):
                metrics = {
                    n: measured[n] for n in ("noise_strength", "logit_cosine") if n in measured
                }
                yield self.record(
                    f"{title}: {BY_DEPTH}", metrics, samples=tuple(cosines), sample_unit="cosine"
                )

    def _spread(self, found: Sequence[Record]) -> dict[str, float]:
        """Means of draws, with the intervals over draws and over the text."""
        drawn, texts = robustness.rise_of(self.clean, [np.array(r.samples) for r in found])
        metrics = named("bits_per_byte_rise", drawn)
        for end, value in (("low", texts.low), ("high", texts.high)):
            if value is not None:
                metrics[f"bits_per_byte_rise_text_{end}"] = value
        means = "kl_bits", "top1_agreement", "top5_agreement", "logit_cosine"
        for name in (*means, "first_divergence_tokens"):
            if all(name in r.metrics for r in found):
                metrics[name] = statistics.fmean(r.metrics[name] for r in found)
        return metrics

    def _snr(self, title: str, measured, products) -> Iterator[Record]:
        """Output SNR by projection: as found, and by the plug-in."""
        expected = [robustness.decibels(1.0, p.error_power) for p in products]
        names = ", ".join(p.name for p in products)
        for kind, found in (("measured", measured), ("predicted", expected)):
            if all(map(math.isfinite, found)):
                yield self.record(
                    f"{title}: output SNR of {names}",
                    {"output_snr_db": statistics.fmean(found)},
                    kind=kind,
                    samples=tuple(found),
                    sample_unit="dB",
                )

    def tolerance(self, spec: str, points: Sequence[Sequence[Record]]) -> Record:
        """The strengths at which the loss has risen by each of LOSSES, draw by draw, the area under
        the share of unchanged top-1 over the logarithm of the strength, and the model's size.

        points: at each strength of the sweep, its draws.
        """
        strengths, draws = self.study.sweeps[spec], self.study.draws
        noise = make_noise(spec, strength=strengths[0])
        metrics: dict[str, float] = {"noise_draws": draws, **self._model()}
        if isinstance(noise, BitFlip):
            bits = stored_bits(noise, self.clean.model, self.study.select)
            metrics["stored_bits"] = round(self.study.rows * bits)
        most = 1.0 if noise.bounded else math.inf

        def strength_of(logarithm):
            return min(math.exp(min(logarithm, 700)), most)

        for name, loss in LOSSES.items():
            drawn = [[rises([at[draw]])[0] for at in points] for draw in range(draws)]
            found = [crossing(strengths, rise, loss) for rise in drawn]
            metrics[f"tolerated_{name}_draws"] = sum(max(rise) >= loss for rise in drawn)
            reached = [math.log(value) for value in found if value is not None]
            if len(reached) == draws:  # else the mean would be of the weaker draws alone
                metrics |= named(f"tolerated_{name}", t_interval(reached).map(strength_of))
        if len(strengths) > 1:
            # What is not finite agrees with nothing.
            areas = [
                area(
                    [math.log(s) for s in strengths],
                    [at[draw].metrics.get("top1_agreement", 0.0) for at in points],
                )
                for draw in range(draws)
            ]
            metrics |= named("top1_area", t_interval(areas))
        return self.record(f"{spec} on {self.study.select}: {TOLERATED}", metrics)

    def _model(self) -> dict[str, float]:
        """How large and how good the model is, and what it was trained on where that is known."""
        metrics: dict[str, float] = {
            "parameters": Shape.of(self.clean.model.config).parameters,
            "bits_per_byte_clean": self.clean.bits_per_byte,
        }
        if self.study.trained_tokens is not None:
            metrics["trained_tokens"] = self.study.trained_tokens
        return metrics

    def budget(self, spec: str) -> Iterator[Record]:
        """Foreseen: how strong a noise the model may have for each loss, and each projection if
        all have an equal share of it."""
        if self.forecast is None:
            return
        forecast, names, strongest = self.forecast, self.names, self.study.sweeps[spec][-1]
        noise = make_noise(spec, strength=strongest)
        strongest = 1.0 if noise.bounded else 10 * strongest
        if noise.when == "read" or not forecast.response.foresees(noise):
            return
        for name, loss in LOSSES.items():
            metrics: dict[str, float] = {}
            whole = forecast.largest(noise.with_strength, names, loss, strongest)
            if whole is None:
                continue
            metrics[f"tolerated_{name}"] = whole
            if isinstance(noise, BitFlip) and noise.burst == 1:  # errors come one by one
                metrics[f"tolerated_{name}_secded"] = before_secded(whole)
            seconds = self._refresh(spec, loss)
            if seconds is not None:
                metrics[f"refresh_{name}_s"] = seconds
            each = [
                forecast.largest(noise.with_strength, [one], loss / len(names), strongest)
                for one in names
            ]
            known = [number for number in each if number is not None]
            yield self.record(
                f"{spec} on {self.study.select}: budget for {loss:g} bits per byte, by projection "
                f"at equal shares: {', '.join(names)}",
                metrics,
                kind="predicted",
                samples=tuple(known) if len(known) == len(names) else (),
                sample_unit=noise.strength_name,
            )

    def _refresh(self, spec: str, loss: float) -> float | None:
        """Seconds after programming at which phase-change cells, as measured, cost the loss."""
        if self.forecast is None or spec.partition(",")[0] != "pcm" or "seconds" in spec:
            return None

        def after(seconds):
            return make_noise(f"{spec},seconds={seconds!r}", strength=1.0)

        return self.forecast.largest(after, self.names, loss, MOST_SECONDS)

    def alone(self, name: str, found: Sequence[Record]) -> Iterator[Record]:
        """A projection's line: the rise with the probe on it alone, and its sensitivity."""
        probe = make_noise(PROBE, strength=PROBE_SIGMA)
        title = f"{PROBE} on {name} alone"
        product = next(robustness.products(self.clean, probe, [], re.escape(name)))
        mean = statistics.fmean(rises(found))
        metrics = {
            "noise_strength": PROBE_SIGMA,
            "sensitivity": mean / shape_error(product.plug_in),
        }
        metrics |= named("bits_per_byte_rise", t_interval(rises(found)))
        yield self.record(title, metrics)
        if self.forecast is not None:
            rise = self.forecast.rise(probe, [name])
            if rise is not None:
                metrics = {"noise_strength": PROBE_SIGMA, "bits_per_byte_rise": rise}
                yield self.record(title, metrics, kind="predicted")

    def control(self, name: str, spec: str, strength: float, found: Sequence[Record]) -> Record:
        """A control's draws, beside the point it belongs to."""
        metrics: dict[str, float] = {"noise_strength": strength, "noise_draws": len(found)}
        if all(map(math.isfinite, rises(found))):
            metrics |= named("bits_per_byte_rise", t_interval(rises(found)))
        metrics["changed_count"] = round(
            statistics.fmean(r.metrics["changed_count"] for r in found)
        )
        return self.record(f"{name}: {spec} at {strength:g} on {self.study.select}", metrics)

    def record(self, title: str, metrics: dict, **fields) -> Record:
        return record(self.study, self.clean, title, metrics, phase="noise", **fields)


def stored_bits(noise: BitFlip, model: Decoder, select: str) -> int:
    """Bits of the values that it can strike, without padding."""
    chosen = selected(model, select)
    return round(
        sum(
            len(one.layers)
            * one.node.data.get_value().shape[-3]  # planes
            * one.width
            * one.columns
            * bits_of(noise.storage, one.node.format)
            for one in chosen
        )
    )


def whole_trits(study: Study, clean: Clean) -> bool:
    """Whether products are foreseen: of whole projections, and only where all struck are trits."""
    noises = (make_noise(spec, strength=s[0]) for spec, s in study.sweeps.items())
    if any(part.domain in ("norms", "cache") for noise in noises for part in noise.parts()):
        return False
    names = [name for target in selected(clean.model, study.select) for name in target.names()]
    return study.rows == 1 and all(name in clean.codes for name in names)


def shape_error(cosine: float) -> float:
    """1 / cos^2 - 1: the error's power over the outputs', behind the gain that fits best."""
    return 1 / max(cosine, 1e-3) ** 2 - 1


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """The mean of y along x, by trapezoids: 1 where y is always 1."""
    return float(np.trapezoid(y, x)) / (x[-1] - x[0])


def crossing(strengths: Sequence[float], rises: Sequence[float], loss: float) -> float | None:
    """The strength where the rise reaches `loss`, on the logarithm of both; None if it does not.

    Below the least strength the rise is taken to grow in proportion to it, down to a tenth; a model
    that is lost there already says nothing of less.
    """
    for i, (strength, rise) in enumerate(zip(strengths, rises, strict=True)):
        if rise < loss:
            continue
        if i == 0:
            return strength * loss / rise if rise <= 10 * loss else None
        low, before = strengths[i - 1], rises[i - 1]
        if before <= 0 or not math.isfinite(rise):
            share = (loss - before) / (rise - before) if math.isfinite(rise) else 0.0
            return low + (strength - low) * share
        share = math.log(loss / before) / math.log(rise / before)
        return low * (strength / low) ** share
    return None
