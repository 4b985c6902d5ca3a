"""Makes gguf_ternary.npz: what the `gguf` package writes for small ternary matrices.

    pip install gguf==0.19.0 && python tests/goldens/make_gguf.py

gguf's quantizer takes the largest magnitude of a block of 256 as its scale, so values times one
scale a block are stored exactly. The tests read the file and do not need the package.
"""

import pathlib

import numpy as np
from gguf import GGMLQuantizationType, quants

K, N = 512, 3


def main() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (N, K)).astype(np.int8)
    scale = rng.uniform(0.01, 2, (N, K // 256)).astype(np.float16)
    weights = values * np.repeat(scale, 256, axis=1).astype(np.float32)
    arrays = {"values": values.T, "scale": scale}
    for name, kind in (
        ("tq1_0", GGMLQuantizationType.TQ1_0),
        ("tq2_0", GGMLQuantizationType.TQ2_0),
    ):
        packed = quants.quantize(weights, kind)
        if not np.array_equal(quants.dequantize(packed, kind), weights):
            raise ValueError(f"{name}: gguf does not read back what it wrote")
        arrays[name] = packed
    # Any byte at all, and what gguf reads in it: not every one is a number under 243.
    noise = rng.integers(0, 256, (1, 54), dtype=np.uint8)
    noise[:, -2:] = np.array([1.0], np.float16).view(np.uint8)
    arrays["noise"] = noise
    arrays["noise_values"] = quants.dequantize(noise, GGMLQuantizationType.TQ1_0).astype(np.int8)
    path = pathlib.Path(__file__).parent / "gguf_ternary.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
