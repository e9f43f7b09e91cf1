"""Tiles of `up` and `down` of moe (see moe.py), by kind of weights and rows of an expert.

UP: BM, BN, BK, warps, stages, SWAP, SPLIT; DOWN, whose BM is that of the route: BN, BK, warps,
stages, SWAP.
"""

from __future__ import annotations

from ..launch import cdiv, get_config, power_of_two
from .moe_values import Weights

UP = {
    ("plain", 16): [
        (16, 64, 128, 4, 4, 1, 1),
        (16, 64, 64, 4, 4, 1, 1),
        (16, 32, 128, 2, 4, 1, 1),
        (16, 32, 64, 2, 4, 1, 1),
    ],
    ("plain", 32): [(32, 128, 64, 4, 4, 1, 1), (32, 64, 64, 4, 4, 1, 1), (32, 64, 64, 4, 3, 1, 1)],
    ("plain", 128): [
        (128, 128, 64, 8, 4, 0, 1),
        (128, 128, 64, 8, 3, 0, 1),
        (64, 128, 64, 4, 3, 0, 1),
        (64, 128, 64, 4, 2, 0, 1),
        (128, 64, 64, 8, 3, 0, 1),
        (64, 64, 32, 4, 3, 0, 1),
    ],
    ("words", 16): [
        (16, 128, 128, 8, 3, 1, 1),
        (16, 64, 256, 4, 3, 1, 1),
        (16, 64, 128, 4, 4, 1, 1),
        (16, 64, 128, 4, 3, 1, 2),
        (16, 32, 128, 2, 3, 1, 1),
    ],
    ("words", 32): [
        (32, 128, 128, 8, 3, 1, 1),
        (32, 128, 128, 4, 3, 1, 1),
        (32, 128, 128, 8, 2, 1, 1),
    ],
    ("words", 128): [
        (128, 128, 128, 8, 3, 1, 1),
        (64, 128, 128, 8, 3, 1, 1),
        (64, 128, 128, 8, 2, 1, 1),
        (32, 128, 128, 8, 2, 1, 1),
    ],
    ("bytes", 16): [(16, 64, 32, 4, 2, 0, 1)],
    ("bytes", 32): [(32, 64, 32, 4, 2, 0, 1)],
    ("bytes", 128): [(64, 64, 32, 4, 2, 0, 1)],
}
DOWN = {
    ("plain", 16): [(64, 128, 4, 4, 1), (64, 64, 4, 4, 1), (32, 128, 2, 4, 1), (64, 64, 4, 3, 1)],
    ("plain", 32): [(128, 64, 4, 4, 1), (64, 64, 4, 4, 1), (64, 64, 4, 3, 1)],
    ("plain", 128): [
        (256, 64, 8, 4, 0),
        (256, 64, 8, 3, 0),
        (128, 64, 8, 3, 0),
        (128, 32, 8, 3, 0),
    ],
    ("words", 16): [
        (128, 128, 4, 3, 1),
        (64, 256, 4, 4, 1),
        (64, 128, 4, 4, 1),
        (32, 128, 2, 4, 1),
    ],
    ("words", 32): [(128, 128, 8, 3, 1), (128, 128, 4, 3, 1), (64, 128, 4, 2, 1)],
    ("words", 128): [(128, 128, 8, 3, 1), (128, 128, 8, 2, 1), (64, 128, 4, 2, 1)],
    ("bytes", 16): [(64, 32, 4, 2, 0)],
    ("bytes", 32): [(64, 32, 4, 2, 0)],
    ("bytes", 128): [(64, 32, 4, 2, 0)],
}


def _tiles(table: dict, w: Weights, rows: int, inner: int) -> list[dict]:
    """The candidates for so many rows of an expert; BK of words divides the inner dim."""
    names = ["BN", "BK", "num_warps", "num_stages", "SWAP", "SPLIT"]
    if table is UP:
        names.insert(0, "BM")
    height = next(h for h in (16, 32, 128) if rows <= h or h == 128)
    found = [dict(zip(names, tile, strict=False)) for tile in table[w.kind, height]]
    return [tile for tile in found if not w.J or inner % tile["BK"] == 0]


def load_of(n: int, E: int) -> tuple[str, int]:
    """-> a key for tiles: how many pairs, if they are few, or rows of an expert; and those rows."""
    if n <= E:
        return f"pairs~{power_of_two(n)}", 1
    rows = power_of_two(cdiv(n, E))
    return f"rows~{rows}", rows


def up_tile(w: Weights, d: int, I: int, key: str, rows: int, x, quant: bool = False) -> dict:
    found = _tiles(UP, w, rows, d)
    if quant and rows > 16:
        # Other tiles round h by way of fp32 sums, gigabytes for long prompts
        found = [tile for tile in found if tile["BN"] % 128 == 0] or found
    return get_config("moe_up", f"{w.name} d{d} I{I} {key}" + " quant" * quant, found, x)


def down_tile(w: Weights, I: int, O: int, BM: int, key: str, x, transposed: bool = False) -> dict:
    name = f"{w.name} {I}x{O} BM{BM} {key}" + " transposed" * transposed
    return get_config("moe_down", name, _tiles(DOWN, w, BM, I), x)
