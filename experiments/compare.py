"""How much faster is it than another program, and how good is a scheme beside others?

    python -m experiments.compare --config=2b4t \\
        --peer='llama.cpp TQ2_0=/path/llama-bench -m /path/2b4t-tq2_0.gguf'
    python -m experiments.compare --schemes=absmean,twn,package.module:Mine

Any llama-bench, llama.cpp's or a fork's, and ours are run in turn, `--rounds` times,
with the memory's read rate measured between. `ternax.comparison` measures; here are the
flags and the table.
"""

import sys
import textwrap

from ternax import comparison, measure
from ternax.errors import UsageError
from ternax.experiments import flags, scheme_card
from ternax.peer import parse_peer
from ternax.provenance import environment
from ternax.record import Record, Store, open_store
from ternax.table import rate, row

WIDTH = 100
# Flags that `experiments.decode` does not get, or not as they were given.
NOT_OURS = {"peer", "rounds", "repetitions", "timeout_s", "prompt_length", "num_tokens", "threads"}
NOT_OURS |= {"output_dir", "debug"}


def compare_flags(define):
    from ternax.nn.cache import KV_DTYPES
    from ternax.nn.table import TABLE_FORMATS

    define.section("Compare")
    define.strings(
        "peer",
        "another program: a name, and a llama-bench command with its model and options",
        form="NAME=COMMAND",
    )
    define.integer("rounds", 6, "times that each program runs; 95 % needs 6", lower=1, upper=999)
    define.integer("prompt_length", 128, "tokens of the prefill", lower=1)
    define.integer("num_tokens", 32, "tokens decoded and timed", lower=1)
    define.integer("repetitions", 1, "samples a peer takes of each phase a round", lower=1)
    define.number("timeout_s", 3600.0, "seconds after which a run of a program is ended", lower=1.0)
    define.section("What ours decodes with")
    define.choice("kv_dtype", "bf16", KV_DTYPES, "how the KV cache is stored")
    define.choice("embed_dtype", "int8", TABLE_FORMATS, "how the embedding table is stored")
    define.choice("head_dtype", None, TABLE_FORMATS, "how the head is stored", default_text="int8")
    define.string(
        "backend", None, "kernel backend", form="NAME", default_text="fastest that can run"
    )


def compare(args) -> None:
    """The command: check, measure in turn, say what was found."""
    if args.schemes is not None:
        return scheme_card.run(args)
    if not args.peer:
        raise UsageError(
            "--peer is missing: --peer='llama.cpp=/path/llama-bench -m model.gguf' names one; "
            "--schemes=absmean,twn compares schemes"
        )
    scheme_card.refuse(args, scheme_card.CARD_FLAGS, "--schemes")
    if "layers" in args.given:
        raise UsageError(
            "--layers: a peer runs its whole model; with --config.num_layers=N ours is smaller"
        )
    if args.profile_dir:
        raise UsageError("--profile_dir is for experiments.decode: a profile takes time")
    name = args.source.name  # decode's default is another one
    asked = flags.words(args, {"rounds", "output_dir", "debug", "peer", "timeout_s"}, config=name)
    contest = comparison.Contest(
        config=args.config.name,
        decode_words=tuple(flags.words(args, NOT_OURS, config=name)),
        peers=tuple(parse_peer(text) for text in args.peer),
        prompt_length=args.prompt_length,
        num_tokens=args.num_tokens,
        rounds=args.rounds,
        repetitions=args.repetitions,
        threads=args.threads or measure.threads_available(),
        timeout_s=args.timeout_s,
        flags_text=" ".join([*asked, *(f"--peer={text}" for text in args.peer)]),
    )
    names = ", ".join(["ternax", *(peer.name for peer in contest.peers)])
    comparison.check(contest)
    what = f"{len(args.peer)}-peers"
    with open_store(args.output_dir, "compare", args.config.name, what) as store:
        check_same(store, contest)
        held = len(comparison.whole_rounds(store.records, contest))
        print(row("compare", f"{args.config.name}: {names}; {args.rounds} rounds, {held} held"))
        ratios = comparison.run(contest, store, watch=show)
        rounds = list(comparison.whole_rounds(store.records, contest).values())
    print("\n".join(["", *table(rounds, ratios), f"wrote {store.directory}/results.json"]))


def check_same(store: Store, contest: comparison.Contest) -> None:
    """UsageError where the store holds anything but rounds of this very comparison."""
    now = (contest.flags_text, environment().source_sha256)
    for record in store.records:
        if (record.flags, record.source_sha256) != now:
            other = "other sources" if record.flags == now[0] else f"{record.flags[:200]!r}"
            raise UsageError(
                f"{store.directory} holds rounds of another comparison ({other}); "
                "choose another --output_dir"
            )


def show(record: Record) -> None:
    """A measurement on screen as it comes; ratios wait for the table."""
    m = record.metrics
    if "round" in m:
        speed = m[comparison.SPEED[record.phase]]
        line = f"round {m['round']}  {record.phase:8} {record.backend:32}"
        line += f" {rate(speed):>8} tokens/s"
        if "share_of_bound" in m:
            line += f", {100 * m['share_of_bound']:.0f} % of bound"
        if "read_bandwidth_gb_per_s" in m:
            line += f" ({m['read_bandwidth_gb_per_s']:.1f} GB/s)"
        print(line, flush=True)


def table(rounds: list[list[Record]], ratios: list[Record]) -> list[str]:
    """Medians of all programs, and our speed over each peer's with the 95 % interval."""
    lines = [f"{'median of rounds':41} {'tokens/s':>10}   ternax / peer"]
    found = {(r.phase, r.backend.partition(" / ")[2]): r.metrics for r in ratios}
    sizes: dict[str, float] = {}
    for phase, metric in comparison.SPEED.items():
        rows: dict[str, list[float]] = {}
        for record in (record for records in rounds for record in records):
            if record.phase == phase:
                rows.setdefault(record.backend, []).append(record.metrics[metric])
                sizes[record.backend] = record.metrics["parameters"]
        for name, speeds in sorted(rows.items(), key=lambda item: (phase, item[0]) in found):
            line = f"{phase:8} {name:32} {rate(measure.percentile(speeds, 50)):>10}"
            if (phase, name) in found:
                m = found[phase, name]
                line += f"   {rate(m['speed_ratio'])}"
                if "speed_ratio_low" in m:
                    line += f" [{rate(m['speed_ratio_low'])} .. {rate(m['speed_ratio_high'])}]"
            lines.append(line)
    peers = {name for _, name in found}
    ours = next(size for name, size in sizes.items() if name not in peers)
    notes = [
        f"{name} counts {sizes[name]:,.0f} parameters and ternax {ours:,.0f}: not the same model"
        for name in sorted(peers)
        if not 0.8 < sizes[name] / ours < 1.25
    ]
    notes.append(
        f"Measured in turn, a process each, over {len(rounds)} rounds. A ratio is the median of "
        "the rounds' own ratios; "
        + (
            "in brackets the interval that holds the true median with 95 % confidence."
            if any("speed_ratio_low" in m for m in found.values())
            else "6 rounds are needed for its 95 % interval."
        )
        + " Above 1 ternax is faster. This is speed alone: the weights of ternax are random."
    )
    return [*lines, *(line for note in notes for line in textwrap.wrap(note, WIDTH))]


COMMAND = flags.Command(
    name="compare",
    summary="Measures our decode and prefill and those of any llama-bench in turn, with ratios; "
    "or trains, judges and times quantization schemes side by side.",
    groups=(flags.model_flags, compare_flags, scheme_card.card_flags, flags.run_flags),
    examples=(
        (
            "--config=2b4t --peer='llama.cpp=llama-bench -m 2b4t-tq2_0.gguf'",
            "prefill of 128 and decode of 32 tokens, six rounds",
        ),
        (
            "--config=70b --prompt_length=16 --num_tokens=8 --peer='...' --output_dir=runs/c70",
            "large models; the same command again goes on where it stopped",
        ),
        (
            "--schemes=absmean,twn,sign --seeds=3 --after_training=ls,gptq",
            "the scheme card: loss with intervals, bits, speed, cost of training, and a plot",
        ),
    ),
    default_config="2b4t",
)


def main(argv=None) -> int:
    return COMMAND.run(compare, argv)


if __name__ == "__main__":
    sys.exit(main())
