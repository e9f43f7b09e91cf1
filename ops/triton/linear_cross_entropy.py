"""The Triton kernels of linear_cross_entropy (see ops/linear_cross_entropy.py) and the products
around them.

All rows meet a chunk of columns of the vocabulary at a time: the library multiplies bf16 into fp32
logits, faster than a kernel that fuses the rest, and one pass over them updates maximum, sum and
target logit of each row, or writes p = (softmax - onehot) g in the dtype of x. With whole columns
the gradient of weight needs no fp32 copy: each chunk is final, rounded once. That of x is added up
in fp32. Sums have a fixed order: the results are deterministic.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, tl

MAX_LOGITS = 1 << 27  # logits held at a time, but the vocabulary in at most MAX_CHUNKS chunks
MAX_CHUNKS = 16
CONFIGS = [
    dict(ROWS=1, BLOCK=8192, num_warps=8),
    dict(ROWS=1, BLOCK=4096, num_warps=4),
    dict(ROWS=4, BLOCK=1024, num_warps=4),
    dict(ROWS=16, BLOCK=256, num_warps=4),
]


@jit
def linear_cross_entropy_forward_kernel(
    # logits of the chunk [N, width] fp32, target [N]
    logits_ptr,
    target_ptr,
    # state and result [N] fp32
    loss_ptr,
    lse_ptr,
    sum_ptr,
    # rows, first column of the chunk, columns
    N,
    first,
    width,
    # whether it is the first, the last chunk
    START: tl.constexpr,
    END: tl.constexpr,
    # block sizes
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online softmax over the chunks: until the last, loss holds the logit of the target, lse the
    maximum m and sum l = sum exp(z - m).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_row = row < N
    target = tl.load(target_ptr + row, mask=mask_row, other=-1)
    row_ptrs = logits_ptr + row.to(tl.int64) * width
    if START:
        l_i = tl.zeros((ROWS,), tl.float32)
        target_logit = tl.zeros((ROWS,), tl.float32)
        m_i = l_i - float("inf")
    else:
        l_i = tl.load(sum_ptr + row, mask=mask_row, other=0.0)
        target_logit = tl.load(loss_ptr + row, mask=mask_row, other=0.0)
        m_i = tl.load(lse_ptr + row, mask=mask_row, other=0.0)

    # m' = max(m, z); l' = l exp(m - m') + sum exp(z - m'), z [ROWS, BLOCK]
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = mask_row[:, None] & (column < width)[None, :]
        z = tl.load(row_ptrs[:, None] + column[None, :], mask=mask, other=-float("inf"))
        m_new = tl.maximum(m_i, tl.max(z, 1))
        m_new = tl.maximum(m_new, -3e38)  # finite, for rows that do not exist
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
        m_i = m_new

    in_chunk = (target >= first) & (target < first + width)
    z = tl.load(row_ptrs + (target - first), mask=in_chunk, other=0.0)
    target_logit = tl.where(in_chunk, z, target_logit)
    if END:
        # lse = m + log l; loss = lse - z_target
        m_i += tl.log(tl.where(mask_row, l_i, 1.0))
        target_logit = tl.where(target < 0, 0.0, m_i - target_logit)
    else:
        tl.store(sum_ptr + row, l_i, mask=mask_row)
    tl.store(lse_ptr + row, m_i, mask=mask_row)
    tl.store(loss_ptr + row, target_logit, mask=mask_row)


@jit
def linear_cross_entropy_backward_kernel(
    # logits of the chunk [N, width] fp32; target, gradient of the loss, lse [N]; result p [N,
    # width]
    logits_ptr,
    target_ptr,
    g_ptr,
    lse_ptr,
    p_ptr,
    # rows, first column of the chunk, columns
    N,
    first,
    width,
    # block sizes
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p = (exp(z - lse) - onehot(target)) g, 0 for ignored rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row, mask=row < N, other=-1)
    counted = (target >= 0)[:, None]
    offs = row.to(tl.int64)[:, None] * width + column[None, :]
    mask = (row < N)[:, None] & (column < width)[None, :]
    z = tl.load(logits_ptr + offs, mask=mask & counted, other=0.0)
    lse = tl.load(lse_ptr + row, mask=row < N, other=0.0)
    p = tl.exp(z - lse[:, None])
    p = tl.where((column + first)[None, :] == target[:, None], p - 1.0, p)
    p = p * tl.load(g_ptr + row, mask=row < N, other=0.0)[:, None]
    tl.store(p_ptr + offs, tl.where(counted, p, 0.0).to(p_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------
# Launching


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a b with fp32 sums. out= also keeps autocast away."""
    if a.device.type == "cpu" or out.dtype.itemsize < a.dtype.itemsize:
        # The library has no product that rounds its sums to these
        product = out.new_empty(out.shape, dtype=torch.float32)
        out.copy_(torch.mm(a.float(), b.float(), out=product))
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out


class _Chunks:
    """x and weight in one dtype, and the logits of a chunk of columns, a multiple of 128, in a
    buffer.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor):
        if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            x, weight = x.float(), weight.float()
        self.x, self.weight = x, weight
        N, V = x.shape[0], weight.shape[0]
        columns = max(MAX_LOGITS // max(N, 1), cdiv(V, MAX_CHUNKS))
        self.columns = min(cdiv(columns, 128) * 128, V)
        self.buffer = x.new_empty(N * self.columns, dtype=torch.float32)

    def logits(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> rows of weight from `first` on, logits [N, len(rows)]"""
        w = self.weight[first : first + self.columns]
        out = self.buffer[: len(self.x) * len(w)].view(len(self.x), len(w))
        return w, _matmul(self.x, w.T, out)


def forward_kernels(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> loss, lse"""
    N, V = x.shape[0], weight.shape[0]
    config = get_config("linear_cross_entropy_forward", f"V{V}", CONFIGS, x)
    loss, lse, sums = (x.new_empty(N, dtype=torch.float32) for _ in range(3))
    target = target.contiguous()
    chunks = _Chunks(x, weight)
    for first in range(0, V, chunks.columns):
        w, logits = chunks.logits(first)
        launch(
            linear_cross_entropy_forward_kernel,
            (cdiv(N, config["ROWS"]),),
            *(logits, target, loss, lse, sums),
            *(N, first, len(w)),
            START=first == 0,
            END=first + chunks.columns >= V,
            **config,
        )
    return loss, lse


def backward_kernels(
    g: torch.Tensor, lse: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    N, V = x.shape[0], weight.shape[0]
    g_x = x.new_empty(x.shape)
    g_w = weight.new_empty(weight.shape)
    config = get_config("linear_cross_entropy_backward", f"V{V}", CONFIGS, x)
    g = g.contiguous()
    lse = lse.contiguous()
    target = target.contiguous()
    chunks = _Chunks(x, weight)
    x = chunks.x
    p_buffer = x.new_empty(chunks.buffer.shape)
    total = x.new_empty(x.shape, dtype=torch.float32)
    part = torch.empty_like(total) if chunks.columns < V else None
    for first in range(0, V, chunks.columns):
        w, logits = chunks.logits(first)
        p = p_buffer[: logits.numel()].view(logits.shape)
        launch(
            linear_cross_entropy_backward_kernel,
            (cdiv(N, config["ROWS"]), cdiv(len(w), config["BLOCK"])),
            *(logits, target, g, lse, p),
            *(N, first, len(w)),
            **config,
        )
        # g_weight = p^T x, final for these rows; g_x = sum over chunks of p w
        _matmul(p.T, x, g_w[first : first + chunks.columns])
        if first == 0:
            _matmul(p, w, total)
        else:
            total.add_(_matmul(p, w, part))
    return g_x.copy_(total), g_w
