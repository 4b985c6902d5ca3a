"""Does a training run that is killed end as one that was not?

    python -m experiments.crash --times=20

Trains once undisturbed, then `--times` runs that are each killed with SIGKILL at a moment drawn
over a run's whole length, its start-up and its end included, and resumed by the same command.
Losses of every step, which the order of the data decides, weights and optimizer state must
be the undisturbed run's to the bit. `ternax.crash` kills and compares.
"""

import pathlib
import shutil
import sys
import tempfile
import time

from ternax import data, measure
from ternax.experiments import flags
from ternax.record import Record, open_store
from ternax.table import row

TRAIN = ("steps", "batch", "length", "save_every", "corpus", "scheme", "inputs")


def crash_flags(define):
    define.section("Crash")
    define.integer("times", 20, "runs that are killed and resumed", lower=1)
    define.integer("steps", 1500, "updates of each run", lower=1)
    define.integer("batch", 4, "sequences of an update", lower=1)
    define.integer("length", 64, "tokens of a sequence", lower=2)
    define.integer("save_every", 50, "steps between checkpoints", lower=1)
    define.string("corpus", data.STDLIB, "a text file, a folder, or stdlib", form="PATH")


def crash(args) -> int:
    """The command: train, kill, resume, compare; exit code 1 where a run ended otherwise."""
    import jax

    from ternax import crash

    words = [f"--config={args.source.name}"]
    words += [f"--{name}={getattr(args, name)}" for name in TRAIN]
    trials = []
    with (
        open_store(args.output_dir, "crash", args.config.name, args.scheme) as store,
        tempfile.TemporaryDirectory(dir=store.directory) as scratch,
    ):
        title = f"{args.config.name} in {args.scheme}, {args.steps} steps, {args.times} kills"
        print(row("crash", title), flush=True)
        folder = pathlib.Path(scratch)
        crash.train_apart(words, folder / "first")  # fills the caches that later ones find
        started = time.monotonic()
        crash.train_apart(words, folder / "whole")
        seconds = time.monotonic() - started
        for number, moment in enumerate(crash.moments(args.times, seconds, args.seed), 1):
            mine = folder / str(number)
            trials.append(crash.trial(words, mine, folder / "whole", moment))
            shutil.rmtree(mine)
            told = "; ".join(trials[-1].differences[:3]) or "identical"
            killed = f"killed after {trials[-1].after_s:.1f} s, step {trials[-1].killed_at}"
            print(row(f"{number:>5}", f"{killed}: {told}"), flush=True)
        identical = sum(not trial.differences for trial in trials)
        store.append(
            Record(
                experiment="crash",
                config=args.config.name,
                scheme=args.scheme,
                inputs=args.inputs,
                backend="xla",
                device=measure.device_name(jax.devices()[0]),
                layers=args.config.num_layers,
                batch=args.batch,
                context=args.length,
                phase="train",
                kind="measured",
                samples=tuple(trial.killed_at for trial in trials),
                sample_unit="step",
                metrics={
                    "steps": args.steps,
                    "kills": len(trials),
                    "identical_count": identical,
                },
                seed=args.seed,
                flags=args.command_line,
                note="samples are the steps done when each run was killed; compared are losses, "
                "gradient norms and learning rates of every step, weights, optimizer state",
            )
        )
    print(f"{identical} of {len(trials)} runs ended as the one that was not killed, to the bit.")
    print(f"wrote {store.directory}/results.json")
    return 0 if identical == len(trials) else 1


COMMAND = flags.Command(
    name="crash",
    summary="Kills training runs at random moments, resumes them, and compares their ends.",
    groups=(flags.model_flags, crash_flags, flags.run_flags),
    examples=(("--times=20", "twenty kills of a small model's training"),),
    default_config="tiny-bitnet",
)


def main(argv=None) -> int:
    return COMMAND.run(crash, argv)


if __name__ == "__main__":
    sys.exit(main())
