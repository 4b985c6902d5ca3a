"""Does a training run that is killed end as one that was not?

    python -m experiments.crash --times=20
    python -m experiments.crash --times=20 --meshes='data:1;data:2;fsdp:2,tensor:2'

Trains once undisturbed, then `--times` runs that are each killed with SIGKILL at a moment drawn
over a run's whole length, its start-up and its end included, and resumed by the same command.
Losses of every step, which the order of the data decides, weights and optimizer state must
be the undisturbed run's to the bit.

With `--meshes` each run is killed at a moment drawn over its steps and goes on on another mesh,
pair after pair. Data, steps and rates must still be the same to the bit, and so must all be up to
the checkpoint; losses behind it must lie where one more undisturbed run on these meshes would.
`ternax.crash` kills and compares, `ternax.loss_band` says how far noise reaches.
"""

import itertools
import pathlib
import shutil
import sys
import tempfile

from ternax import data, measure, mesh
from ternax.errors import UsageError
from ternax.experiments import flags
from ternax.record import Record, open_store
from ternax.table import row

TRAIN = ("steps", "batch", "length", "save_every", "corpus", "scheme", "inputs")
SAME = (
    "samples are the steps done when each run was killed; compared are losses, gradient norms, "
    "learning rates and data of every step, weights, optimizer state"
)
MOVED = (
    "samples are the steps done when each run was killed; compared are data and learning rates of "
    "every step, to the bit, all up to the checkpoint, to the bit, and losses behind it with the "
    "prediction interval of one more run (Student's t, {alarm:g} false alarms in all, were steps "
    "independent) about undisturbed runs, one a mesh, spread over gradient norm pooled over "
    "{stretch} steps; "
)
ENDS = {
    False: "ended as the one that was not killed, to the bit",
    True: "went on on another mesh: data and steps to the bit, losses within noise",
}


def crash_flags(define):
    define.section("Crash")
    define.integer("times", 20, "runs that are killed and resumed", lower=1)
    define.string(
        "meshes",
        None,
        "two or more: each run goes on on another mesh than it was killed on",
        form="MESH;MESH;...",
        default_text="one device",
    )
    define.integer("steps", 1500, "updates of each run", lower=1)
    define.integer("batch", 4, "sequences of an update", lower=1)
    define.integer("length", 64, "tokens of a sequence", lower=2)
    define.integer("save_every", 50, "steps between checkpoints", lower=1)
    define.string("corpus", data.STDLIB, "a text file, a folder, or stdlib", form="PATH")


def meshes_of(text: str | None) -> list[str | None]:
    """What --meshes names. UsageError for what is no mesh, or none to change to."""
    if text is None:
        return [None]
    found: list[str | None] = [
        mesh.describe(mesh.parse(part)).replace("one device", "data:1") for part in text.split(";")
    ]
    if len(found) < 2 or len(set(found)) < len(found):
        raise UsageError(
            f"--meshes: expected two or more that differ, such as 'data:1;fsdp:4', found {text!r}"
        )
    return found


def crash(args) -> int:
    """The command: train, kill, resume, compare; exit code 1 where a run ended otherwise."""
    import jax

    from ternax import crash, loss_band

    meshes = meshes_of(args.meshes)
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
        undisturbed = crash.Undisturbed(
            words, meshes, folder, stretch=args.save_every, times=args.times
        )
        moves = itertools.cycle(undisturbed.moves())
        for number, share in enumerate(crash.moments(args.times, args.seed), 1):
            mine = folder / str(number)
            trials.append(undisturbed.trial(*next(moves), mine, share))
            shutil.rmtree(mine)
            print(row(f"{number:>5}", line(trials[-1])), flush=True)
        right = sum(not trial.differences for trial in trials)
        metrics = {"steps": args.steps, "kills": len(trials)}
        if undisturbed.band is None:
            metrics |= {"identical_count": right}
            note = SAME
        else:
            metrics |= {
                "within_noise_count": right,
                "noise_reach_nats": float(undisturbed.band.reach.max()),
                "handover_nats": max(trial.handover_nats for trial in trials),
            }
            note = MOVED.format(alarm=loss_band.FALSE_ALARM, stretch=args.save_every)
            note += "; ".join(f"{t.start} to {t.onto} at {t.resumed_at}" for t in trials)
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
                metrics=metrics,
                seed=args.seed,
                flags=args.command_line,
                note=note,
            )
        )
    print(f"{right} of {len(trials)} runs {ENDS[undisturbed.band is not None]}.")
    print(f"wrote {store.directory}/results.json")
    return 0 if right == len(trials) else 1


def line(trial) -> str:
    """What became of a killed run, in words."""
    told = "; ".join(trial.differences[:3])
    killed = f"killed after {trial.after_s:.1f} s, step {trial.killed_at}"
    if trial.start == trial.onto:
        return f"{killed}: {told or 'identical'}"
    moved = f"{trial.start} to {trial.onto} at step {trial.resumed_at}"
    return f"{killed}, {moved}: {told or f'within noise, {trial.handover_nats:.1e} nats off first'}"


COMMAND = flags.Command(
    name="crash",
    summary="Kills training runs at random moments, resumes them, and compares their ends.",
    groups=(flags.model_flags, crash_flags, flags.run_flags),
    examples=(
        ("--times=20", "twenty kills of a small model's training"),
        ("--meshes='data:1;data:2;fsdp:2,tensor:2' --batch=8", "going on on other devices"),
    ),
    default_config="tiny-bitnet",
)


def main(argv=None) -> int:
    return COMMAND.run(crash, argv)


if __name__ == "__main__":
    sys.exit(main())
