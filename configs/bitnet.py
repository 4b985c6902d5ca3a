"""BitNet b1.58: the released 700m, 3b and 2B-4T models and the papers' 7b shape.

Parameter totals, which the tests hold against the abstract model:
  bitnet-700m 728,842,752   bitnet-3b 3,324,387,840
  bitnet-2b4t 2,412,820,480   bitnet-7b 6,738,898,944
"""

from typing import Any

from ternax.config import ModelConfig


def _bitnet(**numbers) -> ModelConfig:
    """What the first BitNet models share (1bitLLM config.json): Llama-2 vocabulary, silu."""
    shared: dict[str, Any] = dict(
        family="bitnet",
        vocab_size=32002,
        rope_theta=10000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        activation="silu",
        tie_embeddings=True,
        max_context=2048,
    )
    return ModelConfig(**(shared | numbers))


BITNET_700M = _bitnet(
    name="bitnet-700m",
    hidden_size=1536,
    intermediate_size=4096,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    head_dim=96,
    source="1bitLLM/bitnet_b1_58-large config.json",
)

BITNET_3B = _bitnet(
    name="bitnet-3b",
    hidden_size=3200,
    intermediate_size=8640,
    num_layers=26,
    num_heads=32,
    num_kv_heads=32,
    head_dim=100,
    source="1bitLLM/bitnet_b1_58-3B config.json",
)

BITNET_2B4T = _bitnet(
    name="bitnet-2b4t",
    vocab_size=128256,
    hidden_size=2560,
    intermediate_size=6912,
    num_layers=30,
    num_heads=20,
    num_kv_heads=5,
    head_dim=128,
    rope_theta=500000.0,
    activation="relu2",
    max_context=4096,
    source="microsoft/bitnet-b1.58-2B-4T config.json; transformers models/bitnet",
)

# A shape only: arXiv:2402.17764 times it, no checkpoint was published.
BITNET_7B = _bitnet(
    name="bitnet-7b",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    tie_embeddings=False,
    source="arXiv:2402.17764 (LLaMA 7B shape)",
)
