"""Between a tile and a tuple of its columns: kernels that keep a few values of a token in registers
of their own.

Triton has no indexing of a tile by column. Where a thread is to compute with single values of its
token (elements of a matrix, mixing values), the tile [BT, COLS] is split into COLS vectors [BT], a
tuple, and later joined again. A tuple grows by `values += (x,)` in `tl.static_range` loops: these
unroll, so nothing of it is left at run time. COLS is a power of two.
"""

from __future__ import annotations

from ..launch import jit, tl


@jit
def join_all(values, COUNT: tl.constexpr):
    """COUNT tensors, a power of two -> one, with more dims of 2 at the end that count them."""
    if COUNT == 1:
        return values[0]
    else:
        pairs = ()
        for k in tl.static_range(COUNT // 2):
            pairs += (tl.join(values[k], values[k + COUNT // 2]),)
        return join_all(pairs, COUNT // 2)


@jit
def unpack_columns(tile, COLS: tl.constexpr):
    """[BT, COLS] -> COLS vectors [BT]."""
    if COLS == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        halves = tl.permute(tl.reshape(tile, [tile.shape[0], 2, COLS // 2]), (0, 2, 1))
        left, right = tl.split(halves)
        return unpack_columns(left, COLS // 2) + unpack_columns(right, COLS // 2)


@jit
def pack_columns(values, count: tl.constexpr, COLS: tl.constexpr):
    """`count` vectors [BT] -> [BT, COLS], filled up with zeros."""
    padded = ()
    for k in tl.static_range(COLS):
        padded += (values[k] if k < count else tl.zeros_like(values[0]),)
    return tl.reshape(join_all(padded, COLS), [values[0].shape[0], COLS])
