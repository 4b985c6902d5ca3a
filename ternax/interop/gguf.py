"""A GGUF file as a model: which keys and names mean what, in the architectures that are read.

    architecture    is                                                      rotary pairs
    llama           family llama, silu                                      neighbours
    bitnet          family bitnet, silu, tied; upstream llama.cpp           halves
    bitnet-b1.58    family bitnet, relu2; bitnet.cpp (also as bitnet-25)    halves

Pairs of neighbours are rows of q and k in another order, so they cost nothing here. Sources:
src/models/llama.cpp and bitnet.cpp, gguf-py/gguf/constants.py and conversion/ of llama.cpp;
`build_bitnet_158` of bitnet.cpp.
"""

import dataclasses
import math
import pathlib
from typing import Any, NoReturn

from ternax.config import ModelConfig, RopeScaling
from ternax.errors import BadModelFile, UsageError
from ternax.interop import gguf_file
from ternax.interop.files import Entry, Scratch
from ternax.interop.foreign import is_matrix, shapes

TRITS = ("TQ1_0", "TQ2_0", "I2_S")
# How I2_S is laid out: by the machine that wrote it, or by bitnet.cpp built without ACT_PARALLEL.
I2_S = ("x86", "arm", "rows")
# A scale for each block of a row, where blocks differ; one for the matrix where they do not.
GROUPED = "absmean,granularity=group,group_size=256"

# architecture -> (family, activation)
ARCHITECTURES = {
    "llama": ("llama", "silu"),
    "bitnet": ("bitnet", "silu"),
    "bitnet-b1.58": ("bitnet", "relu2"),
    "bitnet-25": ("bitnet", "relu2"),
}
# Ours -> GGUF's, within a layer and outside.
LAYER_NAMES = {
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "attn_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attn.sub_norm": "attn_sub_norm",
    "mlp.sub_norm": "ffn_sub_norm",
}
TABLE_NAMES = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
ROPE_FREQS = "rope_freqs.weight"


def tensor_name(name: str) -> str:
    """Ours, "layers.3.attn.k" or "head", as GGUF has it."""
    if name in TABLE_NAMES:
        return f"{TABLE_NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.weight"


class GGUFModel:
    """An opened GGUF file, see `foreign.Foreign`. metadata: its key-value pairs."""

    def __init__(self, path, i2_s: str | None = None):
        """i2_s: a key of I2_S, which no file tells.

        Raises:
          BadModelFile: not whole, or not of an architecture that is read.
          UsageError: it holds I2_S, and `i2_s` says not which.
        """
        self.path = pathlib.Path(path)
        self.metadata, self.file = gguf_file.read(self.path)
        arch = self._get("general.architecture", str)
        if arch not in ARCHITECTURES:
            self._bad("general.architecture", f"{arch!r} is not read; {', '.join(ARCHITECTURES)}")
        self.arch, self._i2_s, self._scratch = arch, i2_s, Scratch()
        self.config = self._config()
        self._check_tensors()
        kinds = {self._entry(name).kind for name in self._matrices()}
        self.packed = kinds.issubset(TRITS)
        if "I2_S" in kinds and i2_s not in I2_S:
            raise UsageError(
                f"{path}: I2_S is laid out by the machine that wrote it, which no file tells: say "
                f"i2_s={', i2_s='.join(I2_S[:-1])} or i2_s={I2_S[-1]}, found {i2_s!r}"
            )
        scheme = "none"
        if self.packed:
            scheme = "absmean" if self._one_scale_each() else GROUPED
        elif self.config.family == "bitnet":
            scheme = "ls"  # what is stored is a ternary matrix times its scale
        inputs = "none" if scheme == "none" else "int8"
        self.config = dataclasses.replace(self.config, scheme=scheme, inputs=inputs)

    def where(self, name: str) -> str:
        return tensor_name(name)

    def kind(self, name: str) -> str:
        return self._entry(name).kind

    def trits(self, name: str, out):
        import numpy as np

        from ternax.kernels.transcode import LayoutError, to_canonical

        entry = self._entry(name)
        n, k = entry.shape
        layout = entry.kind.lower() + (f"_{self._i2_s}" if entry.kind == "I2_S" else "")
        reordered = self._reordered(name)
        try:
            raw = self.file.read(tensor_name(name), scratch=self._scratch)
            codes, scale = to_canonical(raw, layout, (k, n), out=None if reordered else out)
        except LayoutError as error:
            self._bad(tensor_name(name), str(error))
        if reordered:
            out[...] = codes[self._rows(name, n)]
        scale = np.asarray(scale, np.float32) * self._factor(name)
        if self.config.scheme != GROUPED:
            # A block of zeros may say 0; every other says the same.
            return np.full((1, 1), scale.max() if scale.max() > 0 else scale.min())
        if not scale.ndim:
            return np.full((k // 256, n), scale)
        return np.ascontiguousarray(scale[self._rows(name, n)].T)

    def floats(self, name: str, first: int = 0, count: int | None = None):
        from ternax.interop.blocks import to_floats

        entry, where = self._entry(name), tensor_name(name)
        columns, rows = entry.shape[-1], math.prod(entry.shape[:-1])
        if entry.kind == "I2_S":
            self._bad(where, "I2_S stands beside matrices of other kinds; store all as trits")
        row_bytes = entry.nbytes // rows
        count = rows - first if count is None else count
        values = to_floats(
            self.file.read(where, first * row_bytes, count * row_bytes), entry.kind, columns
        )
        if self._reordered(name):
            if count != rows:
                raise ValueError(f"{name} is read whole: its rows are in another order")
            values = values[self._rows(name, rows)]
        return values * self._factor(name) if f"{where[:-6]}scale" in self.file.entries else values

    def stored(self, name: str, first: int, count: int):
        from ternax.interop.blocks import as_stored

        entry, where = self._entry(name), tensor_name(name)
        row_bytes = entry.nbytes // entry.shape[0]
        place = first * row_bytes, count * row_bytes
        raw = self.file.read(where, *place, scratch=self._scratch)
        return as_stored(raw, entry.kind, entry.shape[1])

    # --- What it is ------------------------------------------------------------------------

    def _config(self) -> ModelConfig:
        table = self._table("token_embd.weight")
        heads = self._count("attention.head_count")
        head_dim = self._count("attention.key_length", table.shape[1] // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._count(key, head_dim) != head_dim:
                self._bad(f"{self.arch}.{key}", f"expected {head_dim}, the width of a head")
        if self._count("embedding_length") != table.shape[1]:
            self._bad("token_embd.weight", f"expected {self._count('embedding_length')} columns")
        for key in ("expert_count", "rope.scaling.yarn_log_multiplier"):
            if self.metadata.get(f"{self.arch}.{key}", 0):
                self._bad(f"{self.arch}.{key}", "a model with it is not read")
        if self.metadata.get(f"{self.arch}.rope.scaling.type", "none") not in ("none", "linear"):
            self._bad(f"{self.arch}.rope.scaling.type", "only none and rope_freqs are read")
        if self._number("rope.scaling.factor", 1.0) != 1.0:
            self._bad(f"{self.arch}.rope.scaling.factor", "expected 1: linear scaling is not read")
        layers = self._count("block_count")
        if layers > len(self.file.entries):
            self._bad(f"{self.arch}.block_count", f"{layers} blocks, and too few tensors")
        family, activation = ARCHITECTURES[self.arch]
        try:
            config = ModelConfig(
                name=self.path.stem,
                family=family,
                vocab_size=table.shape[0],
                hidden_size=table.shape[1],
                intermediate_size=self._count("feed_forward_length"),
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=self._count("attention.head_count_kv", heads),
                head_dim=head_dim,
                rope_theta=self._number("rope.freq_base", 10000.0),
                rope_scaling=None,
                norm_eps=self._number("attention.layer_norm_rms_epsilon"),
                activation=activation,
                tie_embeddings="output.weight" not in self.file.entries,
                max_context=self._count("context_length"),
                source=f"GGUF, architecture {self.arch}",
            )
            return dataclasses.replace(config, rope_scaling=self._rope_scaling(config))
        except UsageError as error:
            raise BadModelFile(self.path, "metadata", str(error)) from error

    def _rope_scaling(self, config: ModelConfig) -> RopeScaling | None:
        """What stretched the frequencies by the factors stored, found among what is in use."""
        if ROPE_FREQS not in self.file.entries:
            return None
        import numpy as np

        from ternax.interop.blocks import to_floats

        head_dim, theta = config.head_dim, config.rope_theta
        entry = self.file.entries[ROPE_FREQS]
        if entry.kind != "F32" or entry.shape != (head_dim // 2,):
            self._bad(ROPE_FREQS, f"expected F32 [{head_dim // 2}], found {entry.kind}")
        found = to_floats(self.file.read(ROPE_FREQS), "F32", head_dim // 2)[0]
        if (found == 1).all():
            return None
        stored = self.metadata.get("ternax.rope_scaling", [])
        guesses = [RopeScaling(float(found.max()), 1.0, 4.0, 8192)]
        if len(stored) == 4 and all(type(value) is float for value in stored):
            factor, low, high, original = stored
            guesses.insert(0, RopeScaling(factor, low, high, int(original)))
        for guess in guesses:
            if np.allclose(rope_factors(head_dim, theta, guess), found, rtol=1e-5):
                return guess
        self._bad(ROPE_FREQS, "no llama3 scaling of 8192 positions has these factors")

    def _check_tensors(self) -> None:
        """Every tensor that the model has is there, in its shape, and no other."""
        expected = shapes(self.config)
        known = {ROPE_FREQS}
        for name, shape in expected.items():
            where = tensor_name(name)
            if where not in self.file.entries:
                self._bad(where, "missing")
            found = self.file.entries[where].shape
            if found != shape:
                self._bad(where, f"expected {list(shape)}, found {list(found)}")
            known |= {where, f"{where[:-6]}scale"}
        unknown = [name for name in self.file.entries if name not in known]
        if unknown:
            self._bad(unknown[0], f"unknown to architecture {self.arch}")

    def _one_scale_each(self) -> bool:
        """Whether the blocks of each matrix share a scale; those of zeros may say 0."""
        return all(self._shares(name) for name in self._matrices())

    def _shares(self, name: str) -> bool:
        import numpy as np

        entry = self._entry(name)
        if entry.kind == "I2_S":
            return True
        width = gguf_file.KINDS[35 if entry.kind == "TQ2_0" else 34][2]
        rows, first = entry.shape[0], None
        step = max(1, (1 << 22) // (entry.nbytes // rows)) * (entry.nbytes // rows)
        for at in range(0, entry.nbytes, step):
            place = at, min(step, entry.nbytes - at)
            raw = self.file.read(tensor_name(name), *place, scratch=self._scratch)
            scale = np.ascontiguousarray(raw.reshape(-1, width)[:, -2:]).view(np.uint16).reshape(-1)
            real = scale[scale != 0]
            first = real[0] if first is None and real.size else first
            if (real != first).any():
                return False
        return True

    # --- Small things ----------------------------------------------------------------------

    def _matrices(self):
        return [name for name, shape in shapes(self.config).items() if is_matrix(name, shape)]

    def _entry(self, name: str) -> Entry:
        return self.file.entries[tensor_name(name)]

    def _factor(self, name: str):
        """The matrix's `.scale` of upstream's bitnet, f32; 1 without one."""
        import numpy as np

        where = f"{tensor_name(name)[:-6]}scale"
        if where not in self.file.entries:
            return np.float32(1)
        entry = self.file.entries[where]
        if entry.kind != "F32" or entry.shape != (1,):
            self._bad(where, f"expected F32 [1], found {entry.kind} {list(entry.shape)}")
        return self.file.read(where).view("<f4")[0]

    def _reordered(self, name: str) -> bool:
        return self.arch == "llama" and name.endswith(("attn.q", "attn.k"))

    def _rows(self, name: str, count: int):
        """Which of the file's rows ours are: rotary pairs of neighbours become halves."""
        if not self._reordered(name):
            return slice(None)
        return to_halves(count, self.config.head_dim)

    def _table(self, where: str) -> Entry:
        entry = self.file.entries.get(where)
        if entry is None or len(entry.shape) != 2:
            self._bad(where, "missing, or no matrix")
        return entry

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            self._bad(key, "missing")
        if type(value) is not kind:
            self._bad(key, f"expected {kind.__name__}, found {str(value)[:40]!r}")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._get(f"{self.arch}.{key}", int, default)
        if not 0 < value < 1 << 31:
            self._bad(f"{self.arch}.{key}", f"expected a positive count, found {value}")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        # Seven digits: 1e-5 is stored as the f32 next to it.
        return float(f"{self._get(f'{self.arch}.{key}', float, default):.7g}")

    def _bad(self, where: str, why: str) -> NoReturn:
        raise BadModelFile(self.path, where, why)


def to_halves(rows: int, head_dim: int):
    """Index: halves[i] = pairs[index[i]], within each head of a q or k."""
    import numpy as np

    index = np.arange(rows).reshape(-1, head_dim // 2, 2)
    return index.swapaxes(1, 2).reshape(-1)


def rope_factors(head_dim: int, theta: float, scaling: RopeScaling):
    """f32 [E / 2]: what a frequency is divided by, as llama.cpp stores it."""
    from ternax.nn.rope import frequencies

    return frequencies(head_dim, theta, None) / frequencies(head_dim, theta, scaling)
