"""How well does it predict text, and how far is it from another model?

    python -m experiments.evaluate --config=DIR --reference=OTHER_DIR

Bits per byte and perplexity of a text that no model here is trained on, or of a file, with
intervals; beside a reference also the divergence. `ternax.evaluate` measures; here are the
flags, the records and the table.
"""

import math
import pathlib
import sys

from ternax import configs, cost, measure
from ternax.checkpoint import box
from ternax.checkpoint.split_stacks import split_model
from ternax.config import with_scheme
from ternax.errors import DoesNotFit, UsageError
from ternax.estimate import named
from ternax.experiments import flags, mesh_flag
from ternax.experiments.progress import progress
from ternax.interop.gguf import I2_S
from ternax.interop.tokenizer import FileTokenizer
from ternax.record import Record, open_store
from ternax.sharding import layout_for
from ternax.table import binary, row


def evaluate_flags(define):
    define.section("Model")
    define.string(
        "config",
        "stdlib-bitnet",
        "a model on disk, of ours, Hugging Face or GGUF; one in the box; a name: random weights",
        form="PATH",
    )
    define.string(
        "scheme",
        None,
        "how the projections of a float model are quantized, options behind commas",
        form="NAME",
        default_text="the model's",
    )
    define.choice("i2_s", None, I2_S, "how a GGUF file's I2_S is laid out")
    define.boolean("fake_quant", "floats on the scheme's grid instead of packed kernels")
    define.string(
        "reference", None, "another model, run in the same way, to compare with", form="PATH"
    )
    define.string(
        "reference_scheme", None, "its --scheme", form="NAME", default_text="the reference's"
    )
    define.section("Text")
    define.string("text", "heldout", "a UTF-8 file; heldout comes with ternax", form="FILE")
    define.string(
        "tokenizer",
        None,
        "a tokenizer.json",
        form="FILE",
        default_text="the model's directory's; else one token a byte",
    )
    define.integer("length", 256, "tokens of a sequence", lower=1)
    define.integer("batch", 8, "sequences that run together", lower=1)


def load(
    source: str,
    scheme: str | None,
    *,
    fake_quant: bool,
    seed: int,
    i2_s: str | None = None,
    mesh=None,
):
    """The model of a path or name, on a mesh if there is one.

    A name's floats depend on the seed alone, not on the scheme.

    `ternax.load` would make a name's codes without floats: another model for each scheme,
    which nothing could be compared with.
    """
    import ternax

    stored = box.find(source, i2_s=i2_s)
    if stored.boxed and fake_quant:
        raise UsageError(
            f"{source} comes packed, without the float weights that --fake_quant needs: leave "
            "that out, or give the folder of a float model"
        )
    if stored.directory is not None:
        return ternax.load(source, scheme=scheme, packed=not fake_quant, i2_s=i2_s, mesh=mesh)
    need = 4 * cost.count_parameters(configs.get_config(source))[0]
    free = measure.memory_available_bytes()
    if free is not None and need > free:
        raise DoesNotFit(
            f"--config={source}: its floats need {binary(need)}, available {binary(free)}; "
            "evaluate a saved packed model or a smaller one"
        )
    model = ternax.load(source, scheme=scheme, packed=False, seed=seed)
    if fake_quant:
        return model
    layout = layout_for(mesh, model.config)
    model = ternax.pack_model(model)
    return model if layout is None else split_model(model, layout)


def tokenizer_file(args) -> str | None:
    """The tokenizer.json of the model's directory; None for one token a byte.

    UsageError for a GGUF file whose vocabulary is another: texts are read by tokenizer.json.
    """
    source = args.config
    found = box.find(source, i2_s=args.i2_s)
    file = (found.directory or pathlib.Path(source)) / "tokenizer.json"
    if file.is_file():
        return str(file)
    if found.stored is not None and isinstance(found.tokenizer(), FileTokenizer):
        raise UsageError(
            f"{source} has a vocabulary of its own: give its tokenizer.json as --tokenizer, or "
            "convert it with --format=hf, which writes one"
        )
    return None


def _is_random(source: str | None) -> bool:
    """Whether it is a name without weights that come with it."""
    named = source in configs.CONFIGS or source in configs.ALIASES
    return source is not None and named and box.find(source).directory is None


def run(
    model,
    text,
    *,
    length: int,
    reference=None,
    batch: int = 8,
    seed: int = 0,
    note: str = "",
    flags_text: str = "",
) -> list[Record]:
    """Evaluates a model, beside a reference where there is one.

    Args:
      model, reference: Decoders, float or packed.
      text: a `heldout.Text`.
      length: tokens of a sequence.
      batch: sequences that run together.
      seed, note, flags_text: for the records.

    Returns:
      The model's Record, with the comparison's metrics in it, and the reference's.

    Raises:
      UsageError: a text too short, a vocabulary too small or unlike the reference's.
    """
    from ternax import evaluate, heldout

    if text.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"--tokenizer: expected at most {model.config.vocab_size} tokens, the vocabulary of "
            f"{model.config.name}; found {text.vocab_size} ({text.tokenizer})"
        )
    cut = heldout.windows(text, length)
    known = {"num_bytes": cut.num_bytes, "files": cut.files}
    counts = {
        "sequences": len(cut.tokens),
        "scored_tokens": len(cut.tokens) * length,
        "scored_bytes": int(cut.num_bytes.sum()),
    }

    def record(model, found, others) -> Record:
        metrics = {
            **named("bits_per_byte", found.bits_per_byte),
            "loss_nats": found.loss_nats.value,
            **named("perplexity", found.perplexity),
            **others,
            **counts,
            "text_groups": found.bits_per_byte.count,
        }
        return Record(
            experiment="evaluate",
            config=model.config.name,
            scheme=model.config.scheme,
            inputs=model.config.inputs,
            backend=backend(model),
            device=_devices(model),
            layers=model.config.num_layers,
            batch=batch,
            context=length,
            phase="evaluate",
            kind="measured",
            samples=tuple(found.per_sequence.tolist()),
            sample_unit="bits/byte",
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            seed=seed,
            flags=flags_text,
            note="; ".join(filter(None, [how(model), described(text), note, _mesh(model)])),
        )

    with progress("evaluate", len(cut.tokens), "sequences") as advance:
        if reference is None:
            found = evaluate.evaluate(model, cut.tokens, batch=batch, advance=advance, **known)
            return [record(model, found, {})]
        both = evaluate.compare(model, reference, cut.tokens, batch=batch, advance=advance, **known)
    compared = {
        **named("bits_per_byte_difference", both.difference),
        **named("kl_bits", both.kl_bits),
        **named("top1_agreement", both.top1_agreement),
        "logit_cosine": both.logit_cosine,
    }
    return [record(model, both.model, compared), record(reference, both.reference, {})]


def _device():
    from ternax.workload import first_device

    return first_device()


def _mesh(model) -> str:
    return "" if model.layout is None else f"mesh {model.layout}"


def _devices(model) -> str:
    """Those that the model lies on."""
    name = measure.device_name(_device())
    return name if model.layout is None else f"{model.layout.mesh.size} x {name}"


def backend(model) -> str:
    """Which kernels run: a backend's name, or "float" for a model that is not packed."""
    from ternax.edit import is_packed
    from ternax.workload import backend_name

    return backend_name(None, _device()) if is_packed(model) else "float"


def how(model) -> str:
    """How the weights enter the products."""
    from ternax.edit import is_packed

    if not is_packed(model):
        return "fake-quantized floats, f32 tables"
    head = model.embedding if model.config.tie_embeddings else model.head
    tables = dict.fromkeys([model.embedding.format, head.format])
    return f"packed kernels, {' and '.join(tables)} tables"


def described(text) -> str:
    """The text in words, with its hash."""
    return (
        f"{text.source}: files {int(text.files[-1]) + 1}, tokens {len(text.tokens)}, "
        f"tokenizer {text.tokenizer}, text sha256 {text.sha256[:16]}"
    )


def evaluate(args) -> None:
    """The command: read the text, load, evaluate, say what was found."""
    from ternax import heldout

    if args.threads is not None:
        measure.limit_threads(args.threads)
    if args.profile_dir:
        raise UsageError("--profile_dir is for experiments.decode: nothing is timed here")
    if args.reference is None and args.reference_scheme is not None:
        raise UsageError("--reference_scheme is for a --reference, found none")
    text = heldout.open_text(args.text, tokenizer=args.tokenizer or tokenizer_file(args))
    heldout.windows(text, args.length)  # a text too short is told before anything is loaded
    if args.mesh is not None and args.fake_quant:
        raise UsageError("--mesh is for packed models, found --fake_quant")
    config = with_scheme(box.find(args.config, i2_s=args.i2_s).config, args.scheme)
    work = {"batch": args.batch, "context": args.length, "positions": args.length}
    mesh = mesh_flag.mesh_of(args, config, **work)
    way = {"fake_quant": args.fake_quant, "seed": args.seed, "i2_s": args.i2_s, "mesh": mesh}
    model = load(args.config, args.scheme, **way)
    reference = args.reference and load(args.reference, args.reference_scheme, **way)
    named = dict.fromkeys(name for name in (args.config, args.reference) if _is_random(name))
    records = run(
        model,
        text,
        length=args.length,
        reference=reference,
        batch=args.batch,
        seed=args.seed,
        note=f"random weights: {', '.join(named)}" if named else "",
        flags_text=args.command_line,
    )
    with open_store(args.output_dir, "evaluate", model.config.name, backend(model)) as store:
        for record in records:
            store.append(record)
    print("\n".join(screen(records, text)))
    print(f"wrote    {store.directory}/results.json")


# Metric, what the table calls it, its digits.
ALONE = (
    ("bits_per_byte", "bits per byte", ".4f"),
    ("perplexity", "perplexity of a token", ".4g"),
)
BESIDE = (
    ("bits_per_byte_difference", "bits per byte, less the reference's", "+.6f"),
    ("kl_bits", "KL from the reference, bits a token", ".6f"),
    ("top1_agreement", "same likeliest token", ".4f"),
    ("logit_cosine", "cosine of logits", ".6f"),
)


def screen(records: list[Record], text) -> list[str]:
    """The lines of a run: which model and text, then a value and its interval a line."""
    model, *reference = records
    m = model.metrics
    lines = [
        row("evaluate", _title(model)),
        *(row("beside", _title(record)) for record in reference),
        row("text", described(text)),
        row(
            "",
            f"{m['sequences']:,} sequences of {model.context} tokens, {m['scored_bytes']:,} "
            f"bytes; drawn again in {m['text_groups']} groups for the intervals",
        ),
        "",
        f"{'':38}{'value':>12}    95 % interval over the text",
        *_rows(model, ALONE),
    ]
    for record in reference:
        lines += ["the reference", *_rows(record, ALONE), "both", *_rows(model, BESIDE)]
    return [*lines, ""]


def _title(record: Record) -> str:
    way = record.note.partition(";")[0]
    return f"{record.config} in {record.scheme}, inputs {record.inputs}, {way}, {record.backend}"


def _rows(record: Record, names) -> list[str]:
    lines = []
    for name, words, digits in names:
        if name not in record.metrics:
            continue
        value = format(record.metrics[name], digits)
        line = f"  {words:36}{value:>12}"
        if f"{name}_low" in record.metrics:
            low, high = record.metrics[f"{name}_low"], record.metrics[f"{name}_high"]
            line += f"    {low:{digits}} to {high:{digits}}"
        lines.append(line)
    return lines


COMMAND = flags.Command(
    name="evaluate",
    summary="Bits per byte of a text, with intervals, and how far a model is from another.",
    groups=(evaluate_flags, mesh_flag.mesh_flags, flags.run_flags),
    examples=(
        ("--config=DIR", "a saved model on the text that comes with ternax"),
        ("--config=DIR --scheme=int4 --reference=DIR --reference_scheme=none", "what int4 costs"),
        ("--config=DIR --text=FILE --length=512", "another text, longer sequences"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
