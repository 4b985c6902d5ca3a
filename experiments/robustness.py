"""How much noise does it survive, and was that to be foreseen?

    python -m experiments.robustness --noise=bitflip --noise=gaussian

Sweeps noises over strengths on one model: what happens to each projection's outputs, beside two
predictions, and what happens to the model's predictions of text. `ternax.noise_study` measures;
here are the flags, the table and the plot.
"""

import functools
import sys

from ternax import drawing, measure, noise_table
from ternax.checkpoint import box
from ternax.errors import UsageError
from ternax.evaluate import BATCH
from ternax.experiments import flags, mesh_flag, untrained_table
from ternax.experiments.progress import progress
from ternax.noise import make_noise
from ternax.record import open_store
from ternax.table import row

PRESETS = ("study", "table")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
# Strengths that take a trained model from next to nothing to ruin, by what the noise strikes.
STRENGTHS = {
    "scale_bits": (0.0001, 0.0003, 0.001, 0.003, 0.01),
    "norm_bits": (0.0001, 0.0003, 0.001, 0.003, 0.01),
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
    define.choice(
        "preset", "study", PRESETS, "table: noise on random matrices of 1b, 8b and 70b shape"
    )
    define.string(
        "config", "stdlib-bitnet", "a saved packed model, one in the box, or a name", form="PATH"
    )
    define.choice("weights", "auto", box.WEIGHTS, "auto: stored ones where there are any")
    define.integer("layers", None, "of --preset=table: the first N layers of a stack", lower=1)
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
    define.boolean("no_sensitivity", "leave out each projection struck alone")
    define.boolean("no_forecast", "leave out the predicted rise in loss, and budgets")
    define.boolean("by_depth", "what each layer reads too, beside the clean model")
    define.boolean("controls", "each point again: at other places, Gaussian, in another order")
    define.number(
        "protect", 0.0, "each point again with that share of weights kept clean", lower=0, upper=1
    )
    define.section("Studies together")
    define.strings("combine", "a finished study's folder, one a training seed", form="DIR")
    define.strings("against", "the other arm's, in the same order of seeds", form="DIR")
    define.string(
        "along",
        None,
        "lines through the studies along parameters, trained_tokens or tokens_per_parameter",
        form="A,B",
    )
    define.section("Text")
    define.string("text", "heldout", "a UTF-8 file; heldout comes with ternax", form="FILE")
    define.integer("sequences", 64, "taken evenly from the text", lower=1)
    define.integer("length", 256, "tokens of a sequence", lower=1)


def strengths(text: str | None) -> tuple[float, ...] | None:
    """The numbers of --strengths."""
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(
            f"--strengths: expected numbers with commas between, found {text!r}"
        ) from None


def sweeps(args) -> dict[str, tuple[float, ...]]:
    """Noise -> strengths, as the flags have it."""
    given = strengths(args.strengths)
    return {spec: given or usual(spec) for spec in args.noise or DEFAULT}


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
    if args.preset == "table":
        return table(args)
    if args.combine or args.against or args.along:
        return together(args)
    if args.layers is not None:
        raise UsageError("--layers is for --preset=table: a trained model is studied whole")
    source = box.find(args.config, args.weights)
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
        forecast=not args.no_forecast,
        controls=args.controls,
        depth=args.by_depth,
        protect=args.protect,
        trained_tokens=source.trained_tokens,
        text=f"{source.origin}; {text.source}, sha256 {text.sha256[:16]}",
        flags_text=args.command_line,
    )
    model = load(args.config, source, text, args.seed, mesh)
    noise_study.check(study, model)
    with open_store(args.output_dir, "robustness", study.config, "noise") as store:
        with progress("robustness", None, "") as advance:
            clean = measured.look(model, windows)
            origin, _, said = study.text.partition("; ")
            head = (
                row("model", f"{study.config}, {origin}"),
                row("text", f"{said}; {len(windows.tokens)} sequences of {args.length}"),
                row("clean", f"{clean.bits_per_byte:.4f} bits/byte"),
            )
            print("\n".join(head), flush=True)
            store.shown = functools.partial(shown, head)

            def say(line):
                if advance is None:
                    print(row("", line), flush=True)

            records = noise_study.run(study, clean, store, say=say)
        print("\n".join(["", *noise_table.lines(records)]))
        picture = noise_table.draw(records, store.directory / "robustness.png")
    print(f"wrote {store.directory}/results.json{drawing.said(picture)}")


def shown(head, records) -> list[str] | None:
    """What report.md shows of a study: of equal titles the last, since a study may go on with more
    draws. None where nothing is summed up yet."""
    last = {(r.note, r.kind): r for r in records if r.phase == "noise"}
    return [*head, "", *noise_table.lines(list(last.values()))] if last else None


def table(args) -> None:
    """--preset=table: untrained layers and stacks, see `untrained_table`."""
    asked = untrained_table.table_of(args, strengths(args.strengths))
    with open_store(args.output_dir, "robustness", "untrained", "noise") as store:
        untrained_table.show(asked, store)
    print(f"wrote {store.directory}/results.json")


def together(args) -> None:
    """--combine: several studies, see `noise_meta`; with --along, see `noise_axes`."""
    from ternax import noise_meta

    if not args.combine:
        raise UsageError("--combine is missing: --against and --along say how to take its studies")
    if args.along:
        return lines_along(args)
    records = noise_meta.combine(args.combine, args.against, args.command_line)
    with open_store(args.output_dir, "robustness", records[0].config, "together") as store:
        store.shown = lambda _: noise_meta.lines(records)  # and not what lies there already
        for record in records:
            store.append(record)
        print("\n".join(noise_meta.lines(records)))
    print(f"wrote {store.directory}/results.json")


def lines_along(args) -> None:
    """--along: several studies as points of lines."""
    from ternax import noise_axes, noise_lines, noise_lines_table
    from ternax.checkpoint import whole

    found = noise_lines.find(noise_axes.parse(args.along), args.combine, args.against)
    records = noise_lines.records(found, args.command_line)
    with open_store(args.output_dir, "robustness", records[0].config, "along") as store:
        for record in records:
            store.append(record)
        print("\n".join(noise_lines_table.lines(found)))
        picture = noise_lines_table.draw(found, store.directory / "along.png")
        with whole.whole_file(str(store.directory / "along.md"), "--output_dir") as file:
            file.write(noise_lines_table.page(found, args.command_line, picture).encode())
    print(f"wrote {store.directory}/along.md, results.json{drawing.said(picture)}")


def load(name: str, source: box.Source, text, seed: int, mesh=None):
    """The packed model, on each device of a mesh. UsageError where it lacks tokens of the text."""
    import ternax

    config = source.config
    if text.vocab_size > config.vocab_size:
        raise UsageError(
            f"--text: bytes have {text.vocab_size} values, found a vocabulary of "
            f"{config.vocab_size} in {config.name}"
        )
    if source.directory is not None:
        return ternax.load(name, mesh=mesh)
    return ternax.load(name, weights="random", seed=seed, mesh=mesh)


COMMAND = flags.Command(
    name="robustness",
    summary="Noise on a model: what it does to each layer and to the loss, measured and predicted.",
    groups=(robustness_flags, mesh_flag.mesh_flags, flags.run_flags),
    examples=(
        ("--noise=bitflip --noise=stuck,at=1", "two noises on the model in the box"),
        ("--config=DIR --strengths=0.001,0.01 --draws=10", "rates of your own, a saved model"),
        (r"--noise=gaussian '--select=layers\.0\..*'", "the first layer alone"),
        ("--controls --protect=0.05 --noise=bitflip", "what else costs as much, what helps"),
        ("--preset=table", "what published tables show: random matrices, closed form beside"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(robustness, argv)


if __name__ == "__main__":
    sys.exit(main())
