"""Measures one decode run: plan, create, compile, prefill, decode. Every phase is a Record.

Knows no flags; `experiments.decode` is its command line.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

from ternax import decode_metrics, measure, processes
from ternax.checkpoint.box import Source
from ternax.config import ModelConfig
from ternax.errors import DoesNotFit, Interrupted, OutputError, UsageError
from ternax.interrupt import Stop
from ternax.power import power_meter
from ternax.record import Record, Store
from ternax.sharding import layout_for
from ternax.workload import Workload, backend_name, first_device

# A timed call of the device loop lasts about this long: long against the 1 ms a call
# costs the host, short enough that Ctrl-C is answered and samples are many.
_CALL_S = 0.25
# But so many samples at least, where there are tokens enough.
_MIN_SAMPLES = 8
_SLOW_PREFILL_S = 5.0
# On a GPU a step may be shorter than a call's cost: more tokens to a call there.
_DEVICE_CHUNK = 64
# A step is taken to be at most so many times as long as its bound.
_SLOWEST = 8
_PHASES = ("plan", "create", "compile", "prefill", "decode")


def run(
    config: ModelConfig,
    workload: Workload,
    *,
    store: Store | None = None,
    layers_of: int | None = None,
    flags_text: str = "",
    watch=lambda record: None,
    progress=lambda *phase: contextlib.nullcontext(),
) -> list[Record]:
    """Plans, makes, compiles and measures one model.

    Args:
      config: the model, already cut to the layers that run.
      workload: what to decode.
      store: where each Record is appended as soon as it is known.
      layers_of: layers of the whole model, when `config` holds fewer.
      flags_text: the command line, for the records.
      watch: called with each Record.
      progress: (name, total, unit) -> context manager that reports on one long phase.

    Raises:
      UsageError, OutputError, DoesNotFit: before anything is allocated.
      Interrupted: after what was measured is appended, marked incomplete.
    """
    job = DecodeRun(config, workload, layers_of=layers_of, flags_text=flags_text)
    return job.measure_all(store=store, watch=watch, progress=progress)


class DecodeRun:
    """One run: planned and checked when made, then measured.

    Each phase has a method that samples and one that makes its Record. Ctrl-C is answered
    between device calls, where `stop.check()` raises: no call is cut in two, and what the
    phase has sampled by then is kept.

    Attributes:
      config, workload: the model that runs and what it does.
      flags_text: the command line.
      source: of stored weights, or None where they are random.
      layout: how the model lies on a mesh; None on one device.
      whole: layers of the whole model.
      device: the JAX device that runs.
      backend: the name of the kernel backend that runs.
      common: fields that all records share.
      plan: what the run needs.
      bandwidth: measured in the plan phase, before anything is allocated.
      generated: int32 [B, n] each, the new tokens in order.
      records: what is known so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        workload: Workload,
        *,
        layers_of: int | None = None,
        flags_text: str = "",
        source: Source | None = None,
        mesh: str | None = None,
        model: Any = None,
    ):
        """source: of stored weights; None draws them. mesh: see `engine.load`. model: a Decoder
        made before, of this config and the workload's tables; none is made then.

        Raises what `run` raises, but for DoesNotFit: `plan.fits` tells.
        """
        self.config, self.workload, self.flags_text = config, workload, flags_text
        self.source = source if source and source.directory else None
        self.whole = layers_of or config.num_layers
        self.device = first_device()
        self.layout = layout_for(mesh, config)
        devices = self.layout.mesh.size if self.layout else 1
        # Devices whose bytes lie in the memory that is planned, measured and read here.
        self._sharing = measure.sharing(self.device) if self.layout else 1
        name = measure.device_name(self.device)
        self.common = dict(
            experiment="decode",
            config=config.name,
            scheme=config.scheme,
            inputs=config.inputs,
            device=f"{devices} x {name}" if devices > 1 else name,
            layers=config.num_layers,
            batch=workload.batch,
            context=workload.context,
            seed=workload.seed,
            flags=flags_text,
        )
        if workload.filled and self.layout:
            raise UsageError("a cache that begins filled is on one device: leave out --mesh")
        self._model = model
        if workload.backend is not None:
            backend_name(workload.backend, self.device)  # now, if it cannot run
        self.plan = workload.plan(config, self.device, self.layout)
        if workload.profile_dir and self.plan.fits:
            _check_directory("profile_dir", workload.profile_dir)
        self.bandwidth: measure.Bandwidth | None = None
        self.records: list[Record] = []
        self.generated: list = []
        self._store: Store | None = None
        self._watch = lambda record: None
        self._samples: list[float] = []
        self._state = None
        self._peak_before = 0

    def measure_all(
        self,
        *,
        store: Store | None = None,
        watch=lambda record: None,
        progress=lambda *phase: contextlib.nullcontext(),
        listen: Callable[[list[int]], None] = lambda ids: None,
    ) -> list[Record]:
        """All phases; see `run`. listen: hears the first row's tokens, between the timed calls."""
        if not self.plan.fits:
            raise DoesNotFit(self.plan.refusal())
        self._store, self._watch, self._progress = store, watch, progress
        self._listen = listen
        with Stop() as self._stop:
            for phase in _PHASES:
                self._samples, stopped = [], False
                try:
                    getattr(self, f"_sample_{phase}")()
                except KeyboardInterrupt:
                    stopped = True
                getattr(self, f"_keep_{phase}")(stopped)
                if stopped:
                    place = f" in {store.directory}" if store else ""
                    raise Interrupted(
                        f"interrupted during {phase}; {len(self.records)} records kept{place}, "
                        "the last marked incomplete"
                    )
        return self.records

    @functools.cached_property
    def backend(self) -> str:
        """The kernel backend that runs. Its first use here may build it, which a plan need not."""
        return backend_name(self.workload.backend, self.device)

    def plan_only(self, store: Store) -> None:
        """The plan's Record and no more."""
        self._store, self.backend = store, self.workload.backend or ""
        self._keep_plan(stopped=False)

    def _keep(self, phase, metrics, stopped, notes=(), *, unit="s", kind="measured"):
        """Makes a Record of what was sampled and appends it at once."""
        if self.config.num_layers < self.whole:
            notes = [f"first {self.config.num_layers} of {self.whole} layers", *notes]
        if self.workload.filled:
            notes = [*notes, f"{self.workload.filled} slots of the cache began filled"]
        if self.layout:
            metrics = {"devices": self.layout.mesh.size, **metrics}
            notes = [f"mesh {self.layout}: planned bytes are one device's", *notes]
        record = Record(
            phase=phase,
            kind=kind,
            samples=tuple(self._samples),
            sample_unit=unit,
            metrics=metrics,
            incomplete=stopped,
            backend=self.backend,
            note="; ".join(notes),
            **self.common,
        )
        self.records.append(record)
        if self._store:
            self._store.append(record)
        self._watch(record)

    def _peak(self) -> dict[str, int]:
        """The most memory held since the plan phase, where that is known."""
        found = measure.peak_resident_bytes(self.device)
        if found is None or found <= self._peak_before:
            return {}
        return {"peak_memory_bytes": found}

    def _read_bandwidth(self) -> measure.Bandwidth:
        return measure.read_bandwidth(seconds=0.5, device=self.device)

    def _sample_plan(self):
        self._stop.check()
        self.bandwidth = self._read_bandwidth()
        # The buffer just freed must not count as the model's memory.
        if not (measure.reset_peak() and measure.on_host(self.device)):
            self._peak_before = measure.peak_resident_bytes(self.device) or 0

    def _keep_plan(self, stopped):
        read = {"read_bandwidth_gb_per_s": self.bandwidth.median} if self.bandwidth else {}
        share = self.bandwidth.median / self._sharing if self.bandwidth else None
        metrics = decode_metrics.of_plan(self.plan, share) | read
        self._keep("plan", metrics, stopped, kind="predicted", unit="")

    def _sample_create(self):
        from ternax.engine import load_stored
        from ternax.random_weights import random_model

        self._stop.check()
        if self._model is not None:
            return
        start = time.perf_counter()
        with self._progress("create", self.plan.weight_bytes, "bytes") as advance:

            def done(name, nbytes):
                if advance:
                    advance(nbytes)
                self._stop.check()

            packing = dict(
                embed_dtype=self.workload.embed_dtype,
                head_dtype=self.workload.head_dtype,
                backend=self.workload.backend,
                progress=done,
            )
            if self.source:
                config = self.config
                self._model = load_stored(
                    self.source,
                    scheme=config.scheme,
                    inputs=config.inputs,
                    layers=config.num_layers,
                    mesh=self.layout.mesh if self.layout else None,
                    **packing,
                )
            else:
                self._model = random_model(
                    self.config, seed=self.workload.seed, layout=self.layout, **packing
                )
        self._samples.append(time.perf_counter() - start)

    def _keep_create(self, stopped):
        metrics = self._peak()
        if self._samples:
            metrics |= decode_metrics.of_create(self.plan, self._samples[0])
        self._keep("create", metrics, stopped, [self.source.origin] if self.source else [])

    def _sample_compile(self):
        from ternax.engine import CHUNK_TOKENS
        from ternax.steps import Steps

        most = CHUNK_TOKENS if measure.on_host(self.device) else _DEVICE_CHUNK
        self._steps = Steps(self._model, self.workload, most)
        with self._progress("compile", None, "s"):
            for compile_one in (self._steps.compile_prefill, self._steps.compile_decode):
                self._stop.check()
                start = time.perf_counter()
                compile_one()
                self._samples.append(time.perf_counter() - start)

    def _keep_compile(self, stopped):
        metrics = self._peak()
        if len(self._samples) == 2:
            metrics["compile_s"] = sum(self._samples)
        self._keep("compile", metrics, stopped, ["samples: prefill, decode"])

    def _sample_prefill(self):
        import jax

        from ternax.sharding import fetch

        def once():
            self._stop.check()
            cache = jax.block_until_ready(self._steps.new_cache(of=self._state))
            start = time.perf_counter()
            self._state = self._steps.prefill(cache)
            self.generated = [fetch(self._state.token)[:, None]]
            return time.perf_counter() - start

        with self._progress("prefill", None, "s"):
            self._cold_s = once()
            # Clocks differ, and a step that not all processes take waits for ever.
            (count,) = processes.of_first([1 if self._cold_s > _SLOW_PREFILL_S else 5])
            for _ in range(count):
                self._samples.append(once())

    def _keep_prefill(self, stopped):
        work, notes = self.workload, []
        metrics = {"prompt_tokens": work.prompt_length, **self._peak()}
        if self._samples:
            metrics |= decode_metrics.of_prefill(self._samples, work.batch, work.prompt_length)
            notes.append(f"warm; the cold first run took {self._cold_s:.3g} s")
        self._keep("prefill", metrics, stopped, notes)

    def _sample_decode(self):
        import jax

        self._decoded, self._timed_s, self._chunk = 0, 0.0, 1
        self._power = power_meter()

        def call(steps):
            self._stop.check()
            start = time.perf_counter()
            out, self._state = self._steps.decode(self._state, steps)
            self.generated.append(out)
            seconds = (time.perf_counter() - start) / steps
            self._listen(self.generated[-1][0].tolist())
            return seconds

        self._listen(self.generated[-1][0].tolist())  # what prefill drew
        # The first step is the warm-up: same program, not counted.
        warm_s = call(1)
        left, directory = self.workload.num_tokens - 2, self.workload.profile_dir
        assert self.bandwidth is not None
        # A GPU loads a program's kernels at its first call, which says little of a step then.
        bound = self.plan.bound_tokens_per_s(self.bandwidth.median / self._sharing)
        step_s = min(warm_s, _SLOWEST * self.workload.batch / bound)
        most = self._steps.chunk
        chunk = max(1, min(left // _MIN_SAMPLES, most, round(_CALL_S / step_s)))
        (self._chunk,) = processes.of_first([chunk])
        profile = jax.profiler.trace(directory) if directory else contextlib.nullcontext()
        with profile, self._power, self._progress("decode", left, "tokens") as advance:
            while self._decoded < left:
                steps = min(self._chunk, left - self._decoded)
                self._samples.append(call(steps))
                self._decoded += steps
                self._timed_s += steps * self._samples[-1]
                if advance:
                    advance(steps)

    def _keep_decode(self, stopped):
        planned = self.plan.bytes_of(self._sharing)
        metrics = {"planned_memory_bytes": planned, **self._peak()}
        metrics["generated_tokens"] = sum(part.shape[1] for part in self.generated)
        notes = []
        if self._samples:
            found = [self.bandwidth] if stopped else [self.bandwidth, self._read_bandwidth()]
            metrics |= self._speed([rate for b in found for rate in b.samples_gb_per_s])
            medians = ", ".join(f"{b.median:.3g}" for b in found)
            notes += [f"read bandwidth before and after: {medians} GB/s", self._power.note]
        if self._chunk > 1:
            notes.append(f"a sample is the mean of a device loop of up to {self._chunk} tokens")
        if self.workload.profile_dir:
            notes.append("profiled, which takes time")
        self._keep("decode", metrics, stopped, notes, unit="s/token")

    def _speed(self, bandwidths_gb_per_s: list[float]) -> dict[str, float]:
        """The metrics that follow from the samples of decode steps and of read bandwidth."""
        # What a row holds in the middle of the timed steps, the new token included.
        work = self.workload
        context = work.filled + work.prompt_length + 1 + (self._decoded + 1) / 2
        metrics = decode_metrics.of_decode(
            self.plan, self._samples, bandwidths_gb_per_s, context, self._sharing
        )
        tokens = self._decoded * self.workload.batch
        return metrics | self._power.metrics(tokens=tokens, seconds=self._timed_s)


def _check_directory(flag: str, directory: str) -> None:
    """Makes it; raises OutputError now rather than after the measurement."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--{flag}: {directory} cannot be used: {error.strerror}") from error
