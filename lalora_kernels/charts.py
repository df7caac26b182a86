"""Charts as SVG text for a page of one file: colours by CSS class, so that they follow light and dark; no script.

Sizes are in the drawing's own units, about CSS pixels on a phone; a page shows it at most half as large again.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
COLORS = 8  # CSS classes c0 … c7, each with its own dash pattern
MARKED = 60  # points up to which each has a dot and a tooltip
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line: its name in the legend (None: not there), (x, y) points, its CSS classes, an optional band (low, high)
    around it at the same x."""

    name: str | None
    points: Sequence[Point]
    style: str = "c0"
    band: Sequence[Point] = ()


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    show: Callable[[float], str] = "{:.2f}".format,
    levels: Sequence[tuple[str, float]] = (),
    from_zero: bool = True,
) -> str:
    """A figure: drawing, legend and caption. ``levels`` are dotted lines across, by name; ``show`` writes a y."""
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for pair in line.band for y in pair]
    ys += [level for _, level in levels]
    xs = [x for line in lines for x, _ in line.points]
    x_ticks = ticks(min(xs, default=0), max(xs, default=1), 6, whole=True)
    y_ticks = ticks(min([0.0, *ys]) if from_zero else min(ys, default=0), max(ys, default=1), 5)
    X = _scale(x_ticks[0], max(x_ticks[-1], max(xs, default=1)), LEFT, WIDTH - RIGHT)
    Y = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        *(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{Y(t):.1f}" y2="{Y(t):.1f}"/>'
          f'<text x="{LEFT - 6}" y="{Y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in y_ticks),
        *(f'<text x="{X(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>' for t in x_ticks),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>',
    ]  # fmt: skip
    for _, level in levels:
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{Y(level):.1f}" y2="{Y(level):.1f}"/>')
    for line in lines:
        parts += _drawn(line, X, Y, x_label, show)
    legend = [(f"line {line.style}", line.name) for line in lines if line.name is not None]
    legend += [("level", name) for name, _ in levels]
    return figure(title, y_label, f"0 0 {WIDTH} {HEIGHT}", "".join(parts), legend)


def _drawn(line: Line, X: Callable, Y: Callable, x_label: str, show: Callable[[float], str]) -> Iterable[str]:
    if line.band:
        low = [f"{X(x):.1f},{Y(pair[0]):.1f}" for (x, _), pair in zip(line.points, line.band)]
        high = [f"{X(x):.1f},{Y(pair[1]):.1f}" for (x, _), pair in zip(line.points, line.band)]
        yield f'<polygon class="band {line.style}" points="{" ".join([*low, *reversed(high)])}"/>'
    path = " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in line.points)
    yield f'<polyline class="line {line.style}" points="{path}"/>'
    if len(line.points) <= MARKED and line.name is not None:
        for x, y in line.points:
            told = html.escape(f"{line.name}: {x_label} {x:g}, {show(y)}")
            place = f'cx="{X(x):.1f}" cy="{Y(y):.1f}" r="2.5"'
            yield f'<circle class="dot {line.style}" {place}><title>{told}</title></circle>'


def bar_chart(title: str, rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], y_label: str) -> str:
    """Rows of stacked bars, one piece a name, lengths on one scale."""
    height, gap = 18, 8
    longest = max((sum(pieces) for _, pieces in rows), default=0) or 1
    span = WIDTH - LEFT - RIGHT - 40
    parts = []
    for i, (name, pieces) in enumerate(rows):
        y, x = TOP + i * (height + gap), float(LEFT)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>')
        for j, piece in enumerate(pieces):
            wide = span * piece / longest
            told = html.escape(f"{name}, {names[j]}: {piece:g}")
            parts.append(
                f'<rect fill="{hue(j, len(names))}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{height}">'
                f"<title>{told}</title></rect>"
            )
            x += wide
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{sum(pieces):g}</text>')
    box = f"0 0 {WIDTH} {2 * TOP + len(rows) * (height + gap)}"
    few = [(hue(j, len(names)), name) for j, name in enumerate(names)] if len(names) <= 20 else []
    return figure(title, y_label, box, "".join(parts), few)


def hue(i: int, count: int) -> str:
    """The colour of piece ``i``: hues around the circle, light and dark by turns, readable on either ground."""
    return f"hsl({360 * i / max(count, 1):.0f} 60% {(45, 62)[i % 2]}%)"


def figure(title: str, label: str, box: str, drawing: str, legend: Sequence[tuple[str, str]]) -> str:
    """An accessible <figure>; ``legend`` holds (CSS classes or a colour, name)."""
    keys = "".join(f"<li>{_key(style)}{html.escape(name)}</li>" for style, name in legend)
    return (
        f"<figure><figcaption>{html.escape(title)} <small>{html.escape(label)}</small></figcaption>"
        f'<svg viewBox="{box}" role="img" aria-label="{html.escape(title)}; the numbers stand in the tables below">'
        f"{drawing}</svg>" + (f'<ul class="legend">{keys}</ul>' if keys else "") + "</figure>"
    )


def _key(style: str) -> str:
    if style.startswith("hsl"):
        drawing = f'<rect width="24" height="12" fill="{style}"/>'
    else:
        drawing = f'<line class="{style}" x1="0" x2="24" y1="6" y2="6"/>'
    return f'<svg class="key" viewBox="0 0 24 12" aria-hidden="true">{drawing}</svg>'


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers, at least two and about ``most``, that begin at or below ``low`` and end at or above ``high``."""
    if high <= low:
        high = low + 1
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        if (high - low) / (factor * step) <= most:
            break
    step *= factor
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if whole else math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)
