"""Generate text with a DeepSeek-V4 from compiled graphs: `python generate.py` streams from the embedded model.

Prompts are fed in chunks of one size, the last one padded, so one graph serves every length; one more decodes. Sampling
is part of both graphs, and prompts of different lengths run as one ragged batch. Positions, lengths, temperature, top-k,
top-p and seed are tensors: nothing recompiles when they change.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from checkpoint import load
from compile_config import (
    PRESETS,
    CompileConfig,
    CompileCount,
    compile_decode,
    compile_prefill,
    usable_preset,
)
from model import ModelArgs, Transformer
from tokenizer import StreamDecoder, Tokenizer, encode_messages, load_tokenizer, parse_response
from tools import cli
from tools.stats import choose_threads, peak_memory, process_start, read_bandwidth, versions

ROOT = Path(__file__).parent
PROMPT = "KING RICHARD.\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n"
LONGEST = 8192  # default context of models that could hold more


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, inside the graph


class Sampling(NamedTuple):
    """How the next token is drawn: 0-D tensors on the model's device.

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
    def of(cls, temperature: float, top_k: int, top_p: float, seed: int, device) -> Sampling:
        return cls(
            *(
                torch.tensor(value, dtype=dtype, device=device)
                for value, dtype in zip(
                    (temperature, top_k, top_p, seed),
                    (torch.float32, torch.int64, torch.float32, torch.int64),
                )
            )
        )


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32-bit values held in int64; products stay below 2^63."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def gumbel(seed: torch.Tensor, pos: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise [B, V]: a function of the seed, the row and the position alone, whatever was drawn before."""
    row = torch.arange(len(pos), device=pos.device)
    h = _mix(_mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) ^ row)
    h = _mix(_mix(h ^ pos)[:, None] ^ torch.arange(vocab_size, device=pos.device))
    uniform = ((h >> 9).float() + 0.5) * 2.0**-23  # in (0, 1), exactly
    return -(-uniform.log()).log()


def sample(logits: torch.Tensor, pos: torch.Tensor, how: Sampling, filtered: bool) -> torch.Tensor:
    """logits [B, V], position of the new token [B] -> token [B]. `filtered` (static) is whether top-k or top-p applies.

    The largest of logits / temperature plus Gumbel noise is a draw from their softmax.
    """
    noise = gumbel(how.seed, pos, logits.shape[-1])
    if not filtered:
        return (logits + how.temperature * noise).argmax(-1)
    score, order = logits.sort(dim=-1, descending=True, stable=True)
    p = (score / how.temperature.clamp(min=1e-6)).softmax(-1)
    keep = (torch.arange(score.shape[-1], device=p.device) < how.top_k) & (
        p.cumsum(-1) - p < how.top_p
    )
    score = (score + how.temperature * noise.gather(-1, order)).masked_fill(~keep, float("-inf"))
    return order.gather(-1, score.argmax(-1, keepdim=True))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


class Generator:
    """A model with its caches and compiled phases.

    chunk    tokens of a prompt fed per call
    burst    decode steps between two reads by the host
    Rows remember what they were fed: a prompt that continues it feeds only what is new.
    """

    def __init__(
        self,
        model: Transformer,
        cfg: CompileConfig,
        batch: int,
        max_seq_len: int,
        filtered: bool = False,
        eos: int | None = None,
        say: Callable[[str], None] = lambda message: None,
    ):
        self.model, self.cfg, self.max_seq_len, self.say = model, cfg, max_seq_len, say
        self.device = model.embed.weight.device
        gpu = self.device.type == "cuda"
        self.chunk, self.burst = min(max_seq_len, 2048 if gpu else 256), 8 if gpu else 1
        model.eval().setup_caches(batch, max_seq_len, max_rewind=8 + self.burst - 1)
        self.fed: list[list[int]] = [[] for _ in range(batch)]
        self.high = [0] * batch  # the furthest position each row was fed since it last started at 0
        self.compile_s, self.count, self._warm = 0.0, CompileCount(), set()
        eos = -1 if eos is None else eos

        def first(logits, input_pos, lengths, *how):
            return sample(logits[:, -1], input_pos + lengths, Sampling(*how), filtered)

        def following(logits, input_pos, lengths, *how):
            pos = input_pos + lengths
            token = sample(logits[:, -1], pos, Sampling(*how), filtered)
            return token[:, None], pos, lengths * (token != eos)

        self.prefill, self.decode = (
            compile_prefill(model, cfg, first),
            compile_decode(model, cfg, following),
        )

    def warm(self, phase, width: int, how: Sampling) -> None:
        """Compile a phase by a call that feeds nothing; once."""
        if self.cfg.backend is None or phase.name in self._warm:
            return
        self.say(f" compiling {phase.name} ...")
        start, zeros = (
            time.perf_counter(),
            torch.zeros(len(self.fed), dtype=torch.int64, device=self.device),
        )
        phase(zeros[:, None].repeat(1, width), zeros, zeros, *how)
        self._sync()
        self.compile_s += time.perf_counter() - start
        self._warm.add(phase.name)
        self.say("")
        if phase is self.decode:
            self.count.warm()

    def _sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _feed(self, prompts: list[list[int]], how: Sampling) -> torch.Tensor:
        """Bring every row to the end of its prompt -> the token sampled after it [B]."""
        start, rewind = [], self.model.cache_size[2]
        for row, (fed, prompt) in enumerate(zip(self.fed, prompts)):
            same = next(
                (i for i, (a, b) in enumerate(zip(fed, prompt)) if a != b),
                min(len(fed), len(prompt)),
            )
            same = min(same, len(prompt) - 1)  # the last token is fed again for its logits
            start.append(same if self.high[row] - same <= rewind else 0)
            self.high[row] = max(self.high[row] if start[-1] else 0, len(prompt))
        self.fed_tokens = sum(len(p) - s for p, s in zip(prompts, start))
        token, as_tensor = None, lambda x: torch.tensor(x, dtype=torch.int64, device=self.device)
        for at in range(0, max(len(p) - s for p, s in zip(prompts, start)), self.chunk):
            parts = [p[s + at : s + at + self.chunk] for p, s in zip(prompts, start)]
            tokens = as_tensor([part + [0] * (self.chunk - len(part)) for part in parts])
            new = self.prefill(
                tokens,
                as_tensor([s + at if part else 0 for s, part in zip(start, parts)]),
                as_tensor([len(part) for part in parts]),
                *how,
            )
            token = (
                new
                if token is None
                else torch.where(as_tensor([len(part) for part in parts]) > 0, new, token)
            )
        self.fed = [list(p) for p in prompts]
        return token

    def __call__(
        self, prompts: list[list[int]], how: Sampling, done: Callable[[int, int], bool]
    ) -> dict:
        """Generate for every row, until done(row, token), which is told each token as it comes, has ended them all.

        -> ttft_warm_s, fed_tokens (of the prompts), prefill_tok_per_s, decode_s, decoded (tokens), steps. Compiling is excluded.
        """
        if len(prompts) != len(self.fed) or not all(prompts):
            raise ValueError(
                f"{len(prompts)} prompts for {len(self.fed)} rows: give one for each, none of them empty"
            )
        self.warm(self.prefill, self.chunk, how)
        start = time.perf_counter()
        token = self._feed(prompts, how)[:, None]
        host = token.tolist()
        ttft = time.perf_counter() - start
        pos = torch.tensor([len(p) for p in prompts], device=self.device)
        live, lengths = [True] * len(prompts), torch.ones_like(pos)
        decode_s, decoded, steps = 0.0, 0, 0
        while True:
            was = list(live)
            for column in zip(*host):
                for row, new in enumerate(column):
                    if live[row]:
                        decoded += steps > 0
                        live[row] = not done(row, new)
                        if live[row]:
                            self.fed[row].append(new)  # the next step feeds it
            if not any(live):
                break
            if live != was:
                lengths = lengths * torch.tensor(live, device=self.device)
            self.warm(self.decode, 1, how)
            for row in range(len(prompts)):
                if live[row]:
                    self.high[row] = max(self.high[row], len(self.fed[row]) + self.burst - 1)
            start, results = time.perf_counter(), []
            for _ in range(self.burst):
                token, pos, lengths = self.decode(token, pos, lengths, *how)
                results.append(token)
            host = torch.cat(results, 1).tolist()
            decode_s, steps = decode_s + time.perf_counter() - start, steps + len(results)
        return dict(
            ttft_warm_s=ttft,
            fed_tokens=self.fed_tokens,
            prefill_tok_per_s=self.fed_tokens / ttft,
            decode_s=decode_s,
            decoded=decoded,
            steps=steps,
        )


def active_bytes(model: Transformer, rows: int) -> int:
    """Bytes of parameters that one decode step of so many rows reads, routed experts as often as chance picks them."""
    args, total = model.args, 0.0
    share = 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** rows
    for name, p in model.named_parameters():
        if name.startswith(("embed.", "mtp.")):
            continue
        total += p.nbytes * (share if ".experts." in name else 1)
    return int(total)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Generate text with DeepSeek-V4 from compiled graphs.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default=str(ROOT / "assets" / "tiny"),
        metavar="DIR",
        help="a folder in the released layout (embedded model)",
    )
    add("--prompt", metavar="TEXT")
    add("--prompts", metavar="FILE", help="one prompt a line, run as one batch")
    add("--prompt-ids", metavar="1,2,3", help="token ids, fed as they are")
    add(
        "--interactive",
        action="store_true",
        help="read turns from standard input; each appends to the cache",
    )
    add("--chat", action="store_true", help="prompts are user messages in V4's format")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add("--thinking", action="store_true", help="let the model reason first, with --chat")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add(
        "--max-seq-len",
        type=int,
        metavar="N",
        help=f"context to allocate (the model's, at most {LONGEST})",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="0 is greedy (the default; 0.8 for the built-in prompt)",
    )
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--seed", type=int, default=0)
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end at this text; may be given several times",
    )
    add("--ignore-eos", action="store_true")
    add("--device", choices=("cpu", "cuda"))
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="float32 on CPU, bfloat16 on CUDA",
    )
    add(
        "--weights",
        choices=("dequant", "native"),
        default="dequant",
        help="native keeps FP8 and FP4 weights packed",
    )
    add("--compile", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    add("--no-compile", action="store_true")
    add("--profile", action="store_true", help="print where the time of decoding goes")
    add(
        "--json",
        action="store_true",
        help="the last line of standard output is one JSON object; progress on standard error",
    )
    flags = parser.parse_args(argv)

    def refuse(wrong, message):
        if wrong:
            raise ValueError(message)

    sources = [f for f in ("prompt", "prompts", "prompt_ids") if getattr(flags, f) is not None] + [
        "interactive"
    ] * flags.interactive
    refuse(len(sources) > 1, "choose one of --prompt, --prompts, --prompt-ids and --interactive")
    refuse(
        not flags.chat and (flags.system is not None or flags.thinking),
        "--system and --thinking need --chat",
    )
    refuse(flags.chat and flags.prompt_ids is not None, "--chat needs text, not --prompt-ids")
    refuse(flags.compile and flags.no_compile, "--compile and --no-compile exclude each other")
    refuse(flags.max_new_tokens < 1, f"--max-new-tokens {flags.max_new_tokens}: ask for at least 1")
    refuse(
        flags.max_seq_len is not None and flags.max_seq_len < 2,
        f"--max-seq-len {flags.max_seq_len}: at least 2 are needed",
    )
    flags.demo = not sources
    if flags.temperature is None:
        flags.temperature = 0.8 if flags.demo else 0.0
    refuse(
        not 0 <= flags.temperature < 1e30,
        f"--temperature {flags.temperature}: choose 0 (greedy) or more",
    )
    refuse(
        flags.top_k is not None and flags.top_k < 1, f"--top-k {flags.top_k}: keep at least 1 token"
    )
    refuse(
        flags.top_p is not None and not 0 < flags.top_p <= 1,
        f"--top-p {flags.top_p}: choose a probability above 0, up to 1",
    )
    refuse(not 0 <= flags.seed < 1 << 63, f"--seed {flags.seed}: choose 0 .. 2^63 - 1")
    refuse("" in flags.stop, "--stop is empty: leave it out")
    refuse(
        flags.device == "cuda" and not torch.cuda.is_available(),
        "--device cuda: no CUDA device is available here; use cpu",
    )
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    flags.dtype = flags.dtype or ("bfloat16" if flags.device == "cuda" else "float32")
    flags.preset = (
        "eager" if flags.no_compile else usable_preset(flags.compile, "default", flags.device)
    )
    refuse(
        PRESETS[flags.preset].cudagraphs and flags.device != "cuda",
        f"--compile {flags.preset} needs a CUDA device",
    )
    return flags


def check_folder(path: str) -> None:
    """Say how to get a released checkpoint when its hub name is given instead of a folder."""
    if os.path.isdir(path):
        return
    name = path.removeprefix("https://huggingface.co/").rstrip("/")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        raise ValueError(
            f"{path}: no such folder; if you mean the model of that name, download it with: "
            f"hf download {name} --local-dir {name.split('/')[1]}"
        )
    raise ValueError(
        f"{path}: no such folder; --checkpoint takes a folder with config.json and safetensors files"
    )


def find_tokenizer(path: str) -> Tokenizer | None:
    """The folder's tokenizer; None if it has none."""
    if not any((Path(path) / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return load_tokenizer(path)


def read_prompts(
    flags: argparse.Namespace, args: ModelArgs, tokenizer: Tokenizer | None
) -> list[list[int]]:
    """The prompts as token ids."""
    if flags.prompt_ids is not None:
        try:
            ids = [int(x) for x in flags.prompt_ids.split(",")] if flags.prompt_ids.strip() else []
        except ValueError:
            raise ValueError(
                f"--prompt-ids {flags.prompt_ids!r}: give integers separated by commas"
            ) from None
        prompts = [ids]
    else:
        if tokenizer is None:
            raise ValueError(
                f"{flags.checkpoint}: has neither tokenizer.json nor tokenizer.model; give --prompt-ids"
            )
        texts = [PROMPT if flags.prompt is None else flags.prompt]
        if flags.prompts is not None:
            try:
                texts = [
                    line
                    for line in Path(flags.prompts).read_text(encoding="utf-8").splitlines()
                    if line.strip()
                ]
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{flags.prompts}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
                ) from None
            if not texts:
                raise ValueError(f"{flags.prompts}: holds no prompt; write one a line")
        prompts = [
            encode(flags, tokenizer, render(flags, [text])) if text else [] for text in texts
        ]
    for ids in prompts:
        if not ids:
            raise ValueError("the prompt is empty")
        wrong = next((i for i in ids if not 0 <= i < args.vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"token id {wrong} is outside the model's vocabulary of {args.vocab_size}"
            )
        check_room(ids, flags.max_seq_len)
    return prompts


def check_room(ids: list[int], max_seq_len: int) -> None:
    if len(ids) >= max_seq_len:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the context holds {max_seq_len}: shorten it or raise --max-seq-len"
        )


def render(flags: argparse.Namespace, turns: list[str]) -> str:
    """The text of a conversation: user and assistant texts in turn with --chat, else one text."""
    if not flags.chat:
        return "".join(turns)
    messages = [
        {"role": "assistant", **parse_response(turn, flags.thinking)}
        if i % 2
        else {"role": "user", "content": turn}
        for i, turn in enumerate(turns)
    ]
    if flags.system is not None:
        messages.insert(0, {"role": "system", "content": flags.system})
    return encode_messages(messages, thinking=flags.thinking)


def encode(flags: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text from `render`, which begins with BOS itself with --chat."""
    return tokenizer.encode(text, bos=not flags.chat)


class Printer:
    """Streams the rows' texts in order: the first unfinished row live, later ones as soon as it is their turn."""

    def __init__(self, rows: int, out):
        self.out, self.waiting, self.closed, self.row = out, [""] * rows, [False] * rows, 0

    def write(self, row: int, text: str, last: bool = False) -> None:
        self.waiting[row] += text
        self.closed[row] |= last
        while self.row < len(self.waiting):
            self.out.write(self.waiting[self.row])
            self.waiting[self.row] = ""
            if not self.closed[self.row]:
                break
            self.out.write("\n")
            self.row += 1
        self.out.flush()


class Progress:
    """Messages on standard error: lines, or on a terminal a note that is wiped out by the next one."""

    def __init__(self):
        self.shown = 0

    def __call__(self, message: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\b" * self.shown + " " * self.shown + "\b" * self.shown + message)
            self.shown = len(message)
        elif message:
            sys.stderr.write(message.strip() + "\n")
        sys.stderr.flush()


class Run:
    """One call of the generator: what the rows produced, streamed while it comes."""

    def __init__(
        self, flags, generator: Generator, tokenizer: Tokenizer | None, eos: int | None, out
    ):
        self.flags, self.generator, self.tokenizer, self.eos, self.out = (
            flags,
            generator,
            tokenizer,
            eos,
            out,
        )

    def __call__(
        self, prompts: list[list[int]], how: Sampling, started: float | None = None
    ) -> dict:
        rows = len(prompts)
        self.tokens, self.text, self.stop = [[] for _ in prompts], [""] * rows, ["length"] * rows
        decoders = [
            StreamDecoder(self.tokenizer, self.flags.stop) if self.tokenizer else None
            for _ in prompts
        ]
        printer, self.ttft = Printer(rows, self.out), None

        if self.flags.demo:
            printer.write(0, PROMPT)

        def show(row, text, last=False):
            self.text[row] += text
            printer.write(row, text, last)

        def done(row, token):
            if self.ttft is None:
                self.ttft = time.time() - started if started else None
            self.tokens[row].append(token)
            decoder = decoders[row]
            if token == self.eos:
                self.stop[row] = "eos"
            elif decoder is None:
                printer.write(row, f"{token} ")
            else:
                show(row, decoder.push(token))
                if decoder.stopped:
                    self.stop[row] = "stop"
            over = self.stop[row] != "length" or len(self.tokens[row]) == self.flags.max_new_tokens
            full = len(prompts[row]) + len(self.tokens[row]) == self.generator.max_seq_len
            if full and not over:
                self.stop[row] = "context"
            if over or full:
                show(row, decoder.flush() if decoder else "", last=True)
            return over or full

        try:
            return self.generator(prompts, how, done)
        except KeyboardInterrupt:  # nothing that was produced is lost
            for row, decoder in enumerate(decoders):
                show(row, decoder.flush() if decoder else "", last=True)
            raise


def card(report: dict, out) -> None:
    """The statistics, for people."""
    number = lambda value, unit="", digits=1: "-" if value is None else f"{value:,.{digits}f}{unit}"
    rows = [
        (
            "prefill",
            f"{number(report['prefill_tok_per_s'], ' tok/s')}, {report['fed_tokens']} tokens",
        ),
        (
            "decode",
            f"{number(report['tok_per_s'], ' tok/s')}, batch {report['batch']}, {report['decoded']} tokens",
        ),
        (
            "first token",
            f"{number(report['ttft_s'], ' s')} from process start, {number(report['ttft_warm_s'], ' s', 3)} warm",
        ),
        (
            "compile",
            f"{number(report['compile_s'], ' s')}; {report['graphs']} graphs, {report['breaks']} breaks, "
            f"{'-' if report['recompiles'] is None else report['recompiles']} recompiles",
        ),
        (
            "memory",
            f"{number(report['memory_bytes'] / 2**20, ' MiB', 0)} peak; decoding reads "
            f"{number(report['active_bytes'] / 2**20, ' MiB')} a step, "
            f"{number(report['bandwidth_share'] and 100 * report['bandwidth_share'], ' %', 0)} of measured bandwidth",
        ),
        (
            "setting",
            f"{report['dtype']} on {report['device']}, preset {report['preset']}, {report['threads']} CPU threads, act_quant "
            f"{'on' if report['act_quant'] else 'off'}, seed {report['seed']}, load {number(report['load'], '', 2)}",
        ),
    ]
    for name, value in rows:
        print(f"{name:>12}  {value}", file=out)


def profile_decode(
    generator: Generator, prompts: list[list[int]], how: Sampling, steps: int = 32
) -> None:
    """Generate a few tokens again under the profiler and print where the time went."""
    room = min(steps, generator.max_seq_len - max(map(len, prompts)))
    seen = [0] * len(prompts)

    def done(row, token):
        seen[row] += 1
        return seen[row] == room

    with torch.profiler.profile() as profile:
        generator(prompts, how, done)
    print(
        profile.key_averages().table(
            sort_by=f"self_{generator.device.type}_time_total",
            row_limit=25,
            max_name_column_width=70,
        ),
        file=sys.stderr,
    )


def run(argv: list[str] | None) -> None:
    flags, started, progress = parse(argv), process_start(), Progress()
    check_folder(flags.checkpoint)
    args = ModelArgs.from_json(flags.checkpoint)
    tokenizer = find_tokenizer(flags.checkpoint)
    flags.max_seq_len = flags.max_seq_len or min(args.max_seq_len, LONGEST)
    if flags.max_seq_len > args.max_seq_len:
        raise ValueError(
            f"--max-seq-len {flags.max_seq_len}: the model's context is {args.max_seq_len}"
        )
    if tokenizer is None and (flags.stop or flags.interactive):
        raise ValueError(
            f"{flags.checkpoint}: has no tokenizer, which {'--stop' if flags.stop else '--interactive'} needs"
        )
    prompts = [] if flags.interactive else read_prompts(flags, args, tokenizer)
    model = load(
        flags.checkpoint,
        device=flags.device,
        dtype=getattr(torch, flags.dtype),
        weights=flags.weights,
    )
    batch = max(1, len(prompts))
    threads = choose_threads(active_bytes(model, 1))
    eos = None if flags.ignore_eos else args.eos_id
    filtered = flags.top_k is not None or flags.top_p is not None
    generator = Generator(
        model, PRESETS[flags.preset], batch, flags.max_seq_len, filtered, eos, progress
    )
    how = Sampling.of(
        flags.temperature,
        min(flags.top_k or args.vocab_size, args.vocab_size),
        flags.top_p or 1.0,
        flags.seed,
        flags.device,
    )
    out = sys.stderr if flags.json else sys.stdout
    runner, turns = Run(flags, generator, tokenizer, eos, out), []
    size = active_bytes(model, batch)

    def report(stats: dict) -> dict:
        speed = stats["decoded"] / stats["decode_s"] if stats["decode_s"] else None
        share = (
            stats["steps"] * size / stats["decode_s"] / read_bandwidth(size, generator.device)
            if stats["decode_s"]
            else None
        )
        count, load_now = generator.count, os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        lists = dict(
            prompt_tokens=[len(p) for p in runner.prompts],
            tokens=runner.tokens,
            text=runner.text if tokenizer else None,
            stop_reason=runner.stop,
        )
        if flags.prompts is None and len(runner.prompts) == 1:
            lists = {key: value and value[0] for key, value in lists.items()}
        return dict(
            **lists,
            tok_per_s=speed,
            ttft_s=runner.ttft,
            ttft_warm_s=stats["ttft_warm_s"],
            compile_s=generator.compile_s,
            graphs=count.graphs,
            breaks=count.breaks,
            recompiles=count.recompiles,
            accepted_per_step=None,
            seed=flags.seed,
            dtype=flags.dtype,
            device=flags.device,
            preset=flags.preset,
            threads=threads,
            act_quant=args.act_quant,
            versions=versions(),
            checkpoint=flags.checkpoint,
            batch=batch,
            fed_tokens=stats["fed_tokens"],
            prefill_tok_per_s=stats["prefill_tok_per_s"],
            decoded=stats["decoded"],
            memory_bytes=peak_memory(generator.device),
            active_bytes=size,
            bandwidth_share=share,
            load=load_now,
        )

    def once(prompts, started=None):
        runner.prompts = prompts
        return report(runner(prompts, how, started))

    if flags.interactive:
        texts, ids, said = (
            [],
            [],
            "",
        )  # the turns; the conversation so far as ids, and the text that they stand for
        if sys.stdin and sys.stdin.isatty():
            print("type a turn and press return; end with control-D", file=sys.stderr)
        for line in sys.stdin or ():
            if not line.strip():
                continue
            texts.append(line.rstrip("\n") if flags.chat else line)
            text = render(flags, texts)
            # What was generated stays as it is: the tokenizer might split its text otherwise, and the cache would not fit.
            ids = (
                ids + tokenizer.encode(text[len(said) :])
                if ids and text.startswith(said)
                else encode(flags, tokenizer, text)
            )
            if len(ids) >= flags.max_seq_len:
                if not turns:
                    check_room(ids, flags.max_seq_len)
                print(
                    f"the context of {flags.max_seq_len} tokens is full: raise --max-seq-len for longer conversations",
                    file=sys.stderr,
                )
                break
            turns.append(once([ids], None if turns else started))
            texts.append(runner.text[0])
            ended = runner.stop[0] == "eos"
            if runner.stop[0] == "stop":  # its tokens reach beyond its text
                ids = []
            else:
                ids, said = ids + runner.tokens[0][: -1 if ended else None], text + runner.text[0]
        if not turns:
            raise ValueError("the prompt is empty: standard input held no turn")
        final = turns[-1] | {
            key: [turn[key] for turn in turns]
            for key in ("prompt_tokens", "tokens", "text", "stop_reason")
        }
        final["ttft_s"] = turns[0]["ttft_s"]
    else:
        final = once(prompts, started)
    if flags.profile:
        profile_decode(generator, runner.prompts, how)
    card(final, sys.stderr)
    if flags.json:
        print(json.dumps(final), flush=True)


def main(argv: list[str] | None = None) -> int:
    return cli.main("generate.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
