"""Llama 3.2 (1b, 3b), Llama 3.1 (8b, 70b, 405b) and the Llama-2 13b shape.

Parameter totals, which the tests hold against the abstract model:
  1b 1,235,814,400   3b 3,212,749,824   8b 8,030,261,248
  70b 70,553,706,496   405b 405,853,388,800   13b 13,015,864,320
"""

from typing import Any

from ternax.config import ModelConfig, RopeScaling

# Llama 3.1 stretches the rotary frequencies by 8, Llama 3.2 by 32; both were
# pre-trained at 8192 positions (config.json, "rope_scaling").
_SCALE_31 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)
_SCALE_32 = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
)


def _llama3(**numbers) -> ModelConfig:
    """What every Llama 3 shares: vocabulary, theta, eps, SwiGLU, 8 kv heads."""
    shared: dict[str, Any] = dict(
        family="llama",
        vocab_size=128256,
        num_kv_heads=8,
        rope_theta=500000.0,
        norm_eps=1e-5,
        activation="silu",
        max_context=131072,
    )
    return ModelConfig(**(shared | numbers))


LLAMA_1B = _llama3(
    name="1b",
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    head_dim=64,
    rope_scaling=_SCALE_32,
    tie_embeddings=True,
    source="meta-llama/Llama-3.2-1B config.json",
)

LLAMA_3B = _llama3(
    name="3b",
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_heads=24,
    head_dim=128,
    rope_scaling=_SCALE_32,
    tie_embeddings=True,
    source="meta-llama/Llama-3.2-3B config.json",
)

LLAMA_8B = _llama3(
    name="8b",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    head_dim=128,
    rope_scaling=_SCALE_31,
    tie_embeddings=False,
    source="meta-llama/Llama-3.1-8B config.json; MaxText llama3.1-8b.yml",
)

LLAMA_70B = _llama3(
    name="70b",
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    head_dim=128,
    rope_scaling=_SCALE_31,
    tie_embeddings=False,
    source="meta-llama/Llama-3.1-70B config.json; MaxText llama3.1-70b.yml",
)

# The first release duplicated the kv heads to 16; the revised one has 8.
LLAMA_405B = _llama3(
    name="405b",
    hidden_size=16384,
    intermediate_size=53248,
    num_layers=126,
    num_heads=128,
    head_dim=128,
    rope_scaling=_SCALE_31,
    tie_embeddings=False,
    source="meta-llama/Llama-3.1-405B config.json (8 kv heads); MaxText llama3.1-405b.yml",
)

LLAMA_13B = ModelConfig(
    name="13b",
    family="llama",
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    activation="silu",
    tie_embeddings=False,
    max_context=4096,
    source="meta-llama/Llama-2-13b config.json; MaxText llama2-13b.yml",
)
