"""Draws line charts as inline SVG, whose colors come from the page, so that they follow its theme.

Colors are names of CSS custom properties (``"train"`` is ``var(--train)``). Text and grid lines have the classes
``tick``, ``axis`` and ``grid`` of the report's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

__all__ = ["Series", "line_chart", "ticks"]

_MOST_POINTS = 400
_MOST_TOOLTIPS = 120


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: the line's name, for tooltips.
        x, y: the points, all finite, with x ascending from 0 or more.
        color: the CSS custom property of the color.
        spread: half the height of a band around each point; None draws no band.
        faint: draw the line thin and pale, as the background of another.
        marked: draw each point, for values that are few and far between.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    spread: Sequence[float] | None = None
    faint: bool = False
    marked: bool = False


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from at or below ``low`` to at or above ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - pad, high + pad) if low else (0.0, pad)
    rough = (high - low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = magnitude * next(m for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, width: int, height: int, from_zero: bool = False
) -> Markup:
    """Draws a chart, and returns an ``<svg>`` element.

    Args:
        series: the lines, later ones above earlier ones. At least one has a point.
        title: what the chart shows, for screen readers.
        x_label: the label of the horizontal axis.
        width, height: the chart's size in CSS pixels, which the page may scale.
        from_zero: start the vertical axis at 0.
    """
    drawn = [_thinned(one) for one in series if len(one.x)]
    lows = [y - s for one in drawn for y, s in zip(one.y, one.spread or [0.0] * len(one.y), strict=True)]
    highs = [y + s for one in drawn for y, s in zip(one.y, one.spread or [0.0] * len(one.y), strict=True)]
    y_ticks = ticks(0.0 if from_zero else min(lows), max(highs), max(2, height // 60))
    # The horizontal axis ends with the data; only the vertical axis is rounded outward.
    x_high = max(one.x[-1] for one in drawn) or 1.0
    x_ticks = ticks(0.0, x_high, max(4, width // 130))
    labels = [_number(value, y_ticks[1] - y_ticks[0]) for value in y_ticks]
    left, right, top, bottom = 12 + 6.2 * max(map(len, labels)), width - 12.0, 10.0, height - 36.0

    def px(x: float) -> float:
        return left + x / x_high * (right - left)

    def py(y: float) -> float:
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    name = escape(title)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{name}">']
    for value, label in zip(y_ticks, labels, strict=True):
        y = py(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", left - 6, f"{y + 4:.1f}", "end", label))
    for value in x_ticks:
        if value <= x_high:
            label = _number(value, x_ticks[1] - x_ticks[0])
            parts.append(_text("tick", px(value), f"{bottom + 16:.1f}", "middle", label))
    parts.append(_text("axis", right, height - 4, "end", escape(x_label)))
    for one in drawn:
        parts.extend(_line(one, [px(x) for x in one.x], py))
    parts.append("</svg>")
    return Markup("".join(parts))


def _text(kind: str, x: float, y: object, anchor: str, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _line(one: Series, xs: Sequence[float], py: Callable[[float], float]) -> list[str]:
    color = f"var(--{one.color})"
    parts = []
    if one.spread is not None:
        upper = [f"{x:.1f},{py(y + s):.1f}" for x, y, s in zip(xs, one.y, one.spread, strict=True)]
        lower = [f"{x:.1f},{py(y - s):.1f}" for x, y, s in zip(xs, one.y, one.spread, strict=True)]
        points = " ".join(upper + lower[::-1])
        parts.append(f'<polygon points="{points}" fill="{color}" opacity="0.13"/>')
    style = 'stroke-width="1" opacity="0.45"' if one.faint else 'stroke-width="2"'
    points = " ".join(f"{x:.1f},{py(y):.1f}" for x, y in zip(xs, one.y, strict=True))
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="{color}" {style} '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )
    visible = one.marked or len(xs) == 1
    if one.faint and not visible:
        return parts
    start, end = (
        ('<circle class="point"', f'r="4" fill="{color}"')
        if visible
        else ("<circle", 'r="7" fill="transparent"')
    )
    for index in range(0, len(xs), max(1, math.ceil(len(xs) / _MOST_TOOLTIPS))):
        tooltip = f"<title>{escape(one.label)}: {one.y[index]:.4g} at {one.x[index]:,.0f}</title>"
        parts.append(f'{start} cx="{xs[index]:.1f}" cy="{py(one.y[index]):.1f}" {end}>{tooltip}</circle>')
    return parts


def _thinned(one: Series) -> Series:
    """The same line with at most `_MOST_POINTS` points, each the mean of its neighbors."""
    size = math.ceil(len(one.x) / _MOST_POINTS)
    if size <= 1:
        return one

    def means(values: Sequence[float]) -> list[float]:
        return [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]

    return replace(one, x=means(one.x), y=means(one.y), spread=one.spread and means(one.spread))


def _number(value: float, step: float) -> str:
    """A tick's label, with just enough digits to tell it from its neighbors."""
    if value == 0:
        return "0"
    if abs(step) < 1e-3 or abs(value) >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    if abs(value) >= 10_000 and step >= 100:
        return f"{value / 1000:.10g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    # a step of 0.25 needs its second digit
    if decimals < 6 and round(step, decimals) != round(step, decimals + 1):
        decimals += 1
    return f"{value:,.{decimals}f}".replace("-", "−")
