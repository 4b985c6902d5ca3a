"""The model that comes with ternax, trained on the standard library's own sources."""

from ternax.config import ModelConfig

STDLIB_BITNET = ModelConfig(
    name="stdlib-bitnet",
    family="bitnet",
    vocab_size=256,
    hidden_size=256,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    activation="relu2",
    tie_embeddings=True,
    max_context=1024,
    source="made for ternax: every width a multiple of 256, as GGUF's ternary blocks need",
)
