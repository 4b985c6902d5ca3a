"""What does quantizing a float model cost, weight by weight?

    python -m experiments.convert --config=tiny-llama --scheme=gptq --calibrate=stdlib

Quantizes every projection in turn, layer by layer, and tells for each one how far it is from
what it was: the weight itself, and with --calibrate also its outputs. `ternax.convert` does it.
"""

import dataclasses
import sys
import textwrap
from typing import Any

from ternax import cost, measure
from ternax.checkpoint.manifest import Manifest
from ternax.errors import DoesNotFit, UsageError
from ternax.experiments import flags
from ternax.record import Record, Store, open_store
from ternax.table import binary, row

WIDTH = 100
# Of the float weights' bytes, what a conversion holds at its peak: beside them the packed ones,
# or the new floats, and one layer's copies and statistics.
_PEAK = {"packed": 1.4, "floats": 2.3}
_OF_QUANTIZING = ("calibrate", "floats", "inputs", "seed")
_OF_TABLES = ("embed_dtype", "head_dtype")
# Of a file's float table, the dtype that holds every value of it.
_FLOAT_TABLES = {"BF16": "bf16", "F16": "f32", "F32": "f32"}


def convert_flags(define):
    from ternax.calibrate import FEEDS
    from ternax.nn.table import TABLE_FORMATS

    define.section("Convert")
    define.string(
        "calibrate",
        None,
        "text whose inputs the scheme sees: stdlib, a file or a directory",
        form="SOURCE",
        default_text="none",
    )
    define.string("tokenizer", None, "tokenizer.json of that text", default_text="a token a byte")
    define.integer("calibrate_tokens", 16384, "tokens of it", lower=1)
    define.integer("calibrate_length", 128, "tokens of each sequence", lower=1)
    define.choice(
        "feed", "quantized", FEEDS, "which output of a layer the calibration of the next one sees"
    )
    define.boolean("floats", "keep dequantized floats, for schemes that no kernel takes")
    define.choice("embed_dtype", "int8", TABLE_FORMATS, "how the embedding table is packed")
    define.choice(
        "head_dtype",
        None,
        TABLE_FORMATS,
        "how the head is packed",
        default_text="int8; tied: as embed_dtype",
    )
    define.string("output", None, "save the converted model there", form="PATH", default_text="no")
    define.string("format", "orbax", "of --output: orbax, hf, gguf:TQ2_0, gguf:TQ1_0, ...")


def run(
    model,
    scheme: str | None,
    store: Store,
    *,
    calibration=None,
    seed: int = 0,
    note: str = "",
    flags_text: str = "",
    watch=lambda error: None,
    **options,
) -> list[Record]:
    """Converts `model` in place: a Record for each weight, then one for all of them.

    Args:
      model: a float Decoder.
      scheme: what it is converted to; None keeps the model's own.
      store: takes each Record as soon as it is known.
      calibration: a `calibrate.Calibration`, or None.
      seed: of schemes that own Params.
      note: what a reader must know of weights and calibration.
      flags_text: the command line.
      watch: called with each `TensorError`.
      options: packed, inputs, embed_dtype, head_dtype, backend, as for `ternax.convert`.
    """
    from ternax.convert import convert

    def quantize(seen):
        return convert(model, scheme, calibration=calibration, seed=seed, watch=seen, **options)[0]

    config = dataclasses.replace(
        model.config,
        scheme=scheme or model.config.scheme,
        inputs=options.get("inputs") or model.config.inputs,
    )
    common = dict(calibration=calibration, seed=seed, note=note, flags_text=flags_text)
    return recorded(quantize, config, store, watch=watch, **common)[1]


def recorded(
    quantize, config, store: Store, *, calibration=None, seed=0, note="", flags_text="", watch
) -> tuple[Any, list[Record]]:
    """(the model, a Record for each weight and one for all) of `quantize(seen)`, which makes the
    model of `config` and calls `seen` with each `TensorError`; the rest as for `run`."""
    import jax

    records: list[Record] = []
    errors: list[Any] = []
    common = Record(
        experiment="convert",
        config=config.name,
        scheme=config.scheme,
        inputs=config.inputs,
        backend="",
        device=measure.device_name(jax.devices()[0]),
        layers=config.num_layers,
        batch=0 if calibration is None else len(calibration.tokens),
        context=0 if calibration is None else calibration.tokens.shape[1],
        phase="convert",
        kind="measured",
        sample_unit="s",
        seed=seed,
        flags=flags_text,
    )

    def keep(text, metrics, samples):
        full = f"{text}; {note}" if note else text
        record = dataclasses.replace(common, note=full, metrics=metrics, samples=samples)
        store.append(record)
        records.append(record)

    def seen(error):
        metrics = {
            "relative_error": error.relative_error,
            "nonzero_share": error.nonzero_share,
            "bits_per_weight": error.bits_per_weight,
        }
        if error.output_snr_db is not None:
            metrics["output_snr_db"] = error.output_snr_db
        size = " x ".join(map(str, error.shape))
        keep(f"{error.name} [{size}]", metrics, (error.seconds,))
        errors.append(error)
        watch(error)

    model = quantize(seen)
    sizes = [error.shape[0] * error.shape[1] for error in errors]

    def mean(name):
        values = [getattr(error, name) for error in errors]
        return sum(n * v for n, v in zip(sizes, values, strict=True)) / sum(sizes)

    metrics = {name: mean(name) for name in ("relative_error", "nonzero_share", "bits_per_weight")}
    metrics["ternary_parameters"] = sum(sizes)
    total = f"mean of {len(errors)} weights by size"
    keep(total, metrics, (sum(error.seconds for error in errors),))
    return model, records


def start(args):
    """(the float model that the flags name, the scheme to convert it to, what it holds).

    A saved model without --scheme keeps its own (None); random floats take the config's.
    """
    from ternax.config import first_layers
    from ternax.engine import load, load_stored

    source, stored = args.source, args.source.directory is not None and not args.source.boxed
    config = first_layers(args.config, args.layers)
    need = int(4 * cost.count_parameters(config)[0] * _PEAK["floats" if args.floats else "packed"])
    free = cost.available_bytes()
    if free is not None and need > free:
        raise DoesNotFit(
            f"{config.name} needs about {binary(need)} to be converted from floats, available "
            f"{binary(free)}; take fewer --layers or a smaller --config"
        )
    if stored:
        if source.stored.packed:
            raise UsageError(
                f"{source.name} is packed already, in {source.config.scheme}: leave "
                "--scheme out to save it in another format"
            )
        model = load_stored(source, packed=False, layers=args.layers)
        return model, args.scheme if "scheme" in args.given else None, "saved floats"
    config = dataclasses.replace(config, scheme="none,dtype=f32", inputs="none")
    return load(config, packed=False, seed=args.seed), args.scheme, "random floats"


def calibration_of(args, config):
    """(Calibration or None, what a record says of it)."""
    if args.calibrate is None:
        given = args.given & {"calibrate_tokens", "calibrate_length", "tokenizer", "feed"}
        if given:
            raise UsageError(f"--{min(given)} belongs to --calibrate=stdlib, a file or a directory")
        return None, "not calibrated"
    from ternax import data
    from ternax.calibrate import Calibration

    corpus = data.open_corpus(args.calibrate, tokenizer=args.tokenizer)
    length = min(args.calibrate_length, args.calibrate_tokens, config.max_context)
    count = max(1, args.calibrate_tokens // length)
    tokens = data.batch(corpus.train, 0, batch=count, length=length, seed=args.seed)[:, :-1]
    told = f"calibrated on {tokens.size:,} tokens, fed {args.feed}, of {corpus.describe()}"
    return Calibration(tokens, feed=args.feed), told


def line(error) -> str:
    """A weight's numbers, under `HEADING`."""
    size = f"{error.shape[0]} x {error.shape[1]}"
    snr = "" if error.output_snr_db is None else f"{error.output_snr_db:.2f}"
    return (
        f"  {error.name:24}{size:>15}{error.relative_error:>12.4f}{snr:>12}"
        f"{100 * error.nonzero_share:>12.1f}{error.bits_per_weight:>10.3f}{error.seconds:>10.2f}"
    ).rstrip()


HEADING = (
    f"  {'weight':24}{'K x N':>15}{'|W-V|/|W|':>12}{'output dB':>12}{'nonzero %':>12}"
    f"{'bits':>10}{'s':>10}"
)


def streams(args) -> bool:
    """Whether another program's floats are quantized as they are read, never whole in memory."""
    stored = args.source.stored
    foreign = stored is not None and not isinstance(stored, Manifest)
    return foreign and not stored.packed and args.calibrate is None and not args.floats


def only_saves(args) -> bool:
    """Whether the model is packed, and so what remains is to save it in another format."""
    stored = args.source.stored
    asked = not args.source.boxed or "format" in args.given
    return stored is not None and stored.packed and asked and "scheme" not in args.given


def save_as(args) -> None:
    """A packed model in another format: codes and scales as they are."""
    from ternax.engine import load_stored
    from ternax.interop.saving import save
    from ternax.interop.weights import Weights

    if not args.output:
        raise UsageError(f"{args.source.name} is packed: --output says where it is to be saved")
    unused = [name for name in _OF_QUANTIZING if name in args.given]
    if unused:
        raise UsageError(
            f"--{unused[0]} is for what is quantized here, and {args.source.name} is packed already"
        )
    asked = {name: getattr(args, name) for name in _OF_TABLES if name in args.given}
    model = load_stored(args.source, layers=args.layers, **kept_tables(args.source) | asked)
    save(model, args.output, args.format, **stored_with(args))
    print(
        f"saved {args.output}, {args.format}: {args.source.name}, codes and scales as they are, "
        f"tables in {Weights(model).format('embedding')}"
    )


def kept_tables(source) -> dict[str, str]:
    """Options of a load under which float tables of another program's file stay what they are;
    tables in blocks become int8, as they do without."""
    if isinstance(source.stored, Manifest):
        return {}
    names = {"embed_dtype": "embedding"}
    if not source.config.tie_embeddings:
        names["head_dtype"] = "head"
    kinds = {option: source.stored.kind(name) for option, name in names.items()}
    return {option: _FLOAT_TABLES[kind] for option, kind in kinds.items() if kind in _FLOAT_TABLES}


def stored_tokenizer(args):
    """What is stored with the model; None, a token a byte or none at all, where nothing is."""
    from ternax.interop.tokenizer import FileTokenizer

    found = args.source.tokenizer() if args.source.directory else None
    return found if isinstance(found, FileTokenizer) else None


def stored_with(args) -> dict:
    """What a conversion passes on as it is."""
    return {"tokenizer": stored_tokenizer(args), "trained_tokens": args.source.trained_tokens}


def convert_model(args) -> None:
    """The command: calibrate, convert, say what was lost, save."""
    if args.threads is not None:
        measure.limit_threads(args.threads)
    from ternax.convert import check_scheme
    from ternax.interop.saving import check, save

    if args.source.stored and any(name.startswith("config.") for name in args.given):
        raise UsageError("--config.FIELD makes another model; a saved one is converted as it is")
    if args.output:  # before what takes hours
        tokenizer, packed = stored_tokenizer(args), not args.floats
        check(args.config, args.output, args.format, tokenizer=tokenizer, packed=packed)
        if args.floats and args.format.startswith("gguf"):
            raise UsageError("--format=gguf wants packed weights, found --floats")
    elif "format" in args.given:
        raise UsageError("--format is of what is saved: --output says where")
    if only_saves(args):
        return save_as(args)
    tied = args.config.tie_embeddings
    head = args.head_dtype or (args.embed_dtype if tied else "int8")
    tables = dict(embed_dtype=args.embed_dtype, head_dtype=head)
    calibration, told = calibration_of(args, args.config)
    common = dict(flags_text=args.command_line, watch=lambda error: print(line(error), flush=True))
    if streams(args):
        origin = "floats of a file, as they are read"
    else:
        model, scheme, origin = start(args)
        check_scheme(model, scheme, packed=not args.floats)
    with open_store(args.output_dir, "convert", args.config.name, args.scheme) as store:
        title = f"convert {args.config.name}, {origin}, to {args.scheme}; {told}"
        print(row("ternax", title), HEADING, sep="\n", flush=True)
        note = f"{origin}; {told}"
        if streams(args):
            from ternax.config import first_layers
            from ternax.interop.loading import load

            way = dict(scheme=args.scheme, inputs=args.inputs, layers=args.layers, **tables)
            model, records = recorded(
                lambda seen: load(args.source.stored, watch=seen, **way),
                first_layers(args.config, args.layers),
                store,
                note=note,
                **common,
            )
        else:
            records = run(
                model,
                scheme,
                store,
                calibration=calibration,
                seed=args.seed,
                note=note,
                packed=not args.floats,
                inputs=args.inputs,
                **tables,
                **common,
            )
        if args.output:
            save(model, args.output, args.format, **stored_with(args))
    total = records[-1]
    m = total.metrics
    print(
        textwrap.fill(
            f"{m['ternary_parameters']:,} weights of {args.config.name} in {args.scheme} at "
            f"{m['bits_per_weight']:.3f} bits are {m['relative_error']:.3f} of their norm away "
            f"from the floats, and {100 * m['nonzero_share']:.1f} % of the codes are not zero.",
            WIDTH,
        )
    )
    print(
        *[f"saved {args.output}"] * bool(args.output),
        f"wrote {store.directory}/results.json",
        sep="\n",
    )


COMMAND = flags.Command(
    name="convert",
    summary="Quantizes a float model after training and tells what each weight lost.",
    groups=(flags.model_flags, convert_flags, flags.run_flags),
    examples=(
        ("--config=tiny-llama --scheme=gptq --calibrate=stdlib", "GPTQ on Python's own sources"),
        ("--config=1b --layers=2 --scheme=ptqtp", "two trit-planes, two layers, no calibration"),
        ("--config=tiny-bitnet --scheme=nf4 --floats", "a format to compare with, as floats"),
        (
            "--config=path/to/llama --scheme=ls --output=mine.gguf --format=gguf:TQ2_0",
            "a Hugging Face model, quantized as it is read, for llama.cpp",
        ),
    ),
    default_config="tiny-llama",
)


def main(argv=None) -> int:
    return COMMAND.run(convert_model, argv)


if __name__ == "__main__":
    sys.exit(main())
