"""What can a GPU that is at hand for minutes be asked, and what does it answer?

    python -m experiments.gpu_day --output_dir=runs/h200 --minutes=8
    python -m experiments.gpu_day --dry_run

Correctness first, then kernels alone beside XLA, torch and gemlite, tuning, and whole models.
Each step is a process with seconds of its own, and writes each number as it is known, so what
is cut off leaves its results.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import time

from ternax.errors import BackendUnavailable, NumericCheckFailed, PeerFailed, UsageError
from ternax.experiments import flags
from ternax.gpu import goals, made, schedule, screen
from ternax.gpu.schedule import Planned
from ternax.record import Record, Store, open_store
from ternax.table import row


def day_flags(define):
    define.section("The day")
    define.number("minutes", 8.0, "that all steps may take together", lower=0.5)
    define.string(
        "steps", None, "of those that --dry_run lists", form="NAME,...", default_text="all"
    )
    define.string(
        "graphs", "on", "CUDA graphs on, off, or on,off: what they change twice", form="ON"
    )
    define.string(
        "commit", None, "of the sources, for records", form="HASH", default_text="as git says"
    )
    define.boolean("rehearse", "on any device, on shapes at which nothing is found out")
    define.boolean("dry_run", "list the steps and their planned seconds, and stop")
    define.section("One step in this process, as each step's own is told")
    define.string("only", None, "its name", form="NAME")
    define.number("seconds", 60.0, "that it may take", lower=0)
    define.number("read_gb_per_s", None, "the best rate that the run has read at")
    define.section("Run")
    define.output_dir()
    define.boolean("debug", "show the traceback of an error")


def step_body(name: str):
    """What a step does: Step -> None. Imports JAX."""
    from ternax.gpu import attending, bandwidth, chains, exactness, facts, models, products, tune
    from ternax.kernels.pallas import decode

    ours = ("mosaic", "head", "XLA bf16", "XLA int8", "torch bf16", "torch int8")
    rehearsed = ("mosaic", "head", "reference", "XLA bf16", "torch bf16", "gemlite A8W158")
    kernels, gemlite = products.run, ("mosaic", "gemlite A8W158", "gemlite A16W158")

    def multiply(step, model, names, batches=products.BATCHES):
        if step.rehearse:
            model, names, batches = "tiny-bitnet", rehearsed, batches[:2]
        kernels(step, model, names, batches)

    bodies = {
        "facts": facts.run,
        "bandwidth": bandwidth.run,
        "exactness": functools.partial(exactness.run, rows=lambda n: n <= decode.MAX_ROWS),
        "exactness-matrix": functools.partial(exactness.run, rows=lambda n: n > decode.MAX_ROWS),
        "exactness-attention": exactness.attend,
        "chain": chains.run,
        "attention": attending.run,
        "tune": tune.run,
        "gemlite": functools.partial(multiply, model="70b", names=gemlite, batches=(1, 16)),
        "decode-70b": functools.partial(models.run, name="70b", points=models.SINGLE),
        "batches-70b": functools.partial(models.run, name="70b", points=models.BATCHES),
        "prefill-70b": functools.partial(models.run, name="70b", points=models.PREFILL),
        "decode-8b": functools.partial(models.run, name="8b", points=models.SMALL),
        "decode-2b4t": functools.partial(models.run, name="bitnet-2b4t", points=models.SMALL),
    }
    for model in ("70b", "8b", "2b4t"):
        bodies[f"kernels-{model}"] = functools.partial(multiply, model=model, names=ours)
    return bodies[name]


def run_one(args) -> None:
    """One step, in this process: records and lines go to stdout."""
    if args.only not in (step.name for step in schedule.STEPS):
        raise UsageError(f"--only must be a step that --dry_run lists, found {args.only!r}")
    off = schedule.GRAPHS_OFF in os.environ.get("XLA_FLAGS", "")
    step = made.Step(
        args.seconds,
        made.tell,
        made.say,
        rehearse=args.rehearse,
        read_gb_per_s=args.read_gb_per_s,
        folder=args.output_dir or ".",
        note="CUDA graphs off" if off else "",
        flags=args.command_line,
    )
    step_body(args.only)(step)


def run(
    steps: list[tuple[Planned, bool]],
    store: Store,
    minutes: float,
    *,
    rehearse: bool = False,
    commit: str | None = None,
    say=print,
) -> list[Record]:
    """Each step in a process of its own; every Record is in the store as soon as it is told.

    steps: with whether CUDA graphs are on. Raises nothing for a step that failed: it says so.
    """
    from ternax.kernels import tuning

    end = time.monotonic() + 60 * minutes
    log = store.directory / "steps.log"
    for number, (planned, graphs) in enumerate(steps):
        left = end - time.monotonic()
        seconds = schedule.share_s(left, [step for step, _ in steps[number:]])
        name = planned.name + ("" if graphs else ", CUDA graphs off")
        if left < schedule.LEAST_S:
            say(f"{name}: no time left")
            continue
        say(f"{name}: {seconds:.0f} s")
        count = len(store.records)

        def keep(record: Record) -> None:
            store.append(dataclasses.replace(record, commit=commit) if commit else record)
            for line in screen.said(record):
                say(f"  {line}")

        ended = schedule.run(
            _words(planned, seconds, store, rehearse),
            {**planned.environment(graphs), tuning.FOLDER: str(store.directory / "tuned")},
            min(seconds + schedule.GRACE_S, left),
            keep,
            lambda line: say(f"  {line}"),
            log,
        )
        how = f"{len(store.records) - count} records in {ended.seconds:.0f} s"
        if ended.code is None:
            how += "; it took too long and was ended"
        elif ended.code:
            how += f"; it ended with {ended.code}: {ended.said}"
        say(f"{name}: {how}")
    return store.records


def _words(planned: Planned, seconds: float, store: Store, rehearse: bool) -> list[str]:
    words = [f"--only={planned.name}", f"--seconds={seconds:.1f}"]
    words.append(f"--output_dir={store.directory}")
    best = goals.best_read(store.records)
    return [
        *words,
        *([f"--read_gb_per_s={best:.6g}"] if best else []),
        *(["--rehearse"] if rehearse else []),
    ]


def day(args) -> None:
    """The command: list, or run and say what was found."""
    if args.only:
        return run_one(args)
    graphs = tuple(args.graphs.split(","))
    if not set(graphs) <= {"on", "off"}:
        raise UsageError(f"--graphs must be on, off or on,off, found {args.graphs!r}")
    steps = schedule.with_graphs(schedule.chosen(args.steps), graphs)
    if args.dry_run:
        for planned, on in steps:
            label = planned.name + ("" if on else " (graphs off)")
            print(f"  {label:28}{planned.seconds:>4} s  {planned.what}")
        print(f"  {'together':28}{sum(p.seconds for p, _ in steps):>4} s")
        return None
    if not args.rehearse:
        check_gpu()
    with open_store(args.output_dir, "gpu_day", "all", "gpu") as store:
        records = run(
            steps,
            store,
            args.minutes,
            rehearse=args.rehearse,
            commit=args.commit,
            say=functools.partial(print, flush=True),
        )
        print("", *screen.table(records), "", sep="\n")
        print(row("wrote", f"{pathlib.Path(store.directory) / 'results.json'}"))
    wrong = goals.wrong(records)
    if wrong:
        raise NumericCheckFailed(
            f"{len(wrong)} checks of exactness failed, the first of them {wrong[0].backend} at "
            f"{wrong[0].config}: {wrong[0].note}"
        )
    if not records:
        raise PeerFailed(f"no step told anything; {store.directory}/steps.log has what they said")
    return None


def check_gpu() -> None:
    """BackendUnavailable where there is none. JAX is not asked: this process holds no memory."""
    from ternax import measure

    if not measure.nvml_handles() and not pathlib.Path("/dev/nvidia0").exists():
        raise BackendUnavailable(
            "no NVIDIA GPU is here: --dry_run lists the steps, --rehearse tries the program on "
            "any device"
        )


COMMAND = flags.Command(
    name="gpu_day",
    summary="Asks a GPU that is at hand for minutes all that is to be known of it, worth first.",
    groups=(day_flags,),
    examples=(
        ("--output_dir=runs/h200 --minutes=8", "everything, within eight minutes"),
        ("--steps=facts,bandwidth,exactness --minutes=2", "is it right, and how fast is memory?"),
        ("--steps=kernels-70b,decode-70b --graphs=on,off", "what CUDA graphs change"),
    ),
)


def main(argv=None) -> int:
    return COMMAND.run(day, argv)


if __name__ == "__main__":
    sys.exit(main())
