"""hadamard: the orthonormal Walsh-Hadamard transform of the indexer (docs/v4.md#indexer)."""

from __future__ import annotations

import torch

from .registry import require


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Transform of the last dim (a power of two, else ValueError) of x in natural order, its dtype.

    y = x H with H[i, j] = (-1)^popcount(i & j) / sqrt(n), in fp32. Formula: DeepSeek's code
    (`rotate_activation` in inference/model.py).
    """
    n = x.shape[-1]
    power_of_two = n & (n - 1) == 0
    require(
        power_of_two,
        f"the Hadamard transform of act_quant needs a power of two, not index_head_dim {n}",
    )
    i = torch.arange(n, device=x.device)
    parity = i[:, None] & i
    for shift in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    signs = (1 - 2 * (parity & 1)).float()
    return ((x.float() @ signs) * n**-0.5).to(x.dtype)
