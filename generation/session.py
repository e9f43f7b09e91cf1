"""From the engine's tokens to text on a terminal, and the policy that ends rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from generation.engine import Engine
from tokenizer import StreamDecoder, Tokenizer


class Printer:
    """Streams rows in order: the first unfinished one live, later ones when it is their turn."""

    def __init__(self, rows: int, out: TextIO):
        self.out = out
        self.waiting, self.closed = [""] * rows, [False] * rows
        self.row = 0

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


class StreamSession:
    """Runs prompts through an engine: prints text as it comes and decides when each row ends.

    settings   keyword arguments of Engine.stream
    stop       texts that end a row
    echo       printed before the first row's text
    tokenizer  None: ids are printed instead of text

    After run(): prompts, tokens, text and stop_reason ("eos", "stop", "length", "context"; None if
    interrupted) of each row. first_token_at: time.time() of the session's first token.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        settings: dict,
        out: TextIO,
        stop: Sequence[str] = (),
        echo: str = "",
    ):
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.out = out
        self.stop = stop
        self.echo = echo
        self.first_token_at: float | None = None
        eos = settings["eos_id"]
        self.eos_ids = (eos,) if isinstance(eos, int) else eos or ()

    def run(self, prompts: list[list[int]]) -> None:
        rows = len(prompts)
        self.prompts = prompts
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.text, self.stop_reason = [""] * rows, [None] * rows
        self.decoders = [
            StreamDecoder(self.tokenizer, self.stop) if self.tokenizer else None for _ in prompts
        ]
        self.printer = Printer(rows, self.out)
        self.printer.write(0, self.echo)
        stream = self.engine.stream(prompts, **self.settings)
        try:
            for row, token in stream:
                self.first_token_at = self.first_token_at or time.time()
                if self.stop_reason[row] is None:
                    self.push(row, token)
                if None not in self.stop_reason:
                    break
        except KeyboardInterrupt:  # nothing that was produced is lost
            for row, reason in enumerate(self.stop_reason):
                if reason is None:
                    self.finish(row)
            raise
        finally:
            stream.close()

    def push(self, row: int, token: int) -> None:
        """Take a row's next token: print it and see whether the row ends."""
        tokens, decoder = self.tokens[row], self.decoders[row]
        tokens.append(token)
        if token in self.eos_ids:
            self.stop_reason[row] = "eos"
        elif decoder is None:
            self.printer.write(row, f"{token} ")
        else:
            self.show(row, decoder.push(token))
            if decoder.stopped:
                self.stop_reason[row] = "stop"
        if self.stop_reason[row] is None:
            if len(tokens) == self.settings["max_new_tokens"]:
                self.stop_reason[row] = "length"
            elif len(self.prompts[row]) + len(tokens) == self.engine.max_seq_len:
                self.stop_reason[row] = "context"
        if self.stop_reason[row] is not None:
            self.finish(row)

    def show(self, row: int, text: str, last: bool = False) -> None:
        self.text[row] += text
        self.printer.write(row, text, last)

    def finish(self, row: int) -> None:
        """Print what the decoder of a row holds back, and close the row."""
        decoder = self.decoders[row]
        self.show(row, decoder.flush() if decoder else "", last=True)

    def results(self) -> dict[str, list | None]:
        """Per row, under the keys of the JSON report."""
        return {
            "prompt_tokens": [len(prompt) for prompt in self.prompts],
            "tokens": self.tokens,
            "text": self.text if self.tokenizer else None,
            "stop_reason": self.stop_reason,
        }
