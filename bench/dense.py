"""The yardstick of the embedded model: a dense transformer of equal active size, same loop.

    python -m bench.dense          trains for as many tokens as the embedded model and records
                                   bench/results/dense.json

Pre-norm blocks of rotary multi-head attention and SwiGLU, no biases. "Active size" counts the
parameters that one token multiplies with: everything but the embedding, and of the routed experts
the chosen ones. The MTP block is left out.
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
from train_step import train
from training.dataset import HELD_OUT, Data, Rows, prepare, read_text
from training.evaluation import held_out_loss
from training.flags import ROOT
from training.optim import Optimizer
from training.stages import learning_rate


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, inter: int):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ffn_norm = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1 = nn.Linear(dim, inter, bias=False)
        self.w3 = nn.Linear(dim, inter, bias=False)
        self.w2 = nn.Linear(inter, dim, bias=False)

    def forward(self, x, cos, sin, mask):
        """x [B, S, d], cos and sin [B, S, D / 2], mask [B, 1, S, S] -> [B, S, d]."""
        h = self.attn_norm(x)
        q, k, v = (w(h).unflatten(-1, (self.heads, -1)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin, False), rotate(k, cos, sin, False)  # [B, S, H, D]
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

    def forward(self, tokens, doc_ids):
        """tokens, doc_ids [B, S] -> logits [B, S, V]."""
        B, S = tokens.shape
        position = torch.arange(S, device=tokens.device)
        angle = (position[:, None] * self.freqs).expand(B, -1, -1)
        causal = position[:, None] >= position
        mask = (doc_ids[:, :, None] == doc_ids[:, None]) & causal
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin(), mask[:, None])
        return self.head(self.norm(x))


def dense_loss(model, tokens, targets, doc_ids):
    """As training.losses.training_loss, of next tokens alone."""
    logits = model(tokens, doc_ids).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.labels.flatten(), ignore_index=-1)
    return loss, {"loss": loss.detach()}


def active_parameters(model: Transformer) -> int:
    """Parameters that one token multiplies with."""
    share = model.args.n_activated_experts / model.args.n_routed_experts
    sizes = [
        p.numel() * (share if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if not name.startswith(("embed.", "mtp."))
    ]
    return round(sum(sizes))


def equal_inter(args: ModelArgs, multiple: int = 8) -> int:
    """Hidden width of the dense MLPs: no smaller than the model of args in active parameters."""
    with torch.device("meta"):
        active = active_parameters(Transformer(args))
    rest = args.vocab_size * args.dim + args.dim * (1 + args.n_layers * (2 + 4 * args.dim))
    return -(-(active - rest) // (3 * args.dim * args.n_layers * multiple)) * multiple


def embedded_data(vocab_size: int = 0) -> Data:
    """The embedded text in the embedded model's tokens."""
    text = read_text([str(ROOT / "data" / "shakespeare.txt")])
    return prepare(text, ROOT / ".cache", vocab_size, str(ROOT / "assets" / "tiny"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def log(metrics: dict) -> None:
    print(json.dumps(metrics), flush=True)


def main(argv: list[str] | None = None) -> int:
    flags = parse(argv)
    threads = choose_threads(1 << 28)
    args = ModelArgs.tiny()
    inter = equal_inter(args)
    torch.manual_seed(flags.seed)
    model = Dense(args.vocab_size, args.dim, args.n_layers, args.n_heads, inter)
    size = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed."))
    print(f"dense model: {size:,} active parameters (inter {inter})", flush=True)
    data = embedded_data(args.vocab_size)
    step = compile_train_step(model, Optimizer(model), CompileConfig(region="model"), dense_loss)
    begun = time.perf_counter()
    train(
        step,
        Rows(data.train, flags.seq_len, args.bos_id, flags.seed),
        torch.device("cpu"),
        steps=flags.steps,
        batch=flags.batch,
        rate=lambda i: learning_rate(i, flags.steps, flags.lr),
        log=log,
    )
    minutes = (time.perf_counter() - begun) / 60
    loss = held_out_loss(model, data.held_out, flags.seq_len, flags.batch, args.bos_id, dense_loss)
    result = {
        **vars(flags),
        "command": "python -m bench.dense",
        "active_parameters": size,
        "minutes": minutes,
        "threads": threads,
        "tokens": flags.steps * flags.batch * flags.seq_len,
        "held_out_share": HELD_OUT,
        "held_out_nats_per_token": loss,
        "held_out_nats_per_char": loss * len(data.held_out) / data.held_out_chars,
    }
    record("dense", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
