"""Two models small enough for tests and first tries: every feature, no size.

Grouped heads, a head width that does not divide the hidden size, llama3 rotary
scaling that acts within the context, both activations, tied and untied heads.
"""

from ternax.config import ModelConfig, RopeScaling

TINY_LLAMA = ModelConfig(
    name="tiny-llama",
    family="llama",
    vocab_size=259,
    hidden_size=64,
    intermediate_size=176,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32
    ),
    norm_eps=1e-5,
    activation="silu",
    tie_embeddings=False,
    max_context=256,
    source="made for tests",
)

TINY_BITNET = ModelConfig(
    name="tiny-bitnet",
    family="bitnet",
    vocab_size=259,
    hidden_size=64,
    intermediate_size=144,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    activation="relu2",
    tie_embeddings=True,
    max_context=256,
    source="made for tests",
)
