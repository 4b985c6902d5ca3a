"""PyTorch on the same card in the same process: cuBLAS through it, memory, and gemlite.

Nothing here runs without torch; every name says why not. Work is captured in CUDA graphs, whose
replays cost the host nothing.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ternax.kernels import ring

STREAMS = ("amax", "sum", "copy")
# torch._int_mm multiplies more than 16 rows; fewer are padded to so many.
_INT_ROWS = 32


@functools.cache
def why_not() -> str | None:
    """None where torch has the GPU; else one line."""
    try:
        import torch
    except ImportError as error:
        return f"torch is not installed: {str(error).splitlines()[0]}"
    except OSError as error:  # a library of CUDA that is not there
        return f"torch cannot be loaded: {str(error).splitlines()[0]}"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def why_no_gemlite() -> str | None:
    if why_not():
        return why_not()
    try:
        importlib.import_module("gemlite")
    except Exception as error:  # whatever a package says that meets another triton
        return f"gemlite cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


class Replayed:
    """A CUDA graph of `calls` calls; see `ring.Timed`."""

    def __init__(self, work: Callable[[], Any], calls: int):
        """work: enqueues all of them; run twice before it is captured, for what warms up."""
        import torch

        self.calls, self._torch = calls, torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._kept = work()

    def run(self, times: int) -> None:
        for _ in range(times):
            self._graph.replay()
        self._torch.cuda.synchronize()


def stream(name: str, size: int, passes: int) -> ring.Timed:
    """Passes over `size` bytes: one of STREAMS."""
    import torch

    if name == "sum":
        words = torch.rand(size // 4, device="cuda")
    else:
        words = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device="cuda")
    if name == "copy":
        target = torch.empty_like(words)
        return Replayed(lambda: [target.copy_(words) for _ in range(passes)], passes)
    one = getattr(torch, name)
    return Replayed(lambda: [one(words) for _ in range(passes)], passes)


def bf16(k_size: int, n: int, rows: int, layers: int, repeats: int) -> ring.Timed:
    """y = x W^T of bf16, by torch's linear."""
    import torch

    x = torch.randn(rows, k_size, device="cuda").bfloat16()
    ws = [torch.randn(n, k_size, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    linear = torch.nn.functional.linear
    return Replayed(lambda: [linear(x, w) for _ in range(repeats) for w in ws], layers * repeats)


def int8(k_size: int, n: int, rows: int, layers: int, repeats: int) -> ring.Timed:
    """The same of int8 with int32 sums, by torch._int_mm, which pads few rows."""
    import torch

    def random(*shape):
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")

    x = random(rows if rows > 16 else _INT_ROWS, k_size)
    ws = [random(n, k_size).t() for _ in range(layers)]
    multiply = torch._int_mm
    return Replayed(lambda: [multiply(x, w) for _ in range(repeats) for w in ws], layers * repeats)


def why_not_int8(k_size: int, n: int) -> str | None:
    """torch._int_mm's rules of shape."""
    if k_size % 8 or n % 8:
        return f"torch._int_mm wants K and N in eights, found {k_size}x{n}"
    return None


def gemlite(helper: str, k_size: int, n: int, rows: int, layers: int, repeats: int) -> ring.Timed:
    """Ternary weights by gemlite's helper of that name, which tunes itself at its first call."""
    import torch

    made = getattr(importlib.import_module("gemlite.helper"), helper)(
        device="cuda", dtype=torch.bfloat16
    )
    scale = torch.ones(1, device="cuda")
    linears = [
        made.from_weights(torch.randint(-1, 2, (n, k_size), device="cuda").bfloat16(), scale)
        for _ in range(layers)
    ]
    x = torch.randn(rows, k_size, device="cuda").bfloat16()

    def work():
        with torch.no_grad():
            return [linear(x) for _ in range(repeats) for linear in linears]

    return Replayed(work, layers * repeats)
