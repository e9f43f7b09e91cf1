"""The MTP block computes spec section 10, drafts through its cache, and needs every one of its parameters."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from model import ModelArgs, Transformer
from testing import randomize, rms, small


@functools.cache
def case(length: int = 200):
    """A model, tokens [2, length], next tokens, hidden streams, and MTP's logits and streams without a cache."""
    model = randomize(Transformer(small(swiglu_limit=1.5)), seed=1)
    tokens = torch.randint(0, 256, (2, length + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, hidden = model(tokens[:, :-1], return_hidden=True)
        return model, tokens[:, :-1], tokens[:, 1:], hidden, *model.mtp(hidden, tokens[:, 1:])


def recomputed(model: Transformer, hidden: torch.Tensor, next_tokens: torch.Tensor):
    """Spec section 10 for one row in fp64, token by token: hidden [S, 4, d], next_tokens [S] -> logits, streams."""
    args, p = model.args, {k: v.double() for k, v in model.state_dict().items()}
    n, d, H, D, r, g = (
        args.hc_mult,
        args.dim,
        args.n_heads,
        args.head_dim,
        args.rope_head_dim,
        args.o_groups,
    )
    m = lambda name: p["mtp.0." + name]
    norm = lambda x, w=1.0: x / (x.square().mean(-1, keepdim=True) + args.norm_eps).sqrt() * w
    freqs = 10000.0 ** (-torch.arange(0, r, 2).double() / r)

    def rope(x, t, sign=1):
        z = torch.view_as_complex(x[..., -r:].reshape(*x.shape[:-1], r // 2, 2)) * torch.exp(
            1j * sign * t * freqs
        )
        return torch.cat((x[..., :-r], torch.view_as_real(z).flatten(-2)), -1)

    def mix(x, fn, base, scale, parts):
        z = norm(x.flatten()) @ m(fn).T
        b, s = m(base), m(scale)
        return [
            part * s[i] + b[o : o + len(part)]
            for i, (part, o) in enumerate(zip(z.split(parts), (0, n, 2 * n)))
        ]

    def site(x, kind, inner):  # one sub-layer between hc_pre and hc_post
        pre, post, comb = mix(
            x, f"hc_{kind}_fn", f"hc_{kind}_base", f"hc_{kind}_scale", (n, n, n * n)
        )
        c = comb.view(n, n).softmax(1) + args.hc_eps
        for i in range(2 * args.hc_sinkhorn_iters - 1):
            c = c / (c.sum(i % 2, keepdim=True) + args.hc_eps)
        out = inner(norm((pre.sigmoid() + args.hc_eps) @ x, m(f"{kind}_norm.weight")))
        return 2 * post.sigmoid()[:, None] * out + c.T @ x

    keys = []

    def attention(x, t):
        q = norm(
            (
                norm(m("attn.wq_a.weight") @ x, m("attn.q_norm.weight")) @ m("attn.wq_b.weight").T
            ).view(H, D)
        )
        keys.append(rope(norm(m("attn.wkv.weight") @ x, m("attn.kv_norm.weight")), t))
        window = torch.stack(keys[-args.window_size :])
        s = torch.cat((rope(q, t) @ window.T * D**-0.5, m("attn.attn_sink")[:, None]), 1).softmax(
            1
        )[:, :-1]
        o = rope(s @ window, t, -1).reshape(g, -1)
        return (
            m("attn.wo_b.weight")
            @ (m("attn.wo_a.weight").view(g, -1, o.shape[1]) @ o[..., None]).flatten()
        )

    def expert(x, w1, w2, w3):
        up = (w3 @ x).clamp(-args.swiglu_limit, args.swiglu_limit)
        return w2 @ (F.silu((w1 @ x).clamp(max=args.swiglu_limit)) * up)

    def moe(x):
        score = F.softplus(m("ffn.gate.weight") @ x).sqrt()
        chosen = (score + m("ffn.gate.bias")).topk(args.n_activated_experts).indices
        y = expert(x, *(m(f"ffn.shared_experts.w{i}.weight") for i in (1, 2, 3)))
        for e in chosen:
            w1, w3 = m("ffn.experts.w13")[e].chunk(2)
            y = y + args.route_scale * score[e] / score[chosen].sum() * expert(
                x, w1, m("ffn.experts.w2")[e], w3
            )
        return y

    logits, streams = [], []
    for t, (h, token) in enumerate(zip(hidden.double(), next_tokens)):
        x = (
            m("e_proj.weight") @ norm(p["embed.weight"][token], m("enorm.weight"))
            + norm(h, m("hnorm.weight")) @ m("h_proj.weight").T
        )
        x = site(site(x, "attn", lambda y: attention(y, t)), "ffn", moe)
        (pre,) = mix(x, "hc_head_fn", "hc_head_base", "hc_head_scale", (n,))
        logits.append(p["head.weight"] @ norm((pre.sigmoid() + args.hc_eps) @ x, m("norm.weight")))
        streams.append(x)
    return torch.stack(logits), torch.stack(streams)


def test_mtp_equals_a_plain_recomputation():
    model, _, nexts, hidden, logits, streams = case()
    expected, expected_streams = recomputed(model, hidden[0], nexts[0])
    assert rms(logits[0], expected) <= 1e-5
    assert rms(streams[0], expected_streams) <= 1e-5


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, _ in Transformer(ModelArgs.debug()).named_parameters()
        if name.startswith("mtp.")
    ],
)
def test_no_mtp_parameter_can_be_lost(name):
    model, _, nexts, hidden, logits, _ = case()
    p = model.get_parameter(name)
    with torch.no_grad():
        kept = p.clone()
        p.copy_(p.flip(0) if "norm" in name else torch.zeros_like(p))
        moved = rms(model.mtp(hidden, nexts)[0], logits)
        p.copy_(kept)
    assert moved > 1e-4


@pytest.mark.parametrize("chunk", (1, 7, 64))
def test_mtp_prefill_equals_decode(chunk):
    """In chunks and token by token, after the backbone's own cached forward."""
    model, tokens, nexts, _, expected, _ = case()
    model.setup_caches(2, 256)
    out = []
    with torch.no_grad():
        for p in range(0, 200, chunk):
            pos, lengths = torch.full((2,), p), torch.full((2,), min(chunk, 200 - p))
            fed, following = (
                F.pad(t[:, p : p + chunk], (0, max(0, p + chunk - 200)), value=-1)
                for t in (tokens, nexts)
            )
            _, hidden = model(fed, pos, lengths, logits=None, return_hidden=True)
            out.append(model.mtp(hidden, following, pos, lengths)[0][:, : lengths[0]])
    assert rms(torch.cat(out, 1), expected) <= 1e-5


@torch.no_grad()
def test_provisional_drafts_leave_no_trace():
    """Three drafts from hidden', then the accepted positions again with the true hidden: as if nothing had been drafted."""
    model, tokens, nexts, hidden, expected, _ = case()
    model.setup_caches(2, 256)
    model.mtp(hidden[:, :130], nexts[:, :130], torch.zeros(2, dtype=torch.int64))
    for p in (130, 133, 134):
        _, h = model.mtp(hidden[:, p : p + 1], nexts[:, p : p + 1], torch.full((2,), p))
        for draft in range(1, 4):
            _, h = model.mtp(h, nexts[:, 5:6], torch.full((2,), p + draft))
        accepted = model.mtp(hidden[:, p : p + 4], nexts[:, p : p + 4], torch.full((2,), p))[0]
        assert rms(accepted, expected[:, p : p + 4]) <= 1e-5


@torch.no_grad()
def test_mtp_drafts_from_its_own_streams():
    """hidden' goes back in as hidden; logits of the last position only, or none."""
    model, _, nexts, hidden, logits, streams = case()
    again = model.mtp(streams, nexts.roll(-1, 1))[0]
    assert again.shape == logits.shape and rms(again, logits) > 0.1
    assert rms(model.mtp(hidden, nexts, logits="last")[0], logits[:, -1:]) <= 1e-6
    assert model.mtp(hidden, nexts, logits=None)[0] is None


def test_a_model_without_mtp_says_so():
    model = Transformer(small(n_mtp_layers=0, compress_ratios=(0, 4, 128, 4)))
    with pytest.raises(ValueError, match="no MTP block"):
        model.mtp(torch.zeros(1, 1, 4, 64), torch.zeros(1, 1, dtype=torch.int64))
