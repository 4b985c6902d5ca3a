"""The copy detector itself: it finds every way to copy a stored array, and only those."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests import hlo

LAYERS, ROWS, WIDTH = 4, 512, 256
LAYER_BYTES = ROWS * WIDTH
STACK = jax.ShapeDtypeStruct((LAYERS, ROWS, WIDTH), jnp.uint8)
X = jax.ShapeDtypeStruct((4, WIDTH), jnp.int8)
INDEX = jax.ShapeDtypeStruct((), jnp.int32)


def compiled(function, *args, **jit):
    return jax.jit(function, **jit).lower(*args).compile()


def dot(x, w):
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def signed(w):
    """The bytes of w as int8, moved but not changed: no arithmetic hides a copy of them."""
    return lax.bitcast_convert_type(w, jnp.int8)


def scanned(x, stack):
    """The mistake this module is for: a stack scanned over, so that each layer is sliced out."""
    return lax.scan(
        lambda y, w: (y + dot(x, signed(w)), None), jnp.zeros((4, ROWS), jnp.int32), stack
    )[0]


def looped_update(cache):
    """A cache carried through a loop that reads the old bytes after it wrote new ones."""

    def body(i, carry):
        cache, total = carry
        new = lax.dynamic_update_slice(cache, jnp.full((1, 1, WIDTH), i, jnp.uint8), (i, 0, 0))
        return new, total + cache.astype(jnp.int32).sum()

    return lax.fori_loop(0, LAYERS, body, (cache, 0))


COPIES = {
    "scan over layers": (scanned, (X, STACK)),
    "one layer taken": (
        lambda x, w, i: dot(x, signed(lax.dynamic_index_in_dim(w, i, 0, False))),
        (X, STACK, INDEX),
    ),
    "a fixed layer returned": (lambda w: w[1], (STACK,)),
    "transposed": (lambda w: jnp.swapaxes(w, 1, 2), (STACK,)),
    "gathered rows": (lambda w: w.reshape(-1, WIDTH)[jnp.arange(ROWS) * 3], (STACK,)),
    "fused along N": (lambda w: jnp.concatenate([w[0], w[1]]), (STACK,)),
    "padded": (lambda w: jnp.pad(w, ((0, 0), (0, 0), (0, 16))), (STACK,)),
    "chosen between": (lambda w, i: jnp.where(i > 0, w[0], w[1]), (STACK, INDEX)),
    "written into another buffer": (
        lambda w, to: lax.dynamic_update_slice(to, w[:1], (1, 0, 0)),
        (STACK, STACK),
    ),
    "update of an argument not donated": (lambda w: w.at[1, 2].set(jnp.uint8(7)), (STACK,)),
    "read after the write": (looped_update, (STACK,)),
    "inside a branch": (
        lambda w, i: lax.cond(i > 0, lambda: w[2], lambda: jnp.zeros((ROWS, WIDTH), jnp.uint8)),
        (STACK, INDEX),
    ),
    "bits as another dtype": (lambda w: lax.bitcast_convert_type(w[1], jnp.int8), (STACK,)),
    "beside a sum of the same bytes": (lambda w: (w[1], w[1].astype(jnp.int32).sum()), (STACK,)),
}


@pytest.mark.parametrize("name", COPIES)
def test_finds_a_copy(name):
    function, args = COPIES[name]
    assert hlo.copies(compiled(function, *args), LAYER_BYTES) != []


def unpacked(x, w, i):
    """A layer read through arithmetic: sliced inside the fusion that unpacks it."""
    rows = lax.dynamic_index_in_dim(w, i, 0, False)
    return dot(x, ((rows >> 2) & 3).astype(jnp.int8))


CLEAN = {
    "unpacked as it is read": (unpacked, (X, STACK, INDEX), {}),
    "converted as it is read": (lambda w, i: w[i].astype(jnp.float32), (STACK, INDEX), {}),
    "updated in place": (
        lambda w, i: lax.dynamic_update_slice(w, jnp.ones((1, 1, WIDTH), jnp.uint8), (i, 0, 0)),
        (STACK, INDEX),
        {"donate_argnums": 0},
    ),
    "filled": (lambda i: jnp.full((ROWS, WIDTH), i.astype(jnp.uint8)), (INDEX,), {}),
    "reduced": (lambda w: w.astype(jnp.int32).sum(), (STACK,), {}),
}


@pytest.mark.parametrize("name", CLEAN)
def test_is_silent_where_nothing_is_copied(name):
    function, args, jit = CLEAN[name]
    assert hlo.copies(compiled(function, *args, **jit), LAYER_BYTES) == []


def test_threshold_and_dtypes_select():
    program = compiled(lambda w: w[1], STACK)
    (found,) = hlo.copies(program, LAYER_BYTES)
    assert (found.dtype, found.bytes) == ("u8", LAYER_BYTES)
    assert hlo.copies(program, LAYER_BYTES + 1) == []
    assert hlo.copies(program, LAYER_BYTES, dtypes=("f32",)) == []


def test_text_that_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="not HLO"):
        hlo.copies("nothing to see", 1)


def test_parses_tuples_comments_and_layouts():
    text = """
ENTRY %main (p: (s32[], u8[4,8])) -> u8[8] {
  %p = (s32[], /*index=1*/u8[4,8]{1,0:T(8,128)}) parameter(0)
  %get = u8[4,8]{1,0} get-tuple-element(%p), index=1
  ROOT %cut = u8[8]{0} slice(u8[4,8]{1,0} %get), slice={[0:1], [0:8]}, metadata={op_name="f(x)"}
}
"""
    body = hlo.parse(text)["main"]
    assert body["p"].arrays == (("s32", 4), ("u8", 32))
    assert body["cut"].operands == ("get",)
    assert [copy.name for copy in hlo.copies(text, 8)] == ["cut"]
