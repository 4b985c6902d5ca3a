"""Train a ternary model, and say what it has learned.

    python -m experiments.train --config=stdlib-bitnet

Trains under any scheme, by default on the standard library's own sources; resumes in the
same --output_dir, to the bit. `ternax.training` trains; here are the flags and the words.
"""

import pathlib
import sys
import time

from ternax import data
from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.experiments import flags, mesh_flag
from ternax.experiments.progress import progress
from ternax.record import Record, open_store
from ternax.table import binary, rate, row

# A line at each of these shares of the run, whatever the terminal.
LINES = 20


def train_flags(define):
    from ternax.nn.linear import COMPUTE
    from ternax.optimizer import OPTIMIZERS, SCHEDULES
    from ternax.quant.training import GRADIENTS

    define.section("Text")
    define.string("corpus", data.STDLIB, "a text file, a folder, or stdlib", form="PATH")
    define.string(
        "tokenizer", None, "a tokenizer.json", form="FILE", default_text="one token a byte"
    )
    define.section("Training")
    define.integer("steps", 6000, "updates of the parameters", lower=1)
    define.integer("batch", 16, "sequences of an update", lower=1)
    define.integer("length", 256, "tokens of a sequence", lower=2)
    define.integer("accumulate", 1, "parts a batch is cut into, to save memory", lower=1)
    define.choice("optimizer", "adamw", OPTIMIZERS, "what turns gradients into updates")
    define.choice("schedule", "bitnet", SCHEDULES, "how the learning rate falls")
    define.number("learning_rate", 3e-3, "its peak", lower=0)
    define.integer("warmup_steps", 100, "steps up to the peak", lower=0)
    define.number("weight_decay", 0.1, "of projections and tables", lower=0)
    define.number("clip", 1.0, "largest norm of a gradient; 0 leaves it", lower=0)
    define.choice("gradient", "identity", GRADIENTS, "how gradients pass the quantizer")
    define.integer("anneal_steps", 0, "steps from float to quantized weights", lower=0)
    define.string("noise", "", "noise on codes, new each step: sign_flip,rate=0.01", form="NAME")
    define.string("teacher", None, "a trained model to distill from", form="NAME|PATH")
    define.number("distill", 0.0, "the teacher's weight in the loss", lower=0, upper=1)
    define.number("temperature", 1.0, "of the distillation", lower=0.01)
    define.choice("compute", "f32", COMPUTE, "what products are held in")
    define.boolean("remat", "compute activations again in the backward pass, to save memory")
    define.section("Keeping")
    define.integer("save_every", 500, "steps between checkpoints", lower=1)
    define.integer("keep", 3, "checkpoints that stay", lower=1)
    define.integer("log_every", 20, "steps between lines of metrics.jsonl", lower=1)
    define.boolean("tensorboard", "write metrics for TensorBoard too (needs tensorboardX)")


def run(config: ModelConfig, spec, corpus: data.Corpus, directory, **options) -> list[Record]:
    """Trains, saves the model in float and packed, and returns the Records; prints nothing.

    Args:
      config: the model.
      spec: a `ternax.train.TrainSpec`.
      corpus: from `ternax.data.open_corpus`.
      directory: the run's folder.
      options: further fields of `ternax.training.TrainRun`, and `ready` and `watch` of its run.
    """
    from ternax import training

    hooks = {name: options.pop(name) for name in ("ready", "watch") if name in options}
    job = training.TrainRun(config, spec, corpus, pathlib.Path(directory), **options)
    model, records = job.run(**hooks)
    training.save_models(model, job.directory, job.trained_tokens)
    return records


def train(args) -> None:
    """The command."""
    import dataclasses

    import jax

    from ternax import engine, measure
    from ternax.placement import Placement
    from ternax.train import TrainSpec

    if args.threads is not None:
        measure.limit_threads(args.threads)
    mesh = mesh_flag.mesh_of(args)
    placement = None if mesh is None else Placement(mesh)
    if (args.teacher is None) != (args.distill == 0):
        raise UsageError("--teacher and --distill go together, found one of them")
    fields = {field.name for field in dataclasses.fields(TrainSpec)}
    spec = TrainSpec(**{name: getattr(args, name) for name in fields})
    config = engine.with_scheme(
        engine.first_layers(args.config, args.layers),
        args.scheme,
        args.inputs if not args.given.isdisjoint({"inputs", "config.inputs"}) else None,
    )
    corpus = data.open_corpus(args.corpus, tokenizer=args.tokenizer)
    start = None
    if args.source.directory is not None and not args.source.boxed:
        start = str(args.source.directory)
        if args.source.stored is not None and args.source.stored.packed:
            raise UsageError(
                f"{args.source.name} holds trits, whose latent floats are gone: train from floats, "
                "or take --weights=random for a model of its shape"
            )
        if any(name.startswith("config.") for name in args.given):
            raise UsageError("--config.FIELD makes another model; a saved one is trained as it is")
    with open_store(args.output_dir, "train", config.name, config.scheme) as store:
        board = Board(store.directory) if args.tensorboard else None
        print(
            row(
                "ternax",
                f"train {config.name} in {config.scheme}, {spec.steps} steps of {spec.batch} x "
                f"{spec.length} tokens, on {measure.device_name(jax.devices()[0])}",
            )
        )
        print(row("corpus", corpus.describe()), flush=True)
        with progress("train", spec.steps, "steps") as advance:
            screen = Screen(spec, advance, board)
            records = run(
                config,
                spec,
                corpus,
                store.directory,
                ready=screen.ready,
                watch=screen.report,
                **{
                    name: getattr(args, name)
                    for name in ("save_every", "keep", "log_every", "teacher")
                },
                start=start,
                placement=placement,
                flags_text=args.command_line,
            )
        for record in records:
            store.append(record)
            if record.phase == "train":
                print(row("speed", speed_line(record, spec.compute)))
                print(row("memory", memory_line(record)))
    print(f"wrote    {store.directory}/model and {store.directory}/float")
    print(f"next: python -m experiments.evaluate --config={store.directory}/model")


def speed_line(record: Record, compute: str) -> str:
    m = record.metrics
    return (
        f"{rate(m['train_tokens_per_s'])} tokens/s, {100 * m['share_of_matrix_rate']:.0f} % of "
        f"the {rate(m['matrix_gflops_per_s'])} GFLOP/s of a large {compute} product"
    )


def memory_line(record: Record) -> str:
    planned = record.metrics["planned_memory_bytes"]
    peak = record.metrics.get("peak_memory_bytes")
    if peak is None:
        return f"planned {binary(planned)}"
    off = 100 * (peak / planned - 1)
    return f"{binary(peak)} at peak, planned {binary(planned)} ({off:+.1f} %)"


class Screen:
    """The run's lines, evenly spread, and the bar of a terminal."""

    def __init__(self, spec, advance, board):
        self.spec, self.advance, self.board = spec, advance, board
        self.done, self.started, self.first = 0, 0.0, 0
        self.every = max(1, spec.steps // LINES)
        self.next_line = 0

    def ready(self, trainer) -> None:
        self.started, self.first = time.monotonic(), trainer.step
        self.done = self.first
        self.next_line = self.first + self.every
        resumed = f"; resumed at step {self.first}" if self.first else ""
        print(
            row(
                "plan",
                f"{binary(trainer.planned_bytes())} for a step, compiled in "
                f"{trainer.compile_s:.1f} s{resumed}",
            ),
            flush=True,
        )
        if self.advance:
            self.advance(self.first)

    def report(self, report) -> None:
        if self.advance:
            self.advance(report.step - self.done)
        self.done = report.step
        if self.board:
            self.board.write(report)
        if report.step >= self.next_line or report.step == self.spec.steps:
            self.next_line = report.step + self.every
            each = (time.monotonic() - self.started) / max(report.step - self.first, 1)
            left = (self.spec.steps - report.step) * each / 60
            print(
                row(
                    "step",
                    f"{report.step:6} of {self.spec.steps}: {report.loss_nats:.4f} nats a token, "
                    f"{rate(report.tokens_per_s)} tokens/s, {left:.0f} min left",
                ),
                flush=True,
            )


class Board:
    """Metrics as TensorBoard reads them."""

    def __init__(self, directory):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs the package tensorboardX: pip install tensorboardX"
            ) from error
        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, report) -> None:
        for name in ("loss_nats", "gradient_norm", "learning_rate", "tokens_per_s"):
            self.writer.add_scalar(name, getattr(report, name), report.step)
        self.writer.flush()


COMMAND = flags.Command(
    name="train",
    summary="Trains a model under a quantization scheme; the same command resumes.",
    groups=(flags.model_flags, train_flags, mesh_flag.mesh_flags, flags.run_flags),
    examples=(
        ("--config=stdlib-bitnet", "the model in the box, from nothing"),
        ("--config=tiny-bitnet --scheme=twn --steps=500", "a quick one under another scheme"),
        ("--config=runs/mine/float --noise=stuck,rate=0.02 --steps=500", "on from saved floats"),
        ("--config=stdlib-bitnet --noise=sign_flip,rate=0.02", "trained under noise"),
    ),
    default_config="stdlib-bitnet",
)


def main(argv=None) -> int:
    return COMMAND.run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
