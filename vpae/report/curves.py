"""Curves of a training log as inline SVG: small panels, one scale each, no script and no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 344, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 10, 24
MOST_POINTS = 400  # of a curve: one a pixel, so that hours of log do not make a heavy page
_SMOOTH_FROM = 40  # points; fewer are few enough to be read as they are


@dataclass(frozen=True)
class Panel:
    """One plot: tags of the log with the names they get, and levels worth a dashed line."""

    title: str
    series: tuple[tuple[str, str], ...]
    levels: tuple[float, ...] = ()


PANELS = (
    Panel("Score distillation (VSD) loss", (("student/vsd", "student"),)),
    Panel(
        "Flow matching of the fake score",
        (("fake_score/flow_matching", "fake score"), ("critic/flow_matching", "fake score")),
    ),
    Panel(
        "Adversarial loss",
        (("head/adversarial", "head"), ("critic/adversarial", "head"), ("student/adversarial", "student")),
    ),
    Panel(
        "Logits of the head",
        (
            ("head/logit_real", "real"),
            ("critic/logit_real", "real"),
            ("head/logit_fake", "generated"),
            ("critic/logit_fake", "generated"),
        ),
        (0.0,),
    ),
    Panel("Conditional SDS loss", (("student/c_sds", "student"),)),
    Panel("Finite-difference R1", (("head/st_r1", "head"), ("head/r1", "head"))),
    Panel("Motion, generated over real", (("watch/motion_ratio", "student"),), (1.0,)),
    Panel("Distance of consistency", (("student/consistency", "student"),)),
    Panel("Regression of the teacher", (("student/regression", "student"),)),
)


@dataclass(frozen=True)
class Curve:
    """Values by turn; NaN is where the curve is broken."""

    name: str
    turns: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[np.isfinite(self.values)][-1])


def read_curve(records: Sequence[Mapping[str, float]], tag: str, name: str) -> Curve | None:
    """The curve of a tag, None where no record holds a finite value of it.

    Records without the tag are other players' turns and leave no gap; a value that is not finite does.
    """
    held = [(r["turn"], r[tag]) for r in records if tag in r]
    turns, values = np.array(held, float).reshape(-1, 2).T
    values = np.where(np.isfinite(values), values, np.nan)
    if not np.isfinite(values).any():
        return None
    bins = math.ceil(len(turns) / MOST_POINTS)
    return Curve(name, _binned(turns, bins), _binned(values, bins))


def _binned(values: np.ndarray, size: int) -> np.ndarray:
    """Means of ``size`` neighbours, NaN only where all of them are."""
    if size == 1:
        return values
    return np.array([_mean(values[i : i + size]) for i in range(0, len(values), size)])


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a twentieth of the curve, NaN where the value is."""
    reach = max(1, len(values) // 40)
    means = [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    return np.where(np.isfinite(values), means, np.nan)


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map of [low, high] onto pixels [start, end], with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        change = np.log if self.logarithmic else np.asarray
        low, high = change(self.low), change(self.high)
        return self.start + (change(values) - low) / (high - low) * (self.end - self.start)


def _round_step(rough: float) -> float:
    """The nearest step of 1, 2, 2.5, 5 times a power of ten that is not finer."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _linear_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    step = _round_step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def turn_axis(curves: Sequence[Curve]) -> Axis:
    """From turn 0 to the last one."""
    high = max(1.0, *(float(c.turns.max()) for c in curves))
    ticks = tuple(t for t in _linear_ticks(0.0, high, 4) if t == int(t))
    return Axis(0.0, high, _LEFT, WIDTH - _RIGHT, ticks)


def value_axis(curves: Sequence[Curve], levels: Sequence[float]) -> Axis:
    """All values and levels with a little air; logarithmic where positive values span more than two decades."""
    values = np.concatenate([c.values for c in curves] + [np.array(levels, float)])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    bottom, top = HEIGHT - _BOTTOM, _TOP
    if low > 0 and high / low > 100:
        low, high = low / 1.15, high * 1.15
        span = math.log10(high / low)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, math.ceil(span / 5))
        per_decade = (1.0,) if span > 3.3 else (1.0, 3.0)
        ticks = tuple(m * 10.0**d for d in decades for m in per_decade if low <= m * 10.0**d <= high)
        return Axis(low, high, bottom, top, ticks, logarithmic=True)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    if low >= 0 and low < 0.5 * high:
        low, high = 0.0, high + air
    else:
        low, high = low - air, high + air
    return Axis(low, high, bottom, top, _linear_ticks(low, high, 5))


def tick_text(value: float, step: float = 0.0) -> str:
    """A tick in few characters: 1500 as 1.5k, very small ones as a power of ten; ``step`` sets the decimals."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    if size >= 1000:
        return f"{value / 1000:g}k".replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    if step and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1  # a step of 2.5
    text = f"{value:.{decimals}f}" if step else f"{value:g}"
    return text.replace("-", "−")


def curve_path(curve: Curve, values: np.ndarray, across: Axis, up: Axis) -> str:
    """The ``d`` of an SVG path: a new sub-path after each gap, a dot for a lone point."""
    xs, ys = across(curve.turns), up(values)
    parts, pen_down = [], False
    for i in range(len(xs)):
        if not np.isfinite(values[i]):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{xs[i]:.1f} {ys[i]:.1f}")
        alone = not pen_down and (i + 1 == len(xs) or not np.isfinite(values[i + 1]))
        if alone:
            parts.append("h0")
        pen_down = True
    return "".join(parts)


def _axes(across: Axis, up: Axis) -> list[str]:
    step = min(np.diff(up.ticks), default=0.0) if not up.logarithmic else 0.0
    marks = []
    for value in up.ticks:
        y = float(up(value))
        marks.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(value, step)}</text>'
        )
    base = HEIGHT - _BOTTOM
    marks.append(f'<line class="base" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for value in across.ticks:
        x, name = float(across(value)), tick_text(value) if value else "turn 0"
        marks.append(f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{name}</text>')
    return marks


def _summary(curve: Curve) -> str:
    finite = curve.values[np.isfinite(curve.values)]
    numbers = [f"{v:.3g}" for v in (finite[0], finite[-1], finite.min(), finite.max())]
    turns = f"turn {curve.turns[0]:.0f} to {curve.turns[-1]:.0f}"
    return f"{curve.name}: {turns}, from {numbers[0]} to {numbers[1]}, lowest {numbers[2]}, highest {numbers[3]}."


def draw_panel(panel: Panel, records: Sequence[Mapping[str, float]], identifier: str) -> str:
    """A ``<figure>`` with title, SVG and legend; empty where the log holds nothing of the panel."""
    curves = [c for tag, name in panel.series if (c := read_curve(records, tag, name))]
    if not curves:
        return ""
    across, up = turn_axis(curves), value_axis(curves, panel.levels)
    marks = _axes(across, up)
    for level in panel.levels:
        y = float(up(level))
        marks.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    keys = []
    for number, curve in enumerate(curves, 1):
        smoothed = len(curve.values) >= _SMOOTH_FROM
        if smoothed:
            marks.append(f'<path class="raw s{number}" d="{curve_path(curve, curve.values, across, up)}"/>')
        line = smooth(curve.values) if smoothed else curve.values
        marks.append(f'<path class="line s{number}" d="{curve_path(curve, line, across, up)}"/>')
        keys.append(
            f'<span class="key s{number}">{escape(curve.name)} <b>{tick_text(float(f"{curve.last:.3g}"))}</b></span>'
        )
    scale = " Logarithmic scale." if up.logarithmic else ""
    about = " ".join(_summary(c) for c in curves) + scale
    heading = f'<h4>{escape(panel.title)}</h4><p class="legend">{"".join(keys)}</p>'
    return (
        f'<figure class="panel"><figcaption>{heading}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{identifier}-t {identifier}-d">'
        f'<title id="{identifier}-t">{escape(panel.title)}</title><desc id="{identifier}-d">{escape(about)}</desc>'
        f"{''.join(marks)}</svg></figure>"
    )
