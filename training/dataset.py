"""Text to rows of tokens: `python train_step.py --data FILE|FOLDER ...` reads plain UTF-8 text.

    files     -> documents, set apart by three blank lines or more, or by files
    documents -> BOS tokens EOS, one after the other, on disk
    tokens    -> rows of a fixed length; one may hold the end of a document, whole documents, and
                 the beginning of another

The last 5 % of the text are held out. Tokens are kept in a folder named by a hash of the text and
the vocabulary, and are memory-mapped: a second run starts at once. An epoch takes every row once,
in an order drawn from the seed; which tokens lie in which row differs from epoch to epoch. A row is
a function of its number alone, so a resumed run reads the rows that it would have read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import TOKENIZER_FILES
from prompt_format import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from tokenizer import Tokenizer, load_tokenizer

HELD_OUT = 0.05  # the tail of the text that is never trained on
MAX_PIECE = 1 << 18  # characters that a vocabulary is fitted to at a time
GAP = "\n\n\n\n"  # between documents
# A tokenizer.json without merges: ids 0 and 1 are BOS and EOS, any other is the byte of that value,
# and a text's own bytes 0 and 1 are dropped. For models whose vocabulary is too small for more.
BYTES = Path(__file__).parent.parent / "data" / "bytes"


def list_files(paths: list[str]) -> list[Path]:
    """The files named, and those in the folders named (all .txt and .md below them), in order."""
    if "" in paths:
        raise ValueError("--data: an empty name; name a file or a folder")
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = [file for file in path.rglob("*") if file.suffix in (".txt", ".md")]
        inside = sorted(file for file in inside if file.is_file())
        if not inside:
            raise ValueError(f"{path}: holds no .txt or .md file")
        files += inside
    return files


def read_text(paths: list[str]) -> str:
    """All text of files and folders, with files set apart as documents are.

    ValueError names the file that cannot be read, or says that there is no text.
    """
    texts = []
    for path in list_files(paths):
        try:
            texts.append(path.read_text(encoding="utf-8-sig").strip("\n"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ValueError(f"{path}: cannot be read ({reason})") from None
    text = (GAP + "\n").join(text for text in texts if text.strip()) + "\n"
    if not text.strip():
        raise ValueError(f"{', '.join(paths)}: holds no text")
    return text


def split(text: str) -> tuple[str, str]:
    """The text to train on, and its held-out tail.

    The cut is at the end of a line; within a line that is as long as the tail, at a word, or else
    anywhere.
    """
    end = int(len(text) * (1 - HELD_OUT))
    for mark in "\n ":
        cut = text.rfind(mark, 0, end) + 1
        if cut > (1 - HELD_OUT) * end:
            return text[:cut], text[cut:]
    return text[:end], text[end:]


def train_tokenizer(text: str, folder: Path, vocab_size: int) -> Path:
    """Fit a byte-pair vocabulary with sentencepiece -> tokenizer.model.

    Every text survives encoding and decoding, except for the character U+2581.
    """
    import sentencepiece  # only for new vocabularies

    folder.mkdir(parents=True, exist_ok=True)
    pieces = (
        line[start : start + MAX_PIECE]
        for line in text.split("\n")
        for start in range(0, len(line) or 1, MAX_PIECE)
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
        max_sentence_length=4 * MAX_PIECE,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def tokenize(text: str, tokenizer: Tokenizer, special: bool = False) -> Iterator[np.ndarray]:
    """Each document's ids, uint32: BOS, the text with one newline at its end, EOS.

    special: names of special tokens in the text are those tokens; else they are text.
    """
    for document in text.split(GAP):
        if document := document.strip("\n"):
            ids = [*tokenizer.encode(document + "\n", bos=True, special=special), tokenizer.eos_id]
            yield np.array(ids, dtype=np.uint32)


def cached(cache: Path, key: dict, make: Callable[[Path], None]) -> Path:
    """The folder of `cache` named by a hash of `key`, complete; make(folder) fills a new one."""
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
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
    source          the folder that holds the tokenizer
    train, held_out ids, uint32, memory-mapped
    """

    folder: Path
    source: Path
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    held_out_chars: int


def prepare(
    text: str, cache: Path, vocab_size: int, source: str | Path | None = None, special: bool = False
) -> Data:
    """Tokenize a text, or find it in the cache.

    source is a folder with a tokenizer. Without one, vocabularies below 512 read bytes, and others
    are fitted to the text. special: see tokenize.
    """
    trained, held_out = split(text)
    files = []
    if source:
        files = [file for file in map(Path(source).joinpath, TOKENIZER_FILES) if file.exists()]
    vocabulary: str | list[str] = f"fitted {vocab_size}"
    if vocab_size < 512 and not files:
        source, vocabulary = BYTES, "bytes"
    elif source:
        load_tokenizer(source)  # ValueError if there is none
        vocabulary = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def make(folder: Path) -> None:
        if not source:
            train_tokenizer(trained, folder, vocab_size)
        tokenizer = load_tokenizer(source or folder)
        for part, file in ((trained, "train"), (held_out, "held_out")):
            with open(folder / file, "wb") as out:
                for ids in tokenize(part, tokenizer, special):
                    out.write(ids.tobytes())

    key = {"text": hashlib.sha256(text.encode()).hexdigest(), "tokenizer": vocabulary, "format": 1}
    if any(name in text for name in ("<｜", "｜DSML｜", THINK, END_THINK)):
        key |= {"special": special}
    folder = cached(cache, key, make)
    tokenizer_folder = Path(source or folder)
    return Data(
        folder,
        tokenizer_folder,
        load_tokenizer(tokenizer_folder),
        map_ids(folder / "train"),
        map_ids(folder / "held_out"),
        len(held_out),
    )


def map_ids(file: Path) -> np.ndarray:
    """A file of uint32, memory-mapped, which an empty file cannot be."""
    return np.memmap(file, np.uint32, "r") if file.stat().st_size else np.empty(0, np.uint32)


class Rows:
    """Rows of `length` tokens of a stream of documents that begin with BOS; see the top.

    per_epoch  rows that an epoch takes, each once: all tokens but fewer than 2 length at the ends
    """

    def __init__(self, ids: np.ndarray, length: int, bos: int, seed: int = 0):
        self.ids, self.length = ids, length
        self.bos, self.seed = bos, seed
        self.per_epoch = (len(ids) - length) // length
        self._epoch: int | None = None  # the one that _offset and _order are of

    def _start(self, row: int) -> int:
        """Where a row begins in the stream."""
        epoch, number = divmod(row, self.per_epoch)
        if self._epoch != epoch:
            random = np.random.default_rng((self.seed, epoch))
            self._epoch = epoch
            self._offset = int(random.integers(self.length))
            self._order = random.permutation(self.per_epoch)
        return self._offset + int(self._order[number]) * self.length

    def __call__(self, rows: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> tokens, targets, doc_ids [B, S] int64 of these rows, as `packed`."""
        starts = np.array([self._start(row) for row in rows])
        window = self.ids[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        return packed(torch.from_numpy(window), self.bos)


def packed(window: torch.Tensor, bos: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Consecutive tokens [B, S + 1] -> tokens, targets, doc_ids [B, S].

    A BOS starts a document and is no target: the last token of a document has target -1.
    """
    tokens, targets = window[:, :-1].contiguous(), window[:, 1:]
    return tokens, targets.masked_fill(targets == bos, -1), (tokens == bos).cumsum(1)


class RankRows:
    """Of the rows of a step, those of one process: an equal part, in order."""

    def __init__(self, rows: Rows, rank: int, size: int):
        self.rows, self.length = rows, rows.length
        self.rank, self.size = rank, size

    def __call__(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = len(numbers) // self.size
        return self.rows(numbers[self.rank * part : (self.rank + 1) * part])
