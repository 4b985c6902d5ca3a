"""The table that published figures match: noise on random matrices of the named shapes.

`experiments.robustness --preset=table` prints it. `ternax.untrained` computes; here are its
records, which a folder keeps, and the lines.
"""

import dataclasses
import functools
import pathlib
import textwrap
from collections.abc import Iterator

import jax

from ternax import configs, measure
from ternax.audit.reader import read
from ternax.config import ModelConfig, first_layers
from ternax.errors import UsageError
from ternax.noise import make_noise
from ternax.record import Record, Store
from ternax.table import row

CONFIGS = ("1b", "8b", "70b")
RATES = (0.1, 0.2, 0.3)
# The first is what published tables are about, and goes through the whole stack.
NOISES = ("trit_resample", "trit_other", "sign_flip", "stuck", "bitflip")
# Whose "similarity" by rate stands beside.
PUBLISHED = pathlib.Path(__file__).parent / "claims" / "l40s-70b-ternary.yaml"
MEANING = (
    "Untrained: all weights are random. One layer's cosine follows from the noise alone, 1 - rate "
    "where trits are drawn anew, whatever the size, the depth or the scale: an identity of random "
    "matrices, which holds no information about any model. A stack of them loses far more, and "
    "that says nothing of a trained model either: what noise does to one is measured on one, by "
    "experiments.robustness without --preset."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """What is asked for.

    Attributes:
      models: the shapes, in turn.
      noises: specs without a strength; the first alone goes through whole stacks.
      rates: their strengths.
      layers: of each stack, None: all.
    """

    models: tuple[ModelConfig, ...]
    noises: tuple[str, ...] = NOISES
    rates: tuple[float, ...] = RATES
    layers: int | None = None
    seed: int = 0
    flags_text: str = ""


def run(table: Table, store: Store) -> Iterator[list[Record]]:
    """Fills what the store lacks. Yields the records of one model's layer or stack at a time."""
    # Stacks last: the layers of all models take less time than one large stack.
    for config in table.models:
        yield [
            record
            for spec in table.noises
            for rate in table.rates
            for record in _kept(store, table, config, spec, rate, _layer)
        ]
    for config in table.models:
        yield [
            record
            for rate in table.rates
            for record in _kept(store, table, config, table.noises[0], rate, _stack)
        ]


def _kept(store: Store, table: Table, config, spec, rate, measured) -> Iterator[Record]:
    """The records of one point: from the store, or made now."""
    deep = first_layers(config, table.layers)
    layers = deep.num_layers if measured is _stack else 1
    of = "the whole stack" if measured is _stack else "one layer"
    title = f"untrained: {spec} at {rate:g} on {of} of {layers}"
    known = [
        r for r in store.records if (r.config, r.note, r.seed) == (config.name, title, table.seed)
    ]
    if not known:
        known = list(measured(table, deep, spec, rate, title))
        for record in known:
            store.append(record)
    yield from known


def _layer(table, config, spec, rate, title) -> Iterator[Record]:
    from ternax import untrained

    found = untrained.layer(config, make_noise(spec, strength=rate), seed=table.seed)
    metrics = {"noise_strength": rate, "changed_count": found.changed}
    yield _record(
        table,
        config,
        title,
        metrics | {"product_cosine": found.cosine},
        layers=1,
        samples=tuple(found.cosines.values()),
        sample_unit="cosine",
    )
    if found.closed_form is not None:
        metrics = {"noise_strength": rate, "product_cosine_closed_form": found.closed_form}
        yield _record(table, config, title, metrics, layers=1, kind="predicted")


def _stack(table, config, spec, rate, title) -> Iterator[Record]:
    from ternax import untrained

    noise = make_noise(spec, strength=rate)
    found = untrained.stack(config, noise, seed=table.seed)
    metrics = {
        "noise_strength": rate,
        "changed_count": found.changed,
        "hidden_cosine": found.hidden_cosine,
        "logit_cosine": found.logit_cosine,
        "top1_agreement": found.top1,
    }
    yield _record(table, config, title, metrics, layers=config.num_layers)


def _record(table: Table, config: ModelConfig, title: str, metrics: dict, **fields) -> Record:
    from ternax import untrained

    deep = fields["layers"] > 1
    return Record(
        **{
            "experiment": "robustness",
            "config": config.name,
            "scheme": config.scheme,
            "inputs": config.inputs,
            "backend": "",
            "device": measure.device_name(jax.devices()[0]),
            "batch": untrained.BATCH if deep else untrained.ROWS,
            "context": untrained.LENGTH if deep else 1,
            "phase": "noise",
            "kind": "measured",
            "metrics": metrics,
            "seed": table.seed,
            "flags": table.flags_text,
            "note": title,
            **fields,
        }
    )


def lines(records: list[Record]) -> list[str]:
    """A head, and a row a point, of layers or of stacks."""
    deep = any("hidden_cosine" in record.metrics for record in records)
    columns = (
        f"{'layers':>6} {'last state':>10} {'logits':>6} {'top-1':>6}"
        if deep
        else f"{'measured':>8} {'least':>6} {'most':>6} {'closed form':>11}"
    )
    what = "end to end, untrained" if deep else "one layer, untrained"
    out = [f"{what:22} {'noise':15} {'rate':>5} {'published':>9} {columns}"]
    forms = {r.note: r.metrics["product_cosine_closed_form"] for r in records if _is_form(r)}
    for record in records:
        m = record.metrics
        if _is_form(record):
            continue
        if deep:
            columns = (
                f"{record.layers:>6} {m['hidden_cosine']:>10.4f} {m['logit_cosine']:>6.3f} "
                f"{m['top1_agreement']:>6.3f}"
            )
        else:
            form = f"{forms[record.note]:.4f}" if record.note in forms else ""
            columns = (
                f"{m['product_cosine']:>8.4f} {min(record.samples):>6.4f} "
                f"{max(record.samples):>6.4f} {form:>11}"
            )
        place = f"{record.config:22} {_spec(record):15} {_rate(record):>5g}"
        out.append(f"{place} {_published(record):>9} {columns}".rstrip())
    return out


def _is_form(record: Record) -> bool:
    return record.kind == "predicted"


def _spec(record: Record) -> str:
    return record.note.removeprefix("untrained: ").partition(" at ")[0]


def _rate(record: Record) -> float:
    return record.metrics["noise_strength"]


def _published(record: Record) -> str:
    found = published().get(_rate(record)) if _spec(record) == NOISES[0] else None
    return "" if found is None else f"{found:.3f}"


@functools.cache
def published() -> dict[float, float]:
    """Rate -> similarity, as the document states them of a 70b."""
    rows = [claim.quantities for table in read(PUBLISHED).tables for claim in table.claims]
    return {
        round(q["noise"].nominal, 9): round(q["similarity"].nominal, 9)
        for q in rows
        if {"noise", "similarity"} <= q.keys()
    }


def table_of(args, strengths: tuple[float, ...] | None) -> Table:
    """What the flags ask for. UsageError for an unknown model, noise or strength."""
    named = [args.config] if "config" in args.given else CONFIGS
    asked = Table(
        models=tuple(configs.get_config(name) for name in named),
        noises=tuple(args.noise or NOISES),
        rates=strengths or RATES,
        layers=args.layers,
        seed=args.seed,
        flags_text=args.command_line,
    )
    for config in asked.models:
        first_layers(config, asked.layers)
    for spec in asked.noises:
        for rate in asked.rates:
            noise = make_noise(spec, strength=rate)
            if noise.domain not in ("codes", "packed"):
                raise UsageError(f"--preset=table strikes trits, found {spec}, on {noise.domain}")
    return asked


def show(asked: Table, store: Store) -> None:
    """Computes, and prints each part of the table as it is there."""
    named = ", ".join(config.name for config in asked.models)
    print(row("model", f"{named}: random weights of those shapes, untrained"), flush=True)
    heads: set[str] = set()
    for records in run(asked, store):
        head, *rows = lines(records)
        print("\n".join([*([] if head in heads else ["", head]), *rows]), flush=True)
        heads.add(head)
    print("\n".join(["", *textwrap.wrap(MEANING, 100)]))
