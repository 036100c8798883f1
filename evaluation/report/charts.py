"""Charts as inline SVG, written by hand: no library, no script. Colours come from the style sheet by class name.

Line charts are 400 units wide, or 560 beside a text, and 236 high; the page shows a unit as about a pixel, so that letters keep
their size on a phone. Interval bars and histograms use percentages and fill whatever width there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyalign.evaluation.report.markup import number, text

HEIGHT = 236
NARROW, WIDE = 400, 560
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 42

MOST_POINTS = 300
HOVER_COLUMNS = 40


@dataclass(frozen=True)
class Line:
    """One curve. ``colour`` is a class of the style sheet: chosen, rejected, policy, plain."""

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Points:
    """Means with error bars of +- ``spread``."""

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    spread: np.ndarray


@dataclass(frozen=True)
class Frame:
    """The mapping from data to the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int

    @property
    def end(self) -> int:
        """Right edge of the plotting area."""
        return self.width - RIGHT

    def at_x(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.end - LEFT)

    def at_y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
    smooth: bool = True,
    width: int = NARROW,
) -> str:
    """A thick smoothed line over the faint raw one; ``level`` draws a dashed line at a value that means something.

    ``name`` must be unique in the page: it names the clipping path.
    """
    shown = [Line(line.label, line.colour, *thin(line.x, line.y)) for line in lines]
    centre = [smoothed(line.y) if smooth else line.y for line in shown]
    frame = _frame([line.x for line in shown], [line.y for line in shown], centre, level, width=width)
    body = [_axes(frame, x_label, y_label), _level(frame, level)]
    for line, middle in zip(shown, centre, strict=True):
        if smooth:
            body.append(_polyline(frame, line.x, line.y, f"raw {line.colour}"))
        body.append(_polyline(frame, line.x, middle, f"line {line.colour}"))
    hover = _hover(frame, shown, centre, x_label)
    summary = "; ".join(
        f"{line.label} from {number(float(middle[0]))} to {number(float(middle[-1]))}"
        for line, middle in zip(shown, centre, strict=True)
    )
    return _legend(lines) + _svg(name, frame, f"{y_label} against {x_label}: {summary}", body, hover)


def point_chart(
    name: str,
    groups: Sequence[Points],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
    width: int = NARROW,
) -> str:
    """Means with error bars, joined by thin lines; the groups stand a little apart so that no bar covers another."""
    lows, highs = [group.y - group.spread for group in groups], [group.y + group.spread for group in groups]
    frame = _frame(
        [group.x for group in groups],
        [*lows, *highs],
        [group.y for group in groups],
        level,
        width=width,
        pad_x=0.03,
        robust=False,
    )
    body = [_axes(frame, x_label, y_label), _level(frame, level)]
    for place, group in enumerate(groups):
        shift = 5 * (place - (len(groups) - 1) / 2)
        marks = []
        for x, y, spread in zip(group.x, group.y, group.spread, strict=True):
            left, middle = frame.at_x(x) + shift, frame.at_y(y)
            says = f"{group.label}, {x_label} {number(x)}: {number(y)} \u00b1 {number(spread)}"
            marks.append(
                f'<g><title>{text(says)}</title><line class="bar {group.colour}" x1="{left:.1f}" x2="{left:.1f}" '
                f'y1="{frame.at_y(y - spread):.1f}" y2="{frame.at_y(y + spread):.1f}"/>'
                f'<circle class="dot {group.colour}" cx="{left:.1f}" cy="{middle:.1f}" r="4"/></g>'
            )
        path = " ".join(f"{frame.at_x(x) + shift:.1f},{frame.at_y(y):.1f}" for x, y in zip(group.x, group.y, strict=True))
        body.append(f'<polyline class="joint {group.colour}" points="{path}"/>{"".join(marks)}')
    summary = "; ".join(f"{group.label} between {number(group.y.min())} and {number(group.y.max())}" for group in groups)
    return _legend(groups) + _svg(name, frame, f"{y_label} against {x_label}: {summary}", body, "")


def interval_row(label: str, low: float, middle: float, high: float, *, colour: str, says: str) -> str:
    """A point and its interval on a scale of 0 to 1, with the line at one half. Full width, 30 pixels high."""
    left, centre, right = (f"{100 * value:.2f}%" for value in (low, middle, high))
    return (
        f'<svg class="interval" width="100%" height="30" role="img" aria-label="{text(f"{label}: {says}")}">'
        f"<title>{text(says)}</title>"
        '<line class="scale" x1="0" x2="100%" y1="15" y2="15"/><line class="half" x1="50%" x2="50%" y1="0" y2="30"/>'
        f'<line class="span {colour}" x1="{left}" x2="{right}" y1="15" y2="15"/>'
        f'<circle class="dot {colour}" cx="{centre}" cy="15" r="6"/></svg>'
    )


def interval_scale() -> str:
    """The numbers under a stack of interval rows."""
    marks = "".join(
        f'<text x="{100 * value:.0f}%" y="14" text-anchor="{anchor}">{shown}</text>'
        for value, shown, anchor in (
            (0.0, "0", "start"),
            (0.25, ".25", "middle"),
            (0.5, "0.5", "middle"),
            (0.75, ".75", "middle"),
            (1.0, "1", "end"),
        )
    )
    return f'<svg class="ticks" width="100%" height="20" aria-hidden="true">{marks}</svg>'


def histogram(edges: Sequence[float], counts: Sequence[int], *, what: str) -> str:
    """Bars of counts between edges; full width."""
    top = max(counts) or 1
    width = 100 / len(counts)
    bars = "".join(
        f"<g><title>{text(f'{number(edges[i])} to {number(edges[i + 1])}: {count}')}</title>"
        f'<rect class="hit" x="{i * width:.2f}%" y="0" width="{width:.2f}%" height="120"/>'
        f'<rect class="column" x="{(i + 0.08) * width:.2f}%" y="{120 - 100 * count / top:.1f}" width="{0.84 * width:.2f}%" '
        f'height="{100 * count / top:.1f}"/></g>'
        for i, count in enumerate(counts)
    )
    middle = (edges[0] + edges[-1]) / 2
    labels = "".join(
        f'<text x="{x}" y="138" text-anchor="{anchor}">{number(value)}</text>'
        for x, anchor, value in (("0", "start", edges[0]), ("50%", "middle", middle), ("100%", "end", edges[-1]))
    )
    says = f"histogram of {what}: {sum(counts)} values from {number(edges[0])} to {number(edges[-1])}, at most {top} in a bin"
    return (
        f'<svg class="histogram" width="100%" height="144" role="img" aria-label="{text(says)}">'
        f'<line class="grid-line" x1="0" x2="100%" y1="20" y2="20"/><text x="0" y="14">{top:,}</text>'
        f'<line class="axis" x1="0" x2="100%" y1="120" y2="120"/>{bars}{labels}</svg>'
    )


def share_bar(share: float, says: str) -> str:
    """A plain bar of ``share`` of the width, for tables."""
    return (
        f'<svg class="share" width="100%" height="12" role="img" aria-label="{text(says)}"><title>{text(says)}</title>'
        '<rect class="rest" width="100%" height="12" rx="2"/>'
        f'<rect class="column" width="{100 * share:.1f}%" height="12" rx="2"/></svg>'
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twelfth of the curve; at the ends the window is cut, not padded."""
    half = len(values) // 24
    if half == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MOST_POINTS`` points, each the mean of equally many neighbours."""
    if len(x) <= MOST_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    sizes = np.diff(cuts)
    return np.add.reduceat(x, cuts[:-1]) / sizes, np.add.reduceat(y, cuts[:-1]) / sizes


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) inside the range, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(
    xs: Sequence[np.ndarray],
    ys: Sequence[np.ndarray],
    centre: Sequence[np.ndarray],
    level: tuple[float, str] | None,
    *,
    width: int,
    pad_x: float = 0.0,
    robust: bool = True,
) -> Frame:
    """Axes that hold every smoothed point and, of the raw ones, all but the outermost hundredth on either side."""
    every = np.concatenate(ys)
    edges = list(np.quantile(every, [0.01, 0.99] if robust else [0.0, 1.0]))
    middle = np.concatenate(centre)
    edges += [middle.min(), middle.max()] + ([level[0]] if level else [])
    low, high = min(edges), max(edges)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    x = np.concatenate(xs)
    left, right = float(x.min()), float(x.max())
    if left == right:
        left, right = left - 1, right + 1
    gap = pad_x * (right - left)
    bottom = 0.0 if 0 <= low < pad else low - pad
    return Frame((left - gap, right + gap), (float(bottom), float(high + pad)), width)


def _axes(frame: Frame, x_label: str, y_label: str) -> str:
    parts = []
    for value in nice_ticks(*frame.y):
        y = frame.at_y(value)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{frame.end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in nice_ticks(*frame.x):
        x = frame.at_x(value)
        anchor = "end" if x > frame.end - 8 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{number(value)}</text>')
    base = HEIGHT - BOTTOM
    middle_x, middle_y = (LEFT + frame.end) / 2, (TOP + base) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{frame.end}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 7}" text-anchor="middle">{text(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">{text(y_label)}</text>'
    )
    return "".join(parts)


def _level(frame: Frame, level: tuple[float, str] | None) -> str:
    if level is None:
        return ""
    y = frame.at_y(level[0])
    above = y - 5 if y - 5 > TOP + 8 else y + 13
    return (
        f'<line class="level" x1="{LEFT}" x2="{frame.end}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick level-name" x="{frame.end}" y="{above:.1f}" text-anchor="end">{text(level[1])}</text>'
    )


def _polyline(frame: Frame, x: np.ndarray, y: np.ndarray, kind: str) -> str:
    points = " ".join(f"{frame.at_x(a):.1f},{frame.at_y(b):.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{kind}" points="{points}"/>'


def _hover(frame: Frame, lines: Sequence[Line], centre: Sequence[np.ndarray], x_label: str) -> str:
    """Invisible columns that show the values there as the browser's own tooltip."""
    places = max((line.x for line in lines), key=len)
    chosen = places[np.linspace(0, len(places) - 1, min(HOVER_COLUMNS, len(places))).astype(int)]
    width = (frame.end - LEFT) / max(len(chosen), 1)
    columns = []
    for place in chosen:
        says = [f"{x_label} {number(float(place))}"]
        for line, middle in zip(lines, centre, strict=True):
            nearest = int(np.abs(line.x - place).argmin())
            says.append(f"{line.label}: {number(float(middle[nearest]))} (raw {number(float(line.y[nearest]))})")
        x = min(max(frame.at_x(float(place)) - width / 2, LEFT), frame.end - width)
        columns.append(
            f'<rect class="hit" x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{text(chr(10).join(says))}</title></rect>"
        )
    return "".join(columns)


def _legend(lines: Sequence[Line] | Sequence[Points]) -> str:
    if len(lines) < 2:
        return ""
    keys = "".join(f'<li><span class="key {line.colour}"></span>{text(line.label)}</li>' for line in lines)
    return f'<ul class="legend" aria-hidden="true">{keys}</ul>'


def _svg(name: str, frame: Frame, summary: str, body: Sequence[str], over: str) -> str:
    axes, level, *curves = body
    return (
        f'<svg class="chart" viewBox="0 0 {frame.width} {HEIGHT}" role="img" aria-label="{text(summary, 600)}">'
        f'<clipPath id="clip-{name}"><rect x="{LEFT}" y="{TOP}" width="{frame.end - LEFT}" height="{HEIGHT - TOP - BOTTOM}"/>'
        f'</clipPath>{axes}{level}<g clip-path="url(#clip-{name})">{"".join(curves)}</g>{over}</svg>'
    )
