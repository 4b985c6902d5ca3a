"""What a decoder is made of: matrices, tables and cache, counted from its shape alone.

No jax: an answer takes milliseconds. `cost.plan` counts the same things on the model that
is then run, and the tests hold the two equal for every named model; here a shape may also be
somebody else's, stated in a claim.
"""

import dataclasses
import functools

from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.formats import Format, get_format
from ternax.roofline import Load

# Kernels a decode step launches for one layer when nothing is fused: two norms, their
# quantization, q, k, v, rope, cache update, attention, o, add, gate, up, activation, down, add.
LAUNCHES_A_LAYER = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that counting needs; the fields of ModelConfig, and two more.

    Attributes:
      mlp_matrices: 3 with a gate (SwiGLU), 2 without.
      sub_norms: BitNet's norms before the attention output and the down projection.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool = False
    mlp_matrices: int = 3
    sub_norms: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 0):
                raise UsageError(f"shape.{field.name} must be an integer from 0 up, found {value}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"shape.num_heads must be a multiple of num_kv_heads, found {self.num_heads} "
                f"and {self.num_kv_heads}"
            )

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        shared = {f.name for f in dataclasses.fields(cls)} & {
            f.name for f in dataclasses.fields(ModelConfig)
        }
        numbers = {name: getattr(config, name) for name in shared}
        return cls(**numbers, sub_norms=config.family == "bitnet")

    @functools.cached_property
    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """(name, K, N) of one layer's projections, as they are stored before any fusion."""
        inner = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        hidden, mlp = self.hidden_size, self.intermediate_size
        gated = (("mlp.gate", hidden, mlp),) if self.mlp_matrices == 3 else ()
        return (
            ("attn.q", hidden, inner),
            ("attn.k", hidden, kv),
            ("attn.v", hidden, kv),
            ("attn.o", inner, hidden),
            *gated,
            ("mlp.up", hidden, mlp),
            ("mlp.down", mlp, hidden),
        )

    @property
    def layer_projection_parameters(self) -> int:
        return sum(k * n for _, k, n in self.matrices)

    @property
    def projection_parameters(self) -> int:
        return self.num_layers * self.layer_projection_parameters

    @property
    def table_parameters(self) -> int:
        """Of the embedding; an untied head is as large again."""
        return self.vocab_size * self.hidden_size

    @property
    def norm_parameters(self) -> int:
        inner = self.num_heads * self.head_dim + self.intermediate_size
        a_layer = 2 * self.hidden_size + (inner if self.sub_norms else 0)
        return self.num_layers * a_layer + self.hidden_size

    @property
    def parameters(self) -> int:
        tables = 1 if self.tie_embeddings else 2
        return self.projection_parameters + self.norm_parameters + tables * self.table_parameters

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the cache holds for one token: keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def projection_bytes(self, weights: Format) -> float:
        return self.num_layers * sum(weights.nbytes(k, n) for _, k, n in self.matrices)

    def table_bytes(self, stored: Format) -> float:
        return stored.nbytes(self.hidden_size, self.vocab_size)

    def kv_bytes_per_token(self, stored: str = "fp16") -> float:
        """Bytes of the cache for one token; an int8 one has an f32 scale a head."""
        values = self.kv_values_per_token
        if stored == "int8":
            return values + 4 * values / self.head_dim
        return values * get_format(stored).code_bits / 8

    def activation_bytes(
        self, batch: int, prompt: int, context: int, *, fused: bool = False
    ) -> int:
        """Temporaries of the larger program, prefill of `prompt` tokens a row that see `context`.

        fused: gate, norm and quantizer are part of each projection's call (`kernels.cpu`). What
        lies between calls is then known to the byte, and the tests hold it to what the compiler
        says; else the widest arrays that XLA may hold at once, from above.
        """
        tokens = batch * prompt
        inner = self.num_heads * self.head_dim
        logits = 3 * 4 * batch * self.vocab_size  # as computed, scaled and drawn from
        if fused:
            kv = 2 * self.num_kv_heads * self.head_dim
            # f32: what enters and leaves the MLP beside gate and up, or attention's residual
            # beside q, k, v and its result; cosines and sines of the positions.
            mlp = 2 * self.hidden_size + 2 * self.intermediate_size
            attention = self.hidden_size + inner + kv + inner
            layer = 4 * tokens * (max(mlp, attention) + self.head_dim)
            # The library keeps its own: int8 codes as drawn and in the order of the weights.
            codes = 2 * tokens * max(self.hidden_size, self.intermediate_size, inner)
            return max(layer, logits) + codes
        # gate and up, their parts, the gated product and its int8 copy are alive together.
        mlp = tokens * self.intermediate_size * (4 * 5 + 2)
        attention = tokens * (self.hidden_size * 4 * 3 + inner * 4 * 4)
        scores = 3 * 4 * batch * self.num_heads * prompt * min(context, 256)
        return mlp + attention + scores + logits

    def load(
        self,
        weights: str,
        *,
        embedding: str = "fp16",
        head: str = "fp16",
        kv: str = "fp16",
        rows: int = 1,
    ) -> Load:
        """What one decode step reads and computes, with each part stored as named.

        rows: decoded together. Here they read the same, however many; a mixture of experts
        reads more of them (`ternax.shapes`).
        """
        table = embedding if self.tie_embeddings else head
        stored = get_format(weights)
        width = self.num_heads * self.head_dim
        inputs = sum(k for _, k, _ in self.matrices) + sum(n for _, _, n in self.matrices)
        return Load(
            projection_bytes=self.projection_bytes(stored) + 4 * self.norm_parameters,
            head_bytes=self.table_bytes(get_format(table)),
            embedding_bytes=0.0 if self.tie_embeddings else self.table_bytes(get_format(embedding)),
            embedding_row_bytes=get_format(embedding).nbytes(self.hidden_size, 1),
            kv_bytes_per_token=self.kv_bytes_per_token(kv),
            activation_bytes=2.0 * self.num_layers * inputs + 4.0 * self.vocab_size,
            projection_macs=float(self.projection_parameters),
            head_macs=float(self.table_parameters),
            attention_macs_per_token=2.0 * self.num_layers * width,
            all_reduces=2 * self.num_layers,
            all_reduce_bytes=2.0 * self.hidden_size,
            launches=LAUNCHES_A_LAYER * self.num_layers + 4,
        )
