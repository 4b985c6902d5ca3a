"""The scheme card: what a quantization scheme costs and gives, beside others and beside floats.

Every scheme trains the same model on the same data from the same seeds; schemes that need no
training convert the trained floats. All are judged by the same text, timed at the same size,
and compared with the floats of their own seed, so that what a seed brings drops out.
"""

import contextlib
import dataclasses
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from flax import nnx

import ternax
from ternax import data, edit, estimate, heldout, training
from ternax.calibrate import Calibration
from ternax.config import ModelConfig, with_scheme
from ternax.convert import convert
from ternax.edit import is_packed
from ternax.errors import UsageError
from ternax.estimate import named
from ternax.evaluate import Evaluation, evaluate
from ternax.measure import device_name
from ternax.quant import make_scheme, parse_scheme
from ternax.random_weights import abstract_model
from ternax.record import Record, Store
from ternax.scheme_speed import decode_records, packs, update_seconds
from ternax.train import TrainSpec

FLOAT = "none"
TRAINED, CONVERTED = "trained", "after training"
HOW = "; all of this card: "


@dataclasses.dataclass(frozen=True)
class Contender:
    """A scheme, and whether a model learns under it or floats are converted to it."""

    scheme: str
    way: str = TRAINED

    @property
    def name(self) -> str:
        return self.scheme if self.way == TRAINED else f"{self.scheme} {self.way}"


@dataclasses.dataclass(frozen=True)
class Card:
    """What is compared.

    Attributes:
      config: the model, whatever its scheme.
      schemes: specs that models are trained under; the floats are among them.
      after: specs that the trained floats are converted to.
      seeds: models of each scheme; seed i is the same start and order of data for all.
      spec: how each trains; its seed is replaced.
      corpus: trained on, and what conversions are calibrated on.
      text: judged by.
      length: tokens of a sequence, of training and of the text.
      directory: one folder a trained model, `scheme-seed`, as experiments.train fills it.
      calibrate_tokens: that a conversion sees; 0 for none.
      speed_words: arguments of `experiments.decode` for the speed; empty leaves it out.
      rounds: of the two timings.
      flags_text: what was asked for, for the records.
    """

    config: ModelConfig
    schemes: tuple[str, ...]
    after: tuple[str, ...]
    seeds: int
    spec: TrainSpec
    corpus: data.Corpus
    text: heldout.Text
    directory: pathlib.Path
    calibrate_tokens: int = 16384
    speed_words: tuple[str, ...] = ()
    rounds: int = 5
    flags_text: str = ""

    def __post_init__(self):
        for scheme in (*self.schemes, *self.after):
            parse_scheme(scheme)
        heldout.windows(self.text, self.spec.length)
        training.check_corpus(self.config, self.spec, self.corpus)

    @property
    def contenders(self) -> tuple[Contender, ...]:
        trained = dict.fromkeys([FLOAT, *self.schemes])
        return (
            *(Contender(scheme) for scheme in trained),
            *(Contender(scheme, CONVERTED) for scheme in dict.fromkeys(self.after)),
        )

    @property
    def how(self) -> str:
        """What models of one card share, in words."""
        spec = self.spec
        return (
            f"{spec.steps} steps of {spec.batch} x {spec.length}, products in {spec.compute}; "
            f"text {self.text.source}, sha256 {self.text.sha256[:16]}; {self.corpus.describe()}; "
            f"conversions calibrated on {self.calibrate_tokens} tokens"
        )

    def folder(self, scheme: str, seed: int) -> pathlib.Path:
        """Where the model of that scheme and seed is trained."""
        return self.directory / f"{re.sub(r'[^A-Za-z0-9._=]+', '-', scheme)}-{seed}"


def split_schemes(text: str) -> tuple[str, ...]:
    """ "absmean,int4,group_size=64,mine:Mine" -> three specs: a part with = is an option."""
    specs: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if "=" in part:
            if not specs:
                raise UsageError(f"schemes: expected a scheme before its option {part!r}")
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return tuple(dict.fromkeys(specs))


def run(card: Card, store: Store, say: Callable[[str], None] = lambda line: None, bar=None):
    """Fills what `store` does not hold yet, then writes one Record of phase "card" a contender.

    Args:
      card: what to compare.
      store: takes a Record for each model judged, round timed and contender summed up.
      say: told what begins, one line each.
      bar: `bar(name, total, unit)` is a context manager that yields advance(n) or None.

    Returns:
      The card's records, in the contenders' order.
    """
    for record in store.records:
        if record.phase == "evaluate" and (card.config.name, card.how) != _judged(record):
            raise UsageError(
                f"{store.directory} holds another card ({', '.join(_judged(record))}); here it "
                f"would be {card.config.name}, {card.how}: choose another --output_dir"
            )
    held = {(r.phase, r.scheme, r.seed, _way(r)): r for r in store.records}
    for contender in card.contenders:
        for seed in range(card.seeds):
            key = ("evaluate", contender.scheme, seed, contender.way)
            if key not in held:
                say(f"{contender.name}, seed {seed}")
                held[key] = _quality(card, contender, seed, held, bar)
                store.append(held[key])
    trained = [c.scheme for c in card.contenders if c.way == TRAINED]
    timed = {r.scheme for r in store.records if r.phase == "train"}
    if not timed.issuperset(trained):
        say(f"time of an update, {card.rounds} rounds")
        for record in _step_records(card, trained):
            store.append(record)
    timed = {r.scheme for r in store.records if r.phase == "decode"}
    packed = [
        scheme
        for scheme in dict.fromkeys(c.scheme for c in card.contenders)
        if packs(with_scheme(card.config, scheme))
    ]
    if card.speed_words and not timed.issuperset(packed):
        say(f"speed, {card.rounds} rounds of decode {' '.join(card.speed_words)}")
        for record in decode_records(
            card.config, packed, card.speed_words, rounds=card.rounds, say=say
        ):
            store.append(dataclasses.replace(record, experiment="compare", flags=card.flags_text))
    found = []
    for contender in card.contenders:
        found.append(_card_record(card, contender, store.records))
        store.append(found[-1])
    return found


def _judged(record: Record) -> tuple[str, str]:
    """(config, how) of a record of phase "evaluate", as its card has them."""
    return record.config, record.note.split(HOW, 1)[-1]


def _way(record: Record) -> str:
    return CONVERTED if record.note.startswith(CONVERTED) else TRAINED


def _quality(card: Card, contender: Contender, seed: int, held, bar) -> Record:
    """The model of one seed on the text."""
    if contender.way == TRAINED:
        model = _trained(card, contender.scheme, seed, bar)
    else:
        floats = ternax.load(card.folder(FLOAT, seed) / "float", packed=False)
        model = _converted(card, floats, contender.scheme, seed)
    cut = heldout.windows(card.text, card.spec.length)
    found: Evaluation = evaluate(model, cut.tokens, num_bytes=cut.num_bytes, files=cut.files)
    metrics = {
        "bits_per_byte": found.bits_per_byte.value,
        "bits_per_byte_low": found.bits_per_byte.low,
        "bits_per_byte_high": found.bits_per_byte.high,
        "loss_nats": found.loss_nats.value,
        "bits_per_weight": _bits_per_weight(card, contender.scheme),
        "sequences": len(cut.tokens),
        "scored_bytes": int(cut.num_bytes.sum()),
    }
    if is_packed(model):
        metrics["weight_bytes"] = sum(
            leaf.nbytes for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
        )
    reference = held.get(("evaluate", FLOAT, seed, TRAINED))
    if reference is not None:
        metrics["bits_per_byte_difference"] = (
            metrics["bits_per_byte"] - reference.metrics["bits_per_byte"]
        )
    ways = "packed" if is_packed(model) else "no packed kernel: fake-quantized floats"
    return _record(
        card,
        contender,
        "evaluate",
        {name: value for name, value in metrics.items() if value is not None},
        inputs=model.config.inputs,
        seed=seed,
        samples=tuple(found.per_sequence.tolist()),
        sample_unit="bits/byte",
        note=f"{contender.way}, {ways}{HOW}{card.how}",
    )


def _trained(card: Card, scheme: str, seed: int, bar):
    """The model of a finished run; trained now, or to its end, where there is none."""
    folder = card.folder(scheme, seed)
    spec = dataclasses.replace(card.spec, seed=seed)
    config = with_scheme(card.config, scheme)
    job = training.TrainRun(
        config, spec, card.corpus, folder, flags_text=f"{card.flags_text} (seed {seed})"
    )
    if not job.finished():
        store = Store(folder)
        with (bar or _no_bar)(f"train {scheme} {seed}", spec.steps, "steps") as advance:
            done = [0]

            def watch(report):
                if advance:
                    advance(report.step - done[0])
                done[0] = report.step

            model, records = job.run(watch=watch)
        training.save_models(model, folder, job.trained_tokens)
        for record in records:
            store.append(record)
        store.finish()
    if packs(config):
        return ternax.load(folder / "model")
    return ternax.load(folder / "float", packed=False)


def _no_bar(name, total, unit):
    return contextlib.nullcontext()


def _converted(card: Card, floats, scheme: str, seed: int):
    """Trained floats under another scheme: packed, or as floats where there is no packed form."""
    calibration = None
    length = card.spec.length
    if card.calibrate_tokens:
        count = max(1, card.calibrate_tokens // length)
        train = card.corpus.train
        tokens = data.batch(train, 0, batch=count, length=length, seed=seed)[:, :-1]
        calibration = Calibration(tokens)
    target = dataclasses.replace(floats.config, scheme=scheme)
    model, _ = convert(
        floats,
        scheme,
        calibration=calibration,
        packed=packs(target),
        inputs=card.config.inputs,
        seed=seed,
    )
    return model


def _step_records(card: Card, schemes: Sequence[str]) -> Iterable[Record]:
    times = update_seconds(card.config, [FLOAT, *schemes], card.spec, rounds=card.rounds)
    for scheme, seconds in times.items():
        middle = estimate.median([a / b for a, b in zip(seconds, times[FLOAT], strict=True)])
        metrics = {
            "train_tokens_per_s": card.spec.batch * card.spec.length / statistics.median(seconds),
            **named("step_time_ratio", middle),
        }
        yield _record(
            card,
            Contender(scheme),
            "train",
            metrics,
            inputs=with_scheme(card.config, scheme).inputs,
            samples=tuple(seconds),
            sample_unit="s",
            note=f"in turn with the others, {card.rounds} rounds; products in {card.spec.compute}",
        )


def _card_record(card: Card, contender: Contender, records: Sequence[Record]) -> Record:
    """A contender's line of the card: over its seeds, beside the floats of the same seeds."""
    mine, floats = (
        {r.seed: r for r in records if (r.phase, r.scheme, _way(r)) == ("evaluate", *key)}
        for key in ((contender.scheme, contender.way), (FLOAT, TRAINED))
    )
    seeds = range(card.seeds)
    losses = [mine[seed].metrics["bits_per_byte"] for seed in seeds]
    bases = [floats[seed].metrics["bits_per_byte"] for seed in seeds]
    metrics = {
        "seeds": card.seeds,
        **named("seed_bits_per_byte", estimate.t_interval(losses)),
    }
    if contender != Contender(FLOAT):
        metrics |= named("gap_bits_per_byte", estimate.paired_difference(losses, bases))
    for name in ("bits_per_weight", "weight_bytes"):
        if name in mine[0].metrics:
            metrics[name] = mine[0].metrics[name]
    for phase, names in (
        ("train", ("step_time_ratio", "step_time_ratio_low", "step_time_ratio_high")),
        ("decode", ("tokens_per_s", "bound_tokens_per_s", "share_of_bound")),
    ):
        timed = [r for r in records if (r.phase, r.scheme) == (phase, contender.scheme)]
        if timed and (phase == "decode" or contender.way == TRAINED):
            metrics |= {
                name: timed[-1].metrics[name] for name in names if name in timed[-1].metrics
            }
    speed = " ".join(card.speed_words)
    return _record(
        card,
        contender,
        "card",
        metrics,
        inputs=mine[0].inputs,
        samples=tuple(losses),
        sample_unit="bits/byte",
        note=f"{contender.way}; {card.seeds} seeds of {card.spec.steps} steps"
        + (f"; speed of decode {speed}" if "tokens_per_s" in metrics else ""),
    )


def _bits_per_weight(card: Card, scheme: str) -> float:
    """Mean over the projections of a model, by size; computes nothing."""
    model = abstract_model(with_scheme(card.config, scheme), packed=False)
    stored = total = 0.0
    for _, linear in edit.float_linears(model):
        layers, k_size, n = linear.kernel.shape
        weight = jax.ShapeDtypeStruct((k_size, n), np.float32)

        def quantize(w, shape=(k_size, n)):
            return make_scheme(scheme, shape, rngs=nnx.Rngs(0)).quantize(w)

        stored += layers * k_size * n * jax.eval_shape(quantize, weight).bits_per_weight
        total += layers * k_size * n
    return stored / total


def _record(card: Card, contender: Contender, phase: str, metrics: dict, **fields) -> Record:
    return Record(
        **{
            "experiment": "compare",
            "config": card.config.name,
            "scheme": contender.scheme,
            "backend": "",
            "device": device_name(jax.devices()[0]),
            "layers": card.config.num_layers,
            "batch": card.spec.batch,
            "context": card.spec.length,
            "phase": phase,
            "kind": "measured",
            "metrics": metrics,
            "flags": card.flags_text,
            **fields,
        }
    )
