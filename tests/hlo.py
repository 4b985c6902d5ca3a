"""Reads optimized HLO and names every instruction that copies stored bytes.

    assert hlo.copies(compiled, min_bytes=one_block) == []

Everything that runs by itself is looked at: the entry, the bodies of loops and branches,
the bodies of calls. What happens inside a fusion is not a copy, unless the fusion does
nothing else: a result that only moves operand bytes about is found through any chain of
slices, reshapes, transposes, concatenations and updates.

In-place updates count what they write, not the buffer they write into. A buffer that
could not be updated in place shows up as a `copy` of its own, which XLA puts in front.
"""

import dataclasses
import functools
import re

# What weights and caches are stored as; f32 is among them only for caches that ask for it.
STORED = ("u8", "s8", "u16", "bf16")

# Opcodes that move bytes and compute nothing -> which operands hold the moved bytes.
_MOVES = {
    "all-gather": (0,),
    "collective-permute": (0,),
    "concatenate": None,  # all of them
    "copy": (0,),
    "copy-start": (0,),
    "dynamic-slice": (0,),
    "dynamic-update-slice": (1,),
    "gather": (0,),
    "pad": (0,),
    "reverse": (0,),
    "scatter": (2,),
    "select": (1, 2),
    "slice": (0,),
    "transpose": (0,),
}
# Opcodes that only name bytes again.
_NAMES = {
    "bitcast": (0,),
    "bitcast-convert": (0,),
    "reshape": (0,),
    "get-tuple-element": (0,),
    "optimization-barrier": (0,),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = type opcode(operands), attributes`.

    Attributes:
      arrays: (dtype, bytes) of each array in its result; several for a tuple.
    """

    computation: str
    name: str
    opcode: str
    arrays: tuple[tuple[str, float], ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def calls(self) -> str | None:
        """The body of a fusion."""
        found = re.search(r"\bcalls=%?([\w.\-]+)", self.attributes)
        return found[1] if found and self.opcode == "fusion" else None


@dataclasses.dataclass(frozen=True)
class Copy:
    """An instruction that moves `bytes` of stored data, as it stands in the program."""

    computation: str
    name: str
    opcode: str
    dtype: str
    bytes: int


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"unbalanced: {text}")


def _instruction(computation: str, line: str) -> Instruction | None:
    line = re.sub(r"/\*.*?\*/", "", line)
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    arrays = tuple(
        (dtype, _element_bytes(dtype) * _count(dims))
        for dtype, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]", result)
    )
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : close]))
    return Instruction(
        computation, head[2], opcode, arrays, operands, rest[close + 1 :], bool(head[1])
    )


def _element_bytes(dtype: str) -> float:
    """By the number in its name: u8, bf16, f8e4m3fn; pred has none."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1


def _count(dims: str) -> int:
    count = 1
    for dim in dims.replace("<=", "").split(","):
        count *= int(dim) if dim else 1
    return count


def parse(text: str) -> dict[str, dict[str, Instruction]]:
    """Computations by name, each its instructions by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    current = None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line)
        if head:
            current = computations.setdefault(head[1], {})
            name = head[1]
        elif line.startswith("}"):
            current = None
        elif current is not None:
            found = _instruction(name, line)
            if found is not None:
                current[found.name] = found
    if not any(computations.values()):
        raise ValueError("no instruction found: this is not HLO text, or its form has changed")
    return computations


def copies(compiled, min_bytes: int, dtypes: tuple[str, ...] = STORED) -> list[Copy]:
    """Every instruction of a compiled program that copies at least `min_bytes` of `dtypes`.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or HLO text.
      min_bytes: what one result must weigh to be listed.
      dtypes: HLO names of the dtypes that hold weights and caches.
    """
    computations = parse(compiled if isinstance(compiled, str) else compiled.as_text())
    instructions = [i for body in computations.values() for i in body.values()]
    inside = {i.calls() for i in instructions}
    return [
        Copy(i.computation, i.name, i.opcode, dtype, int(size))
        for i in instructions
        if i.computation not in inside
        for dtype, size in _moved(computations, i)
        if dtype in dtypes and size >= min_bytes
    ]


def temp_bytes(compiled) -> int:
    """What one call allocates besides its arguments and results, by XLA's own account."""
    return compiled.memory_analysis().temp_size_in_bytes


def _moved(computations, instruction: Instruction):
    """(dtype, bytes) of each result of `instruction` that is moved, not computed."""
    if instruction.opcode in _MOVES:
        return [_written(computations[instruction.computation], instruction)]
    body = computations.get(instruction.calls() or "")
    if body is None:
        return []
    root = next(i for i in body.values() if i.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [
        _written(body, _unnamed(body, r)) for r in results if _only_moves(computations, body, r)
    ]


def _unnamed(body, instruction: Instruction) -> Instruction:
    """The instruction behind bitcasts, so that the size of an update is the update's."""
    while instruction.opcode in _NAMES and instruction.operands:
        instruction = body[instruction.operands[0]]
    return instruction


def _written(body, instruction: Instruction):
    """(dtype, bytes) that a moving instruction writes."""
    arrays = instruction.arrays
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        source = body.get(instruction.operands[_MOVES[instruction.opcode][0]])
        arrays = source.arrays if source else arrays
    return max(arrays, key=lambda array: array[1])


def _only_moves(computations, body, instruction: Instruction) -> bool:
    """Whether a result inside a fusion holds bytes of an operand that nothing computed on."""

    @functools.cache
    def from_operand(name: str) -> bool:
        i = body[name]
        if i.opcode == "parameter":
            return True
        if i.opcode == "fusion":
            return bool(_moved(computations, i))
        if i.opcode not in _MOVES and i.opcode not in _NAMES:
            return False
        data = _MOVES[i.opcode] if i.opcode in _MOVES else _NAMES[i.opcode]
        names = i.operands if data is None else [i.operands[k] for k in data]
        return any(from_operand(name) for name in names)

    return instruction.opcode != "parameter" and from_operand(instruction.name)
