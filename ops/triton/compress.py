"""The Triton kernels of compress (see compress.py): pool, normalise and rotate; and the backward."""

from __future__ import annotations

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .rope import turn_pairs


@jit
def compress_pool(
    rows,
    first,
    end,
    index,
    inside,
    c,
    D: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    """-> highest logit, sum of weights, weighted sum of values: [BE, BD] each."""
    channel = ((c >= 0) & (c < D))[None, :]
    # Finite, as -inf - -inf is none, and lower than any logit.
    top, total = tl.full([BE * G, BD], -1e30, tl.float32), tl.zeros([BE * G, BD], tl.float32)
    e = total
    for lane in tl.static_range(LANES):
        for start in tl.range(0, R, G, loop_unroll_factor=U):
            slot = start + tl.arange(0, G)
            row = first + tl.maximum(end + 1 - (LANES - lane) * R + slot, 0)
            at = rows + row[:, None] * (2 * LANES * D) + lane * D + c[None, :]
            there = (inside & (slot < R) & (index >= LANES - 1 - lane))[:, None] & channel
            k = tl.load(at, mask=there, other=0.0)
            z = tl.load(at + LANES * D, mask=there, other=float("-inf"))
            shrink = tl.exp(-tl.abs(z - top))  # of what is lower
            old, new = tl.where(z > top, shrink, 1.0), tl.where(z > top, 1.0, shrink)
            total, e, top = total * old + new, e * old + k * new, tl.maximum(top, z)
    if G > 1:
        highest = tl.max(top, 0)[None, :]
        share = tl.exp(top - highest)
        total, e, top = tl.sum(total * share, 0)[None, :], tl.sum(e * share, 0)[None, :], highest
    return top, tl.maximum(total, 1.0), e  # a sum below 1 has no slots


@jit
def compress_angles(cos, sin, n, there, D: tl.constexpr, r: tl.constexpr, BD: tl.constexpr):
    """cos and sin for every pair of channels of entries n, [.., BD/2]: those that are not rotated turn by 0."""
    pair = tl.arange(0, BD // 2) - (D - r + 1) // 2
    at, there = (
        n[:, None] * (r // 2) + pair[None, :],
        there[:, None] & ((pair >= 0) & (pair < r // 2))[None, :],
    )
    return tl.load(cos + at, mask=there, other=1.0), tl.load(sin + at, mask=there, other=0.0)


@jit
def compress_forward(
    rows,
    end,
    index,
    weight,
    cos,
    sin,
    out,
    N,
    E,
    entries,
    eps,
    D: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0) * BE + tl.arange(0, BE)
    last, w = (
        tl.load(end + n, mask=n < entries, other=-1),
        tl.load(index + n, mask=n < entries, other=0),
    )
    inside, n = (last >= 0) & (last < N), n.to(tl.int64)
    c = tl.arange(0, BD) - (D - r) % 2  # pairs begin at even places of a tile
    there = (n < entries)[:, None] & ((c >= 0) & (c < D))[None, :]
    out += n[:, None] * D + c[None, :]
    if tl.sum(inside.to(tl.int32), 0) == 0:
        tl.store(out, tl.zeros([BE, BD], out.dtype.element_ty), mask=there)
        return
    top, total, e = compress_pool(rows, n // E * N, last, w, inside, c, D, R, LANES, BE, G, U, BD)
    e = (e / total).to(out.dtype.element_ty).to(tl.float32)
    unit = tl.rsqrt(tl.sum(e * e, 1) / D + eps)
    e = (
        e
        * unit[:, None]
        * tl.load(weight + c, mask=(c >= 0) & (c < D), other=0.0).to(tl.float32)[None, :]
    )
    cosines, sines = compress_angles(cos, sin, n, n < entries, D, r, BD)
    e = turn_pairs(e.to(out.dtype.element_ty).to(tl.float32), cosines, sines, BE, BD)
    tl.store(out, e.to(out.dtype.element_ty), mask=there)


@jit
def compress_backward(
    g,
    rows,
    end,
    index,
    weight,
    cos,
    sin,
    g_rows,
    g_weight,
    N,
    E,
    entries,
    eps,
    D: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0) * BE + tl.arange(0, BE)
    last, w = (
        tl.load(end + n, mask=n < entries, other=-1),
        tl.load(index + n, mask=n < entries, other=0),
    )
    inside, n = (last >= 0) & (last < N), n.to(tl.int64)
    c = tl.arange(0, BD) - (D - r) % 2
    channel = (c >= 0) & (c < D)
    top, total, e = compress_pool(rows, n // E * N, last, w, inside, c, D, R, LANES, BE, G, U, BD)
    e /= total
    rounded = e.to(g.dtype.element_ty).to(tl.float32)
    unit = tl.rsqrt(tl.sum(rounded * rounded, 1) / D + eps)[:, None]
    v = tl.load(
        g + n[:, None] * D + c[None, :], mask=(n < entries)[:, None] & channel[None, :], other=0.0
    ).to(tl.float32)
    cosines, sines = compress_angles(cos, sin, n, n < entries, D, r, BD)
    v = turn_pairs(v, cosines, -sines, BE, BD).to(g.dtype.element_ty).to(tl.float32)
    tl.store(
        g_weight + tl.program_id(0).to(tl.int64) * D + c,
        tl.sum(v * rounded * unit, 0),
        mask=channel,
    )
    v *= tl.load(weight + c, mask=channel, other=0.0).to(tl.float32)[None, :]
    v = unit * (v - rounded * unit * unit * (tl.sum(v * rounded, 1) / D)[:, None])  # gradient of e
    scale = v / total
    for lane in tl.static_range(LANES):
        for start in tl.range(0, R, G, loop_unroll_factor=U):
            slot = start + tl.arange(0, G)
            row = n // E * N + tl.maximum(last + 1 - (LANES - lane) * R + slot, 0)
            at = row[:, None] * (2 * LANES * D) + lane * D + c[None, :]
            there = (inside & (slot < R) & (w >= LANES - 1 - lane))[:, None] & channel[None, :]
            k = tl.load(rows + at, mask=there, other=0.0)
            z = tl.load(rows + at + LANES * D, mask=there, other=float("-inf"))
            gp = tl.exp(z - top) * scale
            tl.atomic_add(g_rows + at, gp, mask=there, sem="relaxed")
            tl.atomic_add(g_rows + at + LANES * D, gp * (k - e), mask=there, sem="relaxed")


def _tiles(name, rows, D, r, ratio, dtype):
    """Constants and options of a launch."""
    BD = power_of_two(D + (D - r) % 2, 2)
    if ratio <= 16:
        candidates = [
            {"BE": max(1, size // BD), "G": 1, "U": 4, "num_warps": warps}
            for size, warps in ((2048, 4), (1024, 4), (512, 16), (512, 8), (512, 4))
        ]
    else:
        candidates = [
            {"BE": 1, "G": 16, "U": U, "num_warps": warps}
            for U, warps in ((2, 16), (2, 8), (1, 16), (1, 8))
        ]
    cfg = get_config(name, f"R{ratio} D{D} {str(dtype)[6:]}", candidates, rows)
    return {"D": D, "r": r, "R": ratio, "LANES": rows.shape[2] // (2 * D), "BD": BD, **cfg}


def kernel(rows, end, index, weight, cos, sin, ratio, eps, dtype):
    (B, N, _), E, D = rows.shape, end.shape[1], weight.shape[0]
    out = rows.new_empty(B, E, D, dtype=dtype)
    cfg = _tiles("compress_forward", rows, D, 2 * cos.shape[-1], ratio, dtype)
    launch(
        compress_forward,
        (cdiv(B * E, cfg["BE"]),),
        *(t.contiguous() for t in (rows, end, index, weight, cos, sin)),
        out,
        N,
        E,
        B * E,
        eps,
        **cfg,
    )
    return out


def backward_kernel(g, rows, end, index, weight, cos, sin, ratio, eps, dtype):
    (B, N, _), E, D = rows.shape, end.shape[1], weight.shape[0]
    cfg = _tiles("compress_backward", rows, D, 2 * cos.shape[-1], ratio, dtype)
    programs = cdiv(B * E, cfg["BE"])
    g_rows, g_weight = rows.new_zeros(rows.shape), rows.new_empty(programs, D)
    launch(
        compress_backward,
        (programs,),
        *(t.contiguous() for t in (g, rows, end, index, weight, cos, sin)),
        g_rows,
        g_weight,
        N,
        E,
        B * E,
        eps,
        **cfg,
    )
    return g_rows, g_weight.sum(0).to(weight.dtype)
