"""One of our models as a Hugging Face directory that transformers loads."""

import json
import pathlib

import numpy as np

from ternax.config import ModelConfig
from ternax.errors import UsageError
from ternax.interop import safetensors_file
from ternax.interop.blocks import from_floats
from ternax.interop.files import Plan
from ternax.interop.foreign import is_matrix, shapes
from ternax.interop.forms import forms, single_plane
from ternax.interop.hf import CONFIG, CONVENTIONS, LAYER_NAMES, TABLE_NAMES
from ternax.interop.weights import Weights
from ternax.kernels.transcode import LayoutError, from_canonical

SHARD_BYTES = 5 * 10**9
_ROWS = 1024


def save(
    weights: Weights,
    directory: pathlib.Path,
    *,
    convention: str = "autobitlinear",
    stop: tuple[int, ...] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills an empty directory.

    Args:
      convention: of `weight_scale` where matrices are trits, of hf.CONVENTIONS.
      stop: ids that end a text.
      shard_bytes: a file holds no more, but for a tensor that alone is larger.

    Raises UsageError: transformers has no such model.
    """
    check(weights.config, convention)
    quantization, dtype = _form(weights, convention)
    plans: list[Plan] = []
    for name, shape in shapes(weights.config).items():
        packed = quantization is not None and quantization["quantization_mode"] == "offline"
        if packed and is_matrix(name, shape):
            plans += _packed(weights, name, shape, convention)
        else:
            plans.append(_floats(weights, name, shape, dtype))
    _write_files(directory, plans, shard_bytes)
    settings = described(weights.config, dtype, stop)
    if quantization is not None:
        settings["quantization_config"] = quantization
    (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def check(config: ModelConfig, convention: str = "autobitlinear") -> None:
    """Raises UsageError where transformers has no such model, whatever its weights are."""
    if convention not in CONVENTIONS:
        raise UsageError(f"hf: expected one of {', '.join(CONVENTIONS)}, found {convention!r}")
    wide = config.num_heads * config.head_dim == config.hidden_size
    if config.family == "bitnet" and not wide:
        raise UsageError(f"hf: {config.name} has heads that are not as wide together as the model")


def check_forms(config: ModelConfig) -> None:
    """Raises UsageError where packed weights of this scheme have no place in such a directory."""
    for form in forms(config):
        _check_format(config, form.format)
        why = single_plane(form, config.scheme)
        if why is None and form.format == "trit2":
            if form.groups > 1 or form.rows:
                why = (
                    f"{form.name} has scales that differ, and weight_scale is one: save it as "
                    "gguf:TQ2_0"
                )
            elif form.shape[0] % 4:
                why = f"{form.name} has {form.shape[0]} rows, four of which share a byte: orbax"
        if why is not None:
            raise UsageError(f"hf: {why}")


def _check_format(config: ModelConfig, format: str) -> None:
    if format == "trit2":
        if config.inputs != "int8":
            raise UsageError(
                f"hf: {config.name} leaves inputs unquantized; transformers' bitnet quantizes them"
            )
    elif config.scheme.partition(",")[0] != "none" or config.inputs != "none":
        raise UsageError(
            f"hf: transformers has no form of {config.scheme} with inputs {config.inputs}: pack "
            "the model ternary, or save it as orbax"
        )


def _form(weights: Weights, convention: str) -> tuple[dict | None, str]:
    """(quantization_config or None, dtype of the rest); UsageError where there is no such model."""
    config = weights.config
    format = weights.format("layers.0.attn.q")
    table = weights.format("embedding")
    dtype = "BF16" if table == "bf16" else "F32"
    bitnet = {"quant_method": "bitnet", "modules_to_not_convert": None}
    online = not weights.packed and config.scheme == "absmean"
    _check_format(config, "trit2" if online else format)
    if format != "trit2" and not online:
        return None, "BF16" if format == "bf16" else "F32"
    mode = "offline" if weights.packed else "online"
    linear = convention if weights.packed else "autobitlinear"
    return bitnet | {"linear_class": linear, "quantization_mode": mode}, dtype


def described(config: ModelConfig, dtype: str, stop: tuple[int, ...]) -> dict:
    """config.json, without its quantization_config."""
    bitnet = config.family == "bitnet"
    found = {
        "architectures": ["BitNetForCausalLM" if bitnet else "LlamaForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": list(stop) if len(stop) > 1 else stop[0] if stop else None,
        "torch_dtype": "bfloat16" if dtype == "BF16" else "float32",
    }
    if not bitnet:
        found["mlp_bias"] = False
    scaling = config.rope_scaling
    if scaling is not None:
        found["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return found


def tensor_name(name: str) -> str:
    """Ours, "layers.3.attn.k" or "head", as transformers has it."""
    if name in TABLE_NAMES:
        return f"{TABLE_NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}.weight"


def _floats(weights: Weights, name: str, shape: tuple[int, ...], dtype: str) -> Plan:
    if len(shape) == 1:
        vector = weights.vector(name)
        exact = dtype == "BF16" and (vector.view(np.uint32) & 0xFFFF == 0).all()
        kind = "BF16" if exact else "F32"
        nbytes = shape[0] * safetensors_file.BYTES[kind]
        return Plan(tensor_name(name), shape, kind, nbytes, lambda: [from_floats(vector, kind)])

    def produce():
        for first in range(0, shape[0], _ROWS):
            count = min(_ROWS, shape[0] - first)
            yield from_floats(weights.floats(name, first, count), dtype)

    nbytes = shape[0] * shape[1] * safetensors_file.BYTES[dtype]
    return Plan(tensor_name(name), shape, dtype, nbytes, produce)


def _packed(weights: Weights, name: str, shape: tuple[int, ...], convention: str) -> list[Plan]:
    """A ternary matrix and its weight_scale."""
    n, k = shape
    if n % 4:
        raise UsageError(f"hf: {name} has {n} rows, four of which share a byte: save it as orbax")
    _, scale = weights.codes(name)
    if (scale != scale.flat[0]).any():
        raise UsageError(
            f"hf: {name} has scales that differ, and weight_scale is one: save it as gguf:TQ2_0"
        )

    def produce():
        try:
            return [from_canonical(weights.codes(name)[0], None, "hf", (k, n))]
        except LayoutError as error:
            raise UsageError(f"hf: {name}: {error}") from error

    where = tensor_name(name)
    stored = weight_scale(np.float32(scale.flat[0]), convention)
    kind = "BF16" if not stored.view(np.uint32)[0] & 0xFFFF else "F32"
    raw = from_floats(stored, kind)
    return [
        Plan(where, (n // 4, k), "U8", n // 4 * k, produce),
        Plan(f"{where}_scale", (1,), kind, raw.size, lambda: [raw]),
    ]


def weight_scale(scale: np.float32, convention: str) -> np.ndarray:
    """f32 [1] that reads as `scale`; with 16 zero bits, so that bf16 holds it, where it can be."""
    if convention == "autobitlinear":
        return np.array([scale], np.float32)
    one = np.float32(1)
    inverse = np.array([one / scale], np.float32)
    bits = inverse.view(np.uint32)
    short = ((bits + 0x8000) & 0xFFFF0000).view(np.float32)
    near = (bits + np.arange(-2, 3)).astype(np.uint32).view(np.float32)
    for candidate in (*short, *inverse, *near):
        if one / candidate == scale:
            return np.array([candidate], np.float32)
    return inverse


def _write_files(directory: pathlib.Path, plans: list[Plan], shard_bytes: int) -> None:
    """One file, or shards and their index."""
    shards: list[list[Plan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + plan.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(plan)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with open(directory / name, "wb") as file:
            safetensors_file.write(file, shard)
    if len(shards) > 1:
        placed = {plan.name: n for n, shard in zip(names, shards, strict=True) for plan in shard}
        index = {"metadata": {"total_size": sum(p.nbytes for p in plans)}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
