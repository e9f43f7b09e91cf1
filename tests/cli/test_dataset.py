"""Contracts of dataset.py: text to documents, to tokens on disk, to packed rows."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tokenizer import load_tokenizer
from training import dataset as D
from training.flags import ROOT

TEXT = (ROOT / "data" / "shakespeare.txt").read_text()


def test_the_held_out_tail_is_never_trained_on():
    trained, held_out = D.split(TEXT)
    assert (
        trained + held_out == TEXT
        and 0.049 < len(held_out) / len(TEXT) < 0.051
        and trained.endswith("\n")
    )


@pytest.mark.parametrize("text", ["words " * 1000, "x" * 6000, "a line\n" + "words " * 1000])
def test_a_text_of_long_lines_is_cut_where_it_must_be(text):
    trained, held_out = D.split(text)
    assert (
        trained + held_out == text
        and abs(len(held_out) / len(text) - 0.05) < 0.01
        and (trained.endswith(" ") or " " not in text)
    )


def test_a_vocabulary_is_fitted_to_lines_of_any_length(tmp_path, monkeypatch):
    monkeypatch.setattr(D, "MAX_PIECE", 1000)
    D.train_tokenizer(TEXT[:60_000].replace("\n", " "), tmp_path, 512)
    assert load_tokenizer(tmp_path).vocab_size == 512


def test_a_vocabulary_round_trips_and_documents_stand_between_bos_and_eos(tmp_path):
    text = TEXT[:60_000] + "\n\n\n\n\nA second document, with \ttabs  and  spaces.\n"
    D.train_tokenizer(text, tmp_path, 512)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 512 and tokenizer.bos_id == 0 and tokenizer.eos_id == 1
    first, second = D.tokenize(text, tokenizer)
    for ids in (first, second):
        assert ids[0] == 0 and ids[-1] == 1 and (ids[1:-1] > 1).all()
    assert (
        tokenizer.decode(second[1:-1].tolist()) == "A second document, with \ttabs  and  spaces.\n"
    )


def test_bytes_round_trip():
    tokenizer = load_tokenizer(D.BYTES)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (256, 0, 1)
    assert all(tokenizer.token_bytes(byte) == bytes([byte]) for byte in range(2, 256))
    text = "naïve  tabs\t\tand \r\n\n lines, 日本語 \x7f\n"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.encode("a", bos=True) == [0, 97]
    assert tokenizer.encode("\0a\1") == [97]  # no BOS or EOS


def test_files_and_folders_are_read_in_order_as_documents(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (
        ("a.txt", "one\n"),
        ("b/c.md", "\n\ntwo\n\n"),
        ("b/ignored.png", "no"),
        ("d.txt", "three"),
    ):
        (tmp_path / name).write_text(text)
    text = D.read_text([str(tmp_path), str(tmp_path / "a.txt")])
    assert [document.strip("\n") for document in text.split(D.GAP)] == [
        "one",
        "two",
        "three",
        "one",
    ]


def test_tokens_are_cached_by_text_and_vocabulary(tmp_path, monkeypatch):
    text = TEXT[:50_000]
    first = D.prepare(text, tmp_path, 256)
    assert first.source == D.BYTES and isinstance(first.train, np.memmap) and first.train[0] == 0
    trained, held_out = D.split(text)
    assert len(first.train) == len(
        np.concatenate(list(D.tokenize(trained, load_tokenizer(D.BYTES))))
    ) and first.held_out_chars == len(held_out)
    assert bytes(first.held_out[1:-1].astype(np.uint8)).decode() == held_out.strip("\n") + "\n"
    monkeypatch.setattr(D, "tokenize", lambda *args: pytest.fail("tokenized again"))
    assert D.prepare(text, tmp_path, 256).folder == first.folder
    with pytest.raises(pytest.fail.Exception):
        D.prepare(text + "more\n", tmp_path, 256)
    assert os.listdir(tmp_path) == [first.folder.name]  # what failed left nothing


def test_a_given_vocabulary_is_used(tmp_path):
    data = D.prepare(TEXT[:50_000], tmp_path, 1024, str(ROOT / "assets" / "tiny"))
    assert data.source == ROOT / "assets" / "tiny" and data.tokenizer.vocab_size == 1024
    assert data.tokenizer.decode(data.train[1:40].tolist()) in TEXT


def test_names_of_special_tokens_in_a_text_are_text_unless_asked_for(tmp_path):
    tiny = str(ROOT / "assets" / "tiny")
    line = "He wrote <｜end▁of▁sentence｜> and <｜User｜> in a book.\n"
    text = line * 400
    plain = D.prepare(text, tmp_path, 1024, tiny)
    special = D.prepare(text, tmp_path, 1024, tiny, special=True)
    assert plain.folder != special.folder
    ends, users = plain.tokenizer.eos_id, plain.tokenizer.token_id("<｜User｜>")
    assert list(plain.train).count(ends) == 1 and users not in plain.train
    assert list(special.train).count(ends) == 1 + list(special.train).count(users) > 300
    decoded = plain.tokenizer.decode(plain.train[1:-1].tolist())
    assert decoded == special.tokenizer.decode(special.train[1:-1].tolist()) in text + line


def test_a_byte_order_mark_is_no_text_and_other_ends_of_lines_are(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028two\ftwo".encode())
    assert D.read_text([str(tmp_path / "a.txt")]) == "one\u2028two\ftwo\n"


def stream(count: int) -> np.ndarray:
    """Distinct ids, but for a BOS at every 50th place."""
    ids = np.arange(5, 5 + count, dtype=np.uint32)
    ids[::50] = 0
    return ids


@pytest.mark.parametrize("count, length", ((1000, 33), (990, 1), (1001, 100), (200, 100)))
def test_an_epoch_takes_every_row_once(count, length):
    ids = np.arange(5, 5 + count, dtype=np.uint32)
    rows = D.Rows(ids, length, bos=0, seed=3)
    seen = {}
    for epoch in range(3):
        tokens = rows(range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch))[0].flatten()
        assert len(tokens.unique()) == len(tokens) == rows.per_epoch * length > count - 2 * length
        seen[epoch] = tokens
    assert rows.per_epoch == 1 or not torch.equal(seen[0], seen[1])
    assert (
        length == 1
        or not torch.equal(seen[0].sort().values, seen[1].sort().values)
        or not torch.equal(seen[0].sort().values, seen[2].sort().values)
    )


def test_a_row_depends_on_its_number_and_the_seed_alone():
    ids = stream(2000)
    one = D.Rows(ids, 40, 0, 1)
    other = D.Rows(ids, 40, 0, 1)
    seeded = D.Rows(ids, 40, 0, 2)
    whole = one(range(120))[0]
    for row in (119, 3, 60):
        assert torch.equal(other(range(row, row + 1))[0][0], whole[row])
    assert not torch.equal(seeded(range(120))[0], whole)


def test_documents_are_set_apart_and_their_ends_have_no_target():
    tokens, targets, docs = D.Rows(stream(2000), 120, 0, 0)(range(8))
    assert (
        tokens.shape == targets.shape == docs.shape == (8, 120)
        and tokens.dtype == targets.dtype == docs.dtype == torch.int64
    )
    starts = tokens == 0
    assert (
        starts.sum() > 8
        and torch.equal(docs.diff(dim=1) == 1, starts[:, 1:])
        and (docs.diff(dim=1) >= 0).all()
    )
    follows = tokens[:, 1:]
    assert torch.equal(targets[:, :-1], torch.where(follows == 0, -1, follows))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda folder: folder / "missing.txt", "missing.txt: cannot be read"),
        (
            lambda folder: (folder / "empty.txt", (folder / "empty.txt").write_text(" \n"))[0],
            "holds no text",
        ),
        (
            lambda folder: (
                folder / "binary.txt",
                (folder / "binary.txt").write_bytes(b"\xff\xfe\x80"),
            )[0],
            "not UTF-8",
        ),
        (lambda folder: folder, "holds no .txt or .md file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, says):
    with pytest.raises(ValueError, match=says):
        D.read_text([str(make(tmp_path))])
