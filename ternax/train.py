"""Quantization-aware training: the step on the device, and the loop round it.

All that a step needs beside the state is a function of (seed, step): data, noise, schedules.
A run that resumes from a checkpoint therefore goes on to the bit.
"""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ternax import data, edit
from ternax.errors import Diverged, DoesNotFit, UsageError
from ternax.models import Decoder
from ternax.noise import make_noise
from ternax.optimizer import SECOND_STAGE, learning_rate, make_optimizer
from ternax.placement import Placement, over_data
from ternax.quant.training import Annealed, Noisy, StepInput, Wrapped, with_gradient
from ternax.table import binary


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """How a model is trained. Equal specs on equal machines give equal bits.

    Attributes:
      steps: updates of the parameters.
      batch: sequences of an update.
      length: tokens of a sequence that are predicted.
      accumulate: parts the batch is cut into, one after the other, to save memory.
      optimizer: a key of OPTIMIZERS; schedule: a key of SCHEDULES.
      learning_rate: the schedule's peak.
      warmup_steps: steps over which the rate rises to it.
      weight_decay: of projections and tables; "bitnet" ends it at half of the run.
      clip: largest global norm of a gradient; 0 leaves it.
      gradient: one of quant.training.GRADIENTS.
      anneal_steps: steps over which weights go from float to quantized; 0 starts quantized.
      noise: "name,rate=...", struck anew each step; "" for none.
      distill: weight of the teacher's distribution in the loss, the rest is the text's.
      temperature: both distributions are softened by it in distillation.
      compute: "f32" or "bf16", what products are held in.
      remat: compute a layer's activations again in the backward pass, to save memory.
      seed: root of the data's order and of every draw.
    """

    steps: int
    batch: int = 16
    length: int = 256
    accumulate: int = 1
    optimizer: str = "adamw"
    schedule: str = "bitnet"
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    gradient: str = "identity"
    anneal_steps: int = 0
    noise: str = ""
    distill: float = 0.0
    temperature: float = 1.0
    compute: str = "f32"
    remat: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.batch % self.accumulate:
            raise UsageError(
                f"batch must be a multiple of accumulate, found {self.batch} and {self.accumulate}"
            )
        if not 0 <= self.distill <= 1:
            raise UsageError(f"distill must lie in [0, 1], found {self.distill}")
        if self.noise:
            make_noise(self.noise)  # told before anything is made

    @property
    def tokens(self) -> int:
        """Targets of the whole run."""
        return self.steps * self.batch * self.length


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop tells its watcher, after every `log_every` steps.

    Attributes:
      step: updates done.
      loss_nats: mean loss a token over the steps since the last report.
      gradient_norm: of the last step, before clipping.
      learning_rate: of the last step.
      tokens_per_s: over the steps since the last report.
      tokens_crc32: of the last step's tokens, int32: equal orders of the data have equal ones.
    """

    step: int
    loss_nats: float
    gradient_norm: float
    learning_rate: float
    tokens_per_s: float
    tokens_crc32: int


class Trainer:
    """A float model being trained. The model it was given is used up.

    Attributes:
      state: {"params", "optimizer"}: all that a checkpoint holds, besides the step.
      step: updates done.
      compiled: the step's executable, whose memory analysis is the plan.
    """

    def __init__(
        self,
        model: Decoder,
        spec: TrainSpec,
        *,
        teacher: Decoder | None = None,
        available_bytes: int | None = None,
        placement: Placement | None = None,
    ):
        """Compiles the step, holds its plan against the memory, then makes the state.

        Args:
          model: float weights.
          spec: how it trains.
          teacher: that `spec.distill` asks for.
          available_bytes: free for state, data and the step; the model's weights, which are
            there already, count as used. None: not checked.
          placement: on which devices, and how; None splits the batch over as many as divide it.

        Raises:
          UsageError: a packed model; distillation without a teacher.
          DoesNotFit: before any of the optimizer's state is allocated.
        """
        if edit.is_packed(model):
            raise UsageError(
                "train: expected float weights, found a packed model; use packed=False"
            )
        if spec.distill and teacher is None:
            raise UsageError("train: distill needs a teacher, found none")
        self.spec, self.step = spec, 0
        parts: Any = nnx.split(prepare(model, spec), nnx.Param, StepInput, ...)
        self._graph, params, inputs, rest = parts
        params = nnx.to_pure_dict(params)
        self._rate = _rate_of(spec)
        self._optimizer = _optimizer_of(spec, params)
        self._place = place = placement or over_data(self._shape[1])
        place.check_batch(self._shape[1])
        params = place.put(params)
        teacher_graph, weights = (None, None) if teacher is None else nnx.split(teacher)
        update = functools.partial(_update, self._graph, teacher_graph, spec, self._optimizer)
        tokens = jax.ShapeDtypeStruct(self._shape, jnp.int32, sharding=place.rows)
        fixed = (inputs, rest, weights)
        abstract = {"params": params, "optimizer": jax.eval_shape(self._optimizer.init, params)}
        started = time.perf_counter()
        self.compiled = (
            jax.jit(update, donate_argnums=0, out_shardings=(place.tree(abstract), None, None))
            .lower(*place.abstract((abstract, *fixed)), jnp.int32(0), tokens)
            .compile()
        )
        self.compile_s = time.perf_counter() - started
        held = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((params, weights))
        )
        if available_bytes is not None and self.planned_bytes() - held > available_bytes:
            raise DoesNotFit(
                f"train: state and step need {binary(self.planned_bytes())}, of which the weights' "
                f"{binary(held)} are there, available {binary(available_bytes)}: a smaller "
                "--batch, --accumulate or --remat need less"
            )
        self._fixed = place.put(fixed)
        moments = jax.jit(self._optimizer.init, out_shardings=place.tree(abstract["optimizer"]))
        self.state: dict[str, Any] = {"params": params, "optimizer": moments(params)}

    @property
    def _shape(self) -> tuple[int, int, int]:
        spec = self.spec
        return spec.accumulate, spec.batch // spec.accumulate, spec.length + 1

    def planned_bytes(self) -> int:
        """Bytes of device memory that state, data and the step's temporaries take."""
        sizes: Any = self.compiled.memory_analysis()
        return (
            sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
            + sizes.temp_size_in_bytes
        )

    def state_bytes(self) -> int:
        """Of these, what lies there between steps on one device."""
        return sum(
            leaf.addressable_shards[0].data.nbytes
            for leaf in jax.tree.leaves((self.state, self._fixed))
            if isinstance(leaf, jax.Array)
        )

    def advance(self, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """One update. tokens: int32 [batch, length + 1] -> (loss, gradient norm), f32 []."""
        placed = self._place.put_rows(tokens.reshape(self._shape))
        self.state, loss, norm = self.compiled(
            self.state, *self._fixed, jnp.int32(self.step), placed
        )
        self.step += 1
        return loss, norm

    def run(
        self,
        corpus: data.Corpus,
        *,
        until: int | None = None,
        log_every: int = 20,
        watch: Callable[[Progress], None] = lambda progress: None,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Trains up to step `until`, by default the spec's last.

        Args:
          corpus: text to train on.
          until: the step to stop at.
          log_every: steps between two reports.
          watch: takes each report.
          after_step: called with the number of steps done, when all of them are known to be
            finite: here a caller saves, or raises to stop.

        Raises:
          Diverged: a loss that is not finite; says at which step.
        """
        spec, losses, since = self.spec, [], time.perf_counter()
        last = spec.steps if until is None else min(until, spec.steps)
        while self.step < last:
            tokens = data.batch(
                corpus.train, self.step, batch=spec.batch, length=spec.length, seed=spec.seed
            )
            loss, norm = self.advance(tokens)
            losses.append(loss)
            if self.step % log_every == 0 or self.step == last:
                values = np.asarray(jax.device_get(losses))
                _check_losses(values, self.step)
                now = time.perf_counter()
                watch(
                    Progress(
                        self.step,
                        float(values.mean()),
                        float(norm),
                        float(self._rate(jnp.float32(self.step - 1))),
                        len(values) * spec.batch * spec.length / (now - since),
                        zlib.crc32(tokens.tobytes()),
                    )
                )
                losses, since = [], now
                after_step(self.step)

    def model(self) -> Decoder:
        """The trained model, float, under its own schemes; the state stays usable."""
        inputs, rest, _ = self._fixed
        inputs, rest, params = self._place.gathered((inputs, rest, self.state["params"]))
        model = nnx.merge(self._graph, inputs, rest, _as_state(params))
        return edit.set_compute(edit.wrap_schemes(model, _unwrapped), "f32")


def abstract_state(model: Decoder, spec: TrainSpec) -> dict[str, Any]:
    """What a Trainer of this model holds as its state, as shapes and dtypes alone.

    model: float, its leaves may be abstract.
    """
    parts: Any = nnx.split(prepare(model, spec), nnx.Param, ...)
    params = nnx.to_pure_dict(parts[1])
    state = {
        "params": params,
        "optimizer": jax.eval_shape(_optimizer_of(spec, params).init, params),
    }
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def _rate_of(spec: TrainSpec):
    return learning_rate(
        spec.schedule, peak=spec.learning_rate, warmup_steps=spec.warmup_steps, steps=spec.steps
    )


def _optimizer_of(spec: TrainSpec, params):
    return make_optimizer(
        spec.optimizer,
        rate=_rate_of(spec),
        weight_decay=spec.weight_decay,
        decay_until=spec.steps * (SECOND_STAGE if spec.schedule == "bitnet" else 1),
        clip=spec.clip,
        decayed=_decayed(params),
    )


def prepare(model: Decoder, spec: TrainSpec) -> Decoder:
    """The model as it is trained: schemes wrapped as the spec says, products in its compute."""
    layers = model.config.num_layers

    def wrap(scheme):
        scheme = with_gradient(scheme, spec.gradient, layers)
        if spec.noise:
            scheme = Noisy(scheme, layers, make_noise(spec.noise))
        return Annealed(scheme, layers) if spec.anneal_steps else scheme

    return edit.set_compute(edit.wrap_schemes(model, wrap), spec.compute)


def _unwrapped(scheme):
    while isinstance(scheme, Wrapped):
        scheme = scheme.inner
    return scheme


def _as_state(pure):
    state = nnx.State(pure)
    return jax.tree.map(nnx.Param, state, is_leaf=lambda leaf: isinstance(leaf, jax.Array))


def _decayed(params):
    """Projections and tables decay; norms and what schemes learn do not."""

    def decays(path, leaf):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        return names[-1] == "kernel" or names[0] in ("embedding", "head")

    return jax.tree_util.tree_map_with_path(decays, params)


def _update(
    graph, teacher_graph, spec: TrainSpec, optimizer, state, inputs, rest, weights, step, tokens
):
    """One update: (state, mean loss, gradient norm). tokens: int32 [A, B / A, T + 1]."""
    params = state["params"]
    inputs = _step_inputs(inputs, spec, step)

    def loss_of(params, part):
        model = nnx.merge(graph, _as_state(params), inputs, rest)
        logits, _ = model.forward(part[:, :-1], remat=spec.remat)
        teacher = None if teacher_graph is None else nnx.merge(teacher_graph, weights)
        return _loss(logits, part, spec, teacher)

    def accumulate(total, part):
        found = jax.value_and_grad(loss_of)(params, part)
        return jax.tree.map(jnp.add, total, found), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    if spec.accumulate == 1:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens[0])
    else:
        (loss, gradients), _ = jax.lax.scan(accumulate, zero, tokens)
        loss, gradients = jax.tree.map(lambda leaf: leaf / spec.accumulate, (loss, gradients))
    updates, moments = optimizer.update(gradients, state["optimizer"], params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "optimizer": moments}, loss, optax.global_norm(gradients)


def _loss(logits, tokens, spec: TrainSpec, teacher) -> jax.Array:
    """Mean over tokens, nats: of the text, and of the teacher's distribution."""
    text = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    if not spec.distill:
        return text
    soft = spec.temperature
    wanted, _ = teacher.forward(tokens[:, :-1])
    wanted = jax.lax.stop_gradient(jax.nn.log_softmax(wanted / soft))
    found = jax.nn.log_softmax(logits / soft)
    divergence = jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1).mean()
    return (1 - spec.distill) * text + spec.distill * soft**2 * divergence


def _step_inputs(inputs, spec: TrainSpec, step):
    """The StepInput leaves of a step: strengths by the warm-up, keys by (seed, step, name)."""
    root = jax.random.fold_in(jax.random.key(spec.seed), step)
    strength = jnp.minimum(step / max(spec.anneal_steps, 1), 1).astype(jnp.float32)

    def fill(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            name = jax.tree_util.keystr(path)
            key = jax.random.fold_in(root, zlib.crc32(name.encode()))
            return jax.random.split(key, leaf.shape[0])
        return jnp.broadcast_to(strength, leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, inputs)


def _check_losses(values: np.ndarray, step: int) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        first = step - len(values) + int(bad[0]) + 1
        raise Diverged(
            first,
            f"train: the loss of step {first} is {values[bad[0]]}; expected a finite one. A lower "
            "--learning_rate or a longer --warmup_steps may help",
        )
