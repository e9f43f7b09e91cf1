"""Shared by the command lines: a mistake ends in one line that says what to do, and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Mistaken flags are ValueErrors like any other bad input."""

    def error(self, message: str):
        raise ValueError(message)


class Progress:
    """Messages on standard error: lines; on a terminal a note that the next one wipes out."""

    def __init__(self):
        self.shown = 0

    def __call__(self, message: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\b" * self.shown + " " * self.shown + "\b" * self.shown + message)
            self.shown = len(message)
        elif message:
            sys.stderr.write(message.strip() + "\n")
        sys.stderr.flush()


def main(
    program: str, run: Callable[[list[str] | None], int | None], argv: list[str] | None
) -> int:
    """Exit code: of run(argv), None being 0; 2 after a one-line message on bad input; 130 when
    interrupted.
    """
    # Huge pages for tensors on CPU: training is faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        return run(argv) or 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
