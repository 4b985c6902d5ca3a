"""A model's variables while its leaves come in, each written once, where it will stay."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from ternax.checkpoint.leaves import Leaf
from ternax.kernels.memory import writable, zeros
from ternax.models import Decoder

# Smaller variables, norms and scales, are made on the host and moved whole.
_LARGE_BYTES = 1 << 20


class Stacks:
    """The variables of `skeleton`, an abstract model, zero until they are filled.

    On a CPU a leaf is a view of its place in the stack. Elsewhere it is an array on the host,
    which is put in its place, in a donated stack, when it is complete.
    """

    def __init__(self, skeleton: Decoder):
        self._graph, self._state = nnx.split(skeleton)
        self._values: dict[tuple, jax.Array | np.ndarray] = {}
        self._views: dict[tuple, np.ndarray | None] = {}
        for path, variable in nnx.to_flat_state(self._state):
            shape, dtype = variable.get_value().shape, variable.get_value().dtype
            if np.prod(shape) * dtype.itemsize < _LARGE_BYTES:
                self._values[path] = self._views[path] = np.zeros(shape, dtype)
            else:
                stack = zeros(shape, dtype).block_until_ready()
                self._values[path], self._views[path] = stack, writable(stack)

    @contextlib.contextmanager
    def open(self, leaf: Leaf) -> Iterator[np.ndarray]:
        """The leaf's place, of its shape and dtype, to be written all over within the block."""
        view = self._views[leaf.path]
        if view is not None:
            yield leaf.of(view)
            return
        array = np.empty(leaf.shape, leaf.dtype)
        yield array
        start = leaf.start if leaf.layer is None else (leaf.layer, *leaf.start)
        value = array if leaf.layer is None else array[None]
        self._values[leaf.path] = put_in_place(self._values[leaf.path], value, start)

    def model(self) -> Decoder:
        """The model. What was opened must not be written to any more."""
        for path, variable in nnx.to_flat_state(self._state):
            value = self._values.pop(path)
            variable.set_value(jnp.array(value) if isinstance(value, np.ndarray) else value)
        self._views.clear()
        return nnx.merge(self._graph, self._state)


@functools.partial(jax.jit, donate_argnums=0)
def put_in_place(variable, value, start):
    """A donated variable with `value` written into it from `start` on."""
    return lax.dynamic_update_slice(variable, value, list(start))
