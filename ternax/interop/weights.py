"""The weights of one of our models, by per-layer name, as files want them: rows and scales."""

import numpy as np
from flax import nnx

from ternax.checkpoint.leaves import leaves
from ternax.edit import is_packed, stored_order
from ternax.errors import UsageError
from ternax.kernels.packing import FLOAT_FORMATS, FORMATS
from ternax.models import Decoder


class Weights:
    """Reads a Decoder's leaves in place. Names as "layers.3.attn.k", "embedding", "norm".

    Attributes:
      config: of the model.
      packed: codes and scales, or latent floats.
    """

    def __init__(self, model: Decoder):
        self.config, self.packed = model.config, is_packed(model)
        self._leaves = {leaf.name: leaf for leaf in leaves(stored_order(model))}
        self._values = {
            path: np.asarray(variable.get_value())
            for path, variable in nnx.to_flat_state(nnx.state(model))
        }

    def _leaf(self, name: str) -> np.ndarray:
        leaf = self._leaves[name]
        return leaf.of(self._values[leaf.path])

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight: f32 [D]."""
        return self._leaf(f"{name}.weight")

    def format(self, name: str) -> str:
        """Of a matrix or table: a key of FORMATS or FLOAT_FORMATS; "f32" of latent floats."""
        if not self.packed:
            return "f32"
        return self._leaves[f"{name}.codes"].format or ""

    def codes(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(codes uint8 [N, bytes], contiguous; scale f32 [G, 1 or N]) of a matrix of integers.

        Raises UsageError where the format has more than that: planes, or a zero point.
        """
        codes = self._leaf(f"{name}.codes")
        if codes.shape[0] > 1 or f"{name}.zero" in self._leaves:
            raise UsageError(
                f"{name}: {self.config.scheme} has two trit-planes or a zero point, which no "
                "file of another program holds: save it as orbax"
            )
        return np.ascontiguousarray(codes[0]), self._leaf(f"{name}.scale")[0]

    def columns(self, name: str) -> int:
        """K of a matrix, D of a table."""
        config, part = self.config, name.split(".")[-1]
        wide = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}
        return wide.get(part, config.hidden_size)

    def integers(self, name: str, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(values int8 [count, K], scale f32 [G, 1 or count]) of rows of an integer format."""
        fmt, k = FORMATS[self.format(name)], self.columns(name)
        codes, scale = self.codes(name)
        rows = codes[first : first + count]
        blocks = rows.reshape(len(rows), -1, 1, 2 * fmt.bits)
        shifts = (fmt.bits * np.arange(fmt.planes, dtype=np.uint8))[:, None]
        codes = (blocks >> shifts) & (2**fmt.bits - 1)
        values = (codes.astype(np.int16) - fmt.offset).astype(np.int8).reshape(len(rows), -1)[:, :k]
        return values, scale if scale.shape[1] == 1 else scale[:, first : first + count]

    def floats(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """f32 [count, K]: rows of a matrix or table, dequantized; all of them for None."""
        if not self.packed:
            leaf = f"{name}.weight"
            whole = self._leaf(leaf) if leaf in self._leaves else self._leaf(f"{name}.kernel").T
            return whole[first:][:count]
        codes = self._leaf(f"{name}.codes")
        count = codes.shape[1] - first if count is None else count
        if self.format(name) in FLOAT_FORMATS:
            stored = codes[0, first : first + count]
            bf16 = stored.dtype == np.uint16
            return (stored.astype(np.uint32) << 16).view(np.float32) if bf16 else stored
        values, scale = self.integers(name, first, count)
        parts = values.reshape(count, scale.shape[0], -1) * scale.T.reshape(-1, scale.shape[0], 1)
        return parts.reshape(count, -1)
