"""Text to rows of tokens: `python train_step.py --data FILE|FOLDER ...` reads plain UTF-8 text.

    files -> documents (set apart by three blank lines or more, or by files) -> BOS tokens EOS, one after the other, on disk
    -> rows of a fixed length, each holding the end of one document, whole ones, and the beginning of another

The last 5 % of the text are held out. Tokens are kept in a folder named by a hash of the text and the vocabulary, and are
memory-mapped: a second run starts at once. An epoch takes every row once, in an
order drawn from the seed; which tokens lie in which row differs from epoch to epoch. A row is a function of its number
alone, so a resumed run reads what it would have read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch

from checkpoint import TOKENIZER_FILES
from tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer, load_tokenizer

HELD_OUT = 0.05  # the tail of the text that is never trained on
LONGEST = 1 << 18  # characters that a vocabulary is fitted to at a time
GAP = "\n\n\n\n"  # between documents


def files_of(paths: list[str]) -> list[Path]:
    """The files named, and those in the folders named (all .txt and .md below them), in order."""
    found: list[Path] = []
    if "" in paths:
        raise ValueError("--data: an empty name; name a file or a folder")
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.suffix in (".txt", ".md") and file.is_file()
            )
            if not inside:
                raise ValueError(f"{path}: holds no .txt or .md file")
            found += inside
        else:
            found.append(path)
    return found


def read_text(paths: list[str]) -> str:
    """All text of files and folders; files are set apart as documents are."""
    texts = []
    for path in files_of(paths):
        try:
            texts.append(path.read_text(encoding="utf-8").strip("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
            ) from None
    text = (GAP + "\n").join(text for text in texts if text.strip()) + "\n"
    if not text.strip():
        raise ValueError(f"{', '.join(paths)}: holds no text")
    return text


def split(text: str) -> tuple[str, str]:
    """The text to train on, and its held-out tail: cut at a line, or where lines are as long as that at a word, or anywhere."""
    at = int(len(text) * (1 - HELD_OUT))
    cut = next(
        (cut for mark in "\n " if (cut := text.rfind(mark, 0, at) + 1) > (1 - HELD_OUT) * at), at
    )
    return text[:cut], text[cut:]


def train_tokenizer(text: str, folder: Path, vocab_size: int) -> Path:
    """Fit a byte-pair vocabulary with sentencepiece; every text survives encoding and decoding, but U+2581. -> tokenizer.model"""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    pieces = (
        line[at : at + LONGEST]
        for line in text.splitlines()
        for at in range(0, len(line) or 1, LONGEST)
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=pieces,
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        bos_id=0,
        eos_id=1,
        unk_id=2,
        bos_piece=BOS,
        eos_piece=EOS,
        user_defined_symbols=[USER, ASSISTANT, THINK, END_THINK],
        max_sentence_length=4 * LONGEST,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


class Bytes:
    """Text as bytes: what models with a vocabulary too small for sentencepiece read. 0 is BOS, 1 EOS; in a text they are left out."""

    bos_id, eos_id = 0, 1

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return [0] * bos + [byte for byte in text.encode() if byte > 1]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if 1 < i < 256).decode(errors="replace")


def tokenize(text: str, tokenizer) -> Iterator[np.ndarray]:
    """Each document's ids, uint32: BOS, the text with one newline at its end, EOS."""
    for document in text.split(GAP):
        if document := document.strip("\n"):
            yield np.array(
                [*tokenizer.encode(document + "\n", bos=True), tokenizer.eos_id], dtype=np.uint32
            )


def cached(cache: Path, key: dict, make: Callable[[Path], None]) -> Path:
    """The folder of `cache` named by a hash of `key`; make(folder) fills it if there is none. Never half-filled."""
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        try:
            make(temporary)
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


class Data(NamedTuple):
    """Tokens of a text.

    folder          of the cache, named by a hash of text and vocabulary
    source          the folder that holds the tokenizer; None for bytes
    train, held_out ids, uint32, memory-mapped
    """

    folder: Path
    source: Path | None
    tokenizer: Tokenizer | Bytes
    train: np.ndarray
    held_out: np.ndarray
    held_out_chars: int


def prepare(text: str, cache: Path, vocab_size: int, source: str | None = None) -> Data:
    """Tokenize a text, or find it in the cache.

    source is a folder with a tokenizer. Without one, vocabularies below 512 read bytes, and others are fitted to the text.
    """
    parts, name = split(text), "bytes" if vocab_size < 512 else f"fitted {vocab_size}"
    files = (
        [file for file in map(Path(source).joinpath, TOKENIZER_FILES) if file.exists()]
        if source
        else []
    )
    if name == "bytes" and not files:
        source = None
    if source:
        load_tokenizer(source)  # complains if there is none
        name = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def reader(folder: Path) -> Tokenizer | Bytes:
        return Bytes() if name == "bytes" else load_tokenizer(source or folder)

    def make(folder: Path) -> None:
        if not source and name != "bytes":
            train_tokenizer(parts[0], folder, vocab_size)
        for part, file in zip(parts, ("train", "held_out")):
            with open(folder / file, "wb") as out:
                for ids in tokenize(part, reader(folder)):
                    out.write(ids.tobytes())

    folder = cached(
        cache,
        {"text": hashlib.sha256(text.encode()).hexdigest(), "tokenizer": name, "format": 1},
        make,
    )
    ids = (
        np.memmap(file, np.uint32, "r")
        if (file := folder / part).stat().st_size
        else np.empty(0, np.uint32)
        for part in ("train", "held_out")
    )
    return Data(
        folder,
        Path(source) if source else None if name == "bytes" else folder,
        reader(folder),
        *ids,
        len(parts[1]),
    )


class Rows:
    """Rows of `length` tokens of a stream of documents that begin with BOS; row i is the same whenever it is asked for.

    per_epoch   rows that an epoch takes, each once: all tokens but fewer than 2 length at the ends of the stream
    """

    def __init__(self, ids: np.ndarray, length: int, bos: int, seed: int = 0):
        self.ids, self.length, self.bos, self.seed = ids, length, bos, seed
        self.per_epoch = (len(ids) - length) // length
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def _start(self, row: int) -> int:
        epoch, number = divmod(row, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            self._epoch = (
                epoch,
                int(random.integers(self.length)),
                random.permutation(self.per_epoch),
            )
        return self._epoch[1] + int(self._epoch[2][number]) * self.length

    def __call__(self, rows: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> tokens, targets, doc_ids [B, S] int64 of these rows. The last token of a document has no target (-1)."""
        starts = np.array([self._start(row) for row in rows])
        window = torch.from_numpy(
            self.ids[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        )
        return packed(window, self.bos)


def packed(window: torch.Tensor, bos: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Consecutive tokens [B, S + 1] -> tokens, targets, doc_ids [B, S]: a BOS starts a document and is no target."""
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:]
    return tokens, targets.masked_fill(targets == bos, -1), (tokens == bos).cumsum(1)
