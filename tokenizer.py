"""Text in and out of DeepSeek-V4: tokenizers and streaming decoding.

* `load_tokenizer` reads the byte-level BPE `tokenizer.json` of the released checkpoints, or the
  sentencepiece `tokenizer.model` of the embedded model. Both have one interface, `Tokenizer`, built
  on one fact: a token is a fixed string of bytes. So decoding is exact, and streams in constant
  time.
* `StreamDecoder` turns ids into text as they arrive, never emits half a character, and stops at
  stop strings.
* `encode_messages` and `parse_response`, V4's chat format, stand in prompt_format.py.

Sources: docs/v4.md#tokenizer, #tokenizer-ids.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from prompt_format import BOS, DSML, END_THINK, EOS, THINK, encode_messages, parse_response
from tools.safetensors_folder import is_lfs_pointer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
    "encode_messages",
    "load_tokenizer",
    "parse_response",
]


class TokenizerError(ValueError):
    """A tokenizer that is missing, unreadable or of the wrong kind; one line with the remedy."""


# --------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer:
    """Text to ids and back, whatever the file format.

    Special tokens in the text (`<｜User｜>`, `</think>`, `｜DSML｜`, ...) become single ids, and
    `decode` writes them out again, so it inverts `encode`. An id without a token (a padded
    vocabulary) decodes to U+FFFD. `bos_id` and `eos_id` are None where the vocabulary has no such
    token. A subclass sets these fields and defines `token_id`, `_encode(text)`, `_lookup(id)`, the
    bytes of an id in range, and `_names()`, the special tokens as they are written.
    """

    bos_id: int | None
    eos_id: int | None
    vocab_size: int

    def __init__(self):
        self._bytes: dict[int, bytes] = {}
        self._name: re.Pattern | None = None  # of a special token

    def encode(self, text: str, bos: bool = False, special: bool = True) -> list[int]:
        """Ids of `text`.

        bos      precede them by the BOS id, unless the text begins with that token
        special  False: the name of a special token is text like any other
        """
        if bos and self.bos_id is None:
            raise TokenizerError("this tokenizer has no BOS token: encode with bos=False")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = error.start
            raise TokenizerError(
                f"the text is not valid Unicode at character {where}: pass UTF-8"
            ) from None
        if special:
            ids = self._encode(text)
        else:
            ids = [token for part in self._parts(text) for token in self._encode(part)]
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def _parts(self, text: str) -> Iterator[str]:
        """The text, cut after the first character of each special token's name."""
        if self._name is None:
            names = sorted(name for name in self._names() if len(name) > 1)
            self._name = re.compile("|".join(map(re.escape, names)) or "(?!)")
        start, found = 0, self._name.search(text)
        while found:
            end = found.start() + 1
            yield text[start:end]
            start, found = end, self._name.search(text, end)
        yield text[start:]

    def decode(self, ids) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, which may end in the middle of a character."""
        if token not in self._bytes:
            in_range = 0 <= token < self.vocab_size
            self._bytes[token] = self._lookup(token) if in_range else "\ufffd".encode()
        return self._bytes[token]

    def token_id(self, piece: str) -> int | None:
        """The id of a token given by its exact spelling, or None."""
        raise NotImplementedError


class ByteLevelTokenizer(Tokenizer):
    """`tokenizer.json`: byte-level BPE, the released checkpoints' format (docs/v4.md#tokenizer)."""

    def __init__(self, path: Path):
        super().__init__()
        try:
            self._bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _unreadable(path, error) from None
        if not isinstance(self._bpe.decoder, tokenizers.decoders.ByteLevel):
            raise TokenizerError(
                f"{path}: not a byte-level BPE; use the tokenizer.json of a DeepSeek checkpoint"
            )
        # GPT-2's alphabet: the vocabulary is spelled in 256 printable characters, one per byte.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._alphabet = {chr(byte): byte for byte in printable}
        self._alphabet |= {chr(256 + n): byte for n, byte in enumerate(others)}
        self.vocab_size = self._bpe.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = self.token_id(BOS), self.token_id(EOS)

    def token_id(self, piece):
        return self._bpe.token_to_id(piece)

    def _names(self):
        return [token.content for token in self._bpe.get_added_tokens_decoder().values()]

    def _encode(self, text):
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _lookup(self, token):
        piece = self._bpe.id_to_token(token) or "\ufffd"
        if self._alphabet.keys() >= set(piece):
            return bytes(map(self._alphabet.get, piece))
        return piece.encode()  # added tokens are plain text


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`: sentencepiece, the embedded model's format.

    `decode(encode(text)) == text` for every text if the model was trained with byte_fallback=True,
    add_dummy_prefix=False, remove_extra_whitespaces=False and normalization_rule_name="identity".

    Sentencepiece spells a space `▁` (U+2581) and never finds control tokens in text. So some
    strings do not go through it but are replaced by fixed ids (`_literal`): control tokens, V4's
    special tokens, whose names hold a `▁`, and the character `▁` itself, as its three bytes.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # OSError or RuntimeError
            raise _unreadable(path, error) from None
        self.vocab_size = self._sp.get_piece_size()
        self._special = {}  # id -> its bytes
        self._literal = {}  # string -> its ids
        for token in range(self.vocab_size):
            piece = self._sp.id_to_piece(token)
            if self._sp.is_control(token) or piece.startswith("<｜") and piece.endswith("｜>"):
                self._special[token] = piece.encode()
                self._literal[piece] = [token]
        # With a space in place of its first `▁`, a name is ordinary text.
        for name in [name for name in self._literal if "▁" in name]:
            head, tail = name.replace("▁", " ").split(" ", 1)
            self._literal[f"{head} {tail}"] = self._sp.encode(head) + self._sp.encode(f" {tail}")
        low_line = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
        self._literal["▁"] = low_line if all(map(self._sp.is_byte, low_line)) else []
        # Longest first: where two names match at one place, the longer one is meant.
        names = sorted(self._literal, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.bos_id = self._end_id(BOS, self._sp.bos_id())
        self.eos_id = self._end_id(EOS, self._sp.eos_id())

    def _end_id(self, name: str, declared: int) -> int | None:
        """The id of V4's name, else the one that the model declares: -1 if none."""
        token = self._literal.get(name, [declared])[0]
        return token if token >= 0 else None

    def token_id(self, piece):
        token = self._sp.piece_to_id(piece)  # the unknown id for unknown pieces
        return token if self._sp.id_to_piece(token) == piece else None

    def _names(self):
        defined = [name for name in (THINK, END_THINK, DSML) if self.token_id(name) is not None]
        return [name.decode() for name in self._special.values()] + defined

    def _encode(self, text):
        ids = []
        for part in filter(None, self._split.split(text)):
            ids += self._literal.get(part) or self._sp.encode(part)
        return ids

    def _lookup(self, token):
        if token in self._special:
            return self._special[token]
        if self._sp.is_byte(token):
            return bytes([int(self._sp.id_to_piece(token)[3:5], 16)])  # <0xE2>
        if self._sp.is_unknown(token):
            return "\ufffd".encode()
        return self._sp.id_to_piece(token).replace("▁", " ").encode()


def _unreadable(path: Path, error: Exception) -> TokenizerError:
    if is_lfs_pointer(path):
        return TokenizerError(f"{path}: is a Git LFS pointer; run git lfs pull, or hf download")
    reason = str(error).partition("\n")[0]
    return TokenizerError(f"{path}: cannot be read as a tokenizer ({reason}); copy the file again")


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of a checkpoint folder (`tokenizer.json`, else `tokenizer.model`) or file.

    TokenizerError, one line, if there is none or if it cannot be read.
    """
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.model")
    file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.exists():
        raise TokenizerError(f"{path}: no such file or folder")
    if file.is_dir():
        raise TokenizerError(
            f"{path}: no {' or '.join(names)} in this folder; copy the checkpoint's or feed ids"
        )
    if file.suffix == ".json":
        return ByteLevelTokenizer(file)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    raise TokenizerError(f"{path}: unknown kind of tokenizer; give a {' or a '.join(names)}")


class StreamDecoder:
    """Ids in, text out as soon as it is certain; constant work per token, however long the stream.

    The pieces of `push` and the last one of `flush` join to `tokenizer.decode(ids)`. Bytes of an
    unfinished character are held back; bytes that can no longer become one are emitted as U+FFFD.
    With `stop` (one string or several), text that may be the start of a stop string is held back
    too. When one is complete, the text before it is emitted, nothing after it is, and `stopped` is
    true. If several match, the first completed counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop=()):
        self._token_bytes = tokenizer.token_bytes
        self._stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in self._stops:
            raise ValueError("a stop string is empty: leave it out")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this id makes certain, often empty."""
        return self._emit(self._utf8.decode(self._token_bytes(token)), final=False)

    def flush(self) -> str:
        """The text held back so far; the stream is over."""
        return self._emit(self._utf8.decode(b"", final=True), final=True)

    def _emit(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        # (end, start) of the stop strings found. The earliest end counts, so that the answer does
        # not depend on how the text was cut into tokens.
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        if final:
            return text
        cut = len(text) - self._held_length(text)
        self._held = text[cut:]
        return text[:cut]

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(len(text), longest), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0
