"""What devices say to each other in a decode step: planned, counted in a program, and its time.

At 2 bits a weight the reading is an eighth of fp16's and the talking is what it was, so a step
of a split ternary model is soon the collectives' latency.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

from ternax.roofline import all_reduce_s
from ternax.sharding import Layout

_ELEMENT_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_OPCODES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(_OPCODES)})(-start)?\((.*)")


@dataclasses.dataclass(frozen=True, order=True)
class Collective:
    """One kind of exchange of a step.

    Attributes:
      kind: "all-reduce" or "all-gather", as XLA names them.
      nbytes: of its result on a device.
      times: of a step.
    """

    kind: str
    nbytes: int
    times: int


def planned(layout: Layout, batch: int) -> list[Collective]:
    """Those of one decode step of a packed model, floats or integers with one scale along K.

    A layer adds partial sums twice, int32 of [rows, D], or f32 of float weights; float inputs of
    integer weights travel as three digits. In front of each stands the maximum that rows are
    quantized with, and where there are sub-norms the mean of squares: a float a row. A split
    table adds the embedded rows and gathers logits. A cache split by slots puts each layer's
    attention together: the largest score of each head, then values and their weights.
    """
    config, rows = layout.config, batch // layout.batch
    width, layers = config.hidden_size, config.num_layers
    floats = config.scheme.partition(",")[0] == "none"
    digits = 1 if floats or config.inputs == "int8" else 3
    quantized = config.inputs == "int8" or not floats
    scalars = 2 * layers * (quantized + (config.family == "bitnet"))
    found = []
    if layout.slots_across:
        heads = rows * config.num_heads // layout.tensor
        found.append(Collective("all-reduce", 4 * heads * (config.head_dim + 1), layers))
        found.append(Collective("all-reduce", 4 * heads, layers))
    if layout.across:
        found.append(Collective("all-reduce", 4 * rows * width * digits, 2 * layers))
    if layout.across and scalars:
        found.append(Collective("all-reduce", 4 * rows, scalars))
    if layout.vocab_across:
        found += [
            Collective("all-reduce", 4 * rows * width, 1),
            Collective("all-gather", 4 * rows * config.vocab_size, 1),
        ]
    return merged(found)


def of_program(text: str, layers: int) -> list[Collective]:
    """Those of one step of a compiled decode loop, counted in its optimized HLO.

    layers: trips of the inner loop, where what stands in it counts as often.
    """
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        result, kind, started, rest = match.groups()
        name = re.search(r'op_name="([^"]*)"', rest)
        inner = name is not None and name[1].count("while/body") >= 2
        # What is started gives its operand back beside its result, which is the last.
        sizes = [_nbytes(*array) for array in re.findall(r"(\w+)\[([\d,]*)\]", result)]
        size = sum(sizes) if kind == "all-reduce" and not started else sizes[-1]
        found.append(Collective(kind, size, layers if inner else 1))
    return merged(found)


def merged(found: Iterable[Collective]) -> list[Collective]:
    """Equal exchanges as one, of all their times; the largest first."""
    times: collections.Counter = collections.Counter()
    for one in found:
        times[one.kind, one.nbytes] += one.times
    every = [Collective(kind, nbytes, n) for (kind, nbytes), n in times.items()]
    return sorted(every, key=lambda one: (-one.nbytes, one.kind))


def seconds(
    found: Iterable[Collective], devices: int, link_gb_per_s: float, latency_s: float
) -> tuple[float, float]:
    """(seconds of a step that bytes take, seconds that latency takes), one after the other.

    Args:
      devices: in a ring, see `roofline.all_reduce_s`; a gather goes round it once.
      link_gb_per_s: of one device, in one direction.
      latency_s: of one exchange, however small.
    """
    moved = waited = 0.0
    for one in found:
        round_trips = all_reduce_s(one.nbytes, devices, link_gb_per_s, 0.0)
        moved += one.times * round_trips * (1.0 if one.kind == "all-reduce" else 0.5)
        waited += one.times * latency_s
    return moved, waited


def _nbytes(dtype: str, dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n) * _ELEMENT_BYTES.get(dtype, 4)
