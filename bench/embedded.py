"""The embedded model judged on the text it was never trained on.

    python train_step.py --config tiny --steps 1000 --batch 4 --seq-len 1024 --lr 6e-3 \
        --index-loss 1 --out assets/tiny --experts fp4 --linears fp8 --json
    python -m bench.embedded [REPORT.json]      records bench/results/embedded.json

The first command makes the model; REPORT.json is its output. Without it the training facts of the
last record are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.dense import active_parameters, embedded_data
from bench.record import RESULTS, record
from checkpoint import load
from generate import ROOT
from tools.stats import choose_threads
from training.dataset import HELD_OUT
from training.evaluation import held_out_loss

TINY = ROOT / "assets" / "tiny"
LENGTH = 1024
BATCH = 4
COMMAND = (
    "python train_step.py --config tiny --steps 1000 --batch 4 --seq-len 1024 --lr 6e-3 "
    "--index-loss 1 --out assets/tiny --experts fp4 --linears fp8 --json"
)
KEPT = ("steps", "tokens", "threads", "memory_bytes", "held_out_nats_per_char")  # of the report


@torch.no_grad()
def draft_acceptance(model, ids, rows: int = 8) -> float:
    """How often the MTP block's most likely token is the backbone's, from the same tokens."""
    tokens = torch.from_numpy(ids[: rows * LENGTH].astype("int64")).view(rows, LENGTH)
    logits, hidden = model(tokens, return_hidden=True)
    draft, _ = model.mtp(hidden[:, :-1], tokens[:, 1:])
    return float((draft.argmax(-1) == logits[:, 1:].argmax(-1)).float().mean())


def training_facts(report: str | None) -> dict:
    """Of the training command's output, or of the last record."""
    if report is None:
        return json.loads((RESULTS / "embedded.json").read_text())["training"]
    printed = json.loads(Path(report).read_text().splitlines()[-1])
    facts = {key: printed[key] for key in KEPT}
    return {"command": COMMAND, "minutes": printed["seconds"] / 60, **facts}


def main(argv: list[str]) -> int:
    choose_threads(1 << 28)
    training, data = training_facts(argv[0] if argv else None), embedded_data()
    ids = data.held_out
    chars = data.held_out_chars
    bos = data.tokenizer.bos_id
    result = {
        "training": training,
        "held_out_share": HELD_OUT,
        "held_out_chars": chars,
        "held_out_tokens": len(ids),
        "bytes": sum(file.stat().st_size for file in TINY.iterdir()),
    }
    for prefix, act_quant in (("", False), ("act_quant_", True)):
        model = load(TINY, dtype=torch.float32, act_quant=act_quant)
        loss = held_out_loss(model, ids, LENGTH, BATCH, bos)
        result[f"{prefix}held_out_nats_per_token"] = loss
        result[f"{prefix}held_out_nats_per_char"] = loss * len(ids) / chars
    first_rows = ids[: BATCH * (LENGTH + 1)]
    result["first_rows_nats_per_token"] = held_out_loss(model, first_rows, LENGTH, BATCH, bos)
    result["draft_acceptance"] = draft_acceptance(model.eval(), ids)
    result["active_parameters"] = active_parameters(model)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    record("embedded", result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
