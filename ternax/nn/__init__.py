"""Flax NNX building blocks: linears, attention, MLP, norm, embedding table, KV cache."""
