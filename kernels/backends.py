"""The backends of the packed matmul, and the order they are tried in per platform.

A backend is one record. Adding one is a file with a `BACKEND` and a line here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from . import reference
from .cpu import backend as cpu
from .packing import Packed
from .pallas import backend as mosaic
from .pallas import tiles


class BackendError(ValueError):
    """No backend can run the call; the message lists each one's reason."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the packed matmul.

    Attributes:
      name: what `backend=` and `--backend` call it.
      why_not: (platform, x, w) -> None if it can run the call, else one line why not.
        `x` and `w` may be None: then only the platform is judged.
      run: (digits, x_scale, w, layer, config) -> see `reference.run`.
      heuristic: (x, w) -> config, a mapping of the backend's own settings.
      project: (x, norm, w, residual, layer, *, gate, eps) -> see `cpu.backend.project`: the
        product with what stands round it in one call. None: it is composed of XLA's parts.
      repack: a stack of canonical trits, whose memory it takes -> the layout that it reads; None
        where that is the canonical one.
    """

    name: str
    why_not: Callable[[str, Any, Any], str | None]
    run: Callable[..., Any]
    heuristic: Callable[[Any, Any], Mapping[str, Any]]
    project: Callable[..., Any] | None = None
    repack: Callable[[Packed], Packed] | None = None


BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", cpu.why_not, cpu.run, cpu.heuristic, cpu.project),
    "mosaic": Backend(
        "mosaic", mosaic.why_not, mosaic.run, mosaic.heuristic, repack=tiles.repack_stack
    ),
    "reference": Backend("reference", reference.why_not, reference.run, reference.heuristic),
}

# Fastest first. Platforms not named here try the reference alone.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "gpu": ("mosaic", "reference"),
}


def choose(platform: str, x=None, w=None, name: str | None = None) -> Backend:
    """The backend asked for by `name`, never another; or the first of ORDER that can run.

    Raises:
      BackendError: unknown name, or every reason why none can run.
    """
    if name is not None:
        if name not in BACKENDS:
            raise BackendError(f"no backend is named {name!r}; there are: {', '.join(BACKENDS)}")
        reason = BACKENDS[name].why_not(platform, x, w)
        if reason:
            raise BackendError(f"backend {name!r} cannot run here: {reason}")
        return BACKENDS[name]
    reasons = []
    for candidate in ORDER.get(platform, ("reference",)):
        reason = BACKENDS[candidate].why_not(platform, x, w)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"{candidate}: {reason}")
    raise BackendError("no backend can run this call; " + "; ".join(reasons))
