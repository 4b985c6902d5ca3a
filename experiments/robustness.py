"""How much noise does it survive, and was that to be foreseen?

    python -m experiments.robustness --noise=bitflip --noise=gaussian

Sweeps noises over strengths on one model: what happens to each projection's outputs, beside two
predictions, and what happens to the model's predictions of text. `ternax.noise_study` measures;
here are the flags, the table and the plot.
"""

import pathlib
import sys
import textwrap

from ternax import measure
from ternax.checkpoint import box
from ternax.errors import UsageError
from ternax.evaluate import BATCH
from ternax.experiments import flags, mesh_flag
from ternax.experiments.progress import progress
from ternax.noise import make_noise
from ternax.record import Record, open_store
from ternax.table import row

WIDTH = 100
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Strengths that take a trained model from next to nothing to ruin, by what the noise strikes.
STRENGTHS = {
    "scale_bits": (0.0001, 0.0003, 0.001, 0.003, 0.01),
    "gaussian": (0.1, 0.2, 0.3, 0.45, 0.6),
    "read_gaussian": (0.1, 0.2, 0.3, 0.45, 0.6),
    "pcm": (1.0, 2.0, 3.0, 4.0, 6.0),
    "reram": (0.5, 1.0, 2.0, 3.0, 4.0),
    "input_gaussian": (0.01, 0.02, 0.04, 0.06, 0.1),
    "input_clip": (0.1, 0.2, 0.4, 0.6, 0.8),
    "input_grid": (0.02, 0.05, 0.1, 0.2, 0.4),
}
DEFAULT = (
    "sign_flip",
    "trit_other",
    "trit_resample",
    "stuck",
    "bitflip",
    "bitflip,policy=saturate",
    "bitflip,policy=detect",
    "bitflip,storage=tq1_0",
    "gaussian",
    "pcm",
    "input_gaussian",
)


def robustness_flags(define):
    define.section("Model")
    define.string(
        "config", "stdlib-bitnet", "a saved packed model, one in the box, or a name", form="PATH"
    )
    define.section("Noise")
    define.strings("noise", "a noise without its strength: bitflip,policy=zero", form="NAME")
    define.string(
        "strengths",
        None,
        "of each noise: rates, or deviations in units of the scale, rising",
        form="A,B",
        default_text="by the noise",
    )
    define.integer("draws", 5, "draws of each noise at each strength", lower=1, upper=999)
    define.string("select", r"layers\..*", "which matrices, a regular expression", form="REGEX")
    define.number(
        "rows", 1.0, "share of each matrix's outputs that can be struck", lower=0, upper=1
    )
    define.boolean("no_sensitivity", "leave out each projection's, and the predicted rise in loss")
    define.section("Text")
    define.string("text", "heldout", "a UTF-8 file; heldout comes with ternax", form="FILE")
    define.integer("sequences", 64, "taken evenly from the text", lower=1)
    define.integer("length", 256, "tokens of a sequence", lower=1)


def sweeps(args) -> dict[str, tuple[float, ...]]:
    """Noise -> strengths, as the flags have it."""
    given = None
    if args.strengths is not None:
        try:
            given = tuple(float(word) for word in args.strengths.split(","))
        except ValueError:
            raise UsageError(
                f"--strengths: expected numbers with commas between, found {args.strengths!r}"
            ) from None
    specs = args.noise or list(DEFAULT)
    return {spec: given or usual(spec) for spec in specs}


def usual(spec: str) -> tuple[float, ...]:
    """Strengths where the user gives none. UsageError for a noise that none are known of."""
    name = spec.partition(",")[0]
    if name in STRENGTHS:
        return STRENGTHS[name]
    if not make_noise(spec, strength=RATES[0]).bounded:
        raise UsageError(f"--strengths: expected some for {name}, whose strength is no rate")
    return RATES


def robustness(args) -> None:
    """The command: load, look at the clean model, sweep, say what was found."""
    from ternax import heldout, noise_study
    from ternax import robustness as measured

    if args.threads is not None:
        measure.limit_threads(args.threads)
    if args.profile_dir:
        raise UsageError("--profile_dir is for experiments.decode: nothing is timed here")
    source = box.find(args.config)
    work = {"batch": BATCH, "context": args.length, "positions": args.length}
    mesh = mesh_flag.mesh_of(args, source.config, **work)
    text = heldout.open_text(args.text)
    windows = measured.spread_windows(heldout.windows(text, args.length), args.sequences)
    study = noise_study.Study(
        config=source.config.name,
        sweeps=sweeps(args),
        draws=args.draws,
        seed=args.seed,
        select=args.select,
        rows=args.rows,
        sensitivity=not args.no_sensitivity,
        text=f"{source.origin}; {text.source}, sha256 {text.sha256[:16]}",
        flags_text=args.command_line,
    )
    model = load(args.config, text, args.seed, mesh)
    noise_study.check(study, model)
    with open_store(args.output_dir, "robustness", study.config, "noise") as store:
        with progress("robustness", None, "") as advance:
            clean = measured.look(model, windows)
            print(row("model", f"{study.config}, {source.origin}"))
            print(row("text", f"{study.text}; {len(windows.tokens)} sequences of {args.length}"))
            print(row("clean", f"{clean.bits_per_byte:.4f} bits/byte"), flush=True)

            def say(line):
                if advance is None:
                    print(row("", line), flush=True)

            records = noise_study.run(study, clean, store, say=say)
        print(
            "\n".join(["", *table(records), "", *tolerances(records), *alone(records), "", *LEGEND])
        )
        picture = draw(records, store.directory / "robustness.png")
    drawn = f" and {picture}" if picture else "; a plot needs matplotlib: pip install matplotlib"
    print(f"wrote {store.directory}/results.json{drawn}")


def load(source: str, text, seed: int, mesh=None):
    """The packed model, on each device of a mesh. UsageError where it lacks tokens of the text."""
    import ternax

    stored = box.find(source)
    if text.vocab_size > stored.config.vocab_size:
        raise UsageError(
            f"--text: bytes have {text.vocab_size} values, found a vocabulary of "
            f"{stored.config.vocab_size} in {stored.config.name}"
        )
    if stored.directory is not None:
        return ternax.load(source, mesh=mesh)
    return ternax.load(source, seed=seed, mesh=mesh)


LEGEND = textwrap.wrap(
    "rise: bits per byte more than clean, mean of draws +- half its 95 % interval over draws; in "
    "brackets its interval over the text. Predicted from each projection's plug-in cosine and "
    "measured sensitivity. cos: of a projection's clean and noisy outputs on real inputs, mean of "
    "projections: measured, predicted from the layer's own weights and inputs (plug-in), predicted "
    "for random symmetric ones (closed form). top-1: likeliest byte as without noise. Sensitivity: "
    "bits per byte for an error as strong as the projection's outputs.",
    WIDTH,
)


def table(records: list[Record]) -> list[str]:
    """A line a noise and strength."""
    lines = [
        f"{'noise':23} {'strength':>8} {'rise':>15} {'over the text':>15} {'predict':>7} "
        f"{'cos':>6} {'plug-in':>7} {'closed':>6} {'top-1':>5}"
    ]
    predicted = {r.note: r.metrics for r in records if r.kind == "predicted"}
    for record in records:
        m, p = record.metrics, predicted.get(record.note, {})
        if record.kind != "measured" or "noise_draws" not in m or "noise_strength" not in m:
            continue
        lines.append(
            f"{title(record):23.23} {m['noise_strength']:>8g} {spread(m):>15} {over_text(m):>15} "
            f"{cell(p, 'bits_per_byte_rise', 7)} {cell(m, 'product_cosine', 6)} "
            f"{cell(p, 'product_cosine', 7)} {cell(p, 'product_cosine_closed_form', 6)} "
            f"{cell(m, 'top1_agreement', 5, 3)}".rstrip()
        )
    return lines


def title(record: Record) -> str:
    """The noise of a record, as the user wrote it."""
    return record.note.partition(" at ")[0].partition(" on ")[0]


def cell(metrics: dict, name: str, width: int, digits: int = 4) -> str:
    return f"{metrics[name]:>{width}.{digits}f}" if name in metrics else " " * width


def spread(metrics: dict) -> str:
    """ "0.0512 +-0.0030"; a rise that is not finite is "not finite"."""
    if "bits_per_byte_rise" not in metrics:
        return "not finite"
    text = f"{metrics['bits_per_byte_rise']:.4f}"
    if "bits_per_byte_rise_low" in metrics:
        reach = metrics["bits_per_byte_rise_high"] - metrics["bits_per_byte_rise_low"]
        text += f" +-{reach / 2:.4f}"
    return text


def over_text(metrics: dict) -> str:
    if "bits_per_byte_rise_text_low" not in metrics:
        return ""
    low, high = (metrics[f"bits_per_byte_rise_text_{end}"] for end in ("low", "high"))
    return f"[{low:.3f}, {high:.3f}]"


def tolerances(records: list[Record]) -> list[str]:
    """The headline: which strength costs 0.05 and 0.2 bits per byte."""
    lines = [f"{'strength tolerated':32} {'for 0.05 bits/byte':>31} {'for 0.2':>31}"]
    for record in records:
        if "noise_draws" in record.metrics and "noise_strength" not in record.metrics:
            cells = [tolerated(record.metrics, name) for name in ("005", "020")]
            lines.append(f"{title(record):32} {cells[0]:>31} {cells[1]:>31}")
    return lines


def alone(records: list[Record]) -> list[str]:
    """Projections by what the same noise on each alone costs, the dearest first."""
    found = [record for record in records if "sensitivity" in record.metrics]
    if not found:
        return []
    found.sort(key=lambda record: -record.metrics["bits_per_byte_rise"])
    strength = found[0].metrics["noise_strength"]
    lines = ["", f"{f'gaussian at {strength:g} on one alone':32} {'rise':>16} {'sensitivity':>12}"]
    for record in found:
        name = record.note.split(" on ", 1)[1].split(" ", 1)[0]
        m = record.metrics
        lines.append(f"{name:32} {spread(m):>16} {m['sensitivity']:>12.4f}")
    return lines


def tolerated(metrics: dict, name: str) -> str:
    name = f"tolerated_{name}"
    if name not in metrics:
        return "beyond those tried"
    text = f"{metrics[name]:.3g}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.3g}, {metrics[f'{name}_high']:.3g}]"
    return text


def draw(records: list[Record], target: pathlib.Path) -> pathlib.Path | None:
    """Rise over strength, and measured over predicted rise; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    predicted = {r.note: r.metrics for r in records if r.kind == "predicted"}
    measured = [r for r in records if {"bits_per_byte_rise", "noise_draws"} <= r.metrics.keys()]
    measured = [r for r in measured if r.metrics["bits_per_byte_rise"] > 0]
    marks = "os^vDPX*"
    for number, name in enumerate(dict.fromkeys(map(title, measured))):
        look = {"marker": marks[number // 10 % len(marks)], "markersize": 4}
        mine = [r for r in measured if title(r) == name]
        x = [r.metrics["noise_strength"] for r in mine]
        y = [r.metrics["bits_per_byte_rise"] for r in mine]
        line = left.plot(x, y, label=name, **look)[0]
        pairs = [
            (predicted[r.note]["bits_per_byte_rise"], r.metrics["bits_per_byte_rise"])
            for r in mine
            if "bits_per_byte_rise" in predicted.get(r.note, {})
        ]
        if pairs:
            right.plot(*zip(*pairs, strict=True), linestyle="", color=line.get_color(), **look)
    for loss in (0.05, 0.2):
        left.axhline(loss, color="#9aa5b1", linewidth=1, linestyle="--", zorder=0)
    right.axline((0.01, 0.01), (1, 1), color="#9aa5b1", linewidth=1, zorder=0)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
    left.set_xlabel("strength: rate, or deviation in units of the scale")
    left.set_ylabel("bits per byte more than clean, measured")
    figure.legend(loc="outside right center", fontsize=7)
    right.set_xlabel("predicted from layers' errors and sensitivities")
    right.set_ylabel("measured")
    figure.suptitle(records[0].config, fontsize=10)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


COMMAND = flags.Command(
    name="robustness",
    summary="Noise on a model: what it does to each layer and to the loss, measured and predicted.",
    groups=(robustness_flags, mesh_flag.mesh_flags, flags.run_flags),
    examples=(
        ("--noise=bitflip --noise=stuck,at=1", "two noises on the model in the box"),
        ("--config=DIR --strengths=0.001,0.01 --draws=10", "rates of your own, a saved model"),
        (r"--noise=gaussian '--select=layers\.0\..*'", "the first layer alone"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(robustness, argv)


if __name__ == "__main__":
    sys.exit(main())
