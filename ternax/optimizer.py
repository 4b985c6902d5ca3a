"""Optimizers and schedules by name, all of them optax's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ternax.errors import UsageError

Schedule = Callable[[jax.Array], jax.Array]

# BitNet's second stage starts here, at this share of the first's rate and without decay.
# Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm, bitnet).
SECOND_STAGE = 0.5
SECOND_RATE = 2 / 3


def _constant(progress):
    return jnp.ones_like(progress)


def _linear(progress):
    return 1 - progress


def _cosine(progress):
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _two_stage(progress):
    return (1 - progress) * jnp.where(progress < SECOND_STAGE, 1.0, SECOND_RATE)


# Share of the run that is done -> share of the peak learning rate.
SCHEDULES: dict[str, Schedule] = {
    "bitnet": _two_stage,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(b1=0.9, b2=0.95),
    "lion": lambda: optax.scale_by_lion(),
    "sgd": lambda: optax.trace(decay=0.9),
}


def learning_rate(name: str, *, peak: float, warmup_steps: int, steps: int) -> Schedule:
    """step -> learning rate: linear from 0 over the warm-up, times the schedule's share."""
    if name not in SCHEDULES:
        raise UsageError(f"schedule: expected one of {', '.join(SCHEDULES)}, found {name!r}")

    def rate(step):
        warm = jnp.minimum((step + 1) / max(warmup_steps, 1), 1)
        return peak * warm * SCHEDULES[name](jnp.minimum(step / steps, 1))

    return rate


def make_optimizer(
    name: str,
    *,
    rate: Schedule,
    weight_decay: float,
    decay_until: float,
    clip: float,
    decayed,
) -> optax.GradientTransformation:
    """Clips by the global norm, preconditions, decays, steps.

    Args:
      name: a key of OPTIMIZERS.
      rate: step -> learning rate.
      weight_decay: times the rate and the parameter, taken off each step.
      decay_until: the step from which there is no decay.
      clip: largest global norm of the gradient; 0 leaves it.
      decayed: tree of booleans like the parameters: which of them decay.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, found {name!r}")

    def decay(step):
        return jnp.where(step < decay_until, weight_decay, 0.0)

    parts = [optax.clip_by_global_norm(clip)] if clip else []
    parts += [
        OPTIMIZERS[name](),
        optax.inject_hyperparams(optax.add_decayed_weights, static_args="mask")(
            weight_decay=decay, mask=lambda _: decayed
        ),
        optax.scale_by_learning_rate(rate),
    ]
    return optax.chain(*parts)
