"""The scoreboard of the GPU suite: published results, the least to reach and the target, beside
what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench import gpu_models

Value = Callable[[dict], float | None]  # of {case: {"rows": {row: ...}}}


class Headline(NamedTuple):
    """A published result, the least to reach (match) and the target (beat)."""

    title: str
    published: str
    match: float
    beat: float
    value: Value
    lower: bool = False  # whether less is better

    def score(self, cases: dict) -> dict:
        try:
            value = self.value(cases)
        except (KeyError, TypeError, ZeroDivisionError):  # not measured, or failed
            value = None

        def reached(limit: float) -> bool | None:
            if value is None:
                return None
            return value <= limit if self.lower else value >= limit

        return {
            "headline": self.title,
            "published": self.published,
            "match": self.match,
            "beat": self.beat,
            "reached": value,
            "matched": reached(self.match),
            "beaten": reached(self.beat),
        }


# --------------------------------------------------------------------------------------------------
# Values: what a headline reads of the measured cases


def of(case: str, row: str, *keys: str) -> Value:
    """A number of a row, by default the milliseconds of ours."""

    def value(cases):
        found = cases[case]["rows"][row]
        for key in keys or ("ms",):
            found = found[key]
        return found

    return value


def times(case: str, row: str, over: str) -> Value:
    """How many times longer another row of the case takes."""
    return lambda cases: cases[case]["rows"][over]["ms"] / cases[case]["rows"][row]["ms"]


def hc_pre_error(cases: dict) -> float:
    """The larger error of post and comb."""
    return max(cases["G1.2"]["rows"][HC_FORWARD]["sides"]["ours"]["errors"][1:])


def sinkhorn_launches(cases: dict) -> float:
    rows = cases["G1.3"]["rows"]
    return max(rows[f"16384, {way}"]["launches"]["ours"] for way in ("forward", "backward"))


def backward_peak(cases: dict) -> float:
    """Peak memory of the attention's backward above its results."""
    ours = cases["G1.6"]["rows"][CSA_4K]["sides"]["ours"]
    return ours["peak_mb"] - ours["results_mb"]


def loss_peak(cases: dict) -> float:
    """Share of the unfused loss's peak memory."""
    sides = cases["G1.11"]["rows"]["forward and backward"]["sides"]
    return sides["ours"]["peak_mb"] / sides["eager"]["peak_mb"]


def times_transformers(cases: dict) -> float | None:
    """Beside the fastest implementation of Transformers' experts."""
    ratios = cases["G2"]["rows"][DECODE_BF16]["ratio"]
    if not ratios:
        return None
    return min(ratio for side, ratio in ratios.items() if side.startswith("transformers"))


# --------------------------------------------------------------------------------------------------
# Headlines

HC_FORWARD = "16384 x 4096, forward"
HC_BOTH = "16384 x 4096, forward and backward"
INDEXER_8K = "8192, one sample"
CSA_4K, SWA_4K, HCA_4K = (f"{kind} 4096, 64 heads" for kind in ("CSA", "SWA", "HCA"))
DECODE_BF16 = "bf16, B=1, 4k"
TRAIN_4, TRAIN_8 = list(gpu_models.TRAIN)[:2]
PEAK = ("sides", "ours", "peak_mb")


def more(title: str, published: str, match: float, beat: float, value: Value) -> Headline:
    return Headline(title, published, match, beat, value)


def less(title: str, published: str, match: float, beat: float, value: Value) -> Headline:
    return Headline(title, published, match, beat, value, lower=True)


HYPER_CONNECTIONS = (
    more("hc_post forward, times eager", "21", 21, 24, of("G1.1", HC_FORWARD, "ratio", "eager")),
    more(
        "hc_post forward and backward, times eager",
        "7",
        7,
        9,
        of("G1.1", HC_BOTH, "ratio", "eager"),
    ),
    more(
        "hc_post forward, times compiled",
        "-",
        1.0,
        1.8,
        of("G1.1", HC_FORWARD, "ratio", "compiled"),
    ),
    less("hc_pre forward 16k, ms", "0.6 in fp32", 0.6, 0.20, of("G1.2", HC_FORWARD)),
    less("hc_pre error of post and comb", "1.56e-2", 1.56e-2, 1e-4, hc_pre_error),
    more(
        "Sinkhorn forward 16k, times eager (wall)",
        "13.6",
        13.6,
        13.6,
        of("G1.3", "16384, forward", "wall_ratio", "eager"),
    ),
    more(
        "Sinkhorn backward 16k, times eager (wall)",
        "14.8",
        14.8,
        14.8,
        of("G1.3", "16384, backward", "wall_ratio", "eager"),
    ),
    less("Sinkhorn forward and backward, launches each", "1", 1, 1, sinkhorn_launches),
    more(
        "Sinkhorn forward 16k, times compiled",
        "6.3",
        1.0,
        6.3,
        of("G1.3", "16384, forward", "ratio", "compiled"),
    ),
)
INDEXER = (
    less("indexer 8k, ms", "4.58", 4.58, 1.0, of("G1.4", INDEXER_8K)),
    more("indexer 8k, times eager", "1.6", 1.6, 7, of("G1.4", INDEXER_8K, "ratio", "eager")),
    less("indexer 8k, peak MB", "774", 774, 150, of("G1.4", INDEXER_8K, *PEAK)),
    more(
        "indexer 8k, 32 samples, times a single sort",
        "2.16",
        2.16,
        4,
        of("G1.4", "8192, 32 samples", "ratio", "single sort"),
    ),
    more(
        "indexer 8k, one sample, times a single sort",
        "below 1",
        1.0,
        4,
        of("G1.4", INDEXER_8K, "ratio", "single sort"),
    ),
)
ATTENTION = (
    less("CSA forward 4k, ms", "3.16", 3.16, 0.70, of("G1.5", CSA_4K)),
    less("SWA forward 4k, ms", "0.71", 0.71, 0.20, of("G1.5", SWA_4K)),
    less("HCA forward 4k, ms", "0.85", 0.85, 0.22, of("G1.5", HCA_4K)),
    less("CSA backward 4k, ms", "16.31", 16.31, 3.0, of("G1.6", CSA_4K)),
    less(
        "CSA backward 4k beside matrix products, ms",
        "-",
        32.62,
        6.0,
        of("G1.6", CSA_4K, "ms_beside_matrix_products"),
    ),
    less("SWA backward 4k, ms", "7.65", 7.65, 0.9, of("G1.6", SWA_4K)),
    less("HCA backward 4k, ms", "11.91", 11.91, 1.0, of("G1.6", HCA_4K)),
    less("CSA backward 4k, peak MB above its results", "4295", 4295, 1100, backward_peak),
    more(
        "RoPE forward 4k, times eager",
        "2.96",
        2.96,
        2.96,
        of("G1.7", "4096 x 64 x 512", "ratio", "eager"),
    ),
    more(
        "RoPE inverse (backward) 4k, times eager",
        "2.81",
        2.81,
        2.81,
        of("G1.7", "4096 x 64 x 512, inverse", "ratio", "eager"),
    ),
    more(
        "compressor CSA, times eager", "-", 1.0, 3, of("G1.8", "CSA, 1 samples", "ratio", "eager")
    ),
)
EXPERTS = (
    more(
        "experts bf16 8k, times grouped_mm",
        "-",
        1.0,
        1.0,
        of("G1.9", "bf16, 8192 tokens", "ratio", "grouped_mm"),
    ),
    more(
        "experts fp4 B=1, percent of floor",
        "-",
        50,
        75,
        of("G1.9", "fp4, 1 tokens", "percent_of_floor"),
    ),
    *(
        more(
            f"experts B={batch}, fp4 times {form}",
            "-",
            1.0,
            target,
            times("G1.9", f"fp4, {batch} tokens", f"{form}, {batch} tokens"),
        )
        for batch in (1, 8)
        for form, target in (("fp8", 1.5), ("bf16", 3))
    ),
)
ELEMENTWISE = (
    more(
        "clamped SwiGLU forward, times eager",
        "-",
        1.0,
        4,
        of("G1.10", "swiglu, forward", "ratio", "eager"),
    ),
    more(
        "clamped SwiGLU forward, percent of floor",
        "-",
        50,
        80,
        of("G1.10", "swiglu, forward", "percent_of_floor"),
    ),
    more(
        "loss forward and backward, times unfused",
        "-",
        0.9,
        1.0,
        of("G1.11", "forward and backward", "ratio", "eager"),
    ),
    less("loss forward and backward, share of its peak", "-", 1.0, 0.35, loss_peak),
)
MODELS = (
    more(
        "decode slice bf16 B=1, percent of bandwidth",
        "-",
        25,
        50,
        of("G2", DECODE_BF16, "percent_of_floor"),
    ),
    more(
        "decode slice fp4 B=1, percent of bandwidth",
        "-",
        20,
        40,
        of("G2", "fp4, B=1, 4k", "percent_of_floor"),
    ),
    more(
        "decode slice, times our own eager",
        "10.8",
        10.8,
        10.8,
        of("G2", DECODE_BF16, "ratio", "ours, eager"),
    ),
    more("decode slice, times eager Transformers (best)", "-", 10, 20, times_transformers),
    less("decode kernels per layer", "-", 50, 25, of("G2", DECODE_BF16, "kernels_per_layer")),
    more(
        "prefill 4k, times eager Transformers",
        "-",
        1.0,
        5,
        of("G3", "4096 tokens", "ratio", "transformers grouped_mm"),
    ),
    more(
        "prefill 8k, percent of bf16 rate", "-", 20, 40, of("G3", "8192 tokens", "percent_of_floor")
    ),
    more(
        "training 4 layers, tokens/s, no communication",
        "23157",
        23157,
        35000,
        of("G4", TRAIN_4, "tokens_per_s"),
    ),
    more(
        "training, hyper-connections off, times",
        "1.04",
        1.04,
        1.04,
        of("G4", TRAIN_4, "ratio", "hyper-connections off"),
    ),
    more(
        "training 8 layers, tokens/s, no communication",
        "4600",
        4600,
        9392,
        of("G4", TRAIN_8, "tokens_per_s"),
    ),
    less("host time under offload, us", "656", 656, 100, of("G5", "host time under offload", "us")),
    less(
        "recompiles over 32 layouts", "-", 0, 0, of("G5", "training over 32 layouts", "recompiles")
    ),
)
SCOREBOARD = (*HYPER_CONNECTIONS, *INDEXER, *ATTENTION, *EXPERTS, *ELEMENTWISE, *MODELS)


# --------------------------------------------------------------------------------------------------
# The table

MARKS = {None: "", True: "yes", False: "NO"}


def cells(row: dict) -> list[str]:
    """A row of the table, of a headline's score."""
    numbers = (
        "" if row[key] is None else f"{row[key]:.4g}" for key in ("match", "beat", "reached")
    )
    marks = (MARKS[row[key]] for key in ("matched", "beaten"))
    return [row["headline"], row["published"], *numbers, *marks]


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *rest in lines:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        text.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join(text)


def extrapolated(cases: dict) -> list[str]:
    """Speeds of the whole model, computed from those of slices."""
    found = []
    for name, row in cases.get("G2", {}).get("rows", {}).items():
        if "extrapolated_flash_tokens_per_s" in row and "B=1," in name:
            speed = row["extrapolated_flash_tokens_per_s"]
            found.append(
                f"extrapolated, not measured: Flash decoding {name} {speed:.0f} tokens/s on a GPU "
                "that would hold it"
            )
    return found


def scoreboard(cases: dict, toy: bool = False) -> tuple[list[dict], str]:
    """The headlines scored, and as a table; toy sizes leave all of them open."""
    cases = {} if toy else cases
    rows = [headline.score(cases) for headline in SCOREBOARD]
    head = ["headline", "published", "match", "beat", "reached", "matched", "beaten"]
    return rows, "\n".join([aligned([head, *map(cells, rows)]), *extrapolated(cases)])
