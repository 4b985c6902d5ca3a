"""A Hugging Face directory as a model: config.json and safetensors, of Llama and BitNet.

How matrices are stored is said by `quantization_config`, never guessed:

    linear_class    quantization_mode   a matrix                      weight_scale is
    (none at all)                       floats, as they are
    autobitlinear   online              floats, quantized by absmean
    autobitlinear   offline             uint8, four rows a byte       what multiplies the trits
    bitlinear       offline             uint8, four rows a byte       what divides them

Sources: transformers' integrations/bitnet.py and models/{llama,bitnet}/configuration_*.py; for
1bitLLM's models, whose sub-norms have names of their own, their modeling_bitnet.py.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, NoReturn

from ternax.config import ModelConfig, RopeScaling
from ternax.errors import BadModelFile, UsageError
from ternax.interop import safetensors_file
from ternax.interop.files import Entry, Scratch, TensorFile
from ternax.interop.foreign import is_matrix, shapes

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_JSON = 1 << 26
# Bytes of two tensors that are compared at a time.
_PIECE_BYTES = 1 << 22

LAYER_NAMES = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn.sub_norm": "self_attn.attn_sub_norm",
    "mlp.sub_norm": "mlp.ffn_sub_norm",
}
_1BITLLM = {"attn.sub_norm": "self_attn.inner_attn_ln", "mlp.sub_norm": "mlp.ffn_layernorm"}
TABLE_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
CONVENTIONS = ("autobitlinear", "bitlinear")

# Fields of config.json that would change the arithmetic, with the values that do not.
_NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "attention_multiplier": (None,),
    "logit_scale": (None,),
}


class HFModel:
    """An opened directory, see `foreign.Foreign`.

    Attributes:
      settings: config.json.
      convention: of CONVENTIONS where matrices are packed, else None.
    """

    def __init__(self, path, name: str | None = None):
        """name: of the model; None: the directory's.

        BadModelFile: not whole, or not of an architecture that is read.
        """
        self.path = pathlib.Path(path)
        self.settings = read_json(self.path, CONFIG)
        self.convention, online = self._quantization()
        self._names = dict(LAYER_NAMES)
        config = self._config(name or self.path.resolve().name)
        self._files, self._scratch = _open_files(self.path), Scratch()
        if "model.layers.0.self_attn.inner_attn_ln.weight" in self._files:
            self._names |= _1BITLLM
        head, table = self.where("head"), self.where("embedding")
        if config.tie_embeddings and head in self._files and not self._same(head, table):
            self._bad(head, "stands beside tie_word_embeddings: true, and is no copy of the table")
        self.packed = self.convention is not None
        scheme = "absmean" if self.packed or online else "none"
        inputs = "int8" if self.packed or online else "none"
        self.config = dataclasses.replace(config, scheme=scheme, inputs=inputs)
        self._check_tensors()

    def where(self, name: str) -> str:
        if name in TABLE_NAMES:
            return f"{TABLE_NAMES[name]}.weight"
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{self._names[rest]}.weight"

    def kind(self, name: str) -> str:
        return self._entry(self.where(name)).kind

    def trits(self, name: str, out):
        import numpy as np

        from ternax.kernels.transcode import LayoutError, to_canonical

        where = self.where(name)
        (quarter, k), file = self._entry(where).shape, self._files[where]
        try:
            raw = file.read(where, scratch=self._scratch)
            to_canonical(raw, "hf", (k, 4 * quarter), out=out)
        except LayoutError as error:
            self._bad(where, str(error))
        stored = self._read(f"{where}_scale").reshape(1, 1)
        with np.errstate(divide="ignore"):
            return stored if self.convention == "autobitlinear" else 1 / stored

    def floats(self, name: str, first: int = 0, count: int | None = None):
        return self._read(self.where(name), first, count)

    def stored(self, name: str, first: int, count: int):
        from ternax.interop.blocks import as_stored

        return self._read(self.where(name), first, count, as_stored)

    def _read(self, where: str, first: int = 0, count: int | None = None, decode=None):
        from ternax.interop.blocks import to_floats

        entry = self._entry(where)
        columns, rows = entry.shape[-1], math.prod(entry.shape[:-1])
        row_bytes = entry.nbytes // rows
        count = rows - first if count is None else count
        place = first * row_bytes, count * row_bytes
        raw = self._files[where].read(where, *place, scratch=self._scratch)
        return (decode or to_floats)(raw, entry.kind, columns)

    # --- What it is ------------------------------------------------------------------------

    def _quantization(self) -> tuple[str | None, bool]:
        """(convention of packed matrices or None, whether floats are quantized online)."""
        found = self.settings.get("quantization_config")
        if found is None:
            own = self.settings.get("weight_bits"), self.settings.get("input_bits")
            return None, own == (1, 8)  # 1bitLLM's models
        if not isinstance(found, dict) or found.get("quant_method") != "bitnet":
            method = found.get("quant_method") if isinstance(found, dict) else found
            self._bad("quantization_config", f"expected quant_method bitnet, found {method!r}")
        linear = found.get("linear_class", "bitlinear")
        mode = found.get("quantization_mode", "offline")
        if linear not in CONVENTIONS or mode not in ("online", "offline"):
            self._bad("quantization_config", f"linear_class {linear!r}, quantization_mode {mode!r}")
        if found.get("use_rms_norm"):
            self._bad("quantization_config", "use_rms_norm: a norm for each matrix is not read")
        skipped = found.get("modules_to_not_convert") or []
        if not isinstance(skipped, list) or any(skip != "lm_head" for skip in skipped):
            self._bad("quantization_config", f"modules_to_not_convert {skipped!r} is not read")
        if (linear, mode) == ("bitlinear", "online"):
            self._bad("quantization_config", "bitlinear is not online")
        return (None, True) if mode == "online" else (linear, False)

    def _config(self, name: str) -> ModelConfig:
        kind, names = self.settings.get("model_type"), self.settings.get("architectures") or []
        names = names if isinstance(names, list) else [names]
        bitnet = kind == "bitnet" or any(
            name in ("BitnetForCausalLM", "BitNetForCausalLM") for name in names
        )
        if kind not in ("llama", "bitnet"):
            self._bad(CONFIG, f"model_type {kind!r} is not read; llama and bitnet are")
        for key, neutral in _NEUTRAL.items():
            if self.settings.get(key) not in neutral:
                self._bad(CONFIG, f"{key} {self.settings[key]!r} is not read")
        heads, width = self._count("num_attention_heads"), self._count("hidden_size")
        theta, scaling = self._rope()
        try:
            return ModelConfig(
                name=name,
                family="bitnet" if bitnet else "llama",
                vocab_size=self._count("vocab_size"),
                hidden_size=width,
                intermediate_size=self._count("intermediate_size"),
                num_layers=self._count("num_hidden_layers", most=1 << 16),
                num_heads=heads,
                num_kv_heads=self._count("num_key_value_heads", heads),
                head_dim=self._count("head_dim", width // heads),
                rope_theta=theta,
                rope_scaling=scaling,
                norm_eps=self._number("rms_norm_eps", self.settings.get("rms_norm_eps", 1e-6)),
                activation=self.settings.get("hidden_act", "silu"),
                tie_embeddings=self.settings.get("tie_word_embeddings", False),
                max_context=self._count("max_position_embeddings", 2048),
                source=f"Hugging Face directory, model_type {kind}",
            )
        except UsageError as error:
            raise BadModelFile(self.path, CONFIG, str(error)) from error

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """theta and scaling, of both spellings: transformers' until 4 and from 5 on."""
        found = self.settings.get("rope_parameters")
        found = found if found is not None else self.settings.get("rope_scaling") or {}
        if not isinstance(found, dict):
            self._bad(CONFIG, f"rope_parameters {found!r}")
        default = self.settings.get("rope_theta", 10000.0)
        theta = self._number("rope_theta", found.get("rope_theta", default))
        kind = found.get("rope_type", found.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            self._bad(CONFIG, f"rope_type {kind!r} is not read; default and llama3 are")
        factor, low, high = (
            self._number(key, found.get(key))
            for key in ("factor", "low_freq_factor", "high_freq_factor")
        )
        original = found.get("original_max_position_embeddings")
        if type(original) is not int:
            self._bad(CONFIG, f"original_max_position_embeddings {original!r}")
        return theta, RopeScaling(factor, low, high, original)

    def _check_tensors(self) -> None:
        known = {self.where("head")} if self.config.tie_embeddings else set()
        if self.config.num_layers > len(self._files):
            self._bad(CONFIG, f"{self.config.num_layers} layers, and too few tensors")
        for name, shape in shapes(self.config).items():
            where = self.where(name)
            kinds: tuple[str, ...] = ("F32", "F16", "BF16", "F64")
            known.add(where)
            if self.packed and is_matrix(name, shape):
                if shape[0] % 4:
                    self._bad(where, f"{shape[0]} rows, four of which share a byte")
                kinds, shape = ("U8",), (shape[0] // 4, shape[1])
                self._check(f"{where}_scale", (1,), ("F32", "F16", "BF16"))
                known.add(f"{where}_scale")
            self._check(where, shape, kinds)
        # Older files hold the rotary frequencies, which follow from the config.
        unknown = [
            n for n in self._files if n not in known and not n.endswith("rotary_emb.inv_freq")
        ]
        if unknown:
            self._bad(unknown[0], "unknown to the model that config.json describes")

    def _check(self, where: str, shape: tuple[int, ...], kinds: tuple[str, ...]) -> None:
        entry = self._entry(where)
        found = entry.shape or (1,)
        if found != shape or entry.kind not in kinds:
            expected = f"{' or '.join(kinds)} {list(shape)}"
            self._bad(where, f"expected {expected}, found {entry.kind} {list(found)}")

    # --- Small things ----------------------------------------------------------------------

    def _entry(self, where: str) -> Entry:
        if where not in self._files:
            self._bad(where, "missing")
        return self._files[where].entries[where]

    def _same(self, one: str, other: str) -> bool:
        """Whether two tensors are stored as the same bytes."""
        first, second = self._entry(one), self._entry(other)
        if (first.kind, first.shape) != (second.kind, second.shape):
            return False
        for at in range(0, first.nbytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, first.nbytes - at)
            pieces = (self._files[name].read(name, at, size) for name in (one, other))
            if bytes(next(pieces)) != bytes(next(pieces)):
                return False
        return True

    def _count(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.settings.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < most:
            self._bad(CONFIG, f"{key} must be a positive count, found {str(value)[:40]}")
        return value

    def _number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            self._bad(CONFIG, f"{key} must be a number, found {str(value)[:40]}")
        return float(value)

    def _bad(self, where: str, why: str) -> NoReturn:
        raise BadModelFile(self.path, where, why)


def read_json(path: pathlib.Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a directory. BadModelFile where there is none."""
    file = path / name
    try:
        if file.stat().st_size > _MAX_JSON:
            raise BadModelFile(path, name, f"{file.stat().st_size} bytes is no {name}")
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise BadModelFile(path, name, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadModelFile(path, name, f"expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadModelFile(path, name, f"expected an object, found {type(found).__name__}")
    return found


def _open_files(path: pathlib.Path) -> dict[str, TensorFile]:
    """Tensor's name -> the file it is in."""
    if (path / _SINGLE).is_file():
        file = safetensors_file.read(path / _SINGLE)
        return dict.fromkeys(file.entries, file)
    if not (path / _INDEX).is_file():
        pickles = sorted(each.name for each in path.glob("*.bin"))
        if pickles:
            raise BadModelFile(
                path,
                pickles[0],
                "a pickle can run code and is never opened: convert it to safetensors",
            )
        raise BadModelFile(path, _SINGLE, f"missing, and so is {_INDEX}")
    placed = read_json(path, _INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise BadModelFile(path, _INDEX, "expected a weight_map from names to files")
    files = {}
    for name in sorted(set(placed.values())):
        if name != pathlib.PurePath(name).name or not name.endswith(".safetensors"):
            raise BadModelFile(path, _INDEX, f"expected a file of this directory, found {name!r}")
        files[name] = safetensors_file.read(path / name)
    for tensor, name in placed.items():
        if tensor not in files[name].entries:
            raise BadModelFile(path, tensor, f"missing in {name}, where {_INDEX} puts it")
    extra = [t for name, f in files.items() for t in f.entries if placed.get(t) != name]
    if extra:
        raise BadModelFile(path, extra[0], f"is in a file, and not in {_INDEX}")
    return {tensor: files[name] for tensor, name in placed.items()}
