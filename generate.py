"""Generate text with a DeepSeek-V4 from compiled graphs.

`python generate.py` streams from the embedded model.

The command line: flags and prompts, conversations, statistics. generation/engine.py generates,
generation/session.py streams text and ends rows, generation/sampling.py draws tokens.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while modules load: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from checkpoint import load
from compile_config import CHOICES, compiled_as, config_of, usable_preset
from generation.engine import Engine, check_prompt
from generation.sampling import check_settings
from generation.session import StreamSession
from model import ModelArgs, Transformer
from tokenizer import Tokenizer, encode_messages, load_tokenizer, parse_response
from tools import cli
from tools.ahead_compiler import finish
from tools.stats import choose_threads, peak_memory, process_start, read_bandwidth, versions

ROOT = Path(__file__).parent
PROMPT = """KING RICHARD.
Now is the winter of our discontent
Made glorious summer by this sun of York;
"""
DEFAULT_CONTEXT = 8192  # of models that could hold more


# --------------------------------------------------------------------------------------------------
# Flags and prompts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Generate text with DeepSeek-V4 from compiled graphs.", allow_abbrev=False
    )
    add = parser.add_argument
    tiny = str(ROOT / "assets" / "tiny")
    on = dict(action="store_true")
    add("--checkpoint", default=tiny, metavar="DIR", help="a folder in the released layout")
    add("--prompt", metavar="TEXT")
    add("--prompts", metavar="FILE", help="one prompt a line, run as one batch")
    add("--prompt-ids", metavar="1,2,3", help="token ids, fed as they are")
    add("--interactive", **on, help="read turns from standard input; each appends to the cache")
    add("--chat", **on, help="prompts are user messages in V4's format")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add("--thinking", **on, help="let the model reason first, with --chat")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    context = f"context to allocate (the model's, at most {DEFAULT_CONTEXT})"
    add("--max-seq-len", type=int, metavar="N", help=context)
    greedy = "0 is greedy (the default; 0.8 for the built-in prompt)"
    add("--temperature", type=float, metavar="T", help=greedy)
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--seed", type=int, default=0)
    stop = "end at this text; may be given several times"
    add("--stop", action="append", default=[], metavar="TEXT", help=stop)
    add("--ignore-eos", **on)
    add("--device", choices=("cpu", "cuda"))
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="float32 on CPU, bfloat16 on CUDA")
    native = "native keeps FP8 and FP4 weights packed"
    add("--weights", choices=("dequant", "native"), default="dequant", help=native)
    act_quant = "fake-quantise activations as served models do (on with --weights native, else off)"
    add("--act-quant", choices=("on", "off"), help=act_quant)
    add("--compile", choices=CHOICES, metavar="PRESET", help=", ".join(CHOICES))
    add("--no-compile", **on)
    no_wait = "auto: leave when the text has ended, although the compiler has not finished"
    add("--no-wait", **on, help=no_wait)
    add("--profile", **on, help="print where the time of decoding goes")
    add("--json", **on, help="end standard output with a JSON object; progress on standard error")
    flags = parser.parse_args(argv)

    sources = (flags.prompt, flags.prompts, flags.prompt_ids, flags.interactive or None)
    flags.demo = all(source is None for source in sources)
    if flags.temperature is None:
        flags.temperature = 0.8 if flags.demo else 0.0
    check_flags(flags, len(sources) - sources.count(None))
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    flags.dtype = flags.dtype or ("bfloat16" if flags.device == "cuda" else "float32")
    flags.act_quant = flags.act_quant or ("on" if flags.weights == "native" else "off")
    flags.compile = "eager" if flags.no_compile else flags.compile
    flags.preset = usable_preset(flags.compile, "auto", flags.device)
    if config_of(flags.preset).cudagraphs and flags.device != "cuda":
        raise ValueError(f"--compile {flags.preset} needs a CUDA device")
    return flags


def check_flags(flags: argparse.Namespace, sources: int) -> None:
    """ValueError for values and combinations that are wrong whatever the checkpoint."""
    check_settings(
        flags.max_new_tokens,
        flags.temperature,
        flags.top_k,
        flags.top_p,
        flags.seed,
        spell=lambda name: "--" + name.replace("_", "-"),
    )
    no_chat = flags.system is not None or flags.thinking
    short = flags.max_seq_len is not None and flags.max_seq_len < 2
    no_cuda = flags.device == "cuda" and not torch.cuda.is_available()
    mistakes = (
        (sources > 1, "choose one of --prompt, --prompts, --prompt-ids and --interactive"),
        (no_chat and not flags.chat, "--system and --thinking need --chat"),
        (flags.chat and flags.prompt_ids is not None, "--chat needs text, not --prompt-ids"),
        (flags.compile and flags.no_compile, "--compile and --no-compile exclude each other"),
        (short, f"--max-seq-len {flags.max_seq_len}: at least 2 are needed"),
        ("" in flags.stop, "--stop is empty: leave it out"),
        (no_cuda, "--device cuda: no CUDA device is available here; use cpu"),
    )
    for wrong, message in mistakes:
        if wrong:
            raise ValueError(message)


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
        f"{path}: no such folder; "
        "--checkpoint takes a folder with config.json and safetensors files"
    )


def find_tokenizer(flags: argparse.Namespace) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if it has none and no flag needs it."""
    names = ("tokenizer.json", "tokenizer.model")
    if any((Path(flags.checkpoint) / name).exists() for name in names):
        return load_tokenizer(flags.checkpoint)
    if flags.stop or flags.interactive:
        needy = "--stop" if flags.stop else "--interactive"
        raise ValueError(f"{flags.checkpoint}: has no tokenizer, which {needy} needs")
    if flags.prompt_ids is None:
        raise ValueError(
            f"{flags.checkpoint}: has neither {' nor '.join(names)}; give --prompt-ids"
        )
    return None


def read_prompts(
    flags: argparse.Namespace, args: ModelArgs, tokenizer: Tokenizer | None
) -> list[list[int]]:
    """The prompts as token ids."""
    if flags.prompt_ids is not None:
        prompts = [parse_ids(flags.prompt_ids)]
    else:
        if flags.prompts is not None:
            texts = read_lines(flags.prompts)
        else:
            texts = [PROMPT if flags.prompt is None else flags.prompt]
        prompts = [
            encode(flags, tokenizer, render(flags, [text])) if text else [] for text in texts
        ]
    for prompt in prompts:
        check_prompt(prompt, args.vocab_size, flags.max_seq_len, "--max-seq-len")
    return prompts


def parse_ids(text: str) -> list[int]:
    """Ids from text such as 1,2,3."""
    try:
        return [int(x) for x in text.split(",")] if text.strip() else []
    except ValueError:
        raise ValueError(f"--prompt-ids {text!r}: give integers separated by commas") from None


def read_lines(path: str) -> list[str]:
    """The lines of a file that hold text. They end at newlines only: U+2028 is text."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no prompt; write one a line")
    return lines


def render(flags: argparse.Namespace, turns: list[str]) -> str:
    """The text of a conversation: user and assistant texts in turn with --chat, else one text."""
    if not flags.chat:
        return "".join(turns)
    messages = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    for i, turn in enumerate(turns):
        if i % 2:
            messages.append({"role": "assistant", **parse_response(turn, flags.thinking)})
        else:
            messages.append({"role": "user", "content": turn})
    return encode_messages(messages, thinking=flags.thinking)


def encode(flags: argparse.Namespace, tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text from `render`, which begins with BOS itself with --chat."""
    return tokenizer.encode(text, bos=not flags.chat)


# --------------------------------------------------------------------------------------------------
# Conversations


class Conversation:
    """The turns so far: their texts, and the token ids that the cache holds for `text`."""

    def __init__(self, flags: argparse.Namespace, tokenizer: Tokenizer):
        self.flags, self.tokenizer = flags, tokenizer
        self.turns: list[str] = []
        self.ids: list[int] = []
        self.text = ""

    def ask(self, line: str) -> list[int]:
        """Add a user's turn -> the prompt."""
        self.turns.append(line.rstrip("\n") if self.flags.chat else line)
        text = render(self.flags, self.turns)
        if self.ids and text.startswith(self.text):
            # Generated ids stay as they are: the tokenizer might split their text otherwise, and
            # the cache would not fit.
            self.ids = self.ids + self.tokenizer.encode(text[len(self.text) :])
        else:
            self.ids = encode(self.flags, self.tokenizer, text)
        self.text = text
        return self.ids

    def answer(self, tokens: list[int], text: str, stop_reason: str) -> None:
        """Add the model's turn."""
        self.turns.append(text)
        if stop_reason == "stop":  # its tokens reach beyond its text: encode anew
            self.ids = []
        else:
            self.ids = self.ids + (tokens[:-1] if stop_reason == "eos" else tokens)
            self.text += text


def converse(session: StreamSession, flags: argparse.Namespace) -> dict[str, list]:
    """Answer the turns of standard input, each appended to the cache -> results, one per turn."""
    conversation = Conversation(flags, session.tokenizer)
    results: dict[str, list] = {}
    if sys.stdin and sys.stdin.isatty():
        print("type a turn and press return; end with control-D", file=sys.stderr)
    for line in sys.stdin or ():
        if not line.strip():
            continue
        prompt = conversation.ask(line)
        if results and len(prompt) >= flags.max_seq_len:
            print(
                f"the context of {flags.max_seq_len} tokens is full: "
                "raise --max-seq-len for longer conversations",
                file=sys.stderr,
            )
            break
        vocab_size = session.engine.model.args.vocab_size
        check_prompt(prompt, vocab_size, flags.max_seq_len, "--max-seq-len")
        session.run([prompt])
        conversation.answer(session.tokens[0], session.text[0], session.stop_reason[0])
        for key, values in session.results().items():
            results.setdefault(key, []).append(values[0])
    if not results:
        raise ValueError("the prompt is empty: standard input held no turn")
    return results


# --------------------------------------------------------------------------------------------------
# Statistics


def active_bytes(model: Transformer, rows: int) -> int:
    """Bytes of parameters that a decode step of this many rows reads.

    Routed experts count by the share of them that so many tokens choose, were the choice random.
    """
    args = model.args
    chosen = 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** rows
    total = 0.0
    for name, p in model.named_parameters():
        if not name.startswith(("embed.", "mtp.")):
            total += p.nbytes * (chosen if ".experts." in name else 1)
    return int(total)


def make_report(
    session: StreamSession, results: dict, flags: argparse.Namespace, started: float, threads: int
) -> dict:
    """The JSON object; figures are of the last stream."""
    engine, stats = session.engine, session.engine.stats
    text_s = time.time() - started
    # A row that met a --stop text ran on until all rows had ended: its later tokens do not count.
    decoded = sum(len(tokens) - 1 for tokens in session.tokens)
    decode_s, steps = stats.pop("decode_s"), stats.pop("steps")
    nbytes = active_bytes(engine.model, engine.max_batch_size)
    tok_per_s = bandwidth_share = None
    if decode_s:
        tok_per_s = decoded / decode_s
        bandwidth_share = steps * nbytes / decode_s / read_bandwidth(nbytes, engine.device)
    switched_at = stats.pop("switched_at")
    return {
        **results,
        **stats,
        "switched_at": switched_at and switched_at - started,
        "tok_per_s": tok_per_s,
        "decoded": decoded,
        "ttft_s": session.first_token_at - started,
        "text_s": text_s,
        "accepted_per_step": None,
        "seed": flags.seed,
        "dtype": flags.dtype,
        "device": flags.device,
        "preset": flags.compile or "auto",
        "compiled_as": compiled_as(flags.preset, stats["compiled_tokens"] > 0),
        "threads": threads,
        "act_quant": engine.model.args.act_quant,
        "versions": versions(),
        "checkpoint": flags.checkpoint,
        "memory_bytes": peak_memory(engine.device),
        "active_bytes": nbytes,
        "bandwidth_share": bandwidth_share,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def print_stats(report: dict, out: TextIO) -> None:
    """The statistics card, for people."""

    def number(key: str, unit: str = "", digits: int = 1, factor: float = 1.0) -> str:
        value = report[key]
        return "-" if value is None else f"{factor * value:,.{digits}f}{unit}"

    MiB = 1 / 2**20
    act_quant = "on" if report["act_quant"] else "off"
    rows = {
        "prefill": f"{number('prefill_tok_per_s', ' tok/s')}, {report['fed_tokens']} tokens",
        "decode": f"{number('tok_per_s', ' tok/s')}, batch {report['batch']}, "
        f"{report['decoded']} tokens",
        "first token": f"{number('ttft_s', ' s')} from process start, "
        f"{number('ttft_warm_s', ' s', 3)} warm",
        "compile": f"{number('compile_s', ' s')}; {report['graphs']} graphs, "
        f"{report['breaks']} breaks, {number('recompiles', digits=0)} recompiles",
        "memory": f"{number('memory_bytes', ' MiB', 0, MiB)} peak; decoding reads "
        f"{number('active_bytes', ' MiB', 1, MiB)} a step, "
        f"{number('bandwidth_share', ' %', 0, 100)} of measured bandwidth",
        "setting": f"{report['dtype']} on {report['device']}, preset {report['preset']}, "
        f"{report['threads']} CPU threads, act_quant {act_quant}, seed {report['seed']}, "
        f"load {number('load', '', 2)}",
    }
    if report["preset"] == "auto" and report["device"] == "cpu":
        took_over = f"after {number('switched_at', ' s')}" if report["switched_at"] else ""
        rows["compile"] = (
            f"{report['eager_tokens']} tokens eagerly, then {report['compiled_tokens']} by "
            f"compiled code {took_over}".rstrip()
        )
    for name, value in rows.items():
        print(f"{name:>12}  {value}", file=out)


def profile_decode(session: StreamSession, steps: int = 32) -> None:
    """Generate a few tokens again under the profiler and print where the time went."""
    settings = session.settings | {"max_new_tokens": steps, "eos_id": None}
    with torch.profiler.profile() as profile:
        for _ in session.engine.stream(session.prompts, **settings):
            pass
    table = profile.key_averages().table(
        sort_by=f"self_{session.engine.device.type}_time_total",
        row_limit=25,
        max_name_column_width=70,
    )
    print(table, file=sys.stderr)


def run(argv: list[str] | None) -> None:
    flags, started = parse(argv), process_start()
    check_folder(flags.checkpoint)
    args = ModelArgs.from_json(flags.checkpoint)
    flags.max_seq_len = flags.max_seq_len or min(args.max_seq_len, DEFAULT_CONTEXT)
    if flags.max_seq_len > args.max_seq_len:
        raise ValueError(
            f"--max-seq-len {flags.max_seq_len}: the model's context is {args.max_seq_len}"
        )
    tokenizer = find_tokenizer(flags)
    prompts = [] if flags.interactive else read_prompts(flags, args, tokenizer)
    model = load(
        flags.checkpoint,
        device=flags.device,
        dtype=getattr(torch, flags.dtype),
        weights=flags.weights,
        act_quant=flags.act_quant == "on",
    )
    threads = choose_threads(active_bytes(model, 1))
    rows = max(1, len(prompts))
    engine = Engine(model, flags.preset, max_batch_size=rows, max_seq_len=flags.max_seq_len)
    engine.log = cli.Progress()
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(flags, name) for name in names}
    settings["eos_id"] = None if flags.ignore_eos else args.eos_id
    out = sys.stderr if flags.json else sys.stdout
    echo = PROMPT if flags.demo else ""
    session = StreamSession(engine, tokenizer, settings, out, flags.stop, echo)
    if flags.interactive:
        results = converse(session, flags)
    else:
        session.run(prompts)
        results = session.results()
        if flags.prompts is None:  # one prompt: its values, not lists of one
            results = {key: values and values[0] for key, values in results.items()}
    report = make_report(session, results, flags, started, threads)
    if flags.profile:
        profile_decode(session)
    print_stats(report, sys.stderr)
    out.flush()
    finish(engine.compiler, flags.no_wait)
    if flags.json:
        report["compile_s"] = engine.stats["compile_s"]  # now whole
        print(json.dumps(report), flush=True)


def main(argv: list[str] | None = None) -> int:
    return cli.main("generate.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
