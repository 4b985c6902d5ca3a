"""Which row of a whole matrix each row of all devices is.

Fused parts interleave over devices, and kv heads may have copies; along K parts simply follow
one another.
"""

import dataclasses

import numpy as np

from ternax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a matrix, or of several fused, along N.

    Attributes:
      source: int [rows of all devices], the row of the whole matrix that each one is.
      order: int [N], where the whole matrix's rows are first found among them.
      parts: (name, width) of each matrix, whole.
    """

    source: np.ndarray
    order: np.ndarray
    parts: tuple[tuple[str, int], ...]


def rows_in(layout: Layout, parts: tuple[tuple[str, int], ...], *, split: bool = True) -> Rows:
    """Of one device's fused `parts`, (name, width) each.

    split: whether rows are split over the layout's devices at all; else each holds all of them.
    """
    devices = range(layout.tensor if split else 1)
    first = {
        (part, device): int(layout.first_row(part, width, device)) if split else 0
        for part, width in parts
        for device in devices
    }
    widths = {part: first[part, devices[-1]] + width for part, width in parts}
    starts = dict(zip(widths, np.cumsum([0, *widths.values()]), strict=False))
    source = np.concatenate(
        [
            starts[part] + first[part, device] + np.arange(width)
            for device in devices
            for part, width in parts
        ]
    )
    order = np.unique(source, return_index=True)[1]
    return Rows(source, order, tuple(widths.items()))
