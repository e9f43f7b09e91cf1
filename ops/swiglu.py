"""swiglu: the activation of every expert, routed or shared (docs/v4.md#experts), in one place.

    h = silu(gate) up    gate = min(x W1^T, limit), up = clamp(x W3^T, -limit, limit); fp32

To change it: ACTIVATION, `activation` and `slope`. Its name is ModelArgs.hidden_act, which stands
in checkpoints. The kernels of moe (ops/triton/moe*.py, ops/cpu/moe*.cpp) have SiLU built in: with
another activation the references run instead, on a GPU the grouped Python form, which waits for the
GPU once a layer. Formula: DeepSeek's code (`Expert` in inference/model.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATION = "silu"
HAS_KERNELS = ACTIVATION == "silu"


def activation(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x)


def slope(x: torch.Tensor) -> torch.Tensor:
    """The derivative of activation."""
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """Pre-activations gate, up [..., I] fp32 -> h [..., I] fp32."""
    return activation(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def swiglu_backward(
    g: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = h weight, weight [..., 1] -> y, gradients of weight, gate and up for g = dL/dy."""
    gate_c, up_c = gate.clamp(max=limit), up.clamp(-limit, limit)
    act = activation(gate_c)
    g_weight = (g * act * up_c).sum(-1)
    # No gradient passes where a value was clamped.
    g_gate = g * weight * up_c * slope(gate_c) * (gate <= limit)
    g_up = g * weight * act * (up.abs() <= limit)
    return act * up_c * weight, g_weight, g_gate, g_up
