"""A cast model is the model that load(dtype=...) gives; packed weights are not cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint import load, save
from model import ModelArgs, Transformer
from testing import random_model, random_tokens

TINY = Path(__file__).resolve().parent.parent.parent / "assets" / "tiny"


def equal(model: Transformer, other: Transformer) -> bool:
    theirs = other.state_dict()
    return all(
        t.dtype == theirs[name].dtype and torch.equal(t, theirs[name])
        for name, t in model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_cast_keeps_in_fp32_what_load_keeps(dtype):
    loaded, model = load(TINY, dtype=dtype), load(TINY, dtype=torch.float32)
    for args in ((dtype,), ("cpu", dtype), (torch.empty(0, dtype=dtype),)):
        assert equal(load(TINY, dtype=torch.float32).to(*args), loaded)
    assert not equal(model, loaded)
    short = {torch.bfloat16: model.bfloat16, torch.float16: model.half}[dtype]
    assert equal(short(), loaded) and torch.equal(model.freqs, loaded.freqs)
    tokens = random_tokens(1, 9)
    assert torch.equal(model(tokens), loaded(tokens))


def test_casts_to_wider_types_are_of_all_parameters():
    model = random_model().double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model = random_model().bfloat16().float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("formats", ({"experts": "fp4"}, {"linears": "fp8"}, {"experts": "fp8"}))
def test_casts_of_packed_weights_are_refused_and_change_nothing(tmp_path, formats):
    save(random_model(), tmp_path, **formats)
    model, same = (load(tmp_path, weights="native") for _ in range(2))
    for cast in (model.half, model.float, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match="packed .* cannot be cast: .*dequant"):
            cast()
    assert equal(model.to("cpu"), same)


def test_a_model_loads_onto_the_meta_device():
    model = load(TINY, device="meta")
    assert all(p.is_meta for p in model.parameters())
    args = ModelArgs.from_json(TINY)
    assert model.args.dim == args.dim and model(random_tokens(1, 3).to("meta")).shape[1] == 3
