"""A bar chart as SVG text, so that plots need no package."""

from __future__ import annotations

from html import escape

LEFT = 240  # width of the labels
STEP = 28  # height of a row
TOP = 48  # height of the title


def bars(title: str, values: dict[str, float], width: int = 640) -> str:
    """Horizontal bars, one per value, with a line at 1."""
    scale = (width - LEFT - 70) / max([1.0, *values.values()])
    height = TOP + len(values) * STEP + 12
    lines = [f'<text x="12" y="26" font-weight="bold">{escape(title)}</text>']
    for i, (name, value) in enumerate(values.items()):
        y, length = TOP + i * STEP, value * scale
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="20" fill="#4d6bfe"/>',
            f'<text x="{LEFT + length + 6:.1f}" y="{y + 15}">{value:.1f}</text>',
        ]
    one = f"{LEFT + scale:.1f}"
    lines.append(f'<line x1="{one}" x2="{one}" y1="{TOP - 6}" y2="{height - 12}" stroke="#999"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(lines)}</svg>\n'
    )
