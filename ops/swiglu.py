"""swiglu: the activation of every expert, routed or shared (docs/v4.md#experts), in one place.

    h = silu(gate) up    gate = min(x W1^T, limit), up = clamp(x W3^T, -limit, limit); fp32

The traced references differentiate `swiglu`; the opaque form of moe calls `swiglu_backward`. The
kernels of moe (ops/triton/moe*.py, ops/cpu/moe*.cpp) have the formula built in: another activation
needs HAS_KERNELS = False, and then runs from these two functions on every device. A GPU then runs
the grouped Python form, which syncs with the host once a layer. Its name belongs in `hidden_act` of
config.py. Formula: DeepSeek's code (`Expert` in inference/model.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

HAS_KERNELS = True


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """Pre-activations gate, up [..., I] fp32 -> h [..., I] fp32."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def swiglu_backward(
    g: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = h weight, weight [..., 1] -> y, gradients of weight, gate and up for g = dL/dy."""
    gate_c, up_c = gate.clamp(max=limit), up.clamp(-limit, limit)
    sig = torch.sigmoid(gate_c)
    silu = gate_c * sig
    g_weight = (g * silu * up_c).sum(-1)
    # silu' = sigmoid (1 + gate - silu); no gradient passes where a value was clamped
    g_gate = g * weight * up_c * sig * (1 + gate_c - silu) * (gate <= limit)
    g_up = g * weight * silu * (up.abs() <= limit)
    return silu * up_c * weight, g_weight, g_gate, g_up
