"""The Triton kernels of indexer_topk (see indexer_topk.py)."""

from __future__ import annotations

import torch

from ..launch import TYPES, cdiv, get_config, jit, launch, power_of_two, processors, tl

LARGEST_K = 4096  # more are left to the reference
DENSE = 2048  # entries of a split whose scores go to the merge all
WIDEST = 16384  # scores that one program merges
assert WIDEST >= 2 * LARGEST_K  # so that every round of merging leaves fewer lists

# Columns (tokens x heads) and rows (entries) of a product; scores of the buffer (more for large K) and of a step of moving them;
# programs per processor.
CANDIDATES = [
    dict(N=256, BC=64, CAP=2048, C=2048, PER=2, num_warps=4, num_stages=3),
    dict(N=128, BC=64, CAP=2048, C=2048, PER=2, num_warps=4, num_stages=3),
    dict(N=64, BC=128, CAP=4096, C=2048, PER=2, num_warps=4, num_stages=3),
    dict(N=128, BC=32, CAP=2048, C=1024, PER=2, num_warps=4, num_stages=2),
    dict(N=64, BC=64, CAP=4096, C=1024, PER=2, num_warps=4, num_stages=3),
    dict(N=128, BC=64, CAP=2048, C=1024, PER=2, num_warps=4, num_stages=2),
]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A key is an int32 that orders as the score does; HIDDEN, the least, stands for an entry that is not seen.

HIDDEN = tl.constexpr(-(1 << 31)) if tl else None


@jit
def indexer_topk_best(key, K: tl.constexpr):
    """Bounds of the K largest of each row of keys [R, N], or of all where fewer are seen -> above, n, least, found [R]:

    the n keys >= above belong to them, and the first found - n of those in least <= key < above, which are all equal.
    """
    seen = key > HIDDEN
    found = tl.sum(seen.to(tl.int32), 1)
    least = tl.min(tl.where(seen, key, 2147483646), 1)
    above = tl.where(found > K, tl.max(key, 1) + 1, least)
    n = tl.where(found > K, 0, found)
    while tl.max((above > least + 1).to(tl.int32), 0) > 0:
        middle = (least >> 1) + (above >> 1) + (least & above & 1)
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        above, n = tl.where(count > K, above, middle), tl.where(count > K, n, count)
        least = tl.where(count < K, least, middle)
    return above, n, least, tl.minimum(found, K)


@jit
def indexer_topk_move(
    keys,
    entries,
    listed,
    base,
    count,
    above,
    n,
    least,
    found,
    to_keys,
    to_entries,
    KP: tl.constexpr,
    C: tl.constexpr,
):
    """Copy the chosen of a list of `count` keys, in their order, to the front of another list; it may be the same one.

    The first `listed` entries are read, the others follow from their place: base + i. A list of keys is padded to KP.
    """
    passed = 0  # in 16 bits each: keys from `above`, keys from `least`
    for start in range(0, count, C):
        i = tl.max_contiguous(
            start + tl.arange(0, C), 1
        )  # one key a thread, as the stores want it: no change of layout
        key = tl.load(keys + i, mask=i < count, other=HIDDEN)
        over, level = (key >= above).to(tl.int32), ((key >= least) & (key < above)).to(tl.int32)
        both = over + (level << 16)
        order = passed + tl.cumsum(both, 0)
        passed += tl.sum(both, 0)
        chosen = (over > 0) | (level > 0) & ((order >> 16) <= found - n)
        place = (order & 0xFFFF) + tl.minimum(order >> 16, found - n) - 1  # <= i
        entry = tl.load(entries + i, mask=chosen & (i < listed), other=0)
        entry = tl.where(i < listed, entry, base + i)
        tl.debug_barrier()  # all is read that will now be overwritten
        if to_keys is not None:
            tl.store(to_keys + place, key, mask=chosen)
        tl.store(to_entries + place, entry.to(to_entries.dtype.element_ty), mask=chosen)
    if to_keys is not None:
        c = tl.arange(0, KP)
        tl.store(to_keys + c, tl.full((KP,), HIDDEN, tl.int32), mask=c >= found)


@jit
def indexer_topk_select(
    keys,
    entries,
    rows,
    listed,
    base,
    count,
    last,
    to_keys,
    to_entries,
    stride,
    K: tl.constexpr,
    KP: tl.constexpr,
    CAP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The K best of each of `rows` lists of keys: to its front or, at last, to lists elsewhere, which may be without keys."""
    j, i = tl.arange(0, R), tl.arange(0, CAP)
    for r in range(0, rows, R):
        there = (r + j < rows)[:, None] & (i < count)[None, :]
        key = tl.load(keys + (r + j)[:, None] * CAP + i[None, :], mask=there, other=HIDDEN)
        above, n, least, found = indexer_topk_best(key, K)
        for x in range(0, tl.minimum(R, rows - r)):
            a, m = tl.sum(tl.where(j == x, above, 0), 0), tl.sum(tl.where(j == x, n, 0), 0)
            l, f = tl.sum(tl.where(j == x, least, 0), 0), tl.sum(tl.where(j == x, found, 0), 0)
            mine, mine_entry, to = keys + (r + x) * CAP, entries + (r + x) * KP, (r + x) * stride
            if to_keys is None and last:
                indexer_topk_move(
                    mine, mine_entry, listed, base, count, a, m, l, f, None, to_entries + to, KP, C
                )
            else:
                dest, dest_entry = mine, mine_entry
                if to_keys is not None:
                    if last:
                        dest, dest_entry = to_keys + to, to_entries + to
                indexer_topk_move(
                    mine, mine_entry, listed, base, count, a, m, l, f, dest, dest_entry, KP, C
                )


@jit
def indexer_topk_forward(
    q,
    k,
    u,
    lo,
    hi,
    buffer,
    buffer_entry,
    idx,
    best,
    best_entry,
    state,
    B,
    T,
    E,
    splits,
    width,
    dense,
    k_b,
    k_e,
    H: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SPLIT: tl.constexpr,
    BQ: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    CAP: tl.constexpr,
    C: tl.constexpr,
):
    pid, programs, blocks = tl.program_id(0), tl.num_programs(0), (T + BQ - 1) // BQ
    buffer += pid.to(tl.int64) * (BQ * CAP)
    buffer_entry += pid.to(tl.int64) * (BQ * KP)
    j, n, d, c, near = (
        tl.arange(0, BQ),
        tl.arange(0, BQ * HP),
        tl.arange(0, DP),
        tl.arange(0, KP),
        tl.arange(0, BC),
    )
    for turn in range(0, (B * blocks * splits + programs - 1) // programs):
        # Later tokens see more: they come first, and every other turn is dealt out backwards.
        item = turn * programs + (pid if turn % 2 == 0 else programs - 1 - pid)
        if item < B * blocks * splits:
            split, block = item % splits, item // splits
            b, t = block % B, (blocks - 1 - block // B) * BQ
            row, real = (b * T + t).to(tl.int64), t + j < T
            first = tl.maximum(tl.load(lo + row + j, mask=real, other=0), 0).to(tl.int32)
            visible = tl.minimum(tl.load(hi + row + j, mask=real, other=0), E).to(tl.int32) - first
            scored = visible > K
            begin = tl.min(
                tl.where(scored, first, E), 0
            )  # of what any of the tokens needs scores of
            end = tl.max(tl.where(scored, first + visible, 0), 0)
            part = ((tl.maximum(end - begin, 0) + splits - 1) // splits + BC - 1) // BC * BC
            if split == 0:
                every = tl.where(c[None, :] < visible[:, None], first[:, None] + c[None, :], -1).to(
                    tl.int64
                )
                tl.store(
                    idx + (row + j)[:, None] * K + c[None, :],
                    every,
                    mask=(real & ~scored)[:, None] & (c < K)[None, :],
                )
                if SPLIT:  # what the merge finds: how many keys, and the entry of the first if their entries are not listed
                    size = tl.where(
                        part <= dense,
                        end - begin,
                        (end - begin + part - 1) // tl.maximum(part, 1) * KP,
                    )
                    tl.store(state + 2 * (row + j), tl.where(scored, size, 0), mask=real)
                    tl.store(
                        state + 2 * (row + j) + 1,
                        tl.where(j >= 0, tl.where(part <= dense, begin, -1), 0),
                        mask=real,
                    )
            begin += split * part
            end = tl.minimum(end, begin + part)
            if begin < end:
                exists = (t + n // HP < T) & (n % HP < H)
                nh = (row + n // HP) * H + n % HP
                qt = tl.load(
                    q + nh[:, None] * D + d[None, :],
                    mask=exists[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                qt = tl.trans(qt)  # [DP, BQ * HP]
                keys, offset = k + b.to(tl.int64) * k_b, near[:, None] * k_e + d[None, :]
                target, lane, room = buffer, (j * CAP).to(tl.int64), CAP
                if SPLIT:
                    if part <= dense:
                        target, lane = best, (row + j) * width + split * part
                    room = tl.where(part <= dense, part, CAP)
                held = 0
                while begin < end:
                    w = tl.load(u + nh, mask=exists, other=0.0).to(tl.float32)
                    stop = tl.minimum(end, begin + (room - held) // BC * BC)
                    for e in range(begin, stop, BC):
                        at = e + near
                        ahead = (at < stop)[:, None]
                        kt = tl.load(
                            keys + tl.cast(e, tl.int64) * k_e + offset,
                            mask=ahead & (d < D)[None, :],
                            other=0.0,
                        )
                        s = tl.dot(kt.to(qt.dtype), qt, input_precision="ieee")  # [BC, BQ * HP]
                        s = tl.maximum(s, 0.0) * w[None, :]
                        s = tl.sum(tl.reshape(s, (BC, BQ, HP)), 2)
                        bits = s.to(tl.int32, bitcast=True)
                        key = tl.minimum(tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits), 2147483646)
                        inside = (at[:, None] >= first[None, :]) & (
                            at[:, None] < (first + visible)[None, :]
                        )
                        key = tl.where(inside & scored[None, :], key, HIDDEN)
                        tl.store(
                            target + lane[None, :] + (held + at - begin)[:, None],
                            key,
                            mask=ahead & real[None, :],
                        )
                    last, base, count, rows = (
                        stop == end,
                        begin - held,
                        held + stop - begin,
                        tl.minimum(BQ, T - t),
                    )
                    if SPLIT == 0:
                        tl.debug_barrier()  # all scores are written, before they are read, and read before the next ones
                        indexer_topk_select(
                            buffer,
                            buffer_entry,
                            rows,
                            held,
                            base,
                            count,
                            last,
                            None,
                            idx + row * K,
                            K,
                            K,
                            KP,
                            CAP,
                            R,
                            C,
                        )
                        tl.debug_barrier()
                    elif SPLIT == 1:
                        if part > dense:
                            tl.debug_barrier()
                            to = row * width + split * KP
                            indexer_topk_select(
                                buffer,
                                buffer_entry,
                                rows,
                                held,
                                base,
                                count,
                                last,
                                best + to,
                                best_entry + to,
                                width,
                                K,
                                KP,
                                CAP,
                                R,
                                C,
                            )
                            tl.debug_barrier()
                    begin = stop
                    held = K


@jit
def indexer_topk_merge(
    best,
    best_entry,
    state,
    idx,
    better,
    better_entry,
    better_state,
    width,
    wide,
    K: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """The K best of each N keys of a row: the choice if there are no more, else, listed, to be merged again."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count, base = tl.load(state + 2 * row), tl.load(state + 2 * row + 1)
    if better is not None:
        if group == 0:
            tl.store(better_state + 2 * row, tl.where(count > N, (count + N - 1) // N * KP, 0))
            tl.store(better_state + 2 * row + 1, -1)
    if group * N < count:
        at, mine = row * width + group * N, tl.minimum(count - group * N, N)
        listed, base = tl.where(base < 0, mine, 0), base + group * N
        if better is None or count <= N:
            indexer_topk_select(
                best + at,
                best_entry + at,
                1,
                listed,
                base,
                mine,
                True,
                None,
                idx + row * K,
                0,
                K,
                KP,
                N,
                1,
                C,
            )
        else:
            to = row * wide + group * KP
            indexer_topk_select(
                best + at,
                best_entry + at,
                1,
                listed,
                base,
                mine,
                True,
                better + to,
                better_entry + to,
                0,
                K,
                KP,
                N,
                1,
                C,
            )


def kernels(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, topk: int
) -> torch.Tensor:
    (B, T, H, D), E = q.shape, k.shape[1]
    K, dtype = min(topk, E), torch.promote_types(q.dtype, k.dtype)
    idx = lo.new_empty(B, T, K)
    if 0 in idx.shape:
        return idx
    q, u, lo, hi = q.to(dtype).contiguous(), u.contiguous(), lo.contiguous(), hi.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()  # a cache is read where it lies
    cfg = dict(
        get_config(
            "indexer_topk_forward",
            f"H{H} D{D} T{min(power_of_two(T), 8)} {TYPES[dtype]}",
            CANDIDATES,
            q,
        )
    )
    HP, DP, KP = power_of_two(H), power_of_two(D, 16), power_of_two(K)
    scale = cdiv(
        DP * dtype.itemsize, 256
    )  # rows longer than those of bf16 with D = 128, for which the candidates are made
    BQ, BC = (
        max(1, min(cfg.pop("N") // scale // HP, 16, power_of_two(T))),
        max(16, cfg.pop("BC") // scale**2),
    )
    HP = max(HP, 16 // BQ)
    programs, blocks = cfg.pop("PER") * processors(q), B * cdiv(T, BQ)
    splits = max(1, min(programs // blocks, cdiv(E, BC)))
    programs = min(programs, blocks * splits)
    part, dense = cdiv(cdiv(E, splits), BC) * BC, max(DENSE, KP)
    CAP, C = power_of_two(min(part, max(cfg.pop("CAP"), min(4 * KP, 8192), K + BC))), cfg.pop("C")
    scratch = lambda *shape: lo.new_empty(shape, dtype=torch.int32)
    lists = lambda width: (
        scratch(B * T, width),
        scratch(B * T, width),
        scratch(B * T, 2),
    )  # keys, entries, state
    width = cdiv(E, 16) * 16
    width = (
        min(splits * part, width) if part <= dense else min(splits * dense, max(splits * KP, width))
    )
    best = lists(width) if splits > 1 else (None,) * 3
    buffer = scratch(programs, BQ, CAP), scratch(programs, BQ, KP)  # keys, entries
    launch(
        indexer_topk_forward,
        (programs,),
        q,
        k,
        u,
        lo,
        hi,
        *buffer,
        idx,
        *best,
        B,
        T,
        E,
        splits,
        width,
        dense,
        k.stride(0),
        k.stride(1),
        H=H,
        D=D,
        HP=HP,
        DP=DP,
        K=K,
        KP=KP,
        SPLIT=0 if splits == 1 else 1 if part > dense else 2,
        BQ=BQ,
        R=min(BQ, max(1, 4 * C // CAP)),
        BC=BC,
        CAP=CAP,
        C=min(C, CAP),
        **cfg,
    )
    while splits > 1:
        N = power_of_two(width)  # one round of merging, or two of about the same width
        N = N if N <= WIDEST else min(WIDEST, max(2 * KP, power_of_two(int((width * KP) ** 0.5))))
        groups, warps = cdiv(width, N), max(4, min(16, N // 512))
        better = lists(groups * KP) if groups > 1 else (None,) * 3
        launch(
            indexer_topk_merge,
            (B * T, groups),
            *best,
            idx,
            *better,
            width,
            groups * KP,
            K=K,
            KP=KP,
            N=N,
            C=min(N, 4096),
            num_warps=warps,
        )
        if groups == 1:
            break
        best, width = better, groups * KP
    return idx
