"""Charts as inline SVG: drawn with CSS classes so that they follow the page's light or dark colours.

Every chart carries a title and a description for screen readers, axes with labels and units, and tells its series apart
by dash or shape as well as by colour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from lehr.rendering import visible

WIDTH = 960
BESIDE = 710
HALF = 460
"""Widths in pixels of a laptop page: a whole row, a row with facts beside it, one of a pair. Text keeps its size in each."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 48
_NAME_ROOM = 140
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "4 2")
SERIES = len(_DASHES)


def text(value: str) -> Markup:
    """Text that can stand in markup: harmful characters shown, markup escaped."""
    return escape(visible(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A named line of (x, y) points; points that are not finite are left out."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    """Colour and dash, the same for one thing on the whole page."""
    faint: bool = False
    mark: bool = False
    """Draw a dot at every point."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """A stretch of the x axis with a name."""

    name: str
    start: float
    end: float
    style: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear or logarithmic axis from data to pixels."""

    label: str
    low: float
    high: float
    log: bool = False
    integer: bool = False

    def place(self, value: float) -> float:
        """Position of `value` as a share of the axis, 0 at its low end."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label) of about five round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / 6))
            values = [10.0 ** float(power) for power in range(first, last + 1, step)]
            if len(values) >= 2:
                return [(value, f"{value:,.0f}" if self.integer else _power(value)) for value in values]
            middle = [self.low, math.sqrt(self.low * self.high), self.high]
            return [(value, f"{value:.3g}") for value in middle]
        apart = _round_step((self.high - self.low) / 5)
        if self.integer:
            apart = max(1.0, apart)
        first = math.ceil(self.low / apart - 1e-9)
        count = math.floor(self.high / apart + 1e-9) - first + 1
        digits = max(0, -math.floor(math.log10(apart) + 1e-9))
        return [((first + i) * apart, _number((first + i) * apart, digits)) for i in range(count)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _number(value: float, digits: int) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value + 0.0:,.{digits}f}"


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(value: float) -> str:
    return f"10{str(round(math.log10(value))).translate(_SUPERSCRIPT)}"


def axis(label: str, values: Sequence[float], *, log: bool = False, integer: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all finite `values` with a little room; `zero` includes 0."""
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not finite:
        finite = [1.0] if log else [0.0, 1.0]
    low, high = float(min(finite)), float(max(finite))
    if log:
        room = max(0.05 * (math.log10(high) - math.log10(low)), 0.1)
        low, high = 10 ** (math.log10(low) - room), 10 ** (math.log10(high) + room)
        return Axis(label=label, low=low, high=high, log=True, integer=integer)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.04 or max(abs(high) * 0.04, 0.5)
    return Axis(
        label=label,
        low=low if zero and low == 0 else low - room,
        high=high + room,
        integer=integer,
    )


class Frame:
    """An SVG under construction: axes, grid and the mapping from data to pixels."""

    def __init__(
        self,
        title: str,
        description: str,
        x: Axis,
        y: Axis,
        *,
        width: int = WIDTH,
        height: int = 300,
        right: int = _RIGHT,
    ) -> None:
        self.title, self.description = title, description
        self.x_axis, self.y_axis = x, y
        self.width, self.height, self.right = width, height, right
        self.parts: list[Markup] = []
        self._grid()

    def x(self, value: float) -> float:
        """Pixel of an x value."""
        return _LEFT + self.x_axis.place(value) * (self.width - _LEFT - self.right)

    def y(self, value: float) -> float:
        """Pixel of a y value."""
        return self.height - _BOTTOM - self.y_axis.place(value) * (self.height - _BOTTOM - _TOP)

    def add(self, template: str, **values: object) -> None:
        """Append markup; values are escaped."""
        self.parts.append(Markup(template).format(**values))

    def _grid(self) -> None:
        left, right, bottom = _LEFT, self.width - self.right, self.height - _BOTTOM
        for value, label in self.y_axis.ticks():
            y = f"{self.y(value):.1f}"
            self.add('<line class="grid" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>', a=left, b=right, y=y)
            self.add('<text class="tick end" x="{x}" y="{y}" dy=".32em">{t}</text>', x=left - 8, y=y, t=label)
        for value, label in self.x_axis.ticks():
            x = f"{self.x(value):.1f}"
            self.add('<line class="axis" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>', x=x, a=bottom, b=bottom + 4)
            self.add('<text class="tick mid" x="{x}" y="{y}">{t}</text>', x=x, y=bottom + 18, t=label)
        self.add('<line class="axis" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>', a=left, b=right, y=bottom)
        middle = (left + right) / 2
        self.add('<text class="label mid" x="{x}" y="{y}">{t}</text>', x=middle, y=self.height - 8, t=self.x_axis.label)
        y_middle = (_TOP + bottom) / 2
        self.add(
            '<text class="label mid" transform="translate(14 {y}) rotate(-90)">{t}</text>',
            y=y_middle,
            t=self.y_axis.label,
        )

    def bands(self, bands: Sequence[Band]) -> None:
        """Shade stretches of the x axis and name them at the top."""
        for band in bands:
            start, end = self.x(band.start), self.x(band.end)
            if end <= start:
                continue
            self.add(
                '<rect class="band {s}" x="{x:.1f}" y="{y}" width="{w:.1f}" height="{h}"/>',
                s=band.style,
                x=start,
                y=_TOP,
                w=end - start,
                h=self.height - _TOP - _BOTTOM,
            )
            self.add(
                '<text class="note mid" x="{x:.1f}" y="{y}">{t}</text>', x=(start + end) / 2, y=_TOP + 14, t=band.name
            )

    def line(self, series: Series) -> None:
        """Draw a line, and its dots where asked."""
        points = [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
        if self.y_axis.log:
            points = [(x, y) for x, y in points if y > 0]
        if not points:
            return
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        style = series.style % SERIES
        dash = _DASHES[style]
        self.add(
            '<polyline class="line s{s}{f}" points="{p}" stroke-dasharray="{d}"/>',
            s=style,
            f=" faint" if series.faint else "",
            p=path,
            d=dash or "none",
        )
        if series.mark or len(points) == 1:
            for x, y in points:
                self.add(
                    '<circle class="dot s{s}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>', s=style, x=self.x(x), y=self.y(y)
                )

    def end_labels(self, lines: Sequence[Series]) -> None:
        """Name every line where it ends; names that would touch are moved apart."""
        named: list[list[float]] = []
        series_of: list[Series] = []
        for series in lines:
            points = [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
            if points:
                named.append([self.x(points[-1][0]), self.y(points[-1][1])])
                series_of.append(series)
        order = sorted(range(len(named)), key=lambda i: named[i][1])
        floor = self.height - _BOTTOM - 4.0
        for place, i in enumerate(order):
            near = [named[j][1] for j in order[:place] if abs(named[j][0] - named[i][0]) < _NAME_ROOM]
            named[i][1] = max([named[i][1], *(y + 15 for y in near)])
        for place, i in reversed(list(enumerate(order))):
            near = [named[j][1] for j in order[place + 1 :] if abs(named[j][0] - named[i][0]) < _NAME_ROOM]
            named[i][1] = min([named[i][1], floor, *(y - 15 for y in near)])
        for (x, y), series in zip(named, series_of):
            self.add(
                '<text class="series s{s}" x="{x:.1f}" y="{y:.1f}" dy=".32em">{t}</text>',
                s=series.style % SERIES,
                x=x + 9,
                y=y,
                t=text(shorten(series.name, 20)),
            )

    def svg(self) -> Markup:
        """The finished picture."""
        return Markup(
            '<svg viewBox="0 0 {w} {h}" role="img" preserveAspectRatio="xMidYMid meet">'
            "<title>{title}</title><desc>{desc}</desc>{body}</svg>"
        ).format(
            w=self.width,
            h=self.height,
            title=text(self.title),
            desc=text(self.description),
            body=Markup("").join(self.parts),
        )


def shorten(value: str, length: int) -> str:
    """`value` cut to `length` characters."""
    return value if len(value) <= length else f"{value[: length - 1]}…"


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    bands: Sequence[Band] = (),
    width: int = WIDTH,
    height: int = 300,
    labelled: bool = True,
    marks: Sequence[float] = (),
) -> Markup:
    """Lines over a common x axis, each named at its end; `marks` are x values with an upright line."""
    frame = Frame(title, description, x, y, width=width, height=height, right=148 if labelled else _RIGHT)
    frame.bands(bands)
    for value in marks:
        frame.add(
            '<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{a}" y2="{b}"/>',
            x=frame.x(value),
            a=_TOP,
            b=height - _BOTTOM,
        )
    for series in lines:
        frame.line(series)
    if labelled:
        frame.end_labels(lines)
    return frame.svg()


def ribbon_chart(
    title: str,
    description: str,
    steps: Sequence[float],
    quantiles: Sequence[Sequence[float]],
    x: Axis,
    y: Axis,
    *,
    style: int,
    height: int = 220,
) -> Markup:
    """Five quantiles over steps: a light ribbon from least to greatest, a dark one for the middle half, the median a line."""
    frame = Frame(title, description, x, y, height=height, right=_RIGHT)
    for low, high, shade in ((0, 4, "outer"), (1, 3, "inner")):
        forth = [f"{frame.x(step):.1f},{frame.y(row[high]):.1f}" for step, row in zip(steps, quantiles)]
        back = [f"{frame.x(step):.1f},{frame.y(row[low]):.1f}" for step, row in zip(steps, quantiles)]
        frame.add(
            '<polygon class="ribbon {shade} s{s}" points="{p}"/>',
            shade=shade,
            s=style % SERIES,
            p=" ".join([*forth, *reversed(back)]),
        )
    frame.line(Series(name="median", points=[(s, row[2]) for s, row in zip(steps, quantiles)], style=style))
    return frame.svg()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A sample in a scatter plot, with what is shown when one points at it."""

    x: float
    y: float
    chosen: bool
    hint: str = ""


def scatter_chart(
    title: str,
    description: str,
    points: Sequence[Point],
    x: Axis,
    y: Axis,
    *,
    width: int = WIDTH,
    height: int = 400,
) -> Markup:
    """Dots; the chosen ones are drawn last, larger, as diamonds, and tell who they are."""
    frame = Frame(title, description, x, y, width=width, height=height)
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.y > 0 or not y.log)]
    # One path for thousands of dots: a stroke of no length with round ends is a dot.
    dots = "".join(f"M{frame.x(p.x):.1f} {frame.y(p.y):.1f}h0" for p in shown if not p.chosen)
    if dots:
        frame.add('<path class="left" d="{d}"/>', d=dots)
    for point in shown:
        if point.chosen:
            hint = Markup("<title>{}</title>").format(text(shorten(point.hint, 120))) if point.hint else Markup("")
            frame.add(
                '<path class="picked" d="M{x:.1f} {y:.1f}m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z">{h}</path>',
                x=frame.x(point.x),
                y=frame.y(point.y),
                h=hint,
            )
    return frame.svg()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift:
    """A share before and after."""

    name: str
    before: float
    after: float


def shift_chart(title: str, description: str, shifts: Sequence[Shift], high: float, *, width: int = WIDTH) -> Markup:
    """A row for each name: a ring where its share was, a disc where it is, a line between them.

    `high` is the share at the right end, so that several charts can have one scale.
    """
    row, left, right, top = 26, 112, 124, 8
    height = top + row * len(shifts) + 44
    scale = Axis(label="share of samples (%)", low=0.0, high=max(0.01, high) * 100)
    parts: list[Markup] = []

    def place(share: float) -> float:
        return left + scale.place(share * 100) * (width - left - right)

    bottom = top + row * len(shifts)
    for value, label in scale.ticks():
        x = place(value / 100)
        parts.append(
            Markup('<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{a}" y2="{b}"/>').format(x=x, a=top, b=bottom)
        )
        parts.append(
            Markup('<text class="tick mid" x="{x:.1f}" y="{y}">{t}</text>').format(x=x, y=bottom + 16, t=label)
        )
    for number, shift in enumerate(shifts):
        y = top + row * number + row / 2
        before, after = place(shift.before), place(shift.after)
        parts.append(
            Markup('<text class="tick end name" x="{x}" y="{y}" dy=".32em">{t}</text>').format(
                x=left - 12, y=y, t=text(shorten(shift.name, 18))
            )
        )
        parts.append(
            Markup('<line class="move" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>').format(a=before, b=after, y=y)
        )
        parts.append(Markup('<circle class="ring" cx="{x:.1f}" cy="{y}" r="4.5"/>').format(x=before, y=y))
        parts.append(Markup('<circle class="disc" cx="{x:.1f}" cy="{y}" r="4.5"/>').format(x=after, y=y))
        change = f"{shift.before:.1%} → {shift.after:.1%}".replace("100.0%", "100%")
        parts.append(
            Markup('<text class="tick end" x="{x}" y="{y}" dy=".32em">{t}</text>').format(x=width - 2, y=y, t=change)
        )
    parts.append(
        Markup('<text class="label mid" x="{x}" y="{y}">{t}</text>').format(
            x=(left + width - right) / 2, y=height - 6, t=scale.label
        )
    )
    return Markup('<svg viewBox="0 0 {w} {h}" role="img"><title>{t}</title><desc>{d}</desc>{b}</svg>').format(
        w=width, h=height, t=text(title), d=text(description), b=Markup("").join(parts)
    )


def bar_chart(title: str, description: str, bars: Sequence[tuple[str, float]], label: str) -> Markup:
    """Horizontal bars with their number written at the end."""
    row, left, right, top, width = 26, 172, 84, 4, WIDTH
    height = top + row * len(bars) + 26
    high = max([1.0, *(value for _, value in bars)])
    parts: list[Markup] = []
    for number, (name, value) in enumerate(bars):
        y = top + row * number
        length = value / high * (width - left - right)
        parts.append(
            Markup('<text class="tick end name" x="{x}" y="{y}" dy=".32em">{t}</text>').format(
                x=left - 12, y=y + row / 2, t=text(shorten(name, 26))
            )
        )
        parts.append(
            Markup('<rect class="bar" x="{x}" y="{y}" width="{w:.1f}" height="{h}" rx="2"/>').format(
                x=left, y=y + 5, w=max(length, 1.5), h=row - 10
            )
        )
        parts.append(
            Markup('<text class="tick" x="{x:.1f}" y="{y}" dy=".32em">{t}</text>').format(
                x=left + length + 8, y=y + row / 2, t=f"{value:,.0f}"
            )
        )
    parts.append(Markup('<text class="label" x="{x}" y="{y}">{t}</text>').format(x=left, y=height - 6, t=label))
    return Markup('<svg viewBox="0 0 {w} {h}" role="img"><title>{t}</title><desc>{d}</desc>{b}</svg>').format(
        w=width, h=height, t=text(title), d=text(description), b=Markup("").join(parts)
    )
