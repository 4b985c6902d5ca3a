"""Draws of noises at strengths as records: taken from a folder, or measured now."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from ternax import robustness
from ternax.errors import UsageError
from ternax.measure import device_name
from ternax.models import Decoder
from ternax.noise import make_noise
from ternax.record import Record, Store
from ternax.robustness import Clean
from ternax.targets import EVERYTHING, check_study

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
      sensitivity: whether each projection is struck alone too.
      forecast: whether rises in loss are foreseen.
      controls: whether every point has its controls, see `noise_controls`.
      depth: whether what each layer reads is compared too.
      protect: share of the outputs' weights, the dearest, that are also kept clean; 0: none.
      text: the text in words.
      trained_tokens: what the model was trained on; None where that is unknown.
      flags_text: what was asked for.
    """

    config: str
    sweeps: dict[str, tuple[float, ...]]
    draws: int = 5
    seed: int = 0
    select: str = EVERYTHING
    rows: float = 1.0
    sensitivity: bool = True
    forecast: bool = True
    controls: bool = False
    depth: bool = False
    protect: float = 0.0
    text: str = ""
    trained_tokens: int | None = None
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

    def key(self, draw: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), draw)


def check(study: Study, model: Decoder) -> None:
    """UsageError where a pattern selects nothing, or a noise is on what the model does not have."""
    for spec, strengths in study.sweeps.items():
        noise = make_noise(spec, strength=strengths[0])
        check_study(noise, model, study.select, study.rows)


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


def points(study: Study, clean: Clean, store: Store, spec: str, strength: float) -> list[Record]:
    """All draws of a noise at a strength."""
    return [point(study, clean, store, spec, strength, draw) for draw in range(study.draws)]


def point(
    study: Study,
    clean: Clean,
    store: Store,
    spec: str,
    strength: float,
    draw: int,
    select: str | None = None,
) -> Record:
    """One draw; `select` is the study's unless given."""
    select = study.select if select is None else select
    noise = make_noise(spec, strength=strength)
    return kept(
        study,
        clean,
        store,
        f"{spec} at {strength:g} on {select}, draw {draw}",
        strength,
        lambda: robustness.point(clean, noise, study.key(draw), select=select, rows=study.rows),
    )


def kept(study: Study, clean: Clean, store: Store, title: str, strength: float, measured) -> Record:
    """The record of that title: from the store, or of the Point that `measured()` gives."""
    for known in store.records:
        if known.note.split(HOW, 1)[0] == title:
            return known
    found: robustness.Point = measured()
    metrics: dict[str, float] = {"noise_strength": strength, "changed_count": found.changed}
    rise = float((found.rises * clean.text.num_bytes).sum() / clean.text.num_bytes.sum())
    finite = math.isfinite(rise)
    if finite:
        said = {
            "bits_per_byte": clean.bits_per_byte + rise,
            "bits_per_byte_rise": rise,
            "kl_bits": found.kl_bits,
            "top1_agreement": found.top1,
            "top5_agreement": found.top5,
            "logit_cosine": found.cosine,
        }
        # A divergence may overflow where the targets' losses do not.
        metrics |= {name: value for name, value in said.items() if math.isfinite(value)}
        if found.diverged:
            metrics["first_divergence_tokens"] = sum(found.diverged) / len(found.diverged)
    else:
        lost = [value for value in found.rises if not math.isfinite(value)]
        metrics["not_finite_share"] = len(lost) / len(found.rises)
        head = clean.model.config.num_layers
        layer = (found.not_finite or "head").split(".")
        metrics["not_finite_layer"] = int(layer[1]) if len(layer) > 1 else head
    made = record(
        study,
        clean,
        title,
        metrics,
        samples=tuple(found.rises.tolist()) if finite else (),
        sample_unit="bits/byte",
    )
    store.append(made)
    return made


def rises(records: Sequence[Record]) -> list[float]:
    """Bits per byte more than clean, of each draw; infinite where logits were not finite."""
    return [found.metrics.get("bits_per_byte_rise", math.inf) for found in records]


def record(study: Study, clean: Clean, title: str, metrics: dict, **fields) -> Record:
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
