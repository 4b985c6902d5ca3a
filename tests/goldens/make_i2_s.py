"""Writes bitnet.cpp's own I2_S bytes to `bitnet_i2_s.npz`, which is committed.

    python tests/goldens/make_i2_s.py BitNet/src/ggml-bitnet-mad.cpp   # with g++; microsoft/BitNet

Its `quantize_i2_s` is compiled alone, once for each layout, and asked for a small ternary matrix
times a scale. Made from commit 16da220. The file holds:

    values  int8 [K, N]; W is values * scale
    scale   float32 scalar
    x86, arm, rows  uint8 [N * K / 4 + 32]; the 28 bytes behind the scale are left as they were, 0
"""

import ctypes
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

K, N, SCALE = 384, 8, np.float32(0.37)
# Layout -> what the compiler is told; the names stand in for its tests of the processor.
FLAGS = {"x86": ["-DX86", "-DACT_PARALLEL"], "arm": ["-DARM"], "rows": ["-DX86"]}
TESTS = {"__AVX__": "X86", "__AVX2__": "X86", "__AVX512F__": "X86", "__SSSE3__": "X86"}
HEAD = """
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#define ggml_row_size(type, n) ((size_t)(n))
#ifdef X86
#define QK_I2_S 128
#else
#define QK_I2_S 64
#endif
extern "C" """


def main(source: str) -> None:
    text = pathlib.Path(source).read_text()
    body = text[text.index("size_t quantize_i2_s(") : text.index("void ggml_vec_dot_i2_i8_s")]
    for name, ours in (TESTS | {"__ARM_NEON": "ARM"}).items():
        body = body.replace(name, ours)
    values = np.random.default_rng(0).integers(-1, 2, (K, N)).astype(np.int8)
    weights = np.ascontiguousarray(values.T * SCALE, np.float32)
    found = {"values": values, "scale": SCALE}
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(folder) / "quantize.cpp"
        code.write_text(HEAD + body)
        for layout, flags in FLAGS.items():
            library = pathlib.Path(folder) / f"{layout}.so"
            command = ["g++", "-w", "-shared", "-fPIC", *flags, str(code), "-o", str(library)]
            subprocess.run(command, check=True)
            quantize = ctypes.CDLL(str(library)).quantize_i2_s
            quantize.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]
            out = np.zeros(K * N // 4 + 32, np.uint8)
            quantize(weights.ctypes.data, out.ctypes.data, N, K, None)
            found[layout] = out
    np.savez_compressed(pathlib.Path(__file__).with_name("bitnet_i2_s.npz"), **found)


if __name__ == "__main__":
    main(sys.argv[1])
