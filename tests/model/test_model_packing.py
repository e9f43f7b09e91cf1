"""Packed documents do not see each other: positions, window, compressors, indexer and MTP restart at each one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import ops
from model import Transformer
from testing import randomize, rms, small

DOCS = {
    "many": (5, 130, 1, 3, 260, 4, 133, 2),
    "aligned": (128, 4, 256, 132),
    "long first": (391, 127, 6),
}
FORMS = ("reference", "opaque")


@functools.cache
def model_of(form: str) -> Transformer:
    return randomize(
        Transformer(small(swiglu_limit=1.5), ops={name: form for name in ops.OPS}), seed=1
    )


def pack(lengths, pad=(0, 0), seed=0):
    """Random tokens and doc_ids [1, S], with padding before and after, and the slice of each document."""
    ids = (
        [torch.full((pad[0],), -1)]
        + [torch.full((n,), 3 * i) for i, n in enumerate(lengths)]
        + [torch.full((pad[1],), -1)]
    )
    doc_ids = torch.cat(ids)[None]
    tokens = torch.randint(0, 256, doc_ids.shape, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return (
        tokens.masked_fill(doc_ids < 0, -1),
        doc_ids,
        [slice(pad[0] + e - n, pad[0] + e) for e, n in zip(ends, lengths)],
    )


def shifted(tokens):
    return F.pad(tokens[:, 1:], (0, 1), value=7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pad", ((0, 0), (3, 0), (0, 9), (130, 1)))
@pytest.mark.parametrize("docs", DOCS)
@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(docs, pad, form):
    model = model_of(form)
    tokens, doc_ids, spans = pack(DOCS[docs], pad)
    logits, hidden = model(tokens, doc_ids=doc_ids, return_hidden=True)
    mtp, streams = model.mtp(hidden, shifted(tokens), doc_ids=doc_ids)
    for span in spans:
        alone, h = model(tokens[:, span], return_hidden=True)
        assert rms(logits[:, span], alone) <= 1e-5
        n = alone.shape[1] - 1  # the last slot of a packed document sees no next token
        if n:
            assert (
                rms(mtp[:, span][:, :n], model.mtp(h, shifted(tokens[:, span]))[0][:, :n]) <= 1e-5
            )


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_crosses_documents(form):
    """Of the logits of one document with respect to the embeddings of the others: exactly zero, MTP included."""
    model = model_of(form)
    tokens, doc_ids, spans = pack(DOCS["many"], (2, 3))
    seen = []
    hook = model.embed.register_forward_hook(
        lambda module, inputs, output: seen.append(output.requires_grad_())
    )
    logits, hidden = model(tokens, doc_ids=doc_ids, return_hidden=True)
    mtp, _ = model.mtp(hidden, shifted(tokens.clamp(min=0)), doc_ids=doc_ids)
    hook.remove()
    embeddings, nexts = seen
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(logits.shape, generator=generator)
    for span in spans:
        for out in (logits, mtp):
            g_embed, g_next = torch.autograd.grad(
                (out * weight)[:, span].sum(),
                (embeddings, nexts),
                retain_graph=True,
                allow_unused=True,
            )
            assert g_embed[:, span].any()
            g_embed[:, span] = 0
            assert not g_embed.any()
            if out is mtp:  # slot i of the next tokens holds token i + 1
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
    tokens, doc_ids = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    logits = model(tokens, doc_ids=doc_ids)
    for i, (t, d, _) in enumerate(rows):
        assert rms(logits[i], model(t, doc_ids=d)[0]) <= 1e-5
