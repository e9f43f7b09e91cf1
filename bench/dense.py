"""The yardstick of the embedded model: a plain dense transformer of equal active size, trained by the same loop.

    python -m bench.dense          trains for as many tokens as the embedded model and records bench/results/dense.json

Pre-norm blocks of rotary multi-head attention and SwiGLU, no biases. "Active size" counts the parameters that one token
multiplies with: everything but the embedding, and of the routed experts the chosen ones. The MTP block is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench.record import record
from compile_config import CompileConfig, compile_train_step
from model import ModelArgs, RMSNorm, Transformer
from ops.rope import reference as rotate
from tools.stats import choose_threads
from train_step import learning_rate, train
from training.dataset import HELD_OUT, Rows, prepare, read_text
from training.evaluation import held_out_loss
from training.flags import ROOT
from training.optim import Optimizer


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, inter: int):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ffn_norm = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3, self.w2 = (
            nn.Linear(*shape, bias=False) for shape in ((dim, inter), (dim, inter), (inter, dim))
        )

    def forward(self, x, cos, sin, mask):  # [B, S, d]
        h = self.attn_norm(x)
        q, k, v = (
            w(h).unflatten(-1, (self.heads, -1)) for w in (self.wq, self.wk, self.wv)
        )  # [B, S, H, D]
        q, k = rotate(q, cos, sin, False), rotate(k, cos, sin, False)
        o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        x = x + self.wo(o.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Dense(nn.Module):
    def __init__(self, vocab_size: int, dim: int, n_layers: int, heads: int, inter: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, inter) for _ in range(n_layers))
        self.norm, self.head = RMSNorm(dim, 1e-6), nn.Linear(dim, vocab_size, bias=False)
        self.mtp = ()
        D = dim // heads
        self.register_buffer("freqs", 10000.0 ** (-torch.arange(0, D, 2) / D), persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, doc_ids):  # [B, S] -> [B, S, V]
        B, S = tokens.shape
        at = torch.arange(S, device=tokens.device)
        angle = (at[:, None] * self.freqs).expand(B, -1, -1)
        mask = (doc_ids[:, :, None] == doc_ids[:, None]) & (at[:, None] >= at)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin(), mask[:, None])
        return self.head(self.norm(x))


def dense_loss(model, tokens, targets, doc_ids):
    loss = F.cross_entropy(
        model(tokens, doc_ids).flatten(0, 1), targets.next.flatten(), ignore_index=-1
    )
    return loss, {"loss": loss.detach()}


def active_parameters(model: Transformer) -> int:
    """Parameters that one token multiplies with."""
    share = model.args.n_activated_experts / model.args.n_routed_experts
    return round(
        sum(
            p.numel() * (share if ".experts." in name else 1)
            for name, p in model.named_parameters()
            if not name.startswith(("embed.", "mtp."))
        )
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    threads = choose_threads(1 << 28)
    args = ModelArgs.tiny()
    with torch.device("meta"):
        active = active_parameters(Transformer(args))
    fixed = args.vocab_size * args.dim + args.dim * (1 + args.n_layers * (2 + 4 * args.dim))
    inter = (
        -(-(active - fixed) // (3 * args.dim * args.n_layers * 8)) * 8
    )  # no smaller than the embedded model
    torch.manual_seed(flags.seed)
    model = Dense(args.vocab_size, args.dim, args.n_layers, args.n_heads, inter)
    size = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed."))
    print(
        f"embedded model: {active:,} active parameters; dense: {size:,} (inter {inter})", flush=True
    )
    data = prepare(
        read_text([str(ROOT / "data" / "shakespeare.txt")]),
        ROOT / ".cache",
        args.vocab_size,
        str(ROOT / "assets" / "tiny"),
    )
    step = compile_train_step(model, Optimizer(model), CompileConfig(region="model"), dense_loss)
    begun = time.perf_counter()
    train(
        step,
        Rows(data.train, flags.seq_len, args.bos_id, flags.seed),
        torch.device("cpu"),
        steps=flags.steps,
        batch=flags.batch,
        rate=lambda i: learning_rate(i, flags.steps, flags.lr),
        log=lambda metrics: print(json.dumps(metrics), flush=True),
    )
    minutes = (time.perf_counter() - begun) / 60
    loss = held_out_loss(model, data.held_out, flags.seq_len, flags.batch, args.bos_id, dense_loss)
    record(
        "dense",
        dict(
            vars(flags),
            command="python -m bench.dense",
            active_parameters=size,
            minutes=minutes,
            threads=threads,
            tokens=flags.steps * flags.batch * flags.seq_len,
            held_out_share=HELD_OUT,
            held_out_nats_per_token=loss,
            held_out_nats_per_char=loss * len(data.held_out) / data.held_out_chars,
        ),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
