"""Sampling inside the compiled graphs: logits to tokens.

Noise depends on nothing drawn before. Temperature, top-k, top-p and seed are tensors: nothing
recompiles when they change. Shapes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """Sampling parameters: 0-D tensors on the model's device.

    temperature  fp32; 0 takes the most likely token
    top_k        int64; keep the k most likely tokens
    top_p        fp32; keep the most likely tokens until their probability reaches p
    seed         int64
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seed: torch.Tensor

    @classmethod
    def of(
        cls, temperature: float, top_k: int, top_p: float, seed: int, device: torch.device | str
    ) -> Sampling:
        """The tensors of these values."""
        return cls(
            torch.tensor(temperature, dtype=torch.float32, device=device),
            torch.tensor(top_k, dtype=torch.int64, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            torch.tensor(seed, dtype=torch.int64, device=device),
        )


def check_settings(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    spell: Callable[[str], str] = str,
) -> None:
    """ValueError for an impossible setting; spell(name) is the name that its message uses."""
    checks = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "ask for at least 1"),
        ("temperature", temperature, 0 <= temperature < 1e30, "choose 0 (greedy) or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "keep at least 1 token"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "choose a probability above 0, up to 1"),
        ("seed", seed, 0 <= seed < 1 << 63, "choose 0 .. 2^63 - 1"),
    )
    for name, value, valid, remedy in checks:
        if not valid:
            raise ValueError(f"{spell(name)} {value}: {remedy}")


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32-bit values held in int64; products stay below 2^63."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def gumbel(
    seed: torch.Tensor, prompt: torch.Tensor, pos: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Gumbel noise [B, V] fp32, a function of seed [], prompt index [B] and position [B] alone."""
    h = _mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF))
    h = _mix(_mix(h ^ prompt) ^ pos)
    h = _mix(h[:, None] ^ torch.arange(vocab_size, device=pos.device))
    uniform = ((h >> 9).float() + 0.5) * 2.0**-23  # in (0, 1), exactly
    return -(-uniform.log()).log()


def sample(
    logits: torch.Tensor,
    prompt: torch.Tensor,
    pos: torch.Tensor,
    sampling: Sampling,
    filtered: bool,
) -> torch.Tensor:
    """Draw tokens [B] from logits [B, V]; prompt [B] are prompt indices, pos [B] the new positions.

    The largest of logits / temperature plus Gumbel noise is a draw from their softmax.
    filtered (static): whether top-k or top-p apply, which needs a sort.
    """
    noise = gumbel(sampling.seed, prompt, pos, logits.shape[-1])
    if not filtered:
        return (logits + sampling.temperature * noise).argmax(-1)
    score, order = logits.sort(dim=-1, descending=True, stable=True)
    p = (score / sampling.temperature.clamp(min=1e-6)).softmax(-1)
    rank = torch.arange(score.shape[-1], device=p.device)
    above = p.cumsum(-1) - p  # probability of the tokens that are likelier than this one
    keep = (rank < sampling.top_k) & (above < sampling.top_p)
    score = score + sampling.temperature * noise.gather(-1, order)
    score = score.masked_fill(~keep, float("-inf"))
    return order.gather(-1, score.argmax(-1, keepdim=True))[:, 0]


# Epilogues of the compiled phases: logits [B, 1, V] of a call at input_pos [B] that fed lengths [B]
# tokens a row; prompt [B] the rows' prompt indices; sampling as in Sampling.


def sample_prefill(
    logits: torch.Tensor,
    input_pos: torch.Tensor,
    lengths: torch.Tensor,
    filtered: bool,
    prompt: torch.Tensor,
    *sampling: torch.Tensor,
) -> torch.Tensor:
    """The token that follows each row's last one, [B, 1]."""
    pos = input_pos + lengths
    return sample(logits[:, -1], prompt, pos, Sampling(*sampling), filtered)[:, None]


def sample_decode(
    logits: torch.Tensor,
    input_pos: torch.Tensor,
    lengths: torch.Tensor,
    filtered: bool,
    eos_ids: torch.Tensor,
    prompt: torch.Tensor,
    *sampling: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (tokens [B, 1], input_pos [B], lengths [B]) of the next step: length 0 after an EOS."""
    pos = input_pos + lengths
    token = sample(logits[:, -1], prompt, pos, Sampling(*sampling), filtered)
    return token[:, None], pos, lengths * (token[:, None] != eos_ids).all(1)
