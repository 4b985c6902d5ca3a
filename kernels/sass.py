"""What ptxas made of a kernel: registers, spills, and the instructions of its main loop.

Reads the texts of `ptxas -v` and `nvdisasm -c`. Counts are of instructions that a warp
issues; nothing is timed.
"""

import collections
import dataclasses
import re

# Integer instructions of the ALU pipe. IMAD is not among them: it runs on the FMA pipe.
_ALU = {
    "LOP3", "PLOP3", "SHF", "PRMT", "IADD3", "VIADD", "LEA", "SEL", "ISETP", "VIMNMX", "IDP",
    "FLO", "POPC", "BREV", "SGXT", "BMSK", "VABSDIFF",
}  # fmt: skip
# One wgmma on int8 multiplies 64 rows of 32 weights, held by the 128 threads of a warpgroup.
_WEIGHTS_A_THREAD = 64 * 32 // 128
_TENSOR = "IGMMA"

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop that multiplies.

    Attributes:
      instructions: opcode without its suffixes -> how often a turn issues it.
      weights_a_thread: weights that a thread's share of a turn comes to.
    """

    instructions: dict[str, int]
    weights_a_thread: int

    @property
    def issued_per_weight(self) -> float:
        """Issue slots a weight, all instructions counted."""
        return sum(self.instructions.values()) / self.weights_a_thread

    @property
    def alu_per_weight(self) -> float:
        """Instructions of the integer ALU a weight."""
        alu = sum(count for name, count in self.instructions.items() if name in _ALU)
        return alu / self.weights_a_thread


def resources(ptxas: str) -> dict[str, int]:
    """registers, spill_bytes and serialized_wgmma (0 or 1) of the one kernel in `ptxas -v`'s text.

    Raises:
      ValueError: the text names no registers.
    """
    registers = re.findall(r"Used (\d+) registers", ptxas)
    if len(registers) != 1:
        raise ValueError(f"expected one kernel in the text of ptxas, found {len(registers)}")
    spills = re.findall(r"(\d+) bytes spill", ptxas)
    return {
        "registers": int(registers[0]),
        "spill_bytes": sum(map(int, spills)),
        "serialized_wgmma": int("serialized" in ptxas),
    }


def main_loop(disassembly: str) -> Loop:
    """The loop of `nvdisasm -c`'s text in which most instructions multiply on tensor cores.

    Not the shortest: what waits stands behind everything else and goes back into the middle.

    Raises:
      ValueError: there is none.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.search(line):
            opcode = found[1].split(".")[0]
            if opcode == "BRA" and (goal := re.search(r"\.L_x_\d+", found[2])):
                branches.append((len(opcodes), goal[0]))
            opcodes.append(opcode)
    loops = [
        opcodes[labels[goal] : at + 1]
        for at, goal in branches
        if labels.get(goal, at) < at and _TENSOR in opcodes[labels[goal] : at]
    ]
    if not loops:
        raise ValueError(f"no loop with {_TENSOR} in the disassembly")
    counts = max(map(collections.Counter, loops), key=lambda loop: loop[_TENSOR] / loop.total())
    return Loop(dict(counts.most_common()), counts[_TENSOR] * _WEIGHTS_A_THREAD)
