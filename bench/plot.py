"""A bar chart as SVG text, so that plots need no package."""

from __future__ import annotations

from html import escape


def bars(title: str, values: dict[str, float], width: int = 640) -> str:
    """Horizontal bars, one per value, with a line at 1."""
    left, step, top = 240, 28, 48
    scale = (width - left - 70) / max([1.0, *values.values()])
    lines = [f'<text x="12" y="26" font-weight="bold">{escape(title)}</text>']
    for i, (name, value) in enumerate(values.items()):
        y = top + i * step
        lines += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="20" fill="#4d6bfe"/>',
            f'<text x="{left + value * scale + 6:.1f}" y="{y + 15}">{value:.1f}</text>',
        ]
    height = top + len(values) * step + 12
    lines.append(
        f'<line x1="{left + scale:.1f}" x2="{left + scale:.1f}" y1="{top - 6}" y2="{height - 12}" stroke="#999"/>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(lines)}</svg>\n'
    )
