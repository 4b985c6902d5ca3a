"""How long does a user wait, for the first token and for each after it?

    python -m experiments.speedtest --config=1b
    python -m experiments.speedtest --endpoint=http://127.0.0.1:8000

Five kinds of prompt and workloads of fixed length, at several concurrencies, cold apart from
warm, against this package's engine or any server of the OpenAI-compatible protocol; fields as
in vLLM's benchmark, and what was expected beside what was found.
"""

import os
import pathlib
import sys
import textwrap
from collections.abc import Sequence

from ternax import drawing, measure, prompts, speedtest
from ternax.endpoint import Endpoint
from ternax.errors import DoesNotFit, PeerFailed, UsageError
from ternax.experiments import config_flag, flags
from ternax.record import Record, Store, open_store
from ternax.speedtest import Remote, SpeedTest, Target
from ternax.table import rate

KEY = "OPENAI_API_KEY"
# The model of a server that does not say which it has.
UNKNOWN = "unknown"


def speedtest_flags(define):
    define.section("Requests")
    define.string(
        "workload",
        "all",
        "all (short/short, short/long, long/short, code, reasoning), names of them, or "
        "PROMPT:ANSWER in tokens",
        form="NAME,...",
    )
    define.string("concurrency", "1", "requests under way together", form="N,...")
    define.integer("requests", 4, "warm ones of each workload, at least", lower=1)
    define.integer("max_tokens", None, "cut every answer to so many", lower=2, default_text="none")
    define.string("expect", None, "median_ttft_ms:140,output_throughput:12", form="NAME:X,...")
    define.number("usd_per_hour", None, "price of what answers, for the cost of a token", lower=0)
    define.section("This engine")
    define.choice("dispatch", "program", ("program", "layer"), "calls a token: one, or one a layer")
    define.section("A server instead")
    define.string("endpoint", None, "its address", form="http://HOST:PORT")
    define.string("model", None, "the name it is asked for", form="NAME", default_text="its first")
    define.boolean("chat", "ask /v1/chat/completions, not /v1/completions")
    define.boolean("ignore_eos", "ask for answers of full length (vLLM, llama.cpp)")
    define.number("timeout_s", 600.0, "for one answer")


def run(
    test: SpeedTest,
    target: Target,
    store: Store,
    expected: dict[str, float] | None = None,
    watch=lambda record: None,
) -> list[Record]:
    """Asks what the store lacks, then judges what was expected.

    Returns:
      A Record for each point, then a verdict for each expectation; all are in the store.
    """
    points = speedtest.run(test, target, store, watch)
    judged = speedtest.verdicts(expected or {}, points)
    held = {record.note for record in store.records}
    for record in judged:
        if record.note not in held:  # a test that goes on repeats nothing
            store.append(record)
    return [*points, *judged]


def table(records: Sequence[Record]) -> list[str]:
    """A row for each point: what of it is known, or why it failed."""
    wide = max(len(_name(record)) for record in records)
    lines = [
        f"  {'':{wide}}{'cold':>8}{'TTFT':>8}{'p99':>8}{'TPOT':>8}{'ITL p99':>8}{'E2EL':>8}"
        f"{'tokens/s':>10}{'done':>6}",
        f"  {'':{wide}}{'ms':>8}{'ms':>8}{'ms':>8}{'ms':>8}{'ms':>8}{'s':>8}{'out':>10}",
    ]
    for record in records:
        m = record.metrics
        if not m["completed"]:
            why = next(p for p in record.note.split("; ") if p.startswith("failed: "))
            lines.append(f"  {_name(record):{wide}}  {why}"[:100])
            continue
        names = ("cold_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")
        cells = "".join(f"{rate(m[name]) if name in m else '':>8}" for name in names)
        done = f"{m['completed']}/{m['completed'] + m['failed']}"
        lines.append(
            f"  {_name(record):{wide}}{cells}{rate(m['median_e2el_ms'] / 1e3):>8}"
            f"{rate(m['output_throughput']):>10}{done:>6}"
        )
    return lines


def _name(record: Record) -> str:
    workload = record.note.partition(",")[0]
    return workload if record.batch == 1 else f"{workload} x{record.batch}"


def draw(records: Sequence[Record], target: pathlib.Path) -> pathlib.Path | None:
    """Time to first token and per token of each point, as bars; None without matplotlib."""
    pyplot = drawing.pyplot()
    records = [record for record in records if "median_tpot_ms" in record.metrics]
    if pyplot is None or not records:
        return None
    figure, pair = pyplot.subplots(
        1, 2, figsize=(10, 1.5 + 0.35 * len(records)), layout="constrained", sharey=True
    )
    for axis, metric in zip(pair, ("median_ttft_ms", "median_tpot_ms"), strict=True):
        axis.barh(range(len(records)), [record.metrics[metric] for record in records])
        axis.set_xlabel(metric)
    pair[0].set_yticks(range(len(records)), [_name(record) for record in records], fontsize=8)
    pair[0].invert_yaxis()
    figure.suptitle(f"measured: {records[0].config}, {records[0].device}", fontsize=9)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def remote(args) -> Remote:
    """The server that the flags name. UsageError where it says that it has no model; one that does
    not answer is asked all the same, and its rows say why they failed."""
    if "config" in args.given or "dispatch" in args.given:
        raise UsageError("--config and --dispatch are of this engine; --endpoint names a server")
    endpoint = Endpoint(
        args.endpoint,
        args.model or "",
        chat=args.chat,
        ignore_eos=args.ignore_eos,
        timeout_s=args.timeout_s,
        api_key=os.environ.get(KEY, ""),
    )
    if not endpoint.model:
        try:
            names = endpoint.models()
        except PeerFailed as error:
            print(f"note: {error}", file=sys.stderr)
            names = [UNKNOWN]
        if not names:
            raise UsageError(f"--endpoint={endpoint.url} serves no model; --model names one")
        endpoint = Endpoint(**{**vars(endpoint), "model": names[0]})
    common = dict(
        config=endpoint.model,
        scheme="",
        inputs="",
        backend=f"server at {endpoint.url}",
        device="unknown",
        layers=0,
    )
    return Remote(endpoint, common)


def local(args, test: SpeedTest) -> Target:
    """This engine with the model that the flags name, made or loaded; DoesNotFit before it is."""
    from ternax import cost
    from ternax.config import first_layers
    from ternax.engine import load_stored
    from ternax.local import Local
    from ternax.random_weights import random_model
    from ternax.workload import first_device

    if args.threads is not None:
        measure.limit_threads(args.threads)
    config, source, tables = first_layers(args.config, args.layers), args.source, ("int8", "int8")
    stored = source.directory is not None and args.config.name == source.config.name
    if stored:
        scheme = args.scheme if args.given & {"scheme", "config.scheme"} else None
        inputs = args.inputs if args.given & {"inputs", "config.inputs"} else None
        source.check(scheme=scheme, inputs=inputs)
        tables = source.tables or tables
    tokenizer = source.tokenizer()
    longest = max(
        (len(tokenizer.encode(w.text)) if w.text else w.prompt_tokens) + w.max_tokens
        for w in test.workloads
    )
    device = first_device()
    plan = cost.plan(
        config,
        batch=max(test.concurrency),
        context=min(longest, config.max_context),
        embed_dtype=tables[0],
        head_dtype=tables[1],
        available_bytes=cost.available_bytes(device),
        fused=cost.fuses(device),
    )
    if not plan.fits:
        raise DoesNotFit(plan.refusal("a smaller --config or --concurrency"))
    if stored:
        model = load_stored(source, inputs=inputs, layers=args.layers)
    else:
        model = random_model(config, seed=args.seed)
    return Local(model, tokenizer, dispatch=args.dispatch, seed=args.seed, tables=tables)


def test(args) -> None:
    """The command: find what answers, ask, print, judge, keep."""
    expected = speedtest.expectations(args.expect)
    concurrency = config_flag.counts("concurrency", args.concurrency)
    # What a folder holds one of: everything that was asked for but where it is kept.
    asked = flags.words(args, {"output_dir", "debug", "expect", "profile_dir"})
    plan = SpeedTest(
        tuple(prompts.workloads(args.workload, args.max_tokens)),
        concurrency,
        args.requests,
        args.usd_per_hour,
        " ".join(asked),
    )
    target: Target = remote(args) if args.endpoint else local(args, plan)
    title = f"{target.common['config']}, {target.name}"
    with open_store(args.output_dir, "speedtest", target.common["config"], target.name) as store:
        print(f"speedtest  {title}, device {target.common['device']}", flush=True)
        records = run(
            plan,
            target,
            store,
            expected,
            lambda record: print(f"asked      {record.note.partition(';')[0]}", flush=True),
        )
        points = [record for record in records if not record.note.startswith("verdict: ")]
        picture = draw(points, store.directory / "speedtest.png")
    print("", *table(points), "", sep="\n")
    bounds = [record for record in points if "share_of_bound" in record.metrics]
    if bounds:
        shares = [record.metrics["share_of_bound"] for record in bounds]
        print(f"decoding reaches {100 * min(shares):.0f} to {100 * max(shares):.0f} % of its bound")
    for record in records[len(points) :]:
        print(textwrap.fill(record.note, 100, subsequent_indent="  "))
    print(f"wrote    {store.directory}/results.json{drawing.said(picture)}")
    if not any(record.metrics["completed"] for record in points):
        raise PeerFailed(f"no request to {target.name} was answered: {_why(points[0])}")


def _why(record: Record) -> str:
    return record.note.partition("failed: ")[2].partition(";")[0]


COMMAND = flags.Command(
    name="speedtest",
    summary="Asks an engine or a server and times its answers: TTFT, TPOT, ITL, end to end.",
    groups=(flags.model_flags, speedtest_flags, flags.run_flags),
    examples=(
        ("--config=1b --max_tokens=32", "five kinds of prompt, answers cut to 32 tokens"),
        ("--config=1b --workload=128:64 --concurrency=1,4 --dispatch=layer", "a call a layer"),
        ("--endpoint=http://127.0.0.1:8000 --expect=median_ttft_ms:140", "a server, judged"),
    ),
    default_config="1b",
)


def main(argv=None) -> int:
    return COMMAND.run(test, argv)


if __name__ == "__main__":
    sys.exit(main())
