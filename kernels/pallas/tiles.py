"""The order in which GPU kernels read trits: tiles of four slices of k, one at each bit position.

A tile is 128 rows of W by 512 k, 16 KiB that lie together, so a kernel's reads are linear.
Within it bytes stand as tensor cores want them: the 32-bit words that a thread of a
warpgroup loads, 16 bytes at a time and each from its own bank, are registers of wgmma's
operand once masked to one bit position p. In the order of storage:

    half of the tile's rows       s = 0, 1      row 64 s + 16 w + 8 h + g
    half of a slice               c = 0, 1
    rows 8 apart                  h = 0, 1
    warp, row within 8, column    w, g = 0 .. 7, q = 0 .. 3: the 128 threads
    word of the load, byte of it  i, b = 0 .. 3

    at bits 2 p of that byte: the code of k = 512 tile + 128 p + 64 c + 16 i + 4 q + b

Position p of a half tile is a matrix [64, 128] of codes in place, 4^p * code, of the
contiguous k = 512 tile + 128 p + column: activations meet it as they are. At p = 3 the code's
upper bit is the sign of an int8. It is stored inverted, so that the position reads
64 * (code - 2): a mask is all that a kernel does to a weight.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp

from ..packing import CANONICAL, Packed

# Stored with the weights; another order of bytes gets another tag.
LAYOUT = "tiles-128x512-2"
ROWS, TILE_K = 128, 512
HALF = 64
SLICE = 128
TILE_BYTES = ROWS * TILE_K // 4
_SIGN = 0x80
# (half, warp, h, g) of a row of the tile; (p, c, i, b) of a byte within its canonical row.
_SPLIT_ROWS, _SPLIT_BYTES = (2, 4, 2, 8), (4, 2, 4, 4)
_POSITIONS = 4


def grid(shape: tuple[int, int]) -> tuple[int, int]:
    """(tiles along N, tiles along K) of W [K, N]; the last ones may reach over."""
    return math.ceil(shape[1] / ROWS), math.ceil(shape[0] / TILE_K)


def data_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The last two axes of a tiled `Packed.data` of W [K, N]."""
    along_n, along_k = grid(shape)
    return along_n, along_k * TILE_BYTES


def repack(w: Packed) -> Packed:
    """Canonical trits -> tiles, of any leading axes. data [..., N, row bytes] -> [..., T, bytes].

    What a tile holds beyond the matrix is arbitrary: it meets activations of 0 or makes
    outputs that are cut off.
    """
    _expect(w, CANONICAL)
    *lead, n, row = w.data.shape
    along_n, along_k = grid(w.shape)
    pad = [(0, 0)] * len(lead) + [(0, along_n * ROWS - n), (0, along_k * ROWS - row)]
    bytes_ = jnp.pad(w.data, pad).reshape(*lead, along_n, *_SPLIT_ROWS, along_k, *_SPLIT_BYTES)
    # n s w h g k p c i b -> p, n k s c h w g i b, whose codes then change places with q.
    slices = _move(bytes_, len(lead), (6, 0, 5, 1, 7, 3, 2, 4, 8, 9))
    slices = jnp.moveaxis(slices, len(lead), 0)
    tiles = jnp.stack(_exchanged(slices), axis=-3)  # ... g q i b
    data = (tiles ^ jnp.uint8(_SIGN)).reshape(*lead, *data_shape(w.shape))
    return dataclasses.replace(w, data=data, layout=LAYOUT)


def repack_stack(w: Packed) -> Packed:
    """`repack` of a stack [L, P, N, row bytes], a layer at a time; gives up `w.data`'s memory.

    Where tiles take no more bytes than rows, which is where N and K are whole tiles, they are
    written over them, and nothing of a stack's size is allocated.
    """
    _expect(w, CANONICAL)
    return dataclasses.replace(w, data=_by_layers(w.data, w.shape, LAYOUT), layout=LAYOUT)


def canonical_stack(w: Packed) -> Packed:
    """Inverse of `repack_stack`, as sparing."""
    _expect(w, LAYOUT)
    return dataclasses.replace(w, data=_by_layers(w.data, w.shape, CANONICAL), layout=CANONICAL)


def _by_layers(data: jax.Array, shape: tuple[int, int], to: str) -> jax.Array:
    like = jax.eval_shape(
        functools.partial(_turned, shape=shape, to=to),
        jax.ShapeDtypeStruct(data.shape[1:], data.dtype),
    )
    same = math.prod(like.shape) == math.prod(data.shape[1:])
    return (_in_place if same else _beside)(data, shape, to)


def _turned(layer: jax.Array, shape: tuple[int, int], to: str) -> jax.Array:
    """The bytes [P, ...] of one layer in the other order."""
    if to == LAYOUT:
        return repack(Packed(layer, jnp.zeros(()), shape=shape)).data
    return canonical(Packed(layer, jnp.zeros(()), layout=LAYOUT, shape=shape)).data


@functools.partial(jax.jit, static_argnums=(1, 2))
def _beside(data, shape, to):
    return jax.lax.map(lambda layer: _turned(layer, shape, to), data)


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def _in_place(data, shape, to):
    layers, *one = data.shape
    like = jax.eval_shape(lambda layer: _turned(layer, shape, to), data[0])

    def body(i, flat):
        layer = jax.lax.dynamic_index_in_dim(flat, i, keepdims=False).reshape(one)
        turned = _turned(layer, shape, to).reshape(-1)
        return jax.lax.dynamic_update_index_in_dim(flat, turned, i, 0)

    flat = jax.lax.fori_loop(0, layers, body, data.reshape(layers, -1))
    return flat.reshape(layers, *like.shape)


def canonical(w: Packed) -> Packed:
    """Inverse of `repack`: the bytes that it was given."""
    _expect(w, LAYOUT)
    lead = w.data.shape[:-2]
    along_n, along_k = grid(w.shape)
    tiles = w.data.reshape(*lead, along_n, along_k, 2, 2, 2, 4, 8, 4, 4, 4) ^ jnp.uint8(_SIGN)
    columns = jnp.moveaxis(tiles, -3, 0)  # q, n k s c h w g i b
    slices = jnp.stack(_exchanged(columns), axis=len(lead))  # p, n k s c h w g i b
    rows = _move(slices, len(lead), (1, 3, 6, 5, 7, 2, 0, 4, 8, 9))
    rows = rows.reshape(*lead, along_n * ROWS, along_k * ROWS)
    data = rows[..., : w.shape[1], : math.ceil(w.shape[0] / 16) * 4]
    return dataclasses.replace(w, data=data, layout=CANONICAL)


def _exchanged(bytes_: jax.Array) -> list[jax.Array]:
    """Four bytes of four codes each, transposed: code j of byte i becomes code i of byte j."""
    return [
        functools.reduce(
            operator.or_,
            (((bytes_[i] >> (2 * j)) & 3) << (2 * i) for i in range(_POSITIONS)),
        )
        for j in range(_POSITIONS)
    ]


def padded(x: jax.Array) -> jax.Array:
    """Activations over whole tiles. x: int8 [R, K] -> int8 [ceil8(R), ceil512(K)], 0 beyond."""
    return jnp.pad(x, ((0, -x.shape[0] % 8), (0, -x.shape[1] % TILE_K)))


def offsets(x: jax.Array) -> jax.Array:
    """int32 [R]: what a product of tiles lacks. x: int8 [R, K].

    Tiles read trit + 1 at positions 0 to 2 and trit - 1 at position 3.
    """
    last = (jnp.arange(x.shape[1]) // SLICE) % _POSITIONS == _POSITIONS - 1
    x = x.astype(jnp.int32)
    return jnp.where(last, x, -x).sum(-1)


def _move(array: jax.Array, lead: int, order: tuple[int, ...]) -> jax.Array:
    return array.transpose(*range(lead), *(lead + axis for axis in order))


def _expect(w: Packed, layout: str) -> None:
    if w.layout != layout or w.format != "trit2":
        raise ValueError(f"expected trit2 in layout {layout!r}, found {w.format} in {w.layout!r}")
