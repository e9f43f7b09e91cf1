"""The embedded model is as recorded: small, with every layer kind, better than the dense model."""

from __future__ import annotations

import json

import torch

from bench.embedded import BATCH, LENGTH, TINY
from bench.record import RESULTS
from checkpoint import load
from model import ModelArgs
from training.dataset import prepare
from training.evaluation import held_out_loss
from training.flags import ROOT

RECORD = json.loads((RESULTS / "embedded.json").read_text())


def test_it_has_every_layer_kind_and_fits_12_mb():
    args = ModelArgs.from_json(TINY)
    assert set(args.compress_ratios) == {0, 4, 128} and args.n_mtp_layers == 1
    assert 0 < args.n_hash_layers < args.n_layers
    assert args.index_topk < 1024 // 4 and args.max_seq_len >= 2048 and args.act_quant
    assert {**vars(args), "act_quant": False} == vars(ModelArgs.tiny())
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000


def test_it_is_stored_in_the_released_quantised_layout():
    from safetensors import safe_open

    with safe_open(str(TINY / "model.safetensors"), "pt") as file:
        names = file.keys()
        dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    assert dtypes["layers.2.ffn.experts.3.w1.weight"] == "I8"
    assert dtypes["layers.2.ffn.experts.3.w1.scale"] == "F8_E8M0"
    assert dtypes["layers.2.attn.wq_a.weight"] == "F8_E4M3"
    assert dtypes["embed.weight"] == "BF16"


def test_the_recorded_loss_is_this_models_on_text_held_out(tmp_path):
    ids = prepare((ROOT / "data" / "shakespeare.txt").read_text(), tmp_path, 0, str(TINY)).held_out
    assert len(ids) == RECORD["held_out_tokens"]
    model = load(TINY, dtype=torch.float32)
    loss = held_out_loss(model, ids[: BATCH * (LENGTH + 1)], LENGTH, BATCH, bos=0)
    assert abs(loss / RECORD["first_rows_nats_per_token"] - 1) < 1e-3


def test_it_is_no_worse_than_the_dense_yardstick():
    dense = json.loads((RESULTS / "dense.json").read_text())
    assert dense["tokens"] == RECORD["training"]["tokens"]
    assert dense["active_parameters"] >= RECORD["active_parameters"]
    for key in ("held_out_nats_per_char", "act_quant_held_out_nats_per_char"):
        assert RECORD[key] <= dense["held_out_nats_per_char"]
