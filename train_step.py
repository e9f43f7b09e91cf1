"""Train a DeepSeek-V4 on plain text, on whatever device there is: `python train_step.py` trains the debug model briefly.

    text -> tokens (documents joined by BOS) -> rows at random offsets -> one compiled step: loss, gradients, update

The loss is next-token cross-entropy plus 0.3 times that of the MTP block on the token after next. Matrices follow Muon,
everything else AdamW; experts are balanced by nudging the routers' biases, without an auxiliary loss (spec 12). Rows are
drawn from a generator seeded by the step's number, so a resumed run sees the rows it would have seen.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import cli
from checkpoint import save
from compile_config import PRESETS, choose_threads, compile_train_step, peak_memory
from model import Gate, Linear, ModelArgs, Transformer, training_loss
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent
HELD_OUT = 0.05  # the tail of the text that is never trained on


# ---------------------------------------------------------------------------------------------------------------------
# Data


def split(text: str) -> tuple[str, str]:
    """The text to train on, and its held-out tail (cut at a line)."""
    cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
    return text[:cut], text[cut:]


def train_tokenizer(text: str, folder: Path, vocab_size: int) -> Path:
    """Fit a byte-pair vocabulary with sentencepiece; every text survives encoding and decoding. -> tokenizer.model"""
    import sentencepiece
    from tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=vocab_size, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, bos_id=0, eos_id=1, unk_id=2, bos_piece=BOS,
        eos_piece=EOS, user_defined_symbols=[USER, ASSISTANT, THINK, END_THINK], max_sentence_length=1 << 20,
        num_threads=1, minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def tokenize(text: str, encode) -> np.ndarray:
    """Token ids of a text. Documents are set apart by four newlines or more; encode(text, bos=True) begins each with BOS."""
    documents = (document.strip("\n") for document in text.split("\n\n\n\n"))
    parts = [np.array(encode(document + "\n", bos=True), dtype=np.uint32) for document in documents if document]
    return np.concatenate([np.empty(0, np.uint32), *parts])


def encode_bytes(text: str, bos: bool = False) -> list[int]:
    """Text as bytes: what models with a vocabulary too small for sentencepiece read. BOS is 0."""
    return [0] * bos + list(text.encode())


def rows(ids: np.ndarray, step: int, batch: int, length: int, seed: int, bos: int):
    """The rows of one step -> tokens, targets, doc_ids [B, S] int64. A BOS starts a document."""
    start = np.random.default_rng((seed, step)).integers(0, len(ids) - length, batch)
    window = torch.from_numpy(ids[start[:, None] + np.arange(length + 1)].astype(np.int64))
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return tokens, targets, (tokens == bos).cumsum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and optimizer


def count_load(model: Transformer) -> None:
    """Give every score-routed gate a buffer `load` [E] that counts the tokens it sends to each expert while training."""
    def count(gate, inputs, output):
        if gate.training:
            gate.load.add_((output[0].flatten()[None] == torch.arange(len(gate.load), device=gate.load.device)[:, None]).sum(1))

    for module in model.modules():
        if isinstance(module, Gate) and hasattr(module, "bias"):
            module.register_buffer("load", torch.zeros_like(module.bias), persistent=False)
            module.register_forward_hook(count)


HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def orthogonalize(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Push the singular values of matrices [..., a, b] towards 1 by Newton-Schulz steps (spec 12)."""
    x = m.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-12).to(dtype)
    for a, b, c in HYBRID:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x if wide else x.mT


class Optimizer:
    """Muon for matrices (experts and groups one by one), AdamW for embedding, head and everything else (spec 12).

    Parameters below fp32 are updated through fp32 masters. Router biases follow the load counted by `count_load`.
    """

    def __init__(self, model: torch.nn.Module, betas=(0.9, 0.95), eps: float = 1e-20, decay: float = 0.1, momentum: float = 0.95,
                 bias_rate: float = 1e-3):
        self.betas, self.eps, self.decay, self.momentum, self.bias_rate = betas, eps, decay, momentum, bias_rate
        groups = {m.weight: m.groups for m in model.modules() if isinstance(m, Linear)}
        self.gates = [m for m in model.modules() if isinstance(m, Gate) and hasattr(m, "load")]
        self.muon, self.adam, self.count = [], [], torch.zeros(())
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            matrix = p.dim() > 1 and not name.startswith(("embed.", "head.")) and not name.endswith("ape")
            blocks = 2 if name.endswith("w13") else groups.get(p, 1)  # W1 and W3, or the groups of wo_a
            (self.muon if matrix else self.adam).append((name, p, blocks))
            moments = ("first",) if matrix else ("first", "second")
            self.state[name] = {key: torch.zeros_like(p, dtype=torch.float32) for key in moments}
            if p.dtype != torch.float32:
                self.state[name]["master"] = p.detach().float()

    @torch.no_grad()
    def step(self, lr: torch.Tensor) -> None:
        """One update from the gradients, which are then freed. lr is a 0-D tensor."""
        self.count += 1
        for name, p, blocks in self.muon:
            if p.grad is None:  # the indexer, which the language-model loss does not reach
                continue
            state, g = self.state[name], p.grad.float()
            state["first"].mul_(self.momentum).add_(g)
            m = (g + self.momentum * state["first"]).unflatten(-2, (blocks, -1))
            u = orthogonalize(m, torch.bfloat16).float() * (0.18 * max(m.shape[-2:]) ** 0.5)
            self._update(p, state, u.flatten(-3, -2), lr, self.decay)
        b1, b2 = self.betas
        for name, p, _ in self.adam:
            if p.grad is None:
                continue
            state, g = self.state[name], p.grad.float()
            state["first"].lerp_(g, 1 - b1)
            state["second"].lerp_(g.square(), 1 - b2)
            u = state["first"] / (1 - b1**self.count) / ((state["second"] / (1 - b2**self.count)).sqrt() + self.eps)
            self._update(p, state, u, lr, self.decay if p.dim() > 1 else 0.0)
        for gate in self.gates:
            gate.bias += self.bias_rate * (gate.load.mean() - gate.load).sign()
            gate.load.zero_()

    def _update(self, p, state, u, lr, decay):
        weight = state.get("master", p)
        weight.mul_(1 - lr * decay).sub_(lr * u)
        if weight is not p:
            p.copy_(weight)
        p.grad = None

    def state_dict(self) -> dict:
        return {"count": self.count, "state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        self.count.copy_(saved["count"])
        for name, state in self.state.items():
            for key, tensor in state.items():
                tensor.copy_(saved["state"][name][key])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, constant, then a cosine over the last half to a tenth of the peak."""
    warm, done = max(1, steps // 20), step / max(1, steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1))))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, ids: np.ndarray, length: int, batch: int, bos: int, loss=training_loss) -> float:
    """Nats per token over consecutive rows; a token sees at most the length - 1 tokens before it."""
    device, total, count = next(model.parameters()).device, 0.0, len(ids) // (length + 1)
    grid = torch.from_numpy(ids[: count * (length + 1)].astype(np.int64)).view(count, -1).to(device)
    model.eval()
    for part in grid.split(batch):
        tokens, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        total += float(loss(model, tokens, targets, (tokens == bos).cumsum(1))[1]) * len(part)
    model.train()
    return total / count


def train(model: torch.nn.Module, step, ids: np.ndarray, *, steps: int, batch: int, length: int, lr: float, seed: int, bos: int,
          first: int = 0, every: int = 10, after=lambda step: None, log=print) -> float:
    """Run `step` (see compile_train_step) from number `first` to `steps` -> seconds, compiling included.

    after(i) is called when i steps are done; log gets a dict every `every` steps.
    """
    device, begun, warm = next(model.parameters()).device, time.perf_counter(), 0.0
    model.train()
    for i in range(first, steps):
        rate = learning_rate(i, steps, lr)
        metrics = step(*(t.to(device) for t in rows(ids, i, batch, length, seed, bos)), torch.tensor(rate, device=device))
        if i == first or i == steps - 1 or i % every == every - 1:
            metrics = {key: value.item() for key, value in metrics.items()}
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {i + 1}: choose a lower --lr")
            done, seconds = i - first, time.perf_counter() - warm
            log({"step": i + 1, **metrics, "lr": rate, "tok_per_s": done * batch * length / seconds if done else None,
                 "minutes_left": seconds / done * (steps - 1 - i) / 60 if done else None})
        if i == first:
            warm = time.perf_counter()  # the first step compiled
        after(i + 1)
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description="Train a DeepSeek-V4 on plain text.", allow_abbrev=False)
    add = parser.add_argument
    add("--config", default="debug", metavar="NAME|FILE", help="debug, tiny, or a config.json")
    add("--data", default=str(ROOT / "data" / "shakespeare.txt"), metavar="FILE", help="UTF-8 text")
    add("--steps", type=int, default=40)
    add("--batch", type=int, default=4, help="rows per step")
    add("--seq-len", type=int, default=128, help="tokens per row")
    add("--lr", type=float, default=6e-3, help="peak learning rate")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"))
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights; masters are fp32")
    add("--compile", choices=PRESETS, default="regional", metavar="PRESET", help=", ".join(PRESETS))
    add("--out", metavar="DIR", help="save the model and its tokenizer here, in the released layout")
    add("--experts", choices=("bf16", "fp8", "fp4"), default="bf16", help="how --out stores experts")
    add("--linears", choices=("bf16", "fp8"), default="bf16", help="how --out stores the linears that releases quantise")
    add("--state", metavar="FILE", help="keep weights and optimizer here every few minutes, and go on from there if it exists")
    add("--json", action="store_true", help="the last line of standard output is one JSON object; progress on standard error")
    flags = parser.parse_args(argv)
    for name in ("steps", "batch", "seq_len"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)}: at least 1")
    if flags.seed < 0:
        raise ValueError(f"--seed {flags.seed}: choose 0 or more")
    for name in ("out", "state"):
        path = Path(getattr(flags, name) or ".")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {path.absolute().parent}")
    if not 0 < flags.lr < float("inf"):
        raise ValueError(f"--lr {flags.lr}: choose a positive rate")
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available here; use cpu")
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if PRESETS[flags.compile].cudagraphs:
        raise ValueError(f"--compile {flags.compile}: CUDA graphs are for generation; choose default or regional")
    return flags


def read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    if not text.strip():
        raise ValueError(f"{path}: holds no text")
    return text


def run(argv: list[str] | None) -> None:
    flags = parse(argv)
    say = lambda message: print(message, file=sys.stderr if flags.json else sys.stdout, flush=True)
    named = {"debug": ModelArgs.debug, "tiny": ModelArgs.tiny}
    args = named[flags.config]() if flags.config in named else ModelArgs.from_json(flags.config)
    args.act_quant = False  # weights are trained with plain activations
    parts = split(read_text(flags.data))
    with tempfile.TemporaryDirectory() as folder:
        if args.vocab_size < 256:
            raise ValueError(f"{flags.config}: a vocabulary of {args.vocab_size} cannot hold the 256 bytes")
        if args.vocab_size < 512:
            encode, folder = encode_bytes, None
        else:
            try:
                train_tokenizer(parts[0], Path(folder), args.vocab_size)
            except RuntimeError:  # sentencepiece's only complaint about its input
                raise ValueError(f"{flags.data}: is too short a text for a vocabulary of {args.vocab_size}") from None
            encode = load_tokenizer(folder).encode
        ids, held_out = (tokenize(part, encode) for part in parts)
        for part, what in ((ids, "to train on"), (held_out, "held out")):
            if len(part) <= flags.seq_len + 1:
                raise ValueError(f"{flags.data}: {len(part)} tokens {what} are fewer than --seq-len {flags.seq_len} + 2")
        torch.manual_seed(flags.seed)
        torch.set_default_dtype(getattr(torch, flags.dtype))
        try:
            with torch.device(flags.device):
                model = Transformer(args)
        finally:
            torch.set_default_dtype(torch.float32)
        threads = choose_threads(1 << 28)  # training is compute-bound: every core helps
        count_load(model)
        optimizer, first, saved = Optimizer(model), 0, time.monotonic()
        if flags.state and os.path.exists(flags.state):
            try:
                state = torch.load(flags.state, map_location=flags.device)
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                first = state["step"]
            except Exception:  # a torn or foreign file fails in as many ways
                raise ValueError(f"{flags.state}: is not the state of a run with this --config; remove it or name another") from None
            if first >= flags.steps:
                raise ValueError(f"{flags.state}: is already at step {first}; ask for more --steps")
            say(f"going on from step {first} of {flags.state}")

        def after(step):
            nonlocal saved
            if flags.state and (step == flags.steps or time.monotonic() - saved > 240):
                saved, temporary = time.monotonic(), f"{flags.state}.tmp"
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
                os.replace(temporary, flags.state)

        def log(metrics):
            nonlocal last
            last = metrics
            say("  ".join(f"{key} {value:.4g}" for key, value in metrics.items() if value is not None))

        last: dict = {}
        seconds = train(model, compile_train_step(model, optimizer, PRESETS[flags.compile]), ids, steps=flags.steps,
                        batch=flags.batch, length=flags.seq_len, lr=flags.lr, seed=flags.seed, bos=args.bos_id, first=first,
                        after=after, log=log)
        seen = (flags.steps - first) * flags.batch * flags.seq_len
        scored = held_out[: max(seen, flags.seq_len + 1)]  # short runs are judged on as much text as they read
        loss = held_out_loss(model, scored, flags.seq_len, flags.batch, args.bos_id)
        report = {"steps": flags.steps, "tokens": seen, "seconds": seconds,
                  "loss": last.get("loss"), "mtp_loss": last.get("mtp_loss"), "held_out_loss": loss,
                  "held_out_nats_per_char": loss * len(held_out) / len(parts[1]), "tok_per_s": last.get("tok_per_s"),
                  "memory_bytes": peak_memory(torch.device(flags.device)), "threads": threads, "device": flags.device,
                  "torch": torch.__version__}
        say(f"held out: {loss:.3f} nats per token, {report['held_out_nats_per_char']:.3f} per character; "
            f"peak memory {report['memory_bytes'] / 2**20:,.0f} MiB")
        if flags.out:
            save(model, flags.out, experts=flags.experts, linears=flags.linears, tokenizer=folder)
            say(f"saved {flags.out}")
    if flags.json:
        print(json.dumps(report))


def main(argv: list[str] | None = None) -> int:
    return cli.main("train_step.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
