"""The MTP block computes docs/v4.md#mtp, drafts through its cache, and needs its parameters."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from model import ModelArgs, Transformer
from testing import random_model, random_tokens, rms, small


@functools.cache
def case(length: int = 200):
    """A model, tokens [2, length], next tokens, hidden, MTP's logits and hidden'; no cache."""
    model = random_model(small(swiglu_limit=1.5))
    tokens = random_tokens(2, length + 1)
    with torch.no_grad():
        _, hidden = model(tokens[:, :-1], return_hidden=True)
        return model, tokens[:, :-1], tokens[:, 1:], hidden, *model.mtp(hidden, tokens[:, 1:])


class PlainMTP:
    """docs/v4.md#mtp for one row in fp64, token by token, from the parameters of a model."""

    def __init__(self, model: Transformer):
        self.args = model.args
        self.parameters = {name: p.double() for name, p in model.state_dict().items()}
        self.keys = []  # of all tokens so far, [D] each

    def __call__(self, hidden: torch.Tensor, next_tokens: torch.Tensor):
        """hidden [S, n, d], next_tokens [S] -> logits [S, V], streams [S, n, d]"""
        logits, streams = [], []
        for t, (h, token) in enumerate(zip(hidden.double(), next_tokens, strict=True)):
            embedded = self.norm(self.parameters["embed.weight"][token], self.of("enorm.weight"))
            x = self.of("e_proj.weight") @ embedded
            x = x + self.norm(h, self.of("hnorm.weight")) @ self.of("h_proj.weight").T
            x = self.sublayer(x, "attn", lambda y, t=t: self.attention(y, t))
            x = self.sublayer(x, "ffn", self.experts)
            (pre,) = self.mix(x, "hc_head", (self.args.hc_mult,))
            y = self.norm((pre.sigmoid() + self.args.hc_eps) @ x, self.of("norm.weight"))
            logits.append(self.parameters["head.weight"] @ y)
            streams.append(x)
        return torch.stack(logits), torch.stack(streams)

    def of(self, name: str) -> torch.Tensor:
        return self.parameters["mtp.0." + name]

    def norm(self, x, weight=1.0):
        return x / (x.square().mean(-1, keepdim=True) + self.args.norm_eps).sqrt() * weight

    def rope(self, x, t: int, sign: int = 1):
        r = self.args.rope_head_dim
        freqs = 10000.0 ** (-torch.arange(0, r, 2).double() / r)
        z = torch.view_as_complex(x[..., -r:].reshape(*x.shape[:-1], r // 2, 2))
        turned = torch.view_as_real(z * torch.exp(1j * sign * t * freqs)).flatten(-2)
        return torch.cat((x[..., :-r], turned), -1)

    def mix(self, x, site: str, sizes):
        """The logits of pre, post and comb (or of pre alone) from the streams x [n, d]."""
        z = self.norm(x.flatten()) @ self.of(f"{site}_fn").T
        parts = zip(z.split(sizes), self.of(f"{site}_base").split(sizes), strict=True)
        scales = self.of(f"{site}_scale")
        return [part * scales[i] + base for i, (part, base) in enumerate(parts)]

    def sublayer(self, x, kind: str, inner):
        """hc_pre, norm, attention or experts, hc_post."""
        n, eps = self.args.hc_mult, self.args.hc_eps
        pre, post, comb = self.mix(x, f"hc_{kind}", (n, n, n * n))
        c = comb.view(n, n).softmax(1) + eps
        for i in range(2 * self.args.hc_sinkhorn_iters - 1):
            c = c / (c.sum(i % 2, keepdim=True) + eps)
        out = inner(self.norm((pre.sigmoid() + eps) @ x, self.of(f"{kind}_norm.weight")))
        return 2 * post.sigmoid()[:, None] * out + c.T @ x

    def attention(self, x, t: int):
        H, D = self.args.n_heads, self.args.head_dim
        groups = self.args.o_groups
        low = self.norm(self.of("attn.wq_a.weight") @ x, self.of("attn.q_norm.weight"))
        q = self.norm((low @ self.of("attn.wq_b.weight").T).view(H, D))
        key = self.norm(self.of("attn.wkv.weight") @ x, self.of("attn.kv_norm.weight"))
        self.keys.append(self.rope(key, t))
        window = torch.stack(self.keys[-self.args.window_size :])
        scores = self.rope(q, t) @ window.T * D**-0.5
        weights = torch.cat((scores, self.of("attn.attn_sink")[:, None]), 1).softmax(1)[:, :-1]
        o = self.rope(weights @ window, t, -1).reshape(groups, -1)
        wo_a = self.of("attn.wo_a.weight").view(groups, -1, o.shape[1])
        return self.of("attn.wo_b.weight") @ (wo_a @ o[..., None]).flatten()

    def expert(self, x, w1, w2, w3):
        limit = self.args.swiglu_limit
        return w2 @ (F.silu((w1 @ x).clamp(max=limit)) * (w3 @ x).clamp(-limit, limit))

    def experts(self, x):
        score = F.softplus(self.of("ffn.gate.weight") @ x).sqrt()
        biased = score + self.of("ffn.gate.bias")
        chosen = biased.topk(self.args.n_activated_experts).indices
        y = self.expert(x, *(self.of(f"ffn.shared_experts.w{i}.weight") for i in (1, 2, 3)))
        for e in chosen:
            w1, w3 = self.of("ffn.experts.w13")[e].chunk(2)
            weight = self.args.route_scale * score[e] / score[chosen].sum()
            y = y + weight * self.expert(x, w1, self.of("ffn.experts.w2")[e], w3)
        return y


def test_mtp_equals_a_plain_recomputation():
    model, _, next_tokens, hidden, logits, streams = case()
    expected, expected_streams = PlainMTP(model)(hidden[0], next_tokens[0])
    assert rms(logits[0], expected) <= 1e-5
    assert rms(streams[0], expected_streams) <= 1e-5


MTP_PARAMETERS = [
    name for name, _ in Transformer(ModelArgs.debug()).named_parameters() if name.startswith("mtp.")
]


@pytest.mark.parametrize("name", MTP_PARAMETERS)
@torch.no_grad()
def test_no_mtp_parameter_can_be_lost(name):
    model, _, next_tokens, hidden, logits, _ = case()
    p = model.get_parameter(name)
    kept = p.clone()
    p.copy_(p.flip(0) if "norm" in name else torch.zeros_like(p))
    moved = rms(model.mtp(hidden, next_tokens)[0], logits)
    p.copy_(kept)
    assert moved > 1e-4


@pytest.mark.parametrize("chunk", (1, 7, 64))
@torch.no_grad()
def test_mtp_prefill_equals_decode(chunk):
    """In chunks and token by token, after the backbone's own cached forward."""
    model, tokens, next_tokens, _, expected, _ = case()
    model.setup_caches(2, 256)
    out = []
    for p in range(0, 200, chunk):
        pos = torch.full((2,), p)
        lengths = torch.full((2,), min(chunk, 200 - p))
        padding = (0, max(0, p + chunk - 200))
        new = F.pad(tokens[:, p : p + chunk], padding, value=-1)
        after = F.pad(next_tokens[:, p : p + chunk], padding, value=-1)
        _, hidden = model(new, pos, lengths, logits=None, return_hidden=True)
        out.append(model.mtp(hidden, after, pos, lengths)[0][:, : lengths[0]])
    assert rms(torch.cat(out, 1), expected) <= 1e-5


@torch.no_grad()
def test_provisional_drafts_leave_no_trace():
    """Three drafts from hidden', then the accepted positions again with the true hidden.

    As if nothing had been drafted.
    """
    model, tokens, next_tokens, hidden, expected, _ = case()
    model.setup_caches(2, 256)
    model.mtp(hidden[:, :130], next_tokens[:, :130], torch.zeros(2, dtype=torch.int64))
    for p in (130, 133, 134):
        pos = torch.full((2,), p)
        _, h = model.mtp(hidden[:, p : p + 1], next_tokens[:, p : p + 1], pos)
        for draft in range(1, 4):
            _, h = model.mtp(h, next_tokens[:, 5:6], pos + draft)
        accepted = model.mtp(hidden[:, p : p + 4], next_tokens[:, p : p + 4], pos)[0]
        assert rms(accepted, expected[:, p : p + 4]) <= 1e-5


@torch.no_grad()
def test_mtp_drafts_from_its_own_streams():
    """hidden' goes back in as hidden; logits of the last position only, or none."""
    model, _, next_tokens, hidden, logits, streams = case()
    again = model.mtp(streams, next_tokens.roll(-1, 1))[0]
    assert again.shape == logits.shape and rms(again, logits) > 0.1
    assert rms(model.mtp(hidden, next_tokens, logits="last")[0], logits[:, -1:]) <= 1e-6
    assert model.mtp(hidden, next_tokens, logits=None)[0] is None


def test_a_model_without_mtp_says_so():
    model = Transformer(small(n_mtp_layers=0, compress_ratios=(0, 4, 128, 4)))
    with pytest.raises(ValueError, match="no MTP block"):
        model.mtp(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, dtype=torch.int64))
