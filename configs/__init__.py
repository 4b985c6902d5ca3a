"""Named models. `get_config("70b")` returns the literal; `CONFIGS` lists them all."""

import difflib

from ternax.config import ModelConfig
from ternax.configs import bitnet, llama3, stdlib, tiny
from ternax.errors import UsageError
from ternax.kernels.shapes import ALIASES, canonical

CONFIGS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        tiny.TINY_LLAMA,
        tiny.TINY_BITNET,
        stdlib.STDLIB_BITNET,
        llama3.LLAMA_1B,
        llama3.LLAMA_3B,
        llama3.LLAMA_8B,
        llama3.LLAMA_13B,
        llama3.LLAMA_70B,
        llama3.LLAMA_405B,
        bitnet.BITNET_700M,
        bitnet.BITNET_2B4T,
        bitnet.BITNET_3B,
        bitnet.BITNET_7B,
    )
}


def nearest(name: str, names, n: int = 3) -> list[str]:
    """The `n` of `names` most like `name`, best first; all of them when none is near."""
    names = list(names)
    return difflib.get_close_matches(name, names, n=n, cutoff=0.5) or names


def get_config(name: str) -> ModelConfig:
    """The named model. Raises UsageError naming the nearest ones."""
    config = CONFIGS.get(canonical(name))
    if config is None:
        near = ", ".join(nearest(name, [*CONFIGS, *ALIASES]))
        raise UsageError(
            f"config: no model is named {name!r}; nearest: {near} (--list_configs shows all)"
        )
    return config
