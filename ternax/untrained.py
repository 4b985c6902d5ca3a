"""What noise does to random matrices, alone and as a stack: the table that published figures match.

A layer is drawn, struck, multiplied and forgotten, so that a model of any depth needs the memory
of one layer and one table.
"""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax import injection, watchdog
from ternax.config import ModelConfig
from ternax.models import Decoder
from ternax.nn.linear import PackedStack
from ternax.nn.rope import rope_table
from ternax.noise import NoiseModel
from ternax.noise.predict import closed_form, has_moments
from ternax.random_weights import TRIT_DENSITY, random_layer, random_table

# Rows that a layer multiplies, and sequences and tokens that go through a stack.
ROWS, BATCH, LENGTH = 16, 4, 16
_PLACES = (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down"))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's projections under a noise.

    Attributes:
      cosines: "attn.q" -> cosine of its clean and noisy outputs, of normal inputs.
      closed_form: the same from the noise alone; None where no formula is known.
      changed: trits that the noise changed.
    """

    cosines: dict[str, float]
    closed_form: float | None
    changed: int

    @property
    def cosine(self) -> float:
        return statistics.fmean(self.cosines.values())


@dataclasses.dataclass(frozen=True)
class Stack:
    """A whole model under a noise, mean of BATCH x LENGTH tokens.

    Attributes:
      hidden_cosine: of a token's clean and noisy state behind the last layer.
      logit_cosine: of its logits.
      top1: share of tokens whose likeliest next token is the clean model's.
      changed: trits that the noise changed.
    """

    hidden_cosine: float
    logit_cosine: float
    top1: float
    changed: int


def layer(config: ModelConfig, noise: NoiseModel, *, seed: int = 0) -> Layer:
    """Strikes the first layer of the random model, and multiplies normal inputs with it."""
    part = random_layer(config, 0, seed=seed)
    clean = _outputs(part, seed)
    part, counts = injection.perturb(part, noise, jax.random.key(seed))
    noisy = _outputs(part, seed)
    cosines = {
        name: float((y * noisy[name]).sum() / (np.linalg.norm(y) * np.linalg.norm(noisy[name])))
        for name, y in clean.items()
        if np.linalg.norm(noisy[name]) > 0
    }
    form = closed_form(noise, TRIT_DENSITY) if has_moments(noise) else None
    return Layer({name: cosines.get(name, 0.0) for name in clean}, form, sum(counts.values()))


def _outputs(part: Decoder, seed: int) -> dict[str, np.ndarray]:
    """ "attn.q" -> f64 [ROWS, N] of each projection, for the same normal inputs."""
    found = {}
    for i, (branch, name) in enumerate(_PLACES):
        linear = getattr(getattr(part.layers, branch), name)
        x = jax.random.normal(jax.random.key(seed + i), (ROWS, linear.shape[0]))
        y = np.asarray(linear(x, jnp.int32(0)), np.float64)
        ends = np.cumsum([width for _, width in linear.parts])[:-1]
        for (each, _), columns in zip(linear.parts, np.split(y, ends, axis=1), strict=True):
            found[f"{branch}.{each}"] = columns
    return found


def stack(config: ModelConfig, noise: NoiseModel, *, seed: int = 0) -> Stack:
    """Sends random tokens through the clean and the noisy random model, layer by layer.

    Both are `random_model(config)`, and the noise is what `perturb` makes of it with key(seed).
    """
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (BATCH, LENGTH))
    table = random_table(config, "embedding", seed=seed)
    clean = noisy = table.embed(jnp.asarray(tokens, jnp.int32))
    changed = 0
    for number in range(config.num_layers):
        part = random_layer(config, number, seed=seed)
        clean = _through(config, part, clean)
        part, counts = injection.perturb(part, noise, jax.random.key(seed))
        noisy = _through(config, part, noisy)
        changed += sum(counts.values())
        watchdog.tick()
    if not config.tie_embeddings:
        del table
        table = random_table(config, "head", seed=seed)
    logits = [np.asarray(table.logits(part.norm(x)), np.float64) for x in (clean, noisy)]
    return Stack(
        _mean_cosine(np.asarray(clean, np.float64), np.asarray(noisy, np.float64)),
        _mean_cosine(*logits),
        float(np.mean(logits[0].argmax(-1) == logits[1].argmax(-1))),
        changed,
    )


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of [..., D], over all but the last axis."""
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    found = float(np.mean((a * b).sum(axis=-1) / np.where(sizes > 0, sizes, 1)))
    return found if math.isfinite(found) else 0.0


def _through(config: ModelConfig, part: Decoder, x):
    """f32 [B, T, D] through the one layer of `part`."""
    graph, *states = nnx.split(part.layers, PackedStack, ...)
    whole, sliced = states
    return _block(config, graph, whole, jax.tree.map(lambda leaf: leaf[0], sliced), x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(config, graph, whole, leaves, x):
    block = nnx.merge(graph, whole, leaves)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    start = jnp.zeros((x.shape[0],), jnp.int32)
    return block(x, jnp.int32(0), rope_table(config, positions), start, None)[0]
