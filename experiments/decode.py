"""How fast does it decode, and how close is that to the limit?

    python -m experiments.decode --config=70b

Plans, measures this machine's read bandwidth, makes the packed model in place,
compiles, warms up, then times prefill and decode. Every phase is a Record.
"""

import contextlib
import dataclasses
import sys
import time

from ternax import measure
from ternax.config import ModelConfig
from ternax.errors import BackendUnavailable, DoesNotFit, Interrupted, UsageError
from ternax.experiments import flags
from ternax.experiments.progress import progress
from ternax.record import Record, Store, open_store

GIB = 2**30
# A timed call of the device loop lasts about this long: long against the 1 ms a call
# costs the host, short enough that Ctrl-C is answered and samples are many.
_CALL_S = 0.25
# But so many samples at least, where there are tokens enough.
_MIN_SAMPLES = 8
_SLOW_PREFILL_S = 5.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
      batch: rows decoded together.
      prompt_length: tokens of each prompt.
      num_tokens: new tokens a row, the first of which prefill draws.
      prompt: text, one token a byte, instead of random tokens.
      kv_dtype, embed_dtype, head_dtype: how cache and tables are stored.
      backend: a kernel backend by name, or None.
      seed: of weights and prompt.
      profile_dir: where a profile of the timed decode goes, or None.
    """

    batch: int = 1
    prompt_length: int = 16
    num_tokens: int = 16
    prompt: str | None = None
    kv_dtype: str = "bf16"
    embed_dtype: str = "int8"
    head_dtype: str = "int8"
    backend: str | None = None
    seed: int = 0
    profile_dir: str | None = None

    @property
    def context(self) -> int:
        return self.prompt_length + self.num_tokens


def run(config: ModelConfig, workload: Workload, *, store: Store | None = None, layers_of: int | None = None,
        flags_text: str = "", show=lambda line: None, progress=contextlib.nullcontext) -> list[Record]:
    """Plans, makes, compiles and measures one model.

    Args:
      config: the model, already cut to the layers that run.
      workload: what to decode.
      store: where each Record is appended as soon as it is known.
      layers_of: layers of the whole model, when `config` holds fewer.
      flags_text: the command line, for the records.
      show: takes each line for the screen.
      progress: makes a context manager that reports on one long phase.

    Raises:
      DoesNotFit: before anything is allocated.
      Interrupted: after what was measured is appended, marked incomplete.
    """
    return _Run(config, workload, store, layers_of, flags_text, show, progress).all()


class _Run:
    """One measurement; each method is a phase and ends in a Record."""

    def __init__(self, config, workload, store, layers_of, flags_text, show, progress):
        import jax

        from ternax.kernels import backends

        self.config, self.workload, self.store = config, workload, store
        self.show, self.progress = show, progress
        self.device = jax.devices()[0]
        try:
            backend = backends.choose(self.device.platform, name=workload.backend)
        except backends.BackendError as error:
            raise BackendUnavailable(f"--backend: {error}") from error
        where = measure.cpu_model() if self.device.platform == "cpu" else self.device.device_kind
        threads = f", {measure.threads_available()} threads" if self.device.platform == "cpu" else ""
        self.common = dict(
            experiment="decode", config=config.name, scheme=config.scheme, inputs=config.inputs,
            backend=backend.name, device=f"{where}{threads}", layers=config.num_layers,
            batch=workload.batch, context=workload.context, seed=workload.seed, flags=flags_text)
        whole = layers_of or config.num_layers
        self.note = "" if whole == config.num_layers else f"first {config.num_layers} of {whole} layers"
        self.records: list[Record] = []
        self.bandwidth: list[float] = []
        self.plan = make_plan(config, workload, self.device)

    def all(self) -> list[Record]:
        self.record_plan()
        if not self.plan.fits:
            raise DoesNotFit(refusal(self.plan))
        self.measure_bandwidth()
        for phase in (self.create, self.compile, self.prefill, self.decode):
            try:
                phase()
            except KeyboardInterrupt:
                self.keep(phase.__name__, "measured", [], "s", {}, incomplete=True)
                done = len(self.records)
                raise Interrupted(f"interrupted during {phase.__name__}; {done} records kept, "
                                  "the last marked incomplete") from None
        return self.records

    def keep(self, phase, kind, samples, unit, metrics, *, incomplete=False, note=""):
        """Makes a Record and appends it at once."""
        notes = "; ".join(text for text in (self.note, note) if text)
        record = Record(phase=phase, kind=kind, samples=tuple(samples), sample_unit=unit, metrics=metrics,
                        incomplete=incomplete, note=notes, **self.common)
        self.records.append(record)
        if self.store:
            self.store.append(record)

    def record_plan(self):
        plan = self.plan
        metrics = dict(
            planned_memory_bytes=plan.total_bytes, weight_bytes=plan.weight_bytes,
            cache_bytes=plan.bytes["cache"], bytes_per_step=plan.bytes_per_step,
            parameters=plan.parameters, ternary_parameters=plan.ternary_parameters,
            bits_per_weight=plan.bits_per_weight)
        if plan.available_bytes is not None:
            metrics["available_memory_bytes"] = plan.available_bytes
        for line in plan_lines(plan):
            self.show(line)
        self.keep("plan", "predicted", [], "", metrics)

    def measure_bandwidth(self):
        found = measure.read_bandwidth(seconds=0.5, device=self.device)
        self.bandwidth += found.samples_gb_per_s
        if len(self.records) == 1:
            bound = self.plan.bound_tokens_per_s(found.median)
            self.show(f"bound    {found.median:.1f} GB/s read here ({found.method}); "
                      f"{bound:.3g} tokens/s at most")
        # The buffer just freed must not count as the model's memory.
        measure.reset_peak()

    def create(self):
        from ternax.random_weights import random_model

        work = self.workload
        start = time.perf_counter()
        with self.progress("create", self.plan.weight_bytes, "bytes") as advance:
            self.model = random_model(
                self.config, seed=work.seed, embed_dtype=work.embed_dtype, head_dtype=work.head_dtype,
                backend=work.backend, progress=lambda name, nbytes: advance and advance(nbytes))
        seconds = time.perf_counter() - start
        self.keep("create", "measured", [seconds], "s", dict(
            create_s=seconds, weight_bytes=self.plan.weight_bytes,
            gb_per_s=self.plan.weight_bytes / seconds / 1e9, **self.peak()))
        self.show(f"create   {self.plan.weight_bytes / GIB:.2f} GiB packed in {seconds:.1f} s, "
                  f"{TRIT_NOTE if self.plan.bits_per_weight < 4 else 'random codes'}")

    def compile(self):
        import jax.numpy as jnp
        from flax import nnx

        from ternax import engine
        from ternax.nn.cache import init_cache

        work = self.workload
        graph, self.leaves = nnx.split(self.model)
        self.program = engine.Program(graph)
        self.tokens = jnp.asarray(prompt_tokens(self.config, work))
        self.keys = engine.row_keys(work.seed, work.batch)
        self.new_cache = lambda: init_cache(self.config, work.batch, work.context, work.kv_dtype)
        start = time.perf_counter()
        with self.progress("compile", None, "s"):
            cache = self.new_cache()
            lowered = engine.prefill.lower(self.program, self.leaves, self.tokens, cache, self.keys)
            self.run_prefill = lowered.compile()
            prefill_s = time.perf_counter() - start
            token = jnp.zeros((work.batch,), jnp.int32)
            state = engine.DecodeState(cache, token, token > 0, self.keys)
            lowered = engine.decode.lower(self.program, self.leaves, state, jnp.int32(1))
            self.run_decode = lowered.compile()
        seconds = time.perf_counter() - start
        self.keep("compile", "measured", [prefill_s, seconds - prefill_s], "s", dict(
            compile_s=seconds, **self.peak()), note="samples: prefill, decode")
        self.show(f"compile  {seconds:.1f} s")

    def prefill(self):
        import jax

        def once():
            cache = jax.block_until_ready(self.new_cache())
            start = time.perf_counter()
            self.state = self.run_prefill(self.leaves, self.tokens, cache, self.keys)
            self.first_token = jax.device_get(self.state.token)
            return time.perf_counter() - start

        samples: list[float] = []
        try:
            with self.progress("prefill", None, "s"):
                cold = once()
                for _ in range(1 if cold > _SLOW_PREFILL_S else 5):
                    samples.append(once())
        except KeyboardInterrupt:
            if samples:
                self.keep_prefill(samples, cold, incomplete=True)
            raise
        self.keep_prefill(samples, cold)

    def keep_prefill(self, samples, cold, *, incomplete=False):
        seconds = measure.percentile(samples, 50)
        tokens = self.workload.batch * self.workload.prompt_length
        self.keep("prefill", "measured", samples, "s", dict(
            ttft_ms=1e3 * seconds, prefill_tokens_per_s=tokens / seconds,
            prompt_tokens=self.workload.prompt_length, **self.peak()),
            incomplete=incomplete, note=f"warm; the cold first run took {cold:.3g} s")
        self.show(f"prefill  {tokens / seconds:.4g} tokens/s over {self.workload.prompt_length} tokens, "
                  f"time to first token {1e3 * seconds:.4g} ms (cold {1e3 * cold:.4g})")

    def decode(self):
        import jax
        import jax.numpy as jnp

        left = self.workload.num_tokens - 1
        self.generated = [self.first_token[:, None]]

        def call(steps):
            start = time.perf_counter()
            out, self.state = self.run_decode(self.leaves, self.state, jnp.int32(steps))
            self.generated.append(jax.device_get(out)[:, :steps])
            return (time.perf_counter() - start) / steps

        # The first token is the warm-up: same program, not counted.
        warm = call(1)
        left -= 1
        chunk = max(1, min(left // _MIN_SAMPLES, 16, round(_CALL_S / warm)))
        samples: list[float] = []
        self.decode_s = 0.0
        profile = jax.profiler.trace(self.workload.profile_dir) if self.workload.profile_dir else None
        try:
            with (profile or contextlib.nullcontext(), measure.energy_meter() as energy,
                  self.progress("decode", left, "tokens") as advance):
                while left > 0:
                    steps = min(chunk, left)
                    samples.append(call(steps))
                    left -= steps
                    self.decode_s += steps * samples[-1]
                    if advance:
                        advance(steps)
        except KeyboardInterrupt:
            if samples:
                self.keep_decode(samples, chunk, energy, incomplete=True)
            raise
        self.keep_decode(samples, chunk, energy)

    def keep_decode(self, samples, chunk, energy, *, incomplete=False):
        peak = self.peak()
        self.measure_bandwidth()
        bandwidth = measure.percentile(self.bandwidth, 50)
        seconds = measure.percentile(samples, 50)
        rate = self.workload.batch / seconds
        bound = self.plan.bound_tokens_per_s(bandwidth)
        metrics = dict(
            tokens_per_s=rate, bound_tokens_per_s=bound, share_of_bound=rate / bound,
            tpot_ms_p50=1e3 * seconds, tpot_ms_p99=1e3 * measure.percentile(samples, 99),
            bytes_per_step=self.plan.bytes_per_step, read_bandwidth_gb_per_s=bandwidth,
            planned_memory_bytes=self.plan.total_bytes,
            generated_tokens=sum(part.shape[1] for part in self.generated), **peak)
        if energy.joules is not None:
            metrics["joules"] = energy.joules
            steps = sum(part.shape[1] for part in self.generated[2:])
            metrics["joules_per_token"] = energy.joules / (steps * self.workload.batch)
            metrics["watts"] = energy.joules / self.decode_s
        note = "" if chunk == 1 else f"each sample is the mean over a device loop of up to {chunk} tokens"
        self.keep("decode", "measured", samples, "s/token", metrics, incomplete=incomplete, note=note)
        self.show(f"decode   {rate:.4g} tokens/s; {1e3 * seconds:.4g} ms a token (p50), "
                  f"{metrics['tpot_ms_p99']:.4g} (p99), {len(samples)} samples")
        tokens = [int(token) for part in self.generated for token in part[0]]
        self.show(f"tokens   {decoded(tokens, self.workload)}")
        if peak:
            planned, found = self.plan.total_bytes, peak["peak_memory_bytes"]
            self.show(f"memory   {found / GIB:.2f} GiB at peak, planned {planned / GIB:.2f} "
                      f"({100 * (planned / found - 1):+.1f} %)")

    def peak(self) -> dict[str, int]:
        found = measure.peak_resident_bytes(self.device)
        return {} if found is None else {"peak_memory_bytes": found}


TRIT_NOTE = "random trits, 11/16 of them non-zero"


def make_plan(config: ModelConfig, workload: Workload, device=None):
    """The plan of this workload on this machine."""
    from ternax.cost import plan

    free = measure.memory_available_bytes(device)
    resident = measure.resident_bytes(device) or 0
    return plan(config, batch=workload.batch, context=workload.context, prompt=workload.prompt_length,
                kv_dtype=workload.kv_dtype, embed_dtype=workload.embed_dtype,
                head_dtype=workload.head_dtype, available_bytes=None if free is None else free + resident)


def prompt_tokens(config: ModelConfig, workload: Workload):
    """int32 [B, T]: the prompt's bytes, or random tokens from the seed."""
    import numpy as np

    if workload.prompt is not None:
        row = np.frombuffer(workload.prompt.encode(), np.uint8).astype(np.int32)
        return np.tile(row, (workload.batch, 1))
    random = np.random.default_rng(workload.seed)
    shape = (workload.batch, workload.prompt_length)
    return random.integers(0, config.vocab_size, shape, dtype=np.int32)


def decoded(tokens: list[int], workload: Workload, most: int = 12) -> str:
    """The first row's tokens on screen: ids, or with --prompt their bytes as text."""
    if workload.prompt is not None:
        text = bytes(token for token in tokens if token < 256).decode(errors="replace")
        return f"{text!r} ({sum(token >= 256 for token in tokens)} of {len(tokens)} are not bytes)"
    return " ".join(map(str, tokens[:most])) + (" ..." if len(tokens) > most else "")


def plan_lines(plan) -> list[str]:
    """The plan on screen: bytes by part, and what a step reads."""
    parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in plan.bytes.items() if size >= GIB / 200)
    free = "unknown" if plan.available_bytes is None else f"{plan.available_bytes / GIB:.2f} GiB"
    return [
        f"plan     {plan.config.name}: {plan.parameters:,} parameters, {plan.ternary_parameters:,} in "
        f"{plan.config.scheme} at {plan.bits_per_weight:.3g} bits",
        f"         {parts}",
        f"         = {plan.total_bytes / GIB:.2f} GiB; available {free}: "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}",
        f"         a decode step reads {plan.bytes_per_step / 1e9:.3f} GB (batch {plan.batch}, "
        f"context {plan.context})",
    ]


def refusal(plan) -> str:
    """One line: the need, what is there, what would fit."""
    from ternax.cost import MARGIN_BYTES

    need, free = plan.total_bytes + MARGIN_BYTES, plan.available_bytes
    per_layer = (plan.bytes["projections"] + plan.bytes["scales"] + plan.bytes["cache"]) / plan.config.num_layers
    layers = plan.config.num_layers - int(-(-(need - free) // per_layer))
    layered = f"--layers={layers} (part of the model), " if layers >= 1 else ""
    return (f"{plan.config.name} needs {need / GIB:.2f} GiB with a margin of {MARGIN_BYTES / GIB:.2f}, "
            f"available {free / GIB:.2f}; would fit: {layered}--fit=auto (a smaller model); "
            "or --plan_only")


def largest_that_fits(config: ModelConfig, workload: Workload) -> ModelConfig | None:
    """The named model of the same family with the most parameters that fits, or None."""
    from ternax.configs import CONFIGS
    from ternax.cost import count_parameters

    smaller = [c for c in CONFIGS.values() if c.family == config.family]
    for candidate in sorted(smaller, key=lambda c: -count_parameters(c)[0]):
        candidate = dataclasses.replace(candidate, scheme=config.scheme, inputs=config.inputs)
        tied = {"head_dtype": workload.embed_dtype} if candidate.tie_embeddings else {}
        short_enough = workload.context <= candidate.max_context
        if short_enough and make_plan(candidate, dataclasses.replace(workload, **tied)).fits:
            return candidate
    return None


def summary(records: list[Record], whole: int) -> list[str]:
    """What was found, in a plain sentence, and the next command."""
    record = next(r for r in records if r.phase == "decode")
    m = record.metrics
    part = "" if record.layers == whole else f", {record.layers} of its {whole} layers,"
    return [
        f"{record.config}{part} in {record.scheme} decodes {m['tokens_per_s']:.3g} tokens/s at batch "
        f"{record.batch} on this machine:",
        f"{100 * m['share_of_bound']:.1f} % of the {m['bound_tokens_per_s']:.3g} tokens/s that reading "
        f"{m['bytes_per_step'] / 1e9:.2f} GB a token at {m['read_bandwidth_gb_per_s']:.1f} GB/s allows.",
        f"next: python -m experiments.decode --config={record.config.partition('(')[0]} --batch=4",
    ]


def decode_flags(define):
    from ternax.nn.cache import KV_DTYPES
    from ternax.nn.table import TABLE_FORMATS

    define.section("Decode")
    define.string("prompt", None, "text to continue, one token a byte", default_text="random tokens")
    define.integer("prompt_length", 16, "tokens of each random prompt", lower=1)
    define.integer("num_tokens", 16, "new tokens a sequence; the first comes from prefill, the "
                   "second warms up", lower=3)
    define.integer("batch", 1, "sequences decoded together", lower=1)
    define.choice("kv_dtype", "bf16", KV_DTYPES, "how the KV cache is stored")
    define.choice("embed_dtype", "int8", TABLE_FORMATS, "how the embedding table is stored")
    define.choice("head_dtype", None, TABLE_FORMATS, "how the head is stored",
                  default_text="int8; tied: as embed_dtype")
    define.string("backend", None, "kernel backend", form="NAME", default_text="fastest that can run")
    define.boolean("plan_only", "print the plan and stop")
    define.choice("fit", "refuse", ("refuse", "auto"), "a model that does not fit: refuse it, or take "
                  "the largest of its family that does")


def decode(args) -> None:
    """The command: plan, refuse or go on, measure, print."""
    if args.threads is not None:
        measure.limit_threads(args.threads)
    from ternax.engine import first_layers, with_scheme

    whole = args.config.num_layers
    inputs = args.inputs if "inputs" in args.given or "config.inputs" in args.given else None
    config = with_scheme(first_layers(args.config, args.layers), args.scheme, inputs)
    if args.prompt is not None and not args.prompt:
        raise UsageError("--prompt must hold at least one character, found ''")
    length = len(args.prompt.encode()) if args.prompt else args.prompt_length
    head = args.head_dtype or (args.embed_dtype if config.tie_embeddings else "int8")
    workload = Workload(
        batch=args.batch, prompt_length=length, num_tokens=args.num_tokens, prompt=args.prompt,
        kv_dtype=args.kv_dtype, embed_dtype=args.embed_dtype, head_dtype=head, backend=args.backend,
        seed=args.seed, profile_dir=args.profile_dir)
    if workload.context > config.max_context:
        raise UsageError(f"prompt and new tokens must fit {config.name}'s context of {config.max_context}, "
                         f"found {workload.prompt_length} + {workload.num_tokens}")
    if args.prompt and config.vocab_size < 256:
        raise UsageError(f"--prompt needs a vocabulary of at least 256 bytes, found {config.vocab_size}")
    if args.plan_only:
        plan = make_plan(config, workload)
        print("\n".join(plan_lines(plan)))
        if not plan.fits:
            raise DoesNotFit(refusal(plan))
        return
    if args.fit == "auto" and not (plan := make_plan(config, workload)).fits:
        print("\n".join(plan_lines(plan)))
        smaller = largest_that_fits(config, workload)
        if smaller is None:
            raise DoesNotFit(refusal(plan))
        print(f"fit      {config.name} does not fit; {smaller.name} is the largest of its family that does")
        config, whole = smaller, smaller.num_layers
        if config.tie_embeddings:
            workload = dataclasses.replace(workload, head_dtype=workload.embed_dtype)
    backend = args.backend or "auto"
    with open_store(args.output_dir, "decode", config.name, backend) as store:
        print(f"ternax decode  {config.name}  {config.scheme}  layers {config.num_layers}  batch "
              f"{workload.batch}  context {workload.context}")
        records = run(config, workload, store=store, layers_of=whole, flags_text=args.command_line,
                      show=lambda line: print(line, flush=True), progress=progress)
    print()
    print("\n".join(summary(records, whole)))
    print(f"wrote    {store.directory}/results.json")


COMMAND = flags.Command(
    name="decode",
    summary="Decodes with a packed model and sets every number beside its bound.",
    groups=(flags.model_flags, decode_flags, flags.run_flags),
    examples=(
        ("--config=70b", "all 80 layers of the Llama-3 70B shape, random weights"),
        ("--config=8b --layers=4 --batch=4", "the first 4 layers of 8b, 4 sequences"),
        ("--config=2b4t --scheme=int4,group_size=64", "BitNet's shape under another scheme"),
    ),
    default_config="1b",
)


def main(argv=None) -> int:
    return COMMAND.run(decode, argv)


if __name__ == "__main__":
    sys.exit(main())
