"""`ModelConfig`: every number that defines a model, frozen and checked.

The named models are literals in `configs/`; nothing else holds a model's size.
"""

import dataclasses
import math
from typing import Any

from ternax.errors import UsageError

FAMILIES = ("llama", "bitnet")
ACTIVATIONS = ("silu", "relu2")
INPUTS = ("int8", "none")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling of the rotary embedding (`rope_type: llama3`).

    Wavelengths longer than `original_context / low_freq_factor` are stretched by
    `factor`, shorter than `original_context / high_freq_factor` are kept, and the
    band between is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape and the arithmetic of one decoder.

    Attributes:
      name: what records and screens call it.
      family: "llama" (pre-norm blocks) or "bitnet" (the same with a sub-norm in
        front of the attention output and the down projection).
      vocab_size: V, rows of the embedding table and of the head.
      hidden_size: D, width of the residual stream.
      intermediate_size: F, width of the gated MLP.
      num_layers: L, number of blocks.
      num_heads: H, query heads.
      num_kv_heads: G, key/value heads; divides H.
      head_dim: E, width of one head; even. H * E need not equal D.
      rope_theta: base of the rotary frequencies.
      rope_scaling: Llama 3.1 scaling, or None.
      norm_eps: epsilon inside every RMSNorm.
      activation: gate function, "silu" or "relu2" (max(x, 0)^2).
      tie_embeddings: the head reads the embedding table.
      max_context: largest number of positions the model was made for.
      scheme: how the projections are quantized: a name in `ternax.quant.SCHEMES`
        or "package.module:Class", with options behind commas ("int4,group_size=64").
      inputs: how a projection's input is quantized: "int8" (per token) or "none".
      source: where the numbers come from.
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    activation: str
    tie_embeddings: bool
    max_context: int
    source: str
    scheme: str = "absmean"
    inputs: str = "int8"

    def __post_init__(self):
        _check_types(self, "config")
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        ):
            value = getattr(self, field)
            if value < 1:
                raise UsageError(f"config.{field} must be at least 1, found {value}")
        for field, legal in (("family", FAMILIES), ("activation", ACTIVATIONS), ("inputs", INPUTS)):
            value = getattr(self, field)
            if value not in legal:
                raise UsageError(
                    f"config.{field} must be one of {', '.join(legal)}, found {value!r}"
                )
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"config.num_heads must be a multiple of config.num_kv_heads, found "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"config.head_dim must be even (rotary pairs), found {self.head_dim}")
        if not 0 < self.norm_eps < 1:
            raise UsageError(f"config.norm_eps must lie between 0 and 1, found {self.norm_eps}")
        if not 1 < self.rope_theta < math.inf:
            raise UsageError(f"config.rope_theta must exceed 1, found {self.rope_theta}")
        if self.rope_scaling is not None:
            _check_scaling(self.rope_scaling)


def config_from_dict(values: dict) -> ModelConfig:
    """Inverse of `dataclasses.asdict`. TypeError for other fields, UsageError for bad values."""
    scaling = values["rope_scaling"]
    return ModelConfig(
        **values | {"rope_scaling": None if scaling is None else RopeScaling(**scaling)}
    )


def with_scheme(config: ModelConfig, scheme: str | None, inputs: str | None = None) -> ModelConfig:
    """The config under another scheme.

    `inputs` None keeps the config's, but scheme "none" leaves inputs unquantized too.
    """
    if scheme is None:
        scheme = config.scheme
    if inputs is None:
        inputs = "none" if scheme.partition(",")[0] == "none" else config.inputs
    return dataclasses.replace(config, scheme=scheme, inputs=inputs)


def first_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The config cut to its first `layers` layers; None keeps all."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise UsageError(
            f"layers must lie between 1 and {config.num_layers} for {config.name}, found {layers}"
        )
    return dataclasses.replace(config, num_layers=layers)


def _check_scaling(scaling: RopeScaling) -> None:
    """Raises UsageError for a scaling whose frequencies would be wrong or not finite."""
    _check_types(scaling, "config.rope_scaling")
    if not 0 < scaling.factor < math.inf:
        raise UsageError(f"config.rope_scaling.factor must be positive, found {scaling.factor}")
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor < math.inf:
        raise UsageError(
            "config.rope_scaling.low_freq_factor must lie between 0 and high_freq_factor, "
            f"found {scaling.low_freq_factor} and {scaling.high_freq_factor}"
        )
    if scaling.original_context < 1:
        raise UsageError(
            "config.rope_scaling.original_context must be at least 1, "
            f"found {scaling.original_context}"
        )


def _check_types(value, path: str) -> None:
    """Raises UsageError unless every field of a dataclass holds its declared type."""
    for field in dataclasses.fields(value):
        legal: Any = field.type
        found = getattr(value, field.name)
        kinds = (int, float) if legal is float else legal
        if not isinstance(found, kinds) or (isinstance(found, bool) and legal is not bool):
            name = getattr(legal, "__name__", legal)
            raise UsageError(f"{path}.{field.name} must be {name}, found {found!r}")
