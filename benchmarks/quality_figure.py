"""Quality against network evaluations as one SVG: every method at 1 and 4 NFE beside the teacher's own trade-off."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path

from vpae.files import write_text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 900, 540, 64, 52, 36, 190
_INK = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0e7490", "#57606a", "#b35900", "#3b3b98")

Rows = Mapping[str, Mapping[str, Mapping[str, float]]]


def write_figure(path: Path, title: str, teacher: Rows, students: Rows) -> None:
    """Mean of SA, TC and FQ over evaluations (logarithmic), with standard errors.

    All are of one network, so that evaluations are time without the machine's unrest; latency.py has the seconds.
    Students stand side by side around their number of steps.
    """
    points = {name: _point(name, row) for name, row in (teacher | students).items() if "guided" not in name}
    ticks = sorted({int(x) for x, _, _ in points.values()})
    points |= _side_by_side({name: point for name, point in points.items() if name in students})
    across = [x for x, _, _ in points.values()]
    low, high = math.log10(min(across)) - 0.15, math.log10(max(across)) + 0.15
    bottom = max(0.0, 10 * math.floor(min(y - e for _, y, e in points.values()) / 10))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (math.log10(x) - low) / (high - low)
        up = (y - bottom) / (100 - bottom)
        return _LEFT + right * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    parts = list(_axes(place, ticks, low, high, bottom))
    groups: dict[str, list[str]] = {}
    for name in points:
        groups.setdefault(name.rsplit(" ", 2)[0], []).append(name)
    for i, (group, names) in enumerate(groups.items()):
        ink = _INK[i % len(_INK)]
        spots = sorted((place(points[n][0], points[n][1]), points[n]) for n in names)
        line = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in spots)
        dash = ' stroke-dasharray="5 4"' if group == "teacher" else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-opacity=".5"{dash}/>')
        for (x, y), (evaluations, mean, error) in spots:
            reach = abs(place(evaluations, mean + error)[1] - y)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - reach:.1f}" y2="{y + reach:.1f}" stroke="{ink}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{ink}"/>')
        y = _TOP + 14 + 20 * i
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 22}" cy="{y}" r="4" fill="{ink}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 34}" y="{y + 4}">{html.escape(group)}</text>')
    parts.append(f'<text x="{_LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>')
    style = "font: 13px sans-serif; background: #fff"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" style="{style}">'
    write_text(path, "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>', *parts, "</svg>\n"]))


def _side_by_side(points: dict[str, tuple[float, float, float]]) -> dict[str, tuple[float, float, float]]:
    """Students' points, those of as many steps around their place."""
    placed = {}
    for row in sorted({name.split(" ", 1)[1] for name in points}):
        names = [name for name in points if name.split(" ", 1)[1] == row]
        middle = sum(math.log10(points[name][0]) for name in names) / len(names)
        step = min(0.045, 0.24 / max(1, len(names) - 1))  # all of them within the room between two of the teacher's
        for i, name in enumerate(names):
            placed[name] = (10 ** (middle + step * (i - (len(names) - 1) / 2)), *points[name][1:])
    return placed


def _point(name: str, row: Mapping[str, Mapping[str, float]]) -> tuple[float, float, float]:
    error = row["mean"]["standard_error"]
    error = 0.0 if error is None or math.isnan(error) else error
    return float(name.split(" NFE")[0].rsplit(" ", 1)[1]), row["mean"]["mean"], error


def _axes(place, ticks: list[int], low: float, high: float, bottom: float):
    right = place(10**high, bottom)[0]
    for value in range(int(bottom), 101, 10):
        y = place(10**low, value)[1]
        yield f'<line x1="{_LEFT}" x2="{right:.0f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d8dee4"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>'
    for evaluations in ticks:
        x = place(evaluations, bottom)[0]
        yield f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{evaluations}</text>'
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#d8dee4"/>'
    middle = (_LEFT + right) / 2
    label = "network evaluations (NFE); students stand side by side around theirs"
    yield f'<text x="{middle:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">{label}</text>'
    turned = f'transform="translate(16 {_HEIGHT / 2:.0f}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle">mean of SA, TC, FQ</text>'
