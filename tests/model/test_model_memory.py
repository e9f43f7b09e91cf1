"""At Flash's sizes no op materialises a query x key x dim tensor or scores of all heads and keys.

In either form. Prefill and training stay within 1.1 times the bf16 queries, S H D 2 bytes; decode
in a context of 1M tokens within the fp32 index scores of one token, 64 (1M / 4) 4 bytes. Shapes
are traced on fake tensors; nothing is computed.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from model import ModelArgs, Transformer

FORMS = {  # experts stay opaque: their traced form is for small models only
    "reference": {name: "opaque" if name == "moe" else "reference" for name in ops.OPS},
    "opaque": {name: "opaque" for name in ops.OPS},
}


class Largest(TorchDispatchMode):
    """The largest tensor that an operator allocates; without parameters, caches and gradients."""

    def __init__(self, model):
        super().__init__()
        self.known = {tuple(t.shape) for t in (*model.parameters(), *model.buffers())}
        self.bytes = 0
        self.description = ""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.is_view:
            return out
        inputs = {id(t.untyped_storage()) for t in tensors((args, kwargs))}
        for t in tensors(out):
            allocated = id(t.untyped_storage()) not in inputs
            if allocated and tuple(t.shape) not in self.known and t.nbytes > self.bytes:
                self.bytes = t.nbytes
                self.description = f"{op} {tuple(t.shape)} {t.dtype}"
        return out


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", (0, 4, 128))
@pytest.mark.parametrize("phase", ("train", "prefill", "decode"))
def test_no_intermediate_exceeds_the_bound(phase, ratio, form):
    args = dataclasses.replace(
        ModelArgs.flash(), n_layers=1, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(ratio,)
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            model = Transformer(args, ops=FORMS[form])
            S = 8192 if form == "opaque" else 4096
            if phase == "decode":
                model.setup_caches(1, args.max_seq_len)
            tokens = torch.zeros(1, 1 if phase == "decode" else S, dtype=torch.int64)
            with Largest(model) as largest, torch.set_grad_enabled(phase == "train"):
                if phase == "decode":
                    model(tokens, torch.zeros(1, dtype=torch.int64))
                else:
                    _, hidden = model(tokens, logits=None, return_hidden=True)
                    if phase == "train":
                        hidden.sum().backward()
    finally:
        torch.set_default_dtype(before)
    if phase == "decode":
        bound = 64 * args.max_seq_len // 4 * 4
    else:
        bound = 1.1 * S * args.n_heads * args.head_dim * 2
    assert 0 < largest.bytes <= bound, f"{largest.bytes / 1e6:.0f} MB: {largest.description}"
