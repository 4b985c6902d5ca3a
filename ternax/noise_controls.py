"""What else would cost as much? Controls of a point, and what keeping the dearest weights buys."""

import dataclasses
import functools
import math

import jax
import numpy as np

from ternax import robustness
from ternax.injection import perturb
from ternax.noise import make_noise
from ternax.noise.predict import has_moments
from ternax.noise_point import Study, kept
from ternax.record import Record, Store
from ternax.response import Response
from ternax.robustness import Clean
from ternax.trit_edits import protected, relocated, shuffled

ELSEWHERE, EQUAL, ORDER = "elsewhere", "gaussian of equal norm", "weights permuted"
KEPT, KEPT_ANY = "dearest outputs kept", "random outputs kept"


@dataclasses.dataclass(frozen=True)
class Controls:
    """Makes controls of a study's points. Each is a record, and a folder keeps it."""

    study: Study
    clean: Clean
    store: Store

    def of(self, spec: str, strength: float) -> dict[str, list[Record]]:
        """Control -> a record a draw, for a noise at a strength."""
        noise = make_noise(spec, strength=strength)
        found = {}
        trits = noise.domain == "codes" or noise.domain == "packed"
        if trits and getattr(noise, "policy", "") != "raw":
            found[ELSEWHERE] = self._each(ELSEWHERE, spec, strength, self._elsewhere)
        if has_moments(noise) and self.clean.codes:
            found[EQUAL] = self._each(EQUAL, spec, strength, self._equal)
        return found

    def keeping(self, spec: str, strength: float, response: Response) -> dict[str, list[Record]]:
        """The same noise with `study.protect` of the projections' weights kept clean."""
        share = self.study.protect
        noise = make_noise(spec, strength=strength)
        sizes = {n: np.full(w.shape[1], w.shape[0]) for n, w in self.clean.codes.items()}
        random = np.random.default_rng(self.study.seed)
        chance = {name: random.random(len(size)) for name, size in sizes.items()}
        found = {}
        for name, worth in ((KEPT, costs(response, noise)), (KEPT_ANY, chance)):
            rows = dearest(worth, sizes, share)
            found[f"{share:g} of {name}"] = self._each(
                f"{share:g} of {name}",
                spec,
                strength,
                lambda spec, strength, key, rows=rows: self._protected(spec, strength, key, rows),
            )
        return found

    def order(self) -> list[Record]:
        """The clean model with every matrix' trits in random order."""

        def measured(spec, strength, key):
            model = shuffled(self.clean.model, key, self.study.select)
            return robustness.contrast(self.clean, model, 0)

        return self._each(ORDER, "nothing", 0.0, measured)

    def _each(self, name: str, spec: str, strength: float, measured) -> list[Record]:
        study = self.study

        def one(draw):
            title = f"{name}: {spec} at {strength:g} on {study.select}, draw {draw}"
            key = study.key(draw)
            made = functools.partial(measured, spec, strength, key)
            return kept(study, self.clean, self.store, title, strength, made)

        return [one(draw) for draw in range(study.draws)]

    def _noisy(self, spec: str, strength: float, key: jax.Array):
        noise, study = make_noise(spec, strength=strength), self.study
        noisy, counts = perturb(
            self.clean.model, noise, key, select=study.select, rows=study.rows, copy=True
        )
        return noisy, sum(counts.values())

    def _elsewhere(self, spec, strength, key):
        noisy, count = self._noisy(spec, strength, key)
        return robustness.contrast(self.clean, relocated(self.clean.model, noisy, key), count)

    def _equal(self, spec, strength, key):
        sigma = equal_sigma(make_noise(spec, strength=strength), self.clean)
        noise = make_noise("gaussian", strength=sigma)
        study = self.study
        return robustness.point(self.clean, noise, key, select=study.select, rows=study.rows)

    def _protected(self, spec, strength, key, rows):
        noisy, count = self._noisy(spec, strength, key)
        return robustness.contrast(self.clean, protected(self.clean.model, noisy, rows), count)


def equal_sigma(noise, clean: Clean) -> float:
    """The deviation of Gaussian weights whose error has the same expected norm as the noise's."""
    power = count = 0.0
    trits = np.array([-1.0, 0.0, 1.0])
    for codes in clean.codes.values():
        mean, variance = noise.moments(float(np.mean(codes != 0)))
        sizes = np.array([(codes == value).sum() for value in trits])
        power += float(sizes @ (np.square(mean - trits) + variance))
        count += codes.size
    return math.sqrt(power / count)


def costs(response: Response, noise) -> dict[str, np.ndarray]:
    """Name -> f64 [N]: what a weight of each output costs under the noise, in the mean."""
    found = {}
    for name, weights in response.weights.items():
        mean, variance = noise.moments(weights.density)
        power = np.square(mean - np.array([-1.0, 0.0, 1.0])) + variance
        found[name] = weights.by_row @ power / weights.inputs
    return found


def dearest(
    worth: dict[str, np.ndarray], sizes: dict[str, np.ndarray], share: float
) -> dict[str, np.ndarray]:
    """Name -> bool [N]: the outputs of most worth, as many as hold `share` of all weights.

    worth: name -> [N]; sizes: name -> weights of each output, [N].
    """
    size = np.concatenate([sizes[name] for name in worth])
    order = np.argsort(-np.concatenate(list(worth.values())), kind="stable")
    chosen = np.zeros(len(size), bool)
    chosen[order[np.cumsum(size[order]) <= share * size.sum()]] = True
    ends = np.cumsum([len(found) for found in worth.values()])[:-1]
    return dict(zip(worth, np.split(chosen, ends), strict=True))
