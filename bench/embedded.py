"""The embedded model judged on the text it was never trained on.

    python train_step.py --config tiny --steps 1000 --batch 4 --seq-len 1024 --lr 6e-3 --index-loss 1 --out assets/tiny --experts fp4 --linears fp8 --json
    python -m bench.embedded [REPORT.json]      records bench/results/embedded.json

The first command makes the model; REPORT.json is what it printed. Without it the training facts of the last record are kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench.dense import active_parameters
from bench.record import RESULTS, record
from checkpoint import load
from generate import ROOT
from tools.stats import choose_threads
from training.dataset import HELD_OUT, prepare, read_text
from training.evaluation import held_out_loss

TINY, LENGTH, BATCH = ROOT / "assets" / "tiny", 1024, 4


@torch.no_grad()
def draft_acceptance(model, ids, rows: int = 8) -> float:
    """How often the MTP block's most likely token is the backbone's, on held-out text, given the same tokens before."""
    tokens = torch.from_numpy(ids[: rows * LENGTH].astype("int64")).view(rows, LENGTH)
    logits, hidden = model(tokens, return_hidden=True)
    draft, _ = model.mtp(hidden[:, :-1], tokens[:, 1:])
    return float((draft.argmax(-1) == logits[:, 1:].argmax(-1)).float().mean())


def main(argv: list[str]) -> int:
    choose_threads(1 << 28)
    old = RESULTS / "embedded.json"
    if argv:
        printed = json.loads(Path(argv[0]).read_text().splitlines()[-1])
        training = {
            "command": __doc__.splitlines()[2].strip(),
            "minutes": printed["seconds"] / 60,
            **{
                key: printed[key]
                for key in ("steps", "tokens", "threads", "memory_bytes", "held_out_nats_per_char")
            },
        }
    else:
        training = json.loads(old.read_text())["training"]
    data = prepare(
        read_text([str(ROOT / "data" / "shakespeare.txt")]), ROOT / ".cache", 0, str(TINY)
    )
    ids, chars, bos = data.held_out, data.held_out_chars, data.tokenizer.bos_id
    result = {
        "training": training,
        "held_out_share": HELD_OUT,
        "held_out_chars": chars,
        "held_out_tokens": len(ids),
        "bytes": sum(file.stat().st_size for file in TINY.iterdir()),
    }
    for name, act_quant in (("", False), ("act_quant_", True)):
        model = load(TINY, dtype=torch.float32, act_quant=act_quant)
        loss = held_out_loss(model, ids, LENGTH, BATCH, bos)
        result[f"{name}held_out_nats_per_token"], result[f"{name}held_out_nats_per_char"] = (
            loss,
            loss * len(ids) / chars,
        )
    result["first_rows_nats_per_token"] = held_out_loss(
        model, ids[: BATCH * (LENGTH + 1)], LENGTH, BATCH, bos
    )
    result["draft_acceptance"], result["active_parameters"] = (
        draft_acceptance(model.eval(), ids),
        active_parameters(model),
    )
    result["parameters"] = sum(p.numel() for p in model.parameters())
    record("embedded", result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
