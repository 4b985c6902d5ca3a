"""`--mesh=data:2,tensor:4`, or `auto`: what it says, and the devices it is made of.

Axes: `data` splits the batch and copies the weights; `tensor` splits every matrix and the KV
cache by heads; `sequence` splits the cache alone, by slots, for contexts that are long; `fsdp`
splits batch, weights and optimizer alike and gathers a weight when it is used, which pays in
training alone.
"""

import math
import os
from collections.abc import Mapping

from ternax.errors import UsageError

AXES = ("data", "fsdp", "sequence", "tensor")
AUTO = "auto"


def parse(text: str) -> dict[str, int]:
    """Axis -> devices along it, every axis of AXES. UsageError for what is no mesh."""
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, _, size = part.strip().partition(":")
        if axis not in AXES or axis in seen or not size.isdecimal() or int(size) < 1:
            raise UsageError(
                f"mesh: expected sizes of {', '.join(AXES)}, each once, such as "
                f"data:2,tensor:4, or auto; found {text!r}"
            )
        seen.add(axis)
        sizes[axis] = int(size)
    return sizes


def of_auto(text: str) -> int | None:
    """Devices that "auto:4" is to choose among, 0 for "auto": all there are; None: not auto."""
    word, _, count = text.partition(":")
    if word != AUTO:
        return None
    if ":" in text and not (count.isdecimal() and int(count)):
        raise UsageError(f"mesh: expected auto, or auto:4 for so many devices, found {text!r}")
    return int(count or 0)


def describe(sizes: Mapping[str, int]) -> str:
    """As it is written: "data:2,tensor:4"; axes of one device are left out."""
    return ",".join(f"{axis}:{n}" for axis, n in sizes.items() if n > 1) or "one device"


def make_mesh(sizes: Mapping[str, int], devices=None):
    """A jax Mesh with every axis of AXES. UsageError unless there are as many devices.

    Neighbours along `tensor`, which talk in every layer, are neighbours in jax's order: one
    machine's devices come before the next machine's.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    devices = jax.devices() if devices is None else devices
    count = math.prod(sizes.values())
    if count != len(devices):
        kind = devices[0].device_kind
        raise UsageError(
            f"mesh {describe(sizes)} takes {count} device{'s' * (count > 1)}, found "
            f"{len(devices)} ({kind}): sizes must multiply to what there is"
        )
    grid = np.array(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: Mapping[str, int]):
    """A mesh of devices that need not be there: for plans."""
    from jax.sharding import AbstractMesh, AxisType

    shape = tuple(sizes[axis] for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def share_processor(count: int) -> None:
    """Makes `count` devices of this processor, should jax run on one; before its first use.

    They share its cores and its memory: that is for trying a mesh, not for speed. A count in
    XLA_FLAGS stays as it is.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    jax.config.update("jax_num_cpu_devices", count)
