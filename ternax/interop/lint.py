"""What is odd about weights that can be read: in a sentence each, naming the tensor.

What cannot be a weight at all (code 3, NaN) is refused where it is read. This is for what can, and
points at a broken upload or conversion: published ternary models have had all-zero matrices,
and scales applied twice.
"""

import numpy as np

from ternax.kernels.packing import FORMATS

# Shares of zeros that quantizers of trained weights leave: absmean of a Gaussian 31 %, TWN 42 %.
_ZEROS = (0.05, 0.95)
# A scale outside says that one was applied twice, or inverted.
_SCALES = (1e-6, 1e3)
# Bytes that are looked at for the share of zeros.
_SAMPLE = 1 << 16
_ALL_ZERO = 0x55  # four codes of 0
assert FORMATS["trit2"].offset == 1

_HISTOGRAMS = np.array(
    [
        [sum((byte >> 2 * i) & 3 == code for i in range(4)) for code in range(3)]
        for byte in range(256)
    ]
)


def trits(name: str, codes: np.ndarray, scale: np.ndarray) -> list[str]:
    """codes: canonical uint8 [N, bytes]; scale: f32. What is odd; often nothing."""
    step = max(1, codes.size // _SAMPLE)
    counts = np.bincount(codes.reshape(-1)[::step], minlength=256) @ _HISTOGRAMS
    shares = counts / counts.sum()
    if shares[1] == 1 and bool((codes == _ALL_ZERO).all()):
        return [f"{name} is all zero"]
    found = []
    if not _ZEROS[0] <= shares[1] <= _ZEROS[1]:
        found.append(
            f"{name} has codes -1, 0, +1 in shares {', '.join(f'{s:.3f}' for s in shares)}"
        )
    low, high = float(scale.min()), float(scale.max())
    if low < 0:
        found.append(f"{name} has a negative scale, {low:.3g}")
    elif not _SCALES[0] <= high <= _SCALES[1]:
        found.append(f"{name} has a scale of {high:.3g}")
    return found


def floats(name: str, values: np.ndarray) -> list[str]:
    """values: f32. Whether all of them are zero, or some absurdly large."""
    most = float(np.abs(values).max())
    if most == 0:
        return [f"{name} is all zero"]
    return [f"{name} holds {most:.3g}"] if most > 1e5 else []
