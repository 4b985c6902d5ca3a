"""Who multiplies in the steps `kernels-*`: our kernels, XLA, torch, gemlite."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ternax.gpu import torch_peer
from ternax.kernels import backends, bench, ring, target
from ternax.kernels.packing import FORMATS, Packed
from ternax.kernels.pallas import decode, tiles
from ternax.kernels.ternary_matmul import ternary_matmul


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a product: "70b:o", K and N."""

    name: str
    k: int
    n: int


class Contender:
    """One way to multiply.

    Attributes:
      name: for records and tables.
      inputs: what its activations are.
      bytes_a_weight: that it reads.
      compiled: by XLA, so that several can be at once.
    """

    name: str
    inputs: str
    bytes_a_weight: float
    compiled = True

    def __init__(self, ring_bytes: int):
        self._ring_bytes = ring_bytes

    def why_not(self) -> str | None:
        return None

    def takes(self, shape: Shape) -> bool:
        """Whether it multiplies this one."""
        return not shape.name.endswith(":head") or self.bytes_a_weight >= 1

    def weight_bytes(self, shape: Shape) -> int:
        return int(shape.k * shape.n * self.bytes_a_weight)

    def layers(self, shape: Shape) -> int:
        return ring.layers_of(self.weight_bytes(shape), self._ring_bytes)

    def repeats(self, shape: Shape) -> int:
        if self._ring_bytes < ring.RING_BYTES:  # nothing is to be found out
            return 1
        return ring.repeats_of(self.layers(shape), self.weight_bytes(shape))

    def timed(self, shape: Shape, rows: int) -> ring.Timed:
        """A `ring.Program`, not lowered, or what is ready to run. Weights are made once."""
        raise NotImplementedError

    def note(self, shape: Shape, rows: int) -> str:
        """What a reader of its record must know, with "; " before it."""
        del shape, rows
        return ""


class Backend(Contender):
    """A backend of `ternary_matmul`, int8 activations; mosaic's decode kernel runs alone."""

    inputs = "int8"
    bytes_a_weight = FORMATS["trit2"].bits / 8

    def __init__(self, ring_bytes: int, name: str):
        super().__init__(ring_bytes)
        self.name = name
        self.weights = functools.cache(self._made)

    def why_not(self) -> str | None:
        try:
            backends.choose(target.current().platform, name=self.name)
        except ValueError as error:
            return str(error).splitlines()[0]
        return None

    def weight_bytes(self, shape: Shape) -> int:
        return shape.n * FORMATS["trit2"].row_bytes(shape.k)

    def _made(self, shape: Shape) -> Packed:
        return self.stack(shape, self.layers(shape))

    def stack(self, shape: Shape, layers: int) -> Packed:
        """So many layers of random trits, in the order that the backend reads."""
        row = FORMATS["trit2"].row_bytes(shape.k)
        data = bench.fill(jnp.zeros((layers, 1, shape.n, row), jnp.uint8), "trit2")
        w = Packed(data, jnp.ones((layers, 1, 1, 1)), None, "trit2", shape=(shape.k, shape.n))
        return bench.repacked(self.name, w)

    def _config(self, shape: Shape, rows: int) -> Mapping[str, Any]:
        x = jax.ShapeDtypeStruct((rows, shape.k), jnp.int8)
        return backends.BACKENDS[self.name].heuristic(x, self.weights(shape))

    def timed(self, shape: Shape, rows: int) -> ring.Timed:
        w, config = self.weights(shape), self._config(shape, rows)
        x = jnp.asarray(ring.host_rows(rows, shape.k))
        if self._alone(rows):
            return kernel_alone(w, x, config, self.repeats(shape))
        backend = backends.BACKENDS[self.name]

        def product(x, w, layer):
            scale = jnp.ones((rows, 1), jnp.float32)
            return backend.run(x[None], scale, w, layer, dict(config))

        return ring.products(product, x, w, self.layers(shape), self.repeats(shape))

    def _alone(self, rows: int) -> bool:
        return self.name == "mosaic" and rows <= decode.MAX_ROWS

    def note(self, shape: Shape, rows: int) -> str:
        said = ", ".join(f"{k} {v}" for k, v in self._config(shape, rows).items())
        alone = "" if self._alone(rows) else "; scaled, as models have it"
        return f"; {said}{alone}"


class Head(Contender):
    """The head as models have it, int8 under float activations, by the backend that takes it."""

    inputs = "float32"
    bytes_a_weight = FORMATS["int8"].bits / 8

    name = "head"

    def __init__(self, ring_bytes: int):
        super().__init__(ring_bytes)
        self.weights = functools.cache(self._made)

    def takes(self, shape: Shape) -> bool:
        return shape.name.endswith(":head")

    def _made(self, shape: Shape) -> Packed:
        layers, row = self.layers(shape), FORMATS["int8"].row_bytes(shape.k)
        data = bench.fill(jnp.zeros((layers, 1, shape.n, row), jnp.uint8), "int8")
        scale = jnp.ones((layers, 1, 1, 1))
        return Packed(data, scale, None, "int8", shape=(shape.k, shape.n))

    def timed(self, shape: Shape, rows: int) -> ring.Timed:
        w = self.weights(shape)
        x = jnp.asarray(ring.host_rows(rows, shape.k), jnp.float32)

        def product(x, w, layer):
            return ternary_matmul(x, w, layer=layer, out_dtype=jnp.float32)

        return ring.products(product, x, w, self.layers(shape), self.repeats(shape))

    def note(self, shape: Shape, rows: int) -> str:
        chosen = backends.choose(target.current().platform, None, self.weights(shape)).name
        return f"; as models have it, floats in, by {chosen}"


def kernel_alone(w: Packed, x: jax.Array, config: Mapping[str, int], repeats: int) -> ring.Program:
    """The decode kernel on each layer of a ring in tiles. x: int8 [R, K], R <= MAX_ROWS."""
    (rows, _), (along_n, _) = x.shape, tiles.grid(w.shape)
    out = jnp.zeros((1, rows, w.num_planes * along_n * tiles.ROWS), jnp.int32)

    def add(x, data, layer, out):
        decode.add_product(x, rows, data, w.shape, layer, config, out)

    return ring.additions(add, tiles.padded(x), out, w.data, w.data.shape[0], repeats)


class Dot(Contender):
    """XLA's dot of bf16, or of int8 with int32 sums; weights [N, K]."""

    def __init__(self, ring_bytes: int, name: str, dtype, sums):
        super().__init__(ring_bytes)
        self.name, self._dtype, self._sums = name, jnp.dtype(dtype), sums
        self.inputs, self.bytes_a_weight = self._dtype.name, self._dtype.itemsize
        self.weights = functools.cache(self._made)

    def _made(self, shape: Shape) -> tuple[jax.Array, ...]:
        return tuple(
            ring.random_bits((shape.n, shape.k), self._dtype, seed)
            for seed in range(self.layers(shape))
        )

    def timed(self, shape: Shape, rows: int) -> ring.Timed:
        x = ring.random_bits((rows, shape.k), self._dtype, 99)

        def product(x, w):
            contracted = (((1,), (1,)), ((), ()))
            return lax.dot_general(x, w, contracted, preferred_element_type=self._sums)

        return ring.matrices(product, x, self.weights(shape), self.repeats(shape))


class Torch(Contender):
    """torch, by CUDA graphs: `make(k, n, rows, layers, repeats)`."""

    compiled = False

    def __init__(self, ring_bytes, name, make, inputs, bytes_a_weight, why_not=torch_peer.why_not):
        super().__init__(ring_bytes)
        self.name, self._make, self._why_not = name, make, why_not
        self.inputs, self.bytes_a_weight = inputs, bytes_a_weight

    def why_not(self) -> str | None:
        return self._why_not()

    def timed(self, shape: Shape, rows: int) -> ring.Timed:
        return self._make(shape.k, shape.n, rows, self.layers(shape), self.repeats(shape))


class TorchInt8(Torch):
    def timed(self, shape: Shape, rows: int) -> ring.Timed:
        why = torch_peer.why_not_int8(shape.k, shape.n)
        if why:
            raise ValueError(why)
        return super().timed(shape, rows)

    def note(self, shape: Shape, rows: int) -> str:
        return "" if rows > 16 else "; rows padded, since torch._int_mm takes over 16"


def _gemlite(helper: str, inputs: str):
    make = functools.partial(torch_peer.gemlite, helper)
    why_not = torch_peer.why_no_gemlite
    return lambda size: Torch(size, f"gemlite {helper}", make, inputs, 0.25, why_not)


# Name -> ring bytes -> contender. Torch has weights of its own: a process holds both.
CONTENDERS: dict[str, Callable[[int], Contender]] = {
    "mosaic": lambda size: Backend(size, "mosaic"),
    "reference": lambda size: Backend(size, "reference"),
    "head": Head,
    "XLA bf16": lambda size: Dot(size, "XLA bf16", jnp.bfloat16, jnp.bfloat16),
    "XLA int8": lambda size: Dot(size, "XLA int8", jnp.int8, jnp.int32),
    "torch bf16": lambda size: Torch(size, "torch bf16", torch_peer.bf16, "bfloat16", 2),
    "torch int8": lambda size: TorchInt8(size, "torch int8", torch_peer.int8, "int8", 1),
    "gemlite A8W158": _gemlite("A8W158_INT_dynamic", "int8"),
    "gemlite A16W158": _gemlite("A16W158_INT", "bfloat16"),
}
