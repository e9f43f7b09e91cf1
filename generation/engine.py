"""The engine: prompts in, tokens out, from compiled phases with caches.

Prompts are fed in chunks of one size, the last one padded, so one graph serves every length; one
more decodes. Sampling is part of both graphs, and prompts of different lengths run as one ragged
batch. Positions, lengths and sampling parameters are tensors: nothing recompiles when they change.

Shapes: B = max_batch_size rows, T tokens a call.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Sequence

import torch

from compile_config import CompileConfig, compile_decode, compile_prefill, config_of
from generation.sampling import Sampling, check_settings, sample_decode, sample_prefill
from model import Transformer
from tools.ahead_compiler import AheadCompiler
from tools.compile_count import CompileCount
from tools.stats import device_sync

FIGURES = (  # of a stream
    "batch",
    "fed_tokens",
    "ttft_warm_s",
    "decoded",
    "decode_s",
    "steps",
    "eager_tokens",
    "compiled_tokens",
)


class Engine:
    """A model with caches and compiled phases that generates for up to max_batch_size prompts.

    config is a CompileConfig, a preset's name or "auto". ValueError if it is none of these, or
    max_seq_len exceeds the model's.

    Prompt i runs in cache row i. Rows remember the tokens that they were fed, so a prompt that
    continues its row's last conversation feeds only its new tokens. `cached_tokens` is updated
    after a call and `high_water` before it, so a stream may be abandoned at any point. Caches that
    were reset, replaced, moved or used by another engine are noticed (model.cache_generation). New
    weights and calls of the model with input_pos are not: call model.reset_caches() after them.

    model            the Transformer
    stats            figures of the last stream (see the property)
    log              called with short messages while phases compile; replace it to see them
    compiler         of a preset that compiles ahead of time ("auto"); text comes meanwhile
    chunk            tokens of a prompt fed per call
    steps_per_sync   decode steps between two reads by the host
    cached_tokens    per cache row: the tokens that it holds (beyond the context, where no prompt
                     reaches, tokens that were dropped)
    high_water       per cache row: the highest position that may have been fed since position 0
    """

    def __init__(
        self,
        model: Transformer,
        config: CompileConfig | str,
        *,
        max_batch_size: int,
        max_seq_len: int,
    ):
        config = config_of(config) if isinstance(config, str) else config
        if max_seq_len > model.args.max_seq_len:
            raise ValueError(
                f"max_seq_len {max_seq_len}: the model's context is {model.args.max_seq_len}"
            )
        self.model = model.eval()
        self.config = config
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        gpu = self.device.type == "cuda"
        self.chunk = min(max_seq_len, 2048 if gpu else 256)
        self.steps_per_sync = 8 if gpu else 1
        self.max_rewind = 8 + self.steps_per_sync - 1
        self.log: Callable[[str], None] = lambda message: None
        self._generation = -1
        self._claim_caches()
        self.compiler = AheadCompiler()
        self._prefill_phase = compile_prefill(model, self.config, sample_prefill, self.compiler)
        self._decode_phase = compile_decode(model, self.config, sample_decode, self.compiler)
        self._compiled: set[tuple] = set()
        self._compile_s = 0.0
        self._count = CompileCount()
        if self._compiles_ahead:
            self._count.warm()  # this process compiles nothing
        self._figures = dict.fromkeys(FIGURES, 0) | {"switched_at": None}

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def stats(self) -> dict:
        """Figures of the last stream so far; compiling is in none of its seconds but compile_s.

        batch, fed_tokens        prompts; their tokens that were fed, not found in the caches
        ttft_warm_s              seconds from the start of the stream to its first token
        prefill_tok_per_s, tok_per_s   fed_tokens over ttft_warm_s, decoded over decode_s; or None
        decoded, decode_s, steps       tokens after each row's first, seconds, steps of decoding
        eager_tokens, compiled_tokens  all tokens given, by what made them
        switched_at              time.time() when a compiled phase took over from an eager one
        compile_s                seconds that compilers ran since the engine was made, those of
                                 another process, too; 0 if all was loaded
        graphs, graphs_loaded    compiled graphs in use; of them, those that were loaded
        breaks, recompiles       since the engine was made
        """
        figures, count = self._figures, self._count
        prefill_s, decode_s = figures["ttft_warm_s"], figures["decode_s"]
        loaded = self._prefill_phase.graphs_loaded + self._decode_phase.graphs_loaded
        return {
            **figures,
            "prefill_tok_per_s": figures["fed_tokens"] / prefill_s if prefill_s else None,
            "tok_per_s": figures["decoded"] / decode_s if decode_s else None,
            "compile_s": self._compile_s + self.compiler.seconds,
            "graphs": count.graphs + loaded,
            "graphs_loaded": loaded,
            "breaks": count.breaks,
            "recompiles": count.recompiles,
        }

    @property
    def _compiles_ahead(self) -> bool:
        return self.config.ahead and self._decode_phase.compiles_ahead

    def stream(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_id: int | Sequence[int] | None = None,
    ) -> Generator[tuple[int, int], None, None]:
        """A generator of (row, token id) as tokens come, row the prompt's index in `prompts`.

        A row ends with eos_id, or one of them (which is given, too), after max_new_tokens, or when
        prompt and tokens fill the context. Temperature 0 is greedy. Noise depends on seed, prompt
        index and position alone.

        ValueError, before anything runs, for impossible arguments. RuntimeError when a stream goes
        on after its caches were reset or given to another one.
        """
        prompts = [list(prompt) for prompt in prompts]
        self._check_prompts(prompts)
        check_settings(max_new_tokens, temperature, top_k, top_p, seed)
        vocab_size = self.model.args.vocab_size
        top_k_or_all = vocab_size if top_k is None else min(top_k, vocab_size)
        top_p_or_all = 1.0 if top_p is None else top_p
        sampling = Sampling.of(temperature, top_k_or_all, top_p_or_all, seed, self.device)
        filtered = top_k is not None or top_p is not None
        eos_ids = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
        return self._generate(prompts, max_new_tokens, eos_ids, filtered, sampling)

    def _check_prompts(self, prompts: list[list[int]]) -> None:
        if not prompts:
            raise ValueError("there is no prompt: give at least one")
        if len(prompts) > self.max_batch_size:
            raise ValueError(
                f"{len(prompts)} prompts for {self.max_batch_size} rows: give fewer at a time, "
                "or make the engine with a larger max_batch_size"
            )
        for prompt in prompts:
            check_prompt(prompt, self.model.args.vocab_size, self.max_seq_len, "max_seq_len")

    def _generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        eos_ids: list[int],
        filtered: bool,
        sampling: Sampling,
    ) -> Generator[tuple[int, int], None, None]:
        generation = self._claim_caches()
        figures = self._figures = dict.fromkeys(FIGURES, 0) | {"batch": len(prompts)}
        figures["switched_at"] = None
        prompts = prompts + [[]] * (self.max_batch_size - len(prompts))  # unused rows are frozen
        remaining = [
            min(max_new_tokens, self.max_seq_len - len(prompt)) if prompt else 0
            for prompt in prompts
        ]
        prompt_index = torch.arange(self.max_batch_size, device=self.device)
        eos = self._tensor(eos_ids or [-1])
        prefill_args = (filtered, prompt_index, *sampling)
        decode_args = (filtered, eos, prompt_index, *sampling)

        if self._compiles_ahead:
            # Both are compiled meanwhile, first what is needed for longest.
            self._decode_phase.prepare(*self._no_tokens(1), *decode_args)
            self._prefill_phase.prepare(*self._no_tokens(self.chunk), *prefill_args)
        self._compile(self._prefill_phase, self.chunk, prefill_args)
        start = time.perf_counter()
        token = self._prefill(prompts, prefill_args)
        ran_compiled = self._ran_compiled(self._prefill_phase)
        sampled = token.tolist()  # [B][steps]
        figures["ttft_warm_s"] = time.perf_counter() - start
        state = (
            token,
            self._tensor([len(prompt) for prompt in prompts]),
            torch.ones_like(token[:, 0]),
        )
        while True:
            last = [tokens[-1] for tokens in sampled]  # the next input of rows that go on
            for column in zip(*sampled, strict=True):
                for row, new in enumerate(column):
                    if remaining[row]:
                        remaining[row] = 0 if new in eos_ids else remaining[row] - 1
                        figures["decoded"] += figures["steps"] > 0
                        figures["compiled_tokens" if ran_compiled else "eager_tokens"] += 1
                        yield row, new
            live = [row for row, count in enumerate(remaining) if count]
            if not live:
                return
            if self.model.cache_generation != generation:
                raise RuntimeError(
                    "the caches were reset or used by another stream while this one waited: "
                    "finish or close a stream before that"
                )
            self._compile(self._decode_phase, 1, decode_args)
            start = time.perf_counter()
            state, sampled = self._decode(state, live, decode_args)
            figures["decode_s"] += time.perf_counter() - start
            if self._ran_compiled(self._decode_phase) and not ran_compiled:
                figures["switched_at"] = time.time()
            ran_compiled = self._ran_compiled(self._decode_phase)
            figures["steps"] += self.steps_per_sync
            for row in live:
                fed = [last[row], *sampled[row][:-1]]
                # The graph froze the row at the end of its text.
                self.cached_tokens[row] += itertools.takewhile(lambda x: x not in eos_ids, fed)

    def _prefill(self, prompts: list[list[int]], phase_args: tuple) -> torch.Tensor:
        """Bring every row to the end of its prompt -> the token sampled after it, [B, 1]."""
        starts = [self._rewind(row, prompt) for row, prompt in enumerate(prompts)]
        todo = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        self._figures["fed_tokens"] = sum(map(len, todo))
        token = self._tensor([[0] for _ in prompts])
        for offset in range(0, max(map(len, todo)), self.chunk):
            parts = [tokens[offset : offset + self.chunk] for tokens in todo]
            padded = [part + [0] * (self.chunk - len(part)) for part in parts]
            input_pos = [
                start + offset if part else 0 for start, part in zip(starts, parts, strict=True)
            ]
            lengths = self._tensor([len(part) for part in parts])
            for row, part in enumerate(parts):
                self._raise_high_water(row, input_pos[row] + len(part))
            new = self._prefill_phase(
                self._tensor(padded), self._tensor(input_pos), lengths, *phase_args
            )
            token = torch.where(lengths[:, None] > 0, new, token)
            for row, part in enumerate(parts):
                self.cached_tokens[row] += part
        return token

    def _decode(self, state: tuple, live: list[int], phase_args: tuple) -> tuple[tuple, list]:
        """Steps of the live rows between two reads -> (next state, sampled tokens [B][steps]).

        state: (tokens [B, 1], input_pos [B], lengths [B]) of the next step
        """
        token, input_pos, lengths = state
        lengths = lengths * self._tensor([int(row in live) for row in range(len(lengths))])
        for row in live:
            self._raise_high_water(row, len(self.cached_tokens[row]) + self.steps_per_sync)
        sampled = []
        for _ in range(self.steps_per_sync):
            token, input_pos, lengths = self._decode_phase(token, input_pos, lengths, *phase_args)
            sampled.append(token)
        return (token, input_pos, lengths), torch.cat(sampled, 1).tolist()

    def _rewind(self, row: int, prompt: list[int]) -> int:
        """Set a row back to what it shares with a prompt -> position from which the prompt is fed.

        The prompt's last token is always fed, for its logits. A row that is too far ahead to be set
        back starts again at position 0. Without a prompt it stays as it is.
        """
        if not prompt:
            return 0
        cached = self.cached_tokens[row]
        pairs = zip(cached, prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self.high_water[row] - shared > self.max_rewind:
            shared = 0
        del cached[shared:]
        if not shared:
            self.high_water[row] = 0
        return shared

    def _raise_high_water(self, row: int, end: int) -> None:
        """Note, before a call, that it may write a row up to a position."""
        self.high_water[row] = max(self.high_water[row], min(end, self.max_seq_len))

    def _claim_caches(self) -> int:
        """Take over the model's caches -> their new generation.

        If they were not this engine's since, give them its size and forget what rows held.
        """
        model = self.model
        size = (self.max_batch_size, self.max_seq_len, self.max_rewind)
        if model.cache_generation != self._generation:
            if model.cache_size != size:
                model.setup_caches(*size)
            self.cached_tokens = [[] for _ in range(self.max_batch_size)]
            self.high_water = [0] * self.max_batch_size
        model.cache_generation += 1
        self._generation = model.cache_generation
        return self._generation

    def _compile(self, phase: Callable, width: int, phase_args: tuple) -> None:
        """Compile a phase by a call that feeds nothing, once for each kind of arguments."""
        weight = self.model.embed.weight
        key = (phase, phase_args[0], weight.dtype, weight.device)  # phase_args[0]: filtered
        if self.config.ahead and phase.compiles_ahead:
            return
        if self.config.backend is None or key in self._compiled:
            return
        self.log(f" compiling {phase.name} ...")
        start = time.perf_counter()
        phase(*self._no_tokens(width), *phase_args)
        device_sync(self.device)
        self._compile_s += time.perf_counter() - start
        self._compiled.add(key)
        self.log("")
        if phase is self._decode_phase:
            self._count.warm()

    def _ran_compiled(self, phase: Callable) -> bool:
        """Whether the phase's last call ran compiled code: of preset auto, that may change."""
        return phase.ran_compiled if self.config.ahead else self.config.backend is not None

    def _no_tokens(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments of a phase that feed nothing: tokens [B, width], input_pos, lengths [B]."""
        zeros = torch.zeros(self.max_batch_size, dtype=torch.int64, device=self.device)
        return zeros[:, None].repeat(1, width), zeros, zeros

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def check_prompt(prompt: list[int], vocab_size: int, max_seq_len: int, limit: str) -> None:
    """ValueError for a prompt that cannot be fed; limit is the name of max_seq_len."""
    if not prompt:
        raise ValueError("the prompt is empty")
    wrong = next((i for i in prompt if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    if len(prompt) >= max_seq_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, the context holds {max_seq_len}: "
            f"shorten it or raise {limit}"
        )
