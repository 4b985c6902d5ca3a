"""How fast does it decode, and how close is that to the limit?

    python -m experiments.decode --config=70b

Plans, measures this machine's read bandwidth, makes the packed model in place,
compiles, warms up, then times prefill and decode. `ternax.decoding` measures; here
are the flags, the choice of a model that fits, and the last words.
"""

import contextlib
import dataclasses
import shlex
import sys
import textwrap
from typing import Any

from ternax import cost, measure
from ternax.checkpoint.box import Source
from ternax.config import ModelConfig, first_layers, with_scheme
from ternax.decoding import DecodeRun, run
from ternax.errors import DoesNotFit, UsageError
from ternax.experiments import flags, mesh_flag
from ternax.experiments.progress import progress
from ternax.interop.tokenizer import BYTES, Tokenizer, printable
from ternax.record import Record, open_store
from ternax.table import binary, decimal, rate, row
from ternax.workload import Workload

__all__ = ["Workload", "main", "run"]

WIDTH = 100


def decode_flags(define):
    from ternax.nn.cache import KV_DTYPES
    from ternax.nn.table import TABLE_FORMATS

    define.section("Decode")
    define.string(
        "prompt", None, "text to continue, printed as it comes", default_text="random tokens"
    )
    define.integer("prompt_length", 16, "tokens of each random prompt", lower=1)
    define.integer(
        "num_tokens",
        16,
        "new tokens a sequence; the first comes from prefill, the second warms up",
        lower=3,
    )
    define.integer("batch", 1, "sequences decoded together", lower=1)
    define.integer(
        "filled", 0, "cache slots that begin in use: a long context without its prefill", lower=0
    )
    define.choice("kv_dtype", "bf16", KV_DTYPES, "how the KV cache is stored")
    define.choice(
        "embed_dtype",
        None,
        TABLE_FORMATS,
        "how the embedding table is stored",
        default_text="int8; stored weights: as they are",
    )
    define.choice(
        "head_dtype",
        None,
        TABLE_FORMATS,
        "how the head is stored",
        default_text="int8; tied: as embed_dtype",
    )
    define.string(
        "backend", None, "kernel backend", form="NAME", default_text="fastest that can run"
    )
    define.boolean("plan_only", "print the plan and stop")
    define.choice(
        "fit",
        "refuse",
        ("refuse", "auto"),
        "a model that does not fit: refuse it, or take the largest of its family that does",
    )


def planned(args) -> DecodeRun:
    """The run that the flags ask for, checked and planned; nothing is allocated yet."""
    inputs_given = not args.given.isdisjoint({"inputs", "config.inputs"})
    config = first_layers(args.config, args.layers)
    config = with_scheme(config, args.scheme, args.inputs if inputs_given else None)
    length, ids = args.prompt_length, None
    if args.prompt is not None:
        if not args.prompt:
            raise UsageError("--prompt must hold at least one character, found ''")
        if "prompt_length" in args.given:
            raise UsageError("--prompt_length is for random prompts, found --prompt beside it")
        ids = tuple(tokenizer_of(args, config).encode(args.prompt))
        length = len(ids)
    if args.filled + length + args.num_tokens > config.max_context:
        filled = f"{args.filled} + " if args.filled else ""
        raise UsageError(
            f"prompt and new tokens must fit {config.name}'s context of "
            f"{config.max_context} tokens, found {filled}{length} + {args.num_tokens}"
        )
    source, embed, head = stored_source(args, config), args.embed_dtype, args.head_dtype
    if source:
        stored_embed, stored_head = source.tables
        embed, head = embed or stored_embed, head or stored_head
    embed = embed or "int8"
    head = head or (embed if config.tie_embeddings else "int8")
    workload = Workload(
        batch=args.batch,
        prompt_length=length,
        num_tokens=args.num_tokens,
        prompt=args.prompt,
        prompt_ids=ids,
        filled=args.filled,
        kv_dtype=args.kv_dtype,
        embed_dtype=embed,
        head_dtype=head,
        backend=args.backend,
        seed=args.seed,
        profile_dir=args.profile_dir,
    )
    return DecodeRun(
        config,
        workload,
        layers_of=args.config.num_layers,
        flags_text=args.command_line,
        source=source,
        mesh=mesh_flag.mesh_of(args, config, **workload.of_plan),
    )


def tokenizer_of(args, config: ModelConfig) -> Tokenizer:
    """The tokenizer of the model that runs; UsageError where its vocabulary is too small."""
    found = args.source.tokenizer()
    if config.vocab_size < min(found.size, BYTES):
        raise UsageError(
            f"--prompt needs a vocabulary of at least {min(found.size, BYTES)}; "
            f"{config.name} has {config.vocab_size}"
        )
    return found


def stored_source(args, config: ModelConfig) -> Source | None:
    """Where the stored weights of the model that runs are; None where it has none.

    `--config.FIELD` makes another model, whose weights are random. UsageError where the
    flags ask the stored ones to be what they are not.
    """
    source = args.source
    if source.stored is None or source.directory is None or config.name != source.config.name:
        return None
    source.check(
        scheme=config.scheme if args.given & {"scheme", "config.scheme"} else None,
        inputs=config.inputs if args.given & {"inputs", "config.inputs"} else None,
        embed_dtype=args.embed_dtype,
        head_dtype=args.head_dtype,
    )
    return source


def smaller(job: DecodeRun) -> DecodeRun:
    """The same workload on the largest model of the family that fits. DoesNotFit if none does."""

    def workload_for(config):
        if not config.tie_embeddings:
            return job.workload
        return dataclasses.replace(job.workload, head_dtype=job.workload.embed_dtype)

    def plan_of(config):
        config = dataclasses.replace(config, scheme=job.config.scheme, inputs=job.config.inputs)
        return workload_for(config).plan(config, job.device)

    found = cost.largest_that_fits(job.config.family, plan_of)
    if found is None:
        raise DoesNotFit(job.plan.refusal("no other model of its family"))
    return DecodeRun(found.config, workload_for(found.config), flags_text=job.flags_text)


def decode(args) -> None:
    """The command: plan, refuse or go on, measure, say what was found."""
    if args.threads is not None:
        measure.limit_threads(args.threads)
    job, fitted = planned(args), []
    if not job.plan.fits and args.fit == "auto":
        wanted, job = job.plan, smaller(job)
        fitted = [
            row(
                "fit",
                f"{wanted.config.name} needs {binary(wanted.total_bytes)}, available "
                f"{binary(wanted.available_bytes or 0)}; {job.config.name} is the largest of its "
                "family that fits and runs instead",
            )
        ]
    if args.plan_only:
        if args.output_dir:
            with open_store(args.output_dir, "decode", "", "") as store:
                job.plan_only(store)
        show(*fitted, *job.plan.lines(job.whole), *mesh_flag.table(job.layout, job.workload))
    if not job.plan.fits:
        raise DoesNotFit(job.plan.refusal())
    if args.plan_only:
        return
    with open_store(args.output_dir, "decode", job.config.name, job.backend) as store:
        title = (
            f"decode {job.config.name}, batch {job.workload.batch}, context "
            f"{job.workload.context}, backend {job.backend}, on "
            f"{measure.device_name(job.device)}"
        )
        show(row("ternax", title), *fitted, *job.plan.lines(job.whole))
        show(*mesh_flag.table(job.layout, job.workload))
        ways: dict[str, Any] = {"progress": progress}
        if args.prompt is not None:
            ways["listen"] = Voice(args.prompt, tokenizer_of(args, job.config))
            ways["progress"] = _but_decode  # its bar would stand in the text
        job.measure_all(store=store, watch=lambda record: show(*record_lines(record, job)), **ways)
    show(
        f"wrote    {store.directory}/results.json",
        "",
        summary(job.records[-1], job.whole),
        f"next: {next_command(job, args)}",
    )


def show(*lines: str) -> None:
    """At once, also into a pipe: phases take minutes."""
    for line in lines:
        print(line, flush=True)


def _but_decode(name, *rest):
    return contextlib.nullcontext() if name == "decode" else progress(name, *rest)


class Voice:
    """Prints a prompt and what continues it, until the text ends."""

    def __init__(self, prompt: str, tokenizer: Tokenizer):
        self._prompt, self._stop = prompt, tokenizer.stop
        self._next, self._ended = tokenizer.stream(), False

    def __call__(self, ids: list[int]) -> None:
        """The next tokens."""
        text, self._prompt = self._prompt, ""
        head = f"{'text':9}" if text else ""
        for i in ids:
            self._ended = self._ended or i in self._stop
            text += "" if self._ended else self._next(i)
        print(head + printable(text), end="", flush=True)


def record_lines(record: Record, job: DecodeRun) -> list[str]:
    """A phase on screen; nothing for one that was stopped before it had a sample."""
    m, phase = record.metrics, record.phase
    if phase == "plan" and job.bandwidth:
        return [
            row(
                "bound",
                f"{rate(m['bound_tokens_per_s'])} tokens/s at most: "
                f"{job.bandwidth.median:.1f} GB/s read here ({job.bandwidth.method})",
            )
        ]
    if phase == "create" and record.samples:
        return [
            row(
                "create",
                f"{binary(m['weight_bytes'])} of "
                f"{job.source.origin if job.source else 'random weights, packed from birth'}, "
                f"in {m['create_s']:.1f} s",
            )
        ]
    if phase == "compile" and "compile_s" in m:
        return [row("compile", f"{m['compile_s']:.1f} s")]
    if phase == "prefill" and record.samples:
        return [
            row(
                "prefill",
                f"{rate(m['prefill_tokens_per_s'])} tokens/s; first token after "
                f"{rate(m['ttft_ms'])} ms (prompts of {m['prompt_tokens']} tokens)",
            )
        ]
    if phase != "decode" or not record.samples:
        return []
    part = f" through {record.layers} of {job.whole} layers" if record.layers < job.whole else ""
    lines = [
        row(
            "decode",
            f"{rate(m['tokens_per_s'])} tokens/s{part}; {rate(m['tpot_ms_p50'])} ms a "
            f"step (p50), {rate(m['tpot_ms_p99'])} (p99), {len(record.samples)} samples",
        ),
    ]
    if job.workload.prompt is None:
        lines.append(row("tokens", shortened(job.generated)))
    else:
        lines.insert(0, "")  # ends the text
    if "peak_memory_bytes" in m:
        peak, planned = m["peak_memory_bytes"], m["planned_memory_bytes"]
        lines.append(
            row(
                "memory",
                f"{binary(peak)} at peak, planned {binary(planned)} "
                f"({100 * (planned / peak - 1):+.1f} %)",
            )
        )
    return lines


def shortened(generated: list, most: int = 12) -> str:
    """The first row's tokens, the first of them."""
    tokens = [int(token) for rows in generated for token in rows[0]]
    return " ".join(map(str, tokens[:most])) + (" ..." if len(tokens) > most else "")


def summary(record: Record, whole: int) -> str:
    """What was found, in plain words. whole: layers of the whole model."""
    m, subject, caution = record.metrics, f"{record.config} in {record.scheme} decodes", ""
    if record.layers < whole:
        part = "layer" if record.layers == 1 else f"{record.layers} layers"
        verb = "decodes" if record.layers == 1 else "decode"
        subject = f"The first {part} alone of {record.config} in {record.scheme} {verb}"
        caution = f" The model has {whole} layers and is slower."
    return textwrap.fill(
        f"{subject} {rate(m['tokens_per_s'])} tokens/s at batch {record.batch} on this machine: "
        f"{100 * m['share_of_bound']:.1f} % of the {rate(m['bound_tokens_per_s'])} tokens/s that "
        f"reading {decimal(m['bytes_per_step'])} a step at {m['read_bandwidth_gb_per_s']:.1f} GB/s "
        f"allows.{caution}",
        WIDTH,
    )


def next_command(job: DecodeRun, args) -> str:
    """What to try next: the whole model, more rows, another scheme; the first that fits."""
    config, work = job.config, job.workload
    without = {"output_dir", "profile_dir", "fit", "debug", *mesh_flag.OF_PROCESSES}
    if config.name != args.config.name:  # --fit=auto chose another, whole
        without |= {"layers", *(name for name in args.given if name.startswith("config."))}
    # The model, its workload, flags to leave out and flags to set.
    steps: list[tuple[ModelConfig, Workload, set[str], dict]] = []
    if config.num_layers < job.whole:
        whole = dataclasses.replace(config, num_layers=job.whole)
        steps.append((whole, work, {"layers"}, {}))
    if work.batch == 1:
        steps.append((config, dataclasses.replace(work, batch=4), set(), {"batch": 4}))
    if config.scheme != "int8" and not job.source:
        other = dataclasses.replace(config, scheme="int8")
        steps.append((other, work, {"config.scheme"}, {"scheme": "int8"}))
    for model, workload, dropped, changed in steps:
        if workload.plan(model, job.device).fits:
            same = config.name == args.config.name
            named = args.source.name if same else config.name
            return command(args, without | dropped, config=named, **changed)
    return "python -m experiments.doctor"


def command(args, without: set[str], **changed) -> str:
    """The command line again, some flags left out and some changed or added."""
    words = flags.words(args, {"config"} - changed.keys() | without, **changed)
    return shlex.join(["python", "-m", "experiments.decode", *words])


COMMAND = flags.Command(
    name="decode",
    summary="Decodes with a packed model and sets every number beside its bound.",
    groups=(flags.model_flags, decode_flags, mesh_flag.mesh_flags, flags.run_flags),
    examples=(
        ("--config=70b", "all 80 layers of the Llama-3 70B shape, random weights"),
        ("--config=8b --layers=4 --batch=4", "the first 4 layers of 8b, 4 sequences"),
        ("--config=2b4t --scheme=int4,group_size=64", "BitNet's shape under another scheme"),
    ),
    default_config="1b",
    count_parameters=lambda config: cost.count_parameters(config)[0],
)


def main(argv=None) -> int:
    return COMMAND.run(decode, argv)


if __name__ == "__main__":
    sys.exit(main())
