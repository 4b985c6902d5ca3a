"""How weights can be stored: bits, scales and the arithmetic that reads them.

These are the formats that exist, ours and others'; what ternax runs is in `kernels.packing`.
`nbytes` of a matrix is exact where the format's blocks divide its rows.
"""

import dataclasses
import math

from ternax.errors import UsageError

# Information in a weight that is -1, 0 or +1 alike often: a limit of coding, not a format.
TRIT_ENTROPY_BITS = math.log2(3)


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store a matrix [K, N].

    Attributes:
      name: what claims and command lines call it.
      code_bits: of one weight, without scales.
      scale_bits: of one scale (with its offset, if it has one).
      scale_group: weights that share a scale; 0: a whole row (an output); -1: the matrix.
      operands: type of the matrix unit that multiplies it at best (`Device.peak_tflops`):
        that of the activations it is made for.
      cpu_only: no published kernel reads it on an accelerator.
      source: where the layout is written down.
    """

    name: str
    code_bits: float
    scale_bits: int
    scale_group: int
    operands: str
    source: str
    cpu_only: bool = False

    def nbytes(self, k: int, n: int) -> float:
        """Bytes of a matrix of N outputs with K weights each."""
        if self.scale_group > 0:
            scales = n * math.ceil(k / self.scale_group)
        else:
            scales = n if self.scale_group == 0 else 1
        return (k * n * self.code_bits + scales * self.scale_bits) / 8

    @property
    def bits_per_weight(self) -> float:
        """Codes and their group's scale; scales of rows and matrices vanish in large ones."""
        return self.code_bits + (self.scale_bits / self.scale_group if self.scale_group > 0 else 0)


_GGML = "ggml-common.h of llama.cpp"
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("fp32", 32, 0, -1, "fp32", "IEEE 754"),
        Format("fp16", 16, 0, -1, "fp16", "IEEE 754; bf16 is as wide"),
        Format("fp8", 8, 32, -1, "fp8", "arXiv:2209.05433, a scale a matrix"),
        Format("int8", 8, 32, 0, "int8", "ternax scheme int8, a scale a row"),
        Format("q8_0", 8, 16, 32, "int8", _GGML),
        Format("q6_k", 6.5, 16, 256, "int8", _GGML),
        Format("q4_0", 4, 16, 32, "int8", _GGML),
        Format("q4_k", 4.375, 32, 256, "int8", _GGML),
        Format("int4", 4, 32, 128, "int8", "ternax scheme int4, a scale for 128 weights"),
        Format("awq", 4, 20, 128, "fp16", "AutoAWQ: f16 scale and 4-bit zero for 128 weights"),
        Format("nf4", 4, 32, 64, "fp16", "arXiv:2305.14314, scales not quantized again"),
        Format("nvfp4", 4, 8, 16, "fp4", "arXiv:2509.25149, E4M3 scales"),
        Format("mxfp4", 4, 8, 32, "fp4", "OCP Microscaling 1.0"),
        Format("trit2", 2, 32, 0, "int8", "ternax, a scale a row"),
        Format("i2_s", 2, 32, -1, "int8", "microsoft/BitNet, a scale a matrix", cpu_only=True),
        Format("tl2", 5 / 3, 32, -1, "int8", "microsoft/BitNet docs/codegen.md", cpu_only=True),
        Format("tq2_0", 2, 16, 256, "int8", _GGML),
        Format("tq1_0", 1.625, 16, 256, "int8", _GGML),
        Format("base3", 1.6, 32, 0, "int8", "five trits a byte, a scale a row"),
        Format("sherry", 1.25, 32, 0, "int8", "arXiv:2601.07892: 3 of 4 weights, 5 bits"),
    )
}
ALIASES = {
    "f32": "fp32",
    "float32": "fp32",
    "f16": "fp16",
    "bf16": "fp16",
    "float16": "fp16",
    "ternary": "trit2",
    "2-bit": "trit2",
    "base-3": "base3",
    "1.25-bit": "sherry",
    "absmean": "trit2",
    "gptq": "awq",
}


def get_format(name: str) -> Format:
    """The named format. Raises UsageError listing all."""
    found = FORMATS.get(ALIASES.get(name.lower(), name.lower()))
    if found is None:
        raise UsageError(f"no format is named {name!r}; known: {', '.join([*FORMATS, *ALIASES])}")
    return found
