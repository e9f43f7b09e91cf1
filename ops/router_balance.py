"""router_balance: load and sequence-wise balance loss of a router (docs/v4.md#training)."""

from __future__ import annotations

import torch


def router_balance(
    chosen: torch.Tensor, score: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """chosen [B, T, K], score [B, T, E], valid [B, T] or None -> load [E], loss (), over all rows.

    The loss of a row is sum_e f_e P_e: f_e = E / (K T) times the tokens that chose expert e, P_e
    the mean over tokens of score_e / sum_e' score_e'. T counts the valid tokens. Formula: equations
    17 to 20 of DeepSeek-V3 (arXiv 2412.19437), whose loss arXiv 2606.19348 keeps.
    """
    E, K = score.shape[-1], chosen.shape[-1]
    if valid is None:
        valid = torch.ones(chosen.shape[:2], device=score.device)
    valid = valid.float()
    is_chosen = (chosen[..., None] == torch.arange(E, device=score.device)).sum(2)
    picked = is_chosen * valid[..., None]  # [B, T, E]
    share = score / score.sum(-1, keepdim=True) * valid[..., None]  # [B, T, E]
    load = picked.sum(1)  # [B, E]
    T = valid.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return load.sum(0), (load * (E / K) / T * share.sum(1) / T).sum()
