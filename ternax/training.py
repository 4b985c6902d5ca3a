"""One training run in one folder: claimed, resumed, saved, stopped, recorded.

folder/run.json          what is trained and how; a resume must ask for the same
folder/metrics.jsonl     a line each report
folder/checkpoints/      states, the newest few
folder/model, float/     the end: packed, and the float weights it was packed from
"""

import dataclasses
import json
import os
import pathlib
import signal
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import ternax
from ternax import cost, data, edit, engine, processes, watchdog
from ternax.checkpoint import manifest
from ternax.checkpoint.training import TrainCheckpoints
from ternax.config import ModelConfig, config_from_dict
from ternax.errors import (
    BadModelFile,
    Diverged,
    DoesNotFit,
    Interrupted,
    Preempted,
    UsageError,
)
from ternax.interrupt import Stop
from ternax.machine import on_host, peak_resident_bytes, reset_peak, resident_bytes, sharing
from ternax.measure import device_name, memory_available_bytes
from ternax.models import Decoder
from ternax.placement import Placement
from ternax.random_weights import abstract_model
from ternax.record import Record
from ternax.run_folder import append_line, claimed, cut_metrics, differences
from ternax.table import binary
from ternax.train import Progress, Trainer, TrainSpec, abstract_state


@dataclasses.dataclass
class TrainRun:
    """What is trained, on what, how, and where it is kept.

    Attributes:
      config: the model; its scheme is what it is trained under.
      spec: how.
      corpus: the text.
      directory: the run's folder; one run at a time.
      save_every, keep: steps between two checkpoints, and how many stay.
      log_every: steps between two reports.
      start: a folder of saved float weights to train on, in place of random ones.
      teacher: a source for `ternax.load(packed=False)`, where the spec distills.
      flags_text: the command line, for records.
      placement: on which devices; None: all that divide the batch. A run may go on elsewhere.
    """

    config: ModelConfig
    spec: TrainSpec
    corpus: data.Corpus
    directory: pathlib.Path
    save_every: int = 500
    keep: int = 3
    log_every: int = 20
    start: str | None = None
    teacher: str | None = None
    flags_text: str = ""
    placement: Placement | None = None

    def run(
        self,
        *,
        ready: Callable[[Trainer], None] = lambda trainer: None,
        watch: Callable[[Progress], None] = lambda progress: None,
    ) -> tuple[Decoder, list[Record]]:
        """Trains from the newest checkpoint, or from the start, to the last step.

        Args:
          ready: called when everything is compiled and restored.
          watch: takes each report.

        Returns:
          The trained float model and the run's Records (compile and train).

        Raises:
          UsageError: the folder belongs to another run, or one is going on in it.
          DoesNotFit: the step needs more memory than is available.
          Diverged: a loss that is not finite; checkpoints before it stay.
          Preempted, Interrupted: SIGTERM, Ctrl-C; what was done is saved.
        """
        check_corpus(self.config, self.spec, self.corpus)
        with claimed(self.directory), Stop(signal.SIGINT, signal.SIGTERM) as stop:
            if processes.is_first():
                self._check_same()
            trainer = self._trainer()
            with TrainCheckpoints(self.directory / "checkpoints", keep=self.keep) as checkpoints:
                self._resume(trainer, checkpoints)
                ready(trainer)
                return self._advance(trainer, checkpoints, stop, watch)

    def finished(self) -> bool:
        """Whether the folder holds the models of this run at its end.

        Raises:
          UsageError: the folder belongs to another run.
        """
        if not (self.directory / "run.json").exists():
            return False
        self._check_same()
        last = "model" if edit.packs(abstract_model(self.config, packed=False)) else "float"
        return (self.directory / last / "manifest.json").exists()

    @property
    def trained_tokens(self) -> int | None:
        """Targets of the whole training, that of `start` too; None where nobody told those."""
        if self.start is None:
            return self.spec.tokens
        known = manifest.is_saved_model(self.start)
        before = manifest.read(self.start).trained_tokens if known else None
        return None if before is None else before + self.spec.tokens

    def _trainer(self) -> Trainer:
        self._check_memory()
        if self.start is None and self.placement is not None:
            model = self.placement.model(self.config, self.spec.seed)
        elif self.start is None:
            model = engine.load(self.config, packed=False, seed=self.spec.seed)
        else:
            model = engine.load(
                self.start,
                scheme=self.config.scheme,
                packed=False,
                layers=self.config.num_layers,
            )
        teacher = engine.load(self.teacher, packed=False) if self.teacher else None
        available = memory_available_bytes(jax.local_devices()[0])
        if available is not None and self.placement is not None:
            available //= sharing(jax.local_devices()[0])
        return Trainer(
            model,
            self.spec,
            teacher=teacher,
            available_bytes=available,
            placement=self.placement,
        )

    def _check_memory(self) -> None:
        """DoesNotFit where not even weights and their gradients would, before any is made."""
        need = 8 * cost.count_parameters(self.config)[0]
        device = jax.local_devices()[0]
        available = memory_available_bytes(device)
        if self.placement is not None and not on_host(device):
            shape = self.placement.mesh.shape
            need //= shape["fsdp"] * shape["tensor"]
        if available is not None and need > available:
            raise DoesNotFit(
                f"training {self.config.name} needs {binary(need)} for weights and gradients "
                f"alone, available {binary(available)}: take fewer --layers or a smaller --config"
            )

    def _resume(self, trainer: Trainer, checkpoints) -> None:
        latest = checkpoints.latest()
        if processes.is_first():
            cut_metrics(self.directory / "metrics.jsonl", latest or 0)
        if latest is None:
            return
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            trainer.state,
        )
        trainer.state, _ = checkpoints.restore(latest, like)
        trainer.step = latest

    def _advance(self, trainer: Trainer, checkpoints, stop: Stop, watch):
        spec, metrics = self.spec, self.directory / "metrics.jsonl"
        first, next_save = trainer.step, trainer.step + self.save_every
        device = jax.local_devices()[0]
        reset_peak()
        self._planned_bytes = planned_memory_bytes(trainer, device)
        peak_bytes: list[int | None] = []

        def report(progress: Progress) -> None:
            if not peak_bytes:  # of steps alone: saving copies the state
                peak_bytes.append(peak_resident_bytes(device))
            if processes.is_first():
                append_line(metrics, dataclasses.asdict(progress))
            watch(progress)

        def after_step(step: int) -> None:
            nonlocal next_save
            watchdog.tick()
            told = processes.agreed(stop.seen)
            if step >= next_save or step == spec.steps or told is not None:
                checkpoints.save(step, trainer.state, {"tokens": step * spec.batch * spec.length})
                next_save = step + self.save_every
            if told is not None and step < spec.steps:
                checkpoints.wait()
                kind = Preempted if told == signal.SIGTERM else Interrupted
                raise kind(
                    f"stopped by {told.name} after step {step} of {spec.steps}, which is "
                    f"saved in {self.directory}; the same command goes on from there"
                )

        try:
            trainer.run(self.corpus, log_every=self.log_every, watch=report, after_step=after_step)
        except Diverged as error:
            # A loss is of the weights before its update: those saved one step earlier gave it.
            checkpoints.drop_from(error.step - 1)
            raise
        checkpoints.wait()
        if not processes.is_first():
            return trainer.model(), []
        reports = [json.loads(line) for line in metrics.read_text().splitlines()]
        return trainer.model(), [
            self._record("compile", {"compile_s": trainer.compile_s}),
            self._train_record(trainer, reports, first, *peak_bytes),
        ]

    def _train_record(
        self, trainer: Trainer, reports: list[dict], first: int, peak_bytes: int | None = None
    ) -> Record:
        """Of the whole run: the steps before a resume are in its metrics too."""
        rates = [report["tokens_per_s"] for report in reports]
        matrix = matrix_gflops_per_s(self.spec.compute)
        rate = statistics.median(rates)
        flops = flops_per_token(trainer, self.config, self.spec.length)
        return self._record(
            "train",
            {
                "train_tokens_per_s": rate,
                "steps": self.spec.steps,
                "trained_tokens": self.spec.tokens,
                "loss_nats": reports[-1]["loss_nats"],
                "matrix_gflops_per_s": matrix,
                "share_of_matrix_rate": rate * flops / 1e9 / matrix,
                "planned_memory_bytes": self._planned_bytes,
                "parameters": _count(trainer),
            }
            | ({} if peak_bytes is None else {"peak_memory_bytes": peak_bytes}),
            samples=tuple(rates),
            sample_unit="tokens/s",
            note=f"{self.corpus.describe()}; {self._how()}"
            + (f"; resumed at step {first}" if first else ""),
        )

    def _how(self) -> str:
        """What of the spec is not the default, in words for a note."""
        default = TrainSpec(steps=self.spec.steps)
        changed = {
            name: value
            for name, value in dataclasses.asdict(self.spec).items()
            if value != getattr(default, name)
        }
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "default recipe"

    def _record(self, phase: str, metrics: dict, **fields) -> Record:
        return Record(
            experiment="train",
            config=self.config.name,
            scheme=self.config.scheme,
            inputs=self.config.inputs,
            backend="xla",
            device=device_name(jax.local_devices()[0]),
            layers=self.config.num_layers,
            batch=self.spec.batch,
            context=self.spec.length,
            phase=phase,
            kind="measured",
            metrics=metrics,
            seed=self.spec.seed,
            flags=self.flags_text,
            **fields,
        )

    def _identity(self) -> dict:
        """What two runs must share to be one."""
        return {
            "config": dataclasses.asdict(self.config),
            "spec": dataclasses.asdict(self.spec),
            "corpus": self.corpus.sha256,
            "start": self.start,
            "teacher": self.teacher,
        }

    def _check_same(self) -> None:
        """Claims the folder for this run, or raises what differs from the run it belongs to."""
        path, mine = self.directory / "run.json", json.loads(json.dumps(self._identity()))
        if not path.exists():
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(mine, indent=1))
            os.replace(draft, path)
            return
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise BadModelFile(path, "run.json", f"not JSON: {error}") from error
        found = list(differences(theirs, mine))
        if found:
            raise UsageError(
                f"{self.directory} holds another run: {'; '.join(found[:5])}. Give the same flags "
                "to resume it, or another --output_dir"
            )


def planned_memory_bytes(trainer: Trainer, device) -> int:
    """What is held at most during a step, asked for before the first: the compiler's plan of what a
    step takes, and what the process holds already, its state apart, which that counts too."""
    held = resident_bytes(device)
    if held is None:
        return trainer.planned_bytes() + (cost.RUNTIME_BYTES if on_host(device) else 0)
    return held + sharing(device) * (trainer.planned_bytes() - trainer.state_bytes())


def final_state(directory: pathlib.Path) -> dict:
    """The state that a finished run's last checkpoint holds: {"params", "optimizer"}.

    Raises:
      BadModelFile: no run of its steps is there.
    """
    try:
        held = json.loads((directory / "run.json").read_text())
        spec = TrainSpec(**held["spec"])
        config = config_from_dict(held["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModelFile(directory, "run.json", f"not a run: {error}") from error
    like = abstract_state(abstract_model(config, packed=False), spec)
    with TrainCheckpoints(directory / "checkpoints") as checkpoints:
        return checkpoints.restore(spec.steps, like)[0]


def save_models(model: Decoder, directory: pathlib.Path, trained_tokens: int | None = None) -> None:
    """The float weights to directory/float, then, where it packs, the model to directory/model."""
    if not processes.is_first():
        return
    packs = edit.packs(model)
    ternax.save(model, directory / "float", trained_tokens=trained_tokens)
    if packs:
        packed = edit.pack_model(model)
        ternax.save(packed, directory / "model", trained_tokens=trained_tokens)


def check_corpus(config: ModelConfig, spec: TrainSpec, corpus: data.Corpus) -> None:
    """Raises UsageError for a text this model cannot be trained on."""
    if corpus.vocab_size > config.vocab_size:
        raise UsageError(
            f"corpus: its tokens need a vocabulary of {corpus.vocab_size}, {config.name} has "
            f"{config.vocab_size}; set --config.vocab_size"
        )
    data.batch(corpus.train, 0, batch=1, length=spec.length, seed=spec.seed)


def matrix_gflops_per_s(compute: str, seconds: float = 0.5) -> float:
    """The rate of a 2048 x 2048 x 2048 product in `compute`, median over half a second."""
    side = 2048
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[compute]
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    product(a).block_until_ready()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(times) / 1e9


def flops_per_token(trainer: Trainer, config: ModelConfig, length: int) -> float:
    """Operations of an update for each target: forward and backward, two a multiply-add.

    Six for each weight of a projection or of the head, and causal attention, whose half that
    the mask hides is not counted. What remat repeats is not counted either.
    """
    params = trainer.state["params"]
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    weights = sum(leaf.size for path, leaf in flat if getattr(path[-1], "key", "") == "kernel")
    weights += config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_dim * length
    return 6.0 * (weights + attention)


def _count(trainer: Trainer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(trainer.state["params"]))
