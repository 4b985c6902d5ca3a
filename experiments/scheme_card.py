"""The scheme card on screen and on paper: what `experiments.compare --schemes` shows."""

import pathlib
import textwrap

from ternax import card, data, heldout, measure
from ternax.errors import UsageError
from ternax.experiments.progress import progress
from ternax.record import Record, open_store
from ternax.table import rate, row

WIDTH = 100
MODEL = "stdlib-bitnet"


def card_flags(define):
    from ternax.nn.linear import COMPUTE

    define.section("Schemes: the scheme card")
    define.string(
        "schemes",
        None,
        "trained and compared: absmean,twn,int4,group_size=64,package.module:Class",
        form="A,B",
    )
    define.string("after_training", "", "schemes that trained floats are converted to", form="A,B")
    define.integer("seeds", 1, "models of each; 2 at least give an interval", lower=1, upper=99)
    define.integer("steps", 1000, "updates of each model", lower=1)
    define.integer("batch", 16, "sequences of an update", lower=1)
    define.integer("length", 256, "tokens of a sequence", lower=2)
    define.integer("accumulate", 1, "parts a batch is cut into", lower=1)
    define.choice("compute", "f32", COMPUTE, "what products are held in while training")
    define.string("corpus", data.STDLIB, "a text file, a folder, or stdlib", form="PATH")
    define.string("text", heldout.HELDOUT, "what models are judged by, a UTF-8 file", form="FILE")
    define.integer("calibrate_tokens", 16384, "that a conversion sees; 0 for none", lower=0)
    define.string(
        "speed_config", "1b", "decoded under each scheme, with random weights; '' for none"
    )


CARD_FLAGS = {"after_training", "seeds", "steps", "batch", "length", "compute", "corpus", "text"}
CARD_FLAGS |= {"accumulate", "calibrate_tokens", "speed_config"}
PEER_FLAGS = {"peer", "prompt_length", "num_tokens", "repetitions", "timeout_s", "kv_dtype"}
PEER_FLAGS |= {"embed_dtype", "head_dtype", "backend", "layers", "scheme", "inputs", "profile_dir"}


def refuse(args, names, owner: str) -> None:
    """UsageError for the first given flag of the other kind of comparison."""
    for name in sorted(args.given & names):
        raise UsageError(f"--{name} belongs to {owner}, which was not given")


def run(args) -> None:
    """The command: train what is not there yet, judge, time, show."""
    from ternax import configs
    from ternax.train import TrainSpec

    refuse(args, PEER_FLAGS, "--peer")
    if args.threads is not None:
        measure.limit_threads(args.threads)
    config = args.config
    if args.given.isdisjoint({"config"}):
        if any(name.startswith("config.") for name in args.given):
            raise UsageError("--config.FIELD needs the --config that it changes")
        config = configs.get_config(MODEL)
    names = ("steps", "batch", "length", "accumulate", "compute")
    spec = TrainSpec(**{name: getattr(args, name) for name in names})
    schemes = card.split_schemes(args.schemes)
    corpus = data.open_corpus(args.corpus)
    text = heldout.open_text(args.text)
    with open_store(args.output_dir, "compare", config.name, "schemes") as store:
        asked = card.Card(
            config=config,
            schemes=schemes,
            after=card.split_schemes(args.after_training),
            seeds=args.seeds,
            spec=spec,
            corpus=corpus,
            text=text,
            directory=store.directory,
            calibrate_tokens=args.calibrate_tokens,
            speed_words=(f"--config={args.speed_config}", "--num_tokens=34")
            if args.speed_config
            else (),
            rounds=args.rounds,
            flags_text=args.command_line,
        )
        given = ", ".join(c.name for c in asked.contenders)
        print(row("card", f"{config.name}: {given}; {args.seeds} seeds of {args.steps} steps"))
        print(row("corpus", corpus.describe()), flush=True)
        records = card.run(
            asked, store, say=lambda line: print(row("", line), flush=True), bar=progress
        )
        print("\n".join(["", *table(records), *legend(asked)]))
        picture = draw(records, store.directory / "card.png")
    drawn = f" and {picture}" if picture else "; a plot needs matplotlib: pip install matplotlib"
    print(f"wrote {store.directory}/results.json{drawn}")


def table(records: list[Record]) -> list[str]:
    """A line a contender, best loss first."""
    lines = [
        f"{'scheme':27} {'bits/byte':>18} {'more than floats':>19} {'bits/w':>7} {'tok/s':>7} "
        f"{'bound':>7} {'step':>6}"
    ]
    for record in sorted(records, key=lambda r: r.metrics["seed_bits_per_byte"]):
        m = record.metrics
        after = record.note.startswith(card.CONVERTED)
        name = record.scheme if not after else f"{record.scheme} *"
        if len(name) > 27:
            name = f"..{name[-25:]}"
        lines.append(
            f"{name:27} {spread(m, 'seed_bits_per_byte'):>18} "
            f"{spread(m, 'gap_bits_per_byte', '+'):>19} {m['bits_per_weight']:>7.3f} "
            f"{_rate(m, 'tokens_per_s'):>7} {_rate(m, 'bound_tokens_per_s'):>7} "
            f"{_rate(m, 'step_time_ratio'):>6}".rstrip()
        )
    return lines


def spread(metrics: dict, name: str, sign: str = "") -> str:
    """A mean, and half of its interval where it has one: 1.4705 +-0.0030."""
    if name not in metrics:
        return ""
    text = f"{metrics[name]:{sign}.4f}"
    if f"{name}_low" in metrics:
        text += f" +-{(metrics[f'{name}_high'] - metrics[f'{name}_low']) / 2:.4f}"
    return text


def _rate(metrics: dict, name: str) -> str:
    return rate(metrics[name]) if name in metrics else ""


def legend(asked: card.Card) -> list[str]:
    """What the columns are."""
    seeds = (
        f"+- is the 95 % interval over {asked.seeds} training seeds"
        if asked.seeds > 1
        else "one seed, no interval: --seeds=5 gives one"
    )
    told = (
        f"Held-out bits per byte, lower is better; {seeds}; 'more than floats' is seed by seed. "
        "bits/w: stored bits of a projection's weight, scales included. "
    )
    if asked.speed_words:
        told += (
            f"tok/s: decode with {' '.join(asked.speed_words)}, random weights, beside the bound "
            "of the memory's read rate. "
        )
    told += "step: time of a training update over the floats'."
    if asked.after:
        told += " *: floats converted after training."
    return textwrap.wrap(told, WIDTH)


def draw(records: list[Record], target: pathlib.Path) -> pathlib.Path | None:
    """Loss over stored bits and over speed, the Pareto front drawn; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("bits_per_weight", "stored bits a weight, log", 1, "log")]
    if any("tokens_per_s" in r.metrics for r in records):
        panels.append(("tokens_per_s", "decode, tokens/s, measured", -1, "linear"))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (name, label, sign, scale) in zip(axes[0], panels, strict=True):
        shown = [r for r in records if name in r.metrics]
        places = [(r.metrics[name], r.metrics["seed_bits_per_byte"]) for r in shown]
        for record, (x, y) in zip(shown, places, strict=True):
            m = record.metrics
            after = record.note.startswith(card.CONVERTED)
            reach = (m["seed_bits_per_byte_high"] - y) if "seed_bits_per_byte_high" in m else None
            axis.errorbar(x, y, yerr=reach, fmt="s" if after else "o", capsize=3)
            axis.annotate(
                record.scheme.rpartition(":")[2],
                (x, y),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
        best = front(places, sign)
        axis.plot(*zip(*best, strict=True), color="#9aa5b1", linestyle="--", linewidth=1, zorder=0)
        axis.set_xscale(scale)
        axis.set_xlabel(label)
        axis.set_ylabel("held-out bits per byte")
    figure.suptitle(
        f"{records[0].config}, {records[0].metrics['seeds']} seeds; "
        "circles trained, squares converted",
        fontsize=9,
    )
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def front(places: list[tuple[float, float]], sign: int) -> list[tuple[float, float]]:
    """The points that none beats in both; x is better small with sign 1, large with -1."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (sign * place[0], place[1])):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best
