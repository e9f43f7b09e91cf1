"""Packed documents do not see each other: everything with a memory restarts at each one.

That is positions, window, compressors, indexer and MTP.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import ops
from model import Transformer
from testing import random_model, random_tokens, rms, small

DOCS = {
    "many": (5, 130, 1, 3, 260, 4, 133, 2),
    "aligned": (128, 4, 256, 132),
    "long first": (391, 127, 6),
}
FORMS = ("reference", "opaque")


@functools.cache
def model_of(form: str) -> Transformer:
    return random_model(small(swiglu_limit=1.5), ops={name: form for name in ops.OPS})


def pack(lengths, pad=(0, 0), seed=0):
    """Random tokens and doc_ids [1, S], with padding before and after; each document's slice."""
    ids = [torch.full((n,), 3 * i) for i, n in enumerate(lengths)]
    before, after = (torch.full((n,), -1) for n in pad)
    doc_ids = torch.cat([before, *ids, after])[None]
    tokens = random_tokens(*doc_ids.shape, seed=seed).masked_fill(doc_ids < 0, -1)
    starts = [pad[0] + sum(lengths[:i]) for i in range(len(lengths))]
    spans = [slice(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    return tokens, doc_ids, spans


def shift(tokens):
    """The next token at every position; some token at the last."""
    return F.pad(tokens[:, 1:], (0, 1), value=7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pad", ((0, 0), (3, 0), (0, 9), (130, 1)))
@pytest.mark.parametrize("docs", DOCS)
@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(docs, pad, form):
    model = model_of(form)
    tokens, doc_ids, spans = pack(DOCS[docs], pad)
    logits, hidden = model(tokens, doc_ids=doc_ids, return_hidden=True)
    mtp_logits, _ = model.mtp(hidden, shift(tokens), doc_ids=doc_ids)
    for span in spans:
        alone, hidden_alone = model(tokens[:, span], return_hidden=True)
        assert rms(logits[:, span], alone) <= 1e-5
        n = alone.shape[1] - 1  # the last slot of a packed document sees no next token
        if n:
            mtp_alone = model.mtp(hidden_alone, shift(tokens[:, span]))[0]
            assert rms(mtp_logits[:, span][:, :n], mtp_alone[:, :n]) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_crosses_documents(form):
    """Of the logits of one document by the embeddings of the others: exactly zero, MTP included."""
    model = model_of(form)
    tokens, doc_ids, spans = pack(DOCS["many"], (2, 3))
    embedded = []
    hook = model.embed.register_forward_hook(
        lambda module, inputs, output: embedded.append(output.requires_grad_())
    )
    logits, hidden = model(tokens, doc_ids=doc_ids, return_hidden=True)
    mtp_logits, _ = model.mtp(hidden, shift(tokens.clamp(min=0)), doc_ids=doc_ids)
    hook.remove()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    for span in spans:
        for out in (logits, mtp_logits):
            g, g_next = torch.autograd.grad(
                (out * weight)[:, span].sum(), embedded, retain_graph=True, allow_unused=True
            )
            assert g[:, span].any()
            g[:, span] = 0
            assert not g.any()
            if out is mtp_logits:  # slot i of the next tokens holds token i + 1
                g_next[:, span.start : span.stop - 1] = 0
                assert not g_next.any()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_replacing_a_document_moves_no_other(form):
    model = model_of(form)
    tokens, doc_ids, spans = pack(DOCS["many"])
    before = model(tokens, doc_ids=doc_ids)
    for changed in (0, 4, 7):
        other = tokens.clone()
        other[:, spans[changed]] = (other[:, spans[changed]] + 11) % 256
        after = model(other, doc_ids=doc_ids)
        for i, span in enumerate(spans):
            difference = rms(after[:, span], before[:, span])
            assert difference > 0.1 if i == changed else difference <= 1e-6


@torch.no_grad()
def test_one_document_equals_no_doc_ids():
    model = model_of("reference")
    tokens, doc_ids, _ = pack((300,))
    assert rms(model(tokens, doc_ids=doc_ids), model(tokens)) <= 1e-6


@torch.no_grad()
def test_rows_are_packed_independently():
    model = model_of("reference")
    rows = [pack(DOCS["many"]), pack((7, 500, 31), seed=1)]
    tokens = torch.cat([row[0] for row in rows])
    doc_ids = torch.cat([row[1] for row in rows])
    logits = model(tokens, doc_ids=doc_ids)
    for i, (row_tokens, row_ids, _) in enumerate(rows):
        assert rms(logits[i], model(row_tokens, doc_ids=row_ids)[0]) <= 1e-5
