"""The device that programs are compiled for: the one at hand, or one that is not there.

Ahead of time there is a compiler for a GPU and no GPU: `compiling_for` says what it is, so
that backends are chosen and sized for it and not for the processor that compiles.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """What backends ask of a device.

    Attributes:
      platform: as jax names it: "cpu", "gpu".
      kind: the device's name, "NVIDIA H200".
      compute_capability: of a GPU, "9.0"; "" elsewhere.
      core_count: a GPU's streaming multiprocessors; 0 where unknown.
      present: whether it is here, so that a kernel can be tried before it is used.
    """

    platform: str
    kind: str
    compute_capability: str = ""
    core_count: int = 0
    present: bool = True


_elsewhere: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
    "ternax_target", default=None
)


def current() -> Target:
    """The target of `compiling_for`, or the first device of jax."""
    target = _elsewhere.get()
    if target is not None:
        return target
    device = jax.devices()[0]
    return Target(
        device.platform,
        device.device_kind,
        str(getattr(device, "compute_capability", "")),
        int(getattr(device, "core_count", None) or 0),
    )


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it, what is traced is meant for `target`. Compiled functions must not be shared
    with code outside: jax's caches do not know of it."""
    token = _elsewhere.set(target)
    try:
        yield
    finally:
        _elsewhere.reset(token)
