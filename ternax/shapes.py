"""Models of others as shapes alone: planned and predicted here, never run.

A dense one is a `Shape`. A mixture of experts is counted by its active parameters: a step reads
the experts that its rows chose, and all of them are resident.
"""

import dataclasses

from ternax import configs
from ternax.anatomy import Shape
from ternax.errors import UsageError
from ternax.formats import get_format
from ternax.roofline import Load


@dataclasses.dataclass(frozen=True)
class Mixture(Shape):
    """A mixture of experts behind multi-head latent attention (arXiv:2412.19437).

    Attributes:
      dense_layers: of num_layers, the first that have an MLP of `intermediate_size` instead.
      experts, expert_size: routed experts of a layer, and the width of one.
      experts_per_token, shared_experts: how many of them a token uses, and how many beside
        them every token does.
      query_rank, latent_rank, rotary_dim: of the attention; the cache holds one latent and
        one rotary key a layer for each token, whatever the number of heads.
    """

    dense_layers: int = 0
    experts: int = 1
    expert_size: int = 0
    experts_per_token: int = 1
    shared_experts: int = 0
    query_rank: int = 0
    latent_rank: int = 0
    rotary_dim: int = 0

    @property
    def _sparse_layers(self) -> int:
        return self.num_layers - self.dense_layers

    @property
    def _expert_parameters(self) -> int:
        """Of one expert of one layer."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def _always_read_parameters(self) -> int:
        """Projections that every token uses: attention, dense MLPs, shared experts, routers."""
        inner, hidden = self.num_heads * self.head_dim, self.hidden_size
        attention = (
            hidden * self.query_rank
            + self.query_rank * (inner + self.num_heads * self.rotary_dim)
            + hidden * (self.latent_rank + self.rotary_dim)
            + 2 * self.latent_rank * inner
            + inner * hidden
        )
        return (
            self.num_layers * attention
            + self.dense_layers * 3 * hidden * self.intermediate_size
            + self._sparse_layers * self.shared_experts * self._expert_parameters
            + self._sparse_layers * hidden * self.experts
        )

    @property
    def projection_parameters(self) -> int:
        routed = self._sparse_layers * self.experts * self._expert_parameters
        return self._always_read_parameters + routed

    @property
    def active_parameters(self) -> int:
        """Projections that one token multiplies, and the head."""
        used = self._sparse_layers * self.experts_per_token * self._expert_parameters
        return self._always_read_parameters + used + self.table_parameters

    @property
    def norm_parameters(self) -> int:
        a_layer = 2 * self.hidden_size + self.query_rank + self.latent_rank
        return self.num_layers * a_layer + self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        return self.num_layers * (self.latent_rank + self.rotary_dim)

    def load(
        self,
        weights: str,
        *,
        embedding: str = "fp16",
        head: str = "fp16",
        kv: str = "fp16",
        rows: int = 1,
    ) -> Load:
        """As `Shape.load`. `rows` tokens choose alike and independently, so that together they
        read 1 - (1 - share)^rows of the experts."""
        bits = get_format(weights).bits_per_weight
        routed = self._sparse_layers * self.experts * self._expert_parameters
        untouched = (1 - self.experts_per_token / self.experts) ** rows
        idle = untouched * routed * bits / 8
        table = embedding if self.tie_embeddings else head
        # A token writes and reads again about what a dense layer of its active width would.
        mlp = self.expert_size * (self.experts_per_token + self.shared_experts)
        inner = self.num_heads * self.head_dim
        touched = 2 * inner + 4 * self.hidden_size + 3 * mlp
        return Load(
            projection_bytes=self.projection_parameters * bits / 8
            - idle
            + 4 * self.norm_parameters,
            head_bytes=self.table_bytes(get_format(table)),
            embedding_bytes=0.0 if self.tie_embeddings else self.table_bytes(get_format(embedding)),
            embedding_row_bytes=get_format(embedding).nbytes(self.hidden_size, 1),
            kv_bytes_per_token=self.kv_bytes_per_token(kv),
            activation_bytes=2.0 * self.num_layers * touched + 4.0 * self.vocab_size,
            projection_macs=float(self.active_parameters - self.table_parameters),
            head_macs=float(self.table_parameters),
            # Scores against latent and rotary key, then the sum of latents, for every head.
            attention_macs_per_token=float(
                self.num_layers * self.num_heads * (2 * self.latent_rank + self.rotary_dim)
            ),
            all_reduces=2 * self.num_layers,
            all_reduce_bytes=2.0 * self.hidden_size,
            # A layer's 16, the latents' five more, the router and the gathering of its choice.
            launches=24 * self.num_layers + 4,
            idle_bytes=idle,
        )


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A shape, the longest context it was made for, and where its numbers come from."""

    shape: Shape
    max_context: int
    source: str


SHAPES: dict[str, Foreign] = {
    found.shape.name: found
    for found in (
        Foreign(
            Shape(
                name="mistral-24b",
                hidden_size=5120,
                intermediate_size=32768,
                num_layers=40,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                vocab_size=131072,
            ),
            32768,
            "mistralai/Mistral-Small-24B-Instruct-2501, config.json",
        ),
        Foreign(
            Shape(
                name="qwen3-32b",
                hidden_size=5120,
                intermediate_size=25600,
                num_layers=64,
                num_heads=64,
                num_kv_heads=8,
                head_dim=128,
                vocab_size=151936,
            ),
            40960,
            "Qwen/Qwen3-32B, config.json",
        ),
        Foreign(
            Mixture(
                name="deepseek-v3",
                hidden_size=7168,
                intermediate_size=18432,
                num_layers=61,
                num_heads=128,
                num_kv_heads=1,
                head_dim=128,
                vocab_size=129280,
                dense_layers=3,
                experts=256,
                expert_size=2048,
                experts_per_token=8,
                shared_experts=1,
                query_rank=1536,
                latent_rank=512,
                rotary_dim=64,
            ),
            163840,
            "deepseek-ai/DeepSeek-V3, config.json; arXiv:2412.19437",
        ),
    )
}


def get_shape(name: str) -> tuple[Shape, int]:
    """(shape, longest context) of a named model, ours or one of SHAPES. UsageError names the
    nearest ones."""
    if name in SHAPES:
        return SHAPES[name].shape, SHAPES[name].max_context
    config = configs.CONFIGS.get(configs.ALIASES.get(name, name))
    if config is None:
        known = [*configs.CONFIGS, *configs.ALIASES, *SHAPES]
        near = ", ".join(configs.nearest(name, known))
        raise UsageError(f"config: no model is named {name!r}; nearest: {near}")
    return Shape.of(config), config.max_context
