"""Model families. `MODELS[config.family](config, rngs=nnx.Rngs(0))`."""

from ternax.models.bitnet import BitNet
from ternax.models.decoder import Decoder
from ternax.models.llama import Llama

MODELS: dict[str, type[Decoder]] = {"llama": Llama, "bitnet": BitNet}

__all__ = ["MODELS", "BitNet", "Decoder", "Llama"]
