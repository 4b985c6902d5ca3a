"""How does decoding scale: with layers, sizes, batch, context, threads, prompts?

    python -m experiments.scaling --config=8b --axis=layers:4,8,16,32
    python -m experiments.scaling --config=2b4t --axis=batch --axis=context:128,1024
    python -m experiments.scaling --config=8b --axis=context:128,4096 --in_turn --rounds=12

One axis or a grid of two; each point decodes in a process of its own, several rounds in turn.
What does not fit says why and the sweep goes on; the same command in its --output_dir resumes.
A point that was not run is never printed as measured: a depth from a line is extrapolated, a
size from the others predicted, each beside what was measured.
"""

import pathlib
import statistics
import sys
import textwrap

from ternax import curves, drawing, measure, sweep, turns
from ternax.config import first_layers
from ternax.errors import UsageError
from ternax.experiments import flags
from ternax.record import Record, Store, open_store
from ternax.sweep import DEFAULTS, Sweep
from ternax.table import rate
from ternax.workload import Workload

WIDTH = 100


def scaling_flags(define):
    define.section("Scaling")
    define.strings(
        "axis",
        f"{', '.join(DEFAULTS)}, each with values of its own: batch:1,4,16",
        form="NAME[:V,...]",
    )
    define.integer("rounds", 3, "times that each point runs", lower=1)
    define.integer("num_tokens", 16, "tokens decoded and timed", lower=1)
    define.integer("prompt_length", 16, "tokens of the prompt", lower=1)
    define.integer("batch", 1, "sequences decoded together", lower=1)
    define.boolean("in_turn", "contexts in one process, a few tokens of each in turn")
    define.string("kv_dtype", "bf16", "how the cache is stored", form="NAME")
    define.string("embed_dtype", "int8", "how embedding and head are stored", form="NAME")


def run(study: Sweep, store: Store, say=print) -> list[Record]:
    """Measures the points that the store lacks, then sums up.

    Returns:
      The points' records, then what they say together; all are in the store.
    """
    points = sweep.run(study, store, say)
    held = [(record.note, record.metrics) for record in store.records]
    summed = curves.curves(study, points)
    for record in summed:
        if (record.note, record.metrics) not in held:  # a resumed sweep repeats nothing
            store.append(record)
    return [*points, *summed]


def screen(study: Sweep, records: list[Record]) -> list[str]:
    """A row for each point: medians of its rounds; then what the points say together."""
    wide = max(len(sweep.label(point)) for point in study.points)
    lines = [
        f"measured: medians of up to {study.rounds} rounds",
        f"  {'point':{wide}}{'tokens/s':>9}{'ms/step':>9}{'bound':>6}{'first, ms':>10}"
        f"{'prefill/s':>10}{'peak GiB':>9}{'planned':>8}{'error':>8}",
    ]
    for point in study.points:
        found = sweep.of_point(records, point)
        measured = [record for record in found if sweep.is_measured(record)]
        if measured:
            lines.append(f"  {sweep.label(point):{wide}}{_cells(measured)}")
        elif found:
            why = textwrap.shorten(found[-1].note.partition("; ")[2], WIDTH - wide - 4)
            lines.append(f"  {sweep.label(point):{wide}}  {why}")
    points = {id(r) for point in study.points for r in sweep.of_point(records, point)}
    lines += ["", *(_sentence(record) for record in records if id(record) not in points)]
    sizes = [r for r in records if r.kind == "predicted" and "prediction_error" in r.metrics]
    if sizes:
        worst_size = max(sizes, key=lambda record: abs(record.metrics["prediction_error"]))
        lines.append(
            f"sizes: {len(sizes)} predicted by the others, worst "
            f"{100 * worst_size.metrics['prediction_error']:+.1f} % at {worst_size.config}"
        )
    errors = curves.memory_error(records)
    if errors:
        worst = max(errors, key=lambda point: abs(errors[point]))
        lines.append(
            f"memory: planned over measured peak of {len(errors)} points, worst "
            f"{100 * errors[worst]:+.1f} % at {worst}"
        )
    return [part for line in lines for part in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else [line]


def _cells(measured: list[Record]) -> str:
    def median(name: str) -> float:
        return statistics.median(r.metrics[name] for r in measured if name in r.metrics)

    text = (
        f"{rate(median('tokens_per_s')):>9}{rate(median('tpot_ms_p50')):>9}"
        f"{100 * median('share_of_bound'):>4.0f} %{rate(median('ttft_ms')):>10}"
        f"{rate(median('prefill_tokens_per_s')):>10}"
    )
    if any("peak_memory_bytes" in record.metrics for record in measured):
        peak, planned = median("peak_memory_bytes"), median("planned_memory_bytes")
        error = 100 * (planned / peak - 1)
        text += f"{peak / 2**30:>9.2f}{planned / 2**30:>8.2f}{error:>+6.1f} %"
    return text


def _sentence(record: Record) -> str:
    """What a record that sums up says, under its kind's name."""
    m, parts = record.metrics, []
    if "multiplier" in m:
        parts.append(f"{m['multiplier']:.2f} times the tokens/s at {rate(m['tpot_ms_p50'])} ms")
    if "read_bandwidth_gb_per_s" in m:
        streams = m.get("streaming_gb_per_s")
        parts.append(
            f"{m['fixed_ms']:.2f} ms (standard error {m['fixed_error_ms']:.2f}) and the bytes at "
            f"{f'{streams:.1f} GB/s' if streams else 'no rate'}, read at "
            f"{m['read_bandwidth_gb_per_s']:.1f} beside"
        )
    if "efficiency_share" in m:
        parts.append(
            f"{100 * m['efficiency_share']:.0f} % of the bandwidth, a = {m['fixed_ms']:.3g} ms"
        )
    if "slope_ms" in m:
        errors = ["", ", of two steps, which tell no error"]
        if "slope_error_ms" in m:
            errors = [
                f" (standard error {m['fixed_error_ms']:.3f})",
                f" ({m['slope_error_ms']:.2g})",
            ]
        parts.append(
            f"a = {m['fixed_ms']:.3f} ms{errors[0]}, b = {m['slope_ms']:.4g} ms{errors[1]}"
        )
    if "knee_batch" in m:
        parts.append(f"rows cost as much as what they share from batch {m['knee_batch']:.3g} on")
    if record.kind != "measured" and "tokens_per_s" in m:
        parts.append(f"{rate(m['tokens_per_s'])} tokens/s")
    if "tpot_ms_low" in m:
        parts.append(
            f"{rate(m['tpot_ms_p50'])} ms a step [{m['tpot_ms_low']:.4g}, {m['tpot_ms_high']:.4g}]"
        )
    if "reference_tokens_per_s" in m:
        error = f" ({100 * m['prediction_error']:+.1f} %)" if "prediction_error" in m else ""
        parts.append(f"measured {rate(m['reference_tokens_per_s'])}{error}")
    if "worst_residual_share" in m:
        parts.append(f"no step lies more than {100 * m['worst_residual_share']:.1f} % off")
    return f"{record.kind}: {record.config}: {record.note}: {'; '.join(parts)}"


def draw(study: Sweep, records: list[Record], target: pathlib.Path) -> pathlib.Path | None:
    """tokens/s and ms a step over the first axis, a line for each value of the second."""
    pyplot = drawing.pyplot()
    if pyplot is None:
        return None
    figure, pair = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    first = study.axes[0]
    other = study.axes[1] if len(study.axes) > 1 else None
    for fixed in other.values if other else ("",):
        at: dict[str, list] = {
            "axis": [],
            "tokens_per_s": [],
            "bound_tokens_per_s": [],
            "tpot_ms_p50": [],
        }
        for value in first.values:
            point = ((first.name, value), *(((other.name, fixed),) if other else ()))
            found = [r for r in sweep.of_point(records, point) if sweep.is_measured(r)]
            for record in found:
                at["axis"].append(value if first.name == "size" else int(value))
                for name in list(at)[1:]:
                    at[name].append(record.metrics[name])
        name = f"{other.name} {fixed}" if other else "measured"
        (drawn,) = pair[0].plot(at["axis"], at["tokens_per_s"], "o", label=name)
        pair[0].plot(
            at["axis"], at["bound_tokens_per_s"], "_", color=drawn.get_color(), markersize=12
        )
        pair[1].plot(at["axis"], at["tpot_ms_p50"], "o", color=drawn.get_color(), label=name)
    for axis, what in zip(pair, ("tokens/s (dashes: bound)", "ms a step"), strict=True):
        axis.set_xlabel(first.name)
        axis.set_ylabel(what)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def in_turn(args) -> None:
    """The command for contexts of one process: see `ternax.turns`."""
    axes = [sweep.parse_axis(text, args.config) for text in args.axis or ["context"]]
    if [axis.name for axis in axes] != ["context"]:
        raise UsageError("--in_turn is for one --axis=context:V,...: other points are other models")
    if "prompt_length" in args.given:
        raise UsageError("--prompt_length is not for --in_turn: prompts fill what the rounds leave")
    if args.profile_dir:
        raise UsageError("--in_turn takes no --profile_dir: profile one context by decode")
    if args.threads is not None:
        measure.limit_threads(args.threads)
    study = turns.Turns(
        tuple(map(int, axes[0].values)),
        args.rounds,
        args.num_tokens,
        Workload(
            batch=args.batch,
            kv_dtype=args.kv_dtype,
            embed_dtype=args.embed_dtype,
            head_dtype=args.embed_dtype,
            seed=args.seed,
        ),
    )
    with open_store(args.output_dir, "scaling", args.config.name, "in-turn") as store:
        print("scaling ", args.config.name, "contexts in turn", *study.contexts, sep="  ")
        axis = f"--axis=context:{','.join(axes[0].values)}"
        words = " ".join([axis, *flags.words(args, {"axis", "output_dir", "debug", "profile_dir"})])
        found = turns.run(
            first_layers(args.config, args.layers),
            study,
            flags_text=words,
            say=lambda line: print(line, flush=True),
        )
        for record in found:
            store.append(record)
    print("", *map(_turn_sentence, found), sep="\n")
    print(f"wrote    {store.directory}/results.json")


def _turn_sentence(record: Record) -> str:
    m = record.metrics
    if "speed_ratio" not in m:
        speed = f"{rate(m['tokens_per_s'])} tokens/s, {rate(m['tpot_ms_p50'])} ms a step"
        return f"measured: {record.config}: {record.note}: {speed}"
    ends = (
        f"[{m['speed_ratio_low']:.3f}, {m['speed_ratio_high']:.3f}], 95 % by order statistics"
        if "speed_ratio_low" in m
        else "too few rounds for an interval"
    )
    return f"measured: {record.config}: {record.note}: {m['speed_ratio']:.3f} {ends}"


def scaling(args) -> None:
    """The command: check, measure what is missing, say what was found."""
    if args.in_turn:
        return in_turn(args)
    ours = {
        "axis",
        "rounds",
        "in_turn",
        "output_dir",
        "debug",
        "profile_dir",
        "num_tokens",
        "config",
    }
    axes = tuple(sweep.parse_axis(text, args.config) for text in args.axis or ["layers"])
    sized = any(axis.name == "size" for axis in axes)
    changed = {} if sized and "config" not in args.given else {"config": args.source.name}
    study = Sweep(axes, tuple(flags.words(args, ours, **changed)), args.num_tokens, args.rounds)
    name = "sizes" if sized else args.config.name
    with open_store(args.output_dir, "scaling", name, "-".join(a.name for a in axes)) as store:
        print(
            "scaling ", name, *(f"{axis.name} {', '.join(axis.values)}" for axis in axes), sep="  "
        )
        records = run(study, store, lambda line: print(line, flush=True))
        picture = draw(study, records, store.directory / "scaling.png")
    print("", *screen(study, records), sep="\n")
    print(f"wrote    {store.directory}/results.json{drawing.said(picture)}")


COMMAND = flags.Command(
    name="scaling",
    summary="Decodes along one axis or a grid of two, with lines, multipliers and memory.",
    groups=(flags.model_flags, scaling_flags, flags.run_flags),
    examples=(
        ("--config=70b --axis=layers:4,8,10,80", "a line through part, beside the whole"),
        ("--axis=size:1b,8b,13b,70b", "each size predicted by the others"),
        ("--config=2b4t --axis=batch --axis=context:128,1024", "a grid"),
        (
            "--axis=context:128,4096 --in_turn --rounds=12 --num_tokens=8",
            "contexts that meet the same memory",
        ),
    ),
    default_config="8b",
)


def main(argv=None) -> int:
    return COMMAND.run(scaling, argv)


if __name__ == "__main__":
    sys.exit(main())
