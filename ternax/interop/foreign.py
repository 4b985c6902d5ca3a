"""What every model of another program offers, whatever its files look like."""

import pathlib
from typing import Any, Protocol

from ternax.config import ModelConfig
from ternax.errors import UsageError

# Ours, within a layer; a matrix each.
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


class ModelFileWarning(UserWarning):
    """A model file that can be read, and holds what no training leaves behind, or leaves open
    what it should say."""


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model, by our name -> shape, rows first."""
    width, inner = config.hidden_size, config.num_heads * config.head_dim
    kv, ffn = config.num_kv_heads * config.head_dim, config.intermediate_size
    layer = {
        "attn.q": (inner, width),
        "attn.k": (kv, width),
        "attn.v": (kv, width),
        "attn.o": (width, inner),
        "mlp.gate": (ffn, width),
        "mlp.up": (ffn, width),
        "mlp.down": (width, ffn),
        "attn_norm": (width,),
        "mlp_norm": (width,),
    }
    if config.family == "bitnet":
        layer |= {"attn.sub_norm": (inner,), "mlp.sub_norm": (ffn,)}
    found: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocab_size, width),
        "norm": (width,),
    }
    if not config.tie_embeddings:
        found["head"] = (config.vocab_size, width)
    for i in range(config.num_layers):
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether our tensor is a projection, neither a table nor a norm."""
    return name.startswith("layers.") and len(shape) == 2


class Foreign(Protocol):
    """An opened model: header read and checked, no weights yet.

    Attributes:
      path: the file or directory.
      config: the model; its scheme says how its matrices are stored.
      packed: every matrix is stored as trits.
    """

    path: pathlib.Path
    config: ModelConfig
    packed: bool

    def where(self, name: str) -> str:
        """The file's own name of our tensor, for messages."""

    def kind(self, name: str) -> str:
        """How it is stored, in the file's own word: "BF16", "TQ2_0"."""

    def trits(self, name: str, out: Any) -> Any:
        """Scale f32 [G, N] or [1, 1] of a matrix, whose canonical codes are written to `out`,
        uint8 [N, row bytes]."""

    def floats(self, name: str, first: int = 0, count: int | None = None) -> Any:
        """f32 [rows, columns] of a matrix [N, K] or table [V, D]; a norm is [1, D]."""

    def stored(self, name: str, first: int, count: int) -> Any:
        """Rows of a table: `floats`, or what `bits_to_float` makes them of. Until the next call."""


def check(
    model: Foreign,
    path,
    *,
    scheme: str | None = None,
    inputs: str | None = None,
    embed_dtype: str | None = None,
    head_dtype: str | None = None,
) -> None:
    """Whether `model`, called `path`, can be what is asked for; None asks nothing.

    Raises UsageError: its trits are what they are. Its tables and its inputs are free.
    """
    del inputs, embed_dtype, head_dtype
    if model.packed and scheme not in (None, model.config.scheme):
        raise UsageError(
            f"scheme={scheme}: the weights in {path} are stored as {model.config.scheme}; leave "
            "scheme out, or take weights=random"
        )
