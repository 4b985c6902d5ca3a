"""X^T X of what each projection multiplies, on real tokens, one layer at a time.

The inputs are those of the product: behind gate and norm, and rounded as the model's
activations are. Hidden states wait between layers, so memory is that of one layer's
statistics and of the tokens' hidden states, and nothing runs twice but the layer at hand.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ternax.errors import UsageError
from ternax.models import Decoder
from ternax.models.decoder import Block
from ternax.nn.linear import QuantLinear, enter, weight_of
from ternax.nn.rope import rope_table
from ternax.quant.fit import matmul
from ternax.quant.inputs import INPUTS

# Which projection's inputs stand for those of each: q, k and v read the same, gate and up too.
SAME_INPUTS = {
    "attn": {"q": "q", "k": "q", "v": "q", "o": "o"},
    "mlp": {"gate": "gate", "up": "gate", "down": "down"},
}
FEEDS = ("quantized", "float")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The tokens that a conversion looks at.

    Attributes:
      tokens: int32 [n, T], n sequences that do not know of each other.
      batch: sequences that run together.
      feed: what layer i + 1 is shown: the output of layer i as it was just "quantized", as
        GPTQ does it, so that later layers make up for earlier ones, or of the "float" one.
    """

    tokens: np.ndarray
    batch: int = 8
    feed: str = "quantized"

    def __post_init__(self):
        if self.tokens.ndim != 2 or not self.tokens.size or self.batch < 1:
            raise UsageError(
                "calibration: expected tokens [n, T] and a batch of at least 1, found "
                f"{self.tokens.shape} and {self.batch}"
            )
        if self.feed not in FEEDS:
            raise UsageError(
                f"calibration: feed must be one of {', '.join(FEEDS)}, found {self.feed!r}"
            )


class Gram(nnx.Variable):
    """f32 [K, K], the sum of x x^T over all tokens seen."""


class Observed(QuantLinear):
    """A projection that adds the inputs of its product to `gram`.

    `seen_as` says how they are rounded there, a key of `quant.inputs.INPUTS`; the product
    itself reads what it always reads.
    """

    def __init__(self, linear: QuantLinear, seen_as: str):
        self.kernel, self.scheme = linear.kernel, linear.scheme
        self.inputs, self.compute = linear.inputs, linear.compute
        self.seen_as = seen_as
        k_size = linear.kernel.shape[0]
        self.gram = Gram(jnp.zeros((k_size, k_size), jnp.float32))

    def read(self, x, *, gate, norm):
        entered = enter(x, gate, *weight_of(norm))
        rows = INPUTS[self.seen_as].fake_quant(entered).reshape(-1, entered.shape[-1])
        self.gram.set_value(self.gram[...] + matmul(rows.T, rows))
        return INPUTS[self.inputs].fake_quant(entered)


def block_of(model: Decoder, layer: int) -> Block:
    """A copy of one layer of the stack."""
    graph, state = nnx.split(model.layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], state))


class LayerStream:
    """Hidden states on their way through a model: `observe` a layer, then `advance` through it."""

    def __init__(self, model: Decoder, calibration: Calibration):
        """Raises UsageError for tokens the model does not have or a context too long for it."""
        config, tokens = model.config, calibration.tokens
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.vocab_size:
            raise UsageError(
                f"calibration: {config.name} has tokens 0 to {config.vocab_size - 1}, found "
                f"{low} to {high}"
            )
        if tokens.shape[1] > config.max_context:
            raise UsageError(
                f"calibration: sequences must fit {config.name}'s context of "
                f"{config.max_context} tokens, found {tokens.shape[1]}"
            )
        self.num_tokens = tokens.size
        self._rope = rope_table(config, jnp.arange(tokens.shape[1])[None])
        firsts = range(0, len(tokens), calibration.batch)
        parts = [jnp.asarray(tokens[first : first + calibration.batch]) for first in firsts]
        self._hidden = [model.embedding.embed(part) for part in parts]

    def observe(self, block: Block, inputs: str) -> dict[str, jax.Array]:
        """X^T X, f32 [K, K], of each projection: "attn.q" to "mlp.down". Leaves block as it is.

        inputs: how the activations are rounded first, a key of `quant.inputs.INPUTS`.
        """
        block = nnx.clone(block)
        for branch, sources in SAME_INPUTS.items():
            module = getattr(block, branch)
            for part in dict.fromkeys(sources.values()):
                setattr(module, part, Observed(getattr(module, part), inputs))
        parts: Any = nnx.split(block, Gram, ...)
        graph, grams, rest = parts
        for hidden in self._hidden:
            grams = _observe(graph, grams, rest, hidden, self._rope)
        nnx.update(block, grams)
        return {
            f"{branch}.{part}": getattr(getattr(block, branch), source).gram[...]
            for branch, sources in SAME_INPUTS.items()
            for part, source in sources.items()
        }

    def advance(self, block: Block) -> None:
        """Puts the hidden states through the block."""
        graph, state = nnx.split(block)
        self._hidden = [_run(graph, state, hidden, self._rope) for hidden in self._hidden]


def _forward(block: Block, hidden, rope):
    start = jnp.zeros(hidden.shape[:1], jnp.int32)
    return block(hidden, jnp.int32(0), rope, start, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, hidden, rope):
    return _forward(nnx.merge(graph, state), hidden, rope)


@functools.partial(jax.jit, static_argnums=0)
def _observe(graph, grams, rest, hidden, rope):
    block = nnx.merge(graph, grams, rest)
    _forward(block, hidden, rope)
    return nnx.state(block, Gram)
