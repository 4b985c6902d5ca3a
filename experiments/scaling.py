"""How does a decode step's time grow with what it reads?

    python -m experiments.scaling --config=8b --layers_axis=4,8,16,32

Decodes with the first n layers of a model, for several n in turn, and fits
t = a + bytes / rate: the rate at which layers stream, and apart from it the cost a that no
layer adds, in which the head's share is what it takes longer than its bytes at that rate.
A size that was not run is never printed as measured.
"""

import dataclasses
import statistics
import sys
import textwrap

from ternax import comparison, estimate
from ternax.errors import UsageError
from ternax.experiments import flags
from ternax.record import Record, Store, open_store
from ternax.table import decimal, rate

WIDTH = 100


def scaling_flags(define):
    define.section("Scaling")
    define.string("layers_axis", None, "numbers of layers, three at least", form="N,N,...")
    define.integer("rounds", 5, "times that each size runs", lower=1)
    define.integer("num_tokens", 16, "tokens decoded and timed", lower=1)
    define.integer("prompt_length", 16, "tokens of the prompt", lower=1)


def axis(text: str | None, most: int) -> list[int]:
    """--layers_axis as numbers. UsageError for what is none."""
    words = (text or "").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UsageError(
            f"--layers_axis must be numbers behind commas, as in 4,8,16; found {text!r}"
        )
    layers = sorted({int(word) for word in words})
    if len(layers) < 3 or layers[0] < 1 or layers[-1] > most:
        raise UsageError(
            f"--layers_axis needs three different numbers between 1 and {most}, found {text!r}"
        )
    return layers


def run(words, layers: list[int], rounds: int, store: Store, flags_text="", watch=print) -> Record:
    """Decodes at every depth, `rounds` times, and fits the line.

    Args:
      words: arguments of `experiments.decode`, but for the layers.
      layers: depths, in rising order; odd rounds take them forwards, even ones backwards.
      rounds: how often.
      store: takes each decode Record and the line's.
      flags_text: the command line, for the records.
      watch: called with a line of text for each decode.

    Returns:
      The line's Record: its samples are the median seconds a token at each depth.
    """
    points: dict[int, list[Record]] = {depth: [] for depth in layers}
    for number in range(1, rounds + 1):
        for depth in layers if number % 2 else layers[::-1]:
            records = comparison.decode_apart([*words, f"--layers={depth}"])
            found = next(record for record in records if record.phase == "decode")
            metrics = found.metrics | {"round": number}
            found = dataclasses.replace(
                found, experiment="scaling", metrics=metrics, flags=flags_text
            )
            store.append(found)
            points[depth].append(found)
            watch(
                f"round {number}  {depth:3} layers  {rate(metrics['tpot_ms_p50'])} ms a step, "
                f"{100 * metrics['share_of_bound']:.0f} % of the bound"
            )
    sizes = [statistics.median(r.metrics["bytes_per_step"] for r in points[n]) for n in layers]
    times = [statistics.median(r.metrics["tpot_ms_p50"] for r in points[n]) / 1e3 for n in layers]
    fit = estimate.line(sizes, times)
    rates = [r.metrics["read_bandwidth_gb_per_s"] for found in points.values() for r in found]
    record = dataclasses.replace(
        points[layers[-1]][-1],
        samples=tuple(times),
        sample_unit="s/token",
        metrics={
            "fixed_ms": 1e3 * fit.fixed,
            "fixed_error_ms": 1e3 * fit.fixed_error,
            "streaming_gb_per_s": 1e-9 / fit.slope,
            "worst_residual_share": fit.worst_share,
            "read_bandwidth_gb_per_s": statistics.median(rates),
        },
        note=f"line through layers {', '.join(map(str, layers))}, medians of {rounds} rounds; "
        f"bytes a step: {', '.join(map(decimal, sizes))}",
    )
    store.append(record)
    return record


def scaling(args) -> None:
    """The command: check, decode at every depth, fit, say what was found."""
    layers = axis(args.layers_axis, args.config.num_layers)
    if "layers" in args.given:
        raise UsageError("--layers cuts a model once; here --layers_axis does")
    ours = {"layers_axis", "rounds", "output_dir", "debug", "profile_dir", "num_tokens", "config"}
    words = flags.words(args, ours, config=args.source.name)
    words.append(f"--num_tokens={args.num_tokens + 2}")
    with open_store(args.output_dir, "scaling", args.config.name, "layers") as store:
        print(f"scaling  {args.config.name}, layers {', '.join(map(str, layers))}")
        record = run(words, layers, args.rounds, store, args.command_line)
    m = record.metrics
    print(
        textwrap.fill(
            f"A step costs {m['fixed_ms']:.2f} ms (standard error {m['fixed_error_ms']:.2f}), the "
            f"head's slower reading included, and the time to read its bytes at "
            f"{m['streaming_gb_per_s']:.1f} GB/s; memory was read at "
            f"{m['read_bandwidth_gb_per_s']:.1f} GB/s beside it. No depth lies more than "
            f"{100 * m['worst_residual_share']:.1f} % from that line.",
            WIDTH,
        )
    )
    print(f"wrote {store.directory}/results.json")


COMMAND = flags.Command(
    name="scaling",
    summary="Fits a decode step's time over the layers that run: a fixed cost, and a rate.",
    groups=(flags.model_flags, scaling_flags, flags.run_flags),
    examples=(
        ("--config=8b --layers_axis=4,8,16,32", "five rounds of four depths"),
        ("--config=70b --layers_axis=10,20,40 --rounds=3", "part of a large model"),
    ),
    default_config="8b",
)


def main(argv=None) -> int:
    return COMMAND.run(scaling, argv)


if __name__ == "__main__":
    sys.exit(main())
