"""What the report compares: the samplers' figures, the three bars of the main job, and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Attributes:
        key: in ``Variant.scores``.
        name: on the page.
        short: in the terminal, ASCII.
        note: what it measures, and which way is better where that is not upwards.
        digits: decimals shown.
    """

    key: str
    name: str
    short: str
    note: str
    digits: int


SCORES = (
    Measure("sa", "Semantic alignment", "SA", "colours, count, directions and gravity as captioned", 1),
    Measure("tc", "Temporal coherence", "TC", "no ball vanishes, appears or jumps; the captioned law holds", 1),
    Measure("fq", "Frame quality", "FQ", "each frame against a clean drawing of what it shows; sharpness", 1),
    Measure("mean", "Mean", "mean", "of the three above, each on a scale of 0 to 100", 1),
    Measure("dynamic_degree", "Dynamic degree", "dynamic", "motion over that of the real clip; 1 is right", 2),
    Measure("frechet", "Fréchet distance", "Frechet", "of clip features to the real ones’; lower is better", 3),
    Measure("frame0_psnr", "First-frame PSNR", "PSNR dB", "dB against the given first frame", 1),
    Measure("trajectory_error", "Trajectory error", "path px", "px off the simulated paths; lower is better", 2),
)
SECONDS = Measure("seconds_per_clip", "Seconds per clip", "s/clip", "in the denoiser; lower is better", 3)
MEASURES = (*SCORES, SECONDS)


@dataclass(frozen=True)
class Variant:
    """One way of making clips.

    Attributes:
        name: the network, with or without " N NFE" behind it; :data:`TEACHER` and :data:`STUDENT` make the
            headline, other names only appear.
        nfe: network evaluations a clip, 0 for clips that no network made.
        frames: for each condition uint8 ``[F, H, W, 3]``; empty to appear in the table alone.
        scores: by the keys of :data:`SCORES`; a key left out or NaN is shown as a dash.
        seconds_per_clip: in the denoiser; None where nobody measured it.
    """

    name: str
    nfe: int
    frames: list[np.ndarray]
    scores: dict[str, float]
    seconds_per_clip: float | None

    def __post_init__(self) -> None:
        check_scores(self.label, self.scores)

    @property
    def network(self) -> str:
        return self.name.removesuffix(f" {self.nfe} NFE")

    @property
    def label(self) -> str:
        return f"{self.network} {self.nfe} NFE" if self.nfe else self.name

    def value(self, measure: Measure) -> float:
        """The figure under ``measure``, NaN where there is none."""
        if measure is SECONDS:
            return math.nan if self.seconds_per_clip is None else float(self.seconds_per_clip)
        return float(self.scores.get(measure.key, math.nan))


def check_scores(name: str, scores: Mapping[str, float]) -> None:
    """Refuse a score that no row would show.

    Raises:
        ValueError: an unknown key.
    """
    known = [m.key for m in SCORES]
    if unknown := sorted(set(scores) - set(known)):
        raise ValueError(f"{name}: unknown score {unknown[0]!r}; known: {', '.join(known)}")


def format_value(measure: Measure, value: float, missing: str = "-") -> str:
    """A figure with the decimals of its measure; seconds with three significant digits."""
    if not math.isfinite(value):
        return missing
    if measure is SECONDS:
        whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        leading = 0 if whole or not value else -math.floor(math.log10(abs(value))) - 1
        return f"{value:.{max(0, 3 - whole + leading)}f}"
    return f"{value:.{measure.digits}f}"


@dataclass(frozen=True)
class Bars:
    """What the student must reach: % of the teacher's mean, % of its dynamic degree, times fewer seconds a clip."""

    mean: float = 95.0
    dynamic_degree: float = 90.0
    speed_up: float = 40.0


BARS = Bars()


@dataclass(frozen=True)
class Figure:
    """One of the three figures of the headline: NaN where it was not measured."""

    value: float
    unit: str
    what: str
    bar: float
    detail: str

    @property
    def met(self) -> bool:
        return self.value >= self.bar

    @property
    def shown(self) -> str:
        """Rounded down, so that a bar that was missed by a hair is not shown as met."""
        if not math.isfinite(self.value):
            return "–"
        scale = 1 if self.value >= 1000 else 10
        return f"{math.floor(round(self.value * scale, 6)) / scale:.{0 if scale == 1 else 1}f}"


def contestants(variants: Sequence[Variant]) -> tuple[Variant, Variant]:
    """The two that the headline compares: the student at its fewest steps, the teacher at its most.

    Raises:
        ValueError: one of the two is missing.
    """
    students = [v for v in variants if v.network == STUDENT]
    teachers = [v for v in variants if v.network == TEACHER]
    if not students or not teachers:
        names = ", ".join(repr(v.name) for v in variants) or "none"
        raise ValueError(f"the report compares a {STUDENT!r} with a {TEACHER!r}; got {names}")
    return min(students, key=lambda v: v.nfe), max(teachers, key=lambda v: v.nfe)


def headline(variants: Sequence[Variant], bars: Bars = BARS) -> tuple[Figure, Figure, Figure]:
    """The three figures of the main job, from the variants alone.

    Raises:
        ValueError: no student or no teacher.
    """
    student, teacher = contestants(variants)
    measures = {m.key: m for m in MEASURES}

    def pair(key: str, unit: str = "") -> tuple[float, float, str]:
        mine, theirs = student.value(measures[key]), teacher.value(measures[key])
        texts = [format_value(measures[key], value, "–") + unit for value in (mine, theirs)]
        return mine, theirs, f"{texts[0]} against {texts[1]}"

    def over(a: float, b: float, times: float) -> float:
        return times * a / b if b else math.nan

    mean, full_mean, mean_text = pair("mean")
    motion, full_motion, motion_text = pair("dynamic_degree")
    quick, slow, time_text = pair("seconds_per_clip", " s")
    return (
        Figure(over(mean, full_mean, 100), "%", "of the teacher’s mean score", bars.mean, mean_text),
        Figure(over(motion, full_motion, 100), "%", "of its dynamic degree", bars.dynamic_degree, motion_text),
        Figure(over(slow, quick, 1), "×", "less time in the denoiser", bars.speed_up, time_text),
    )


def table_rows(variants: Sequence[Variant], real: Mapping[str, float] | None) -> list[tuple[str, dict[str, float]]]:
    """What both tables hold: for each sampler its label and its figure by measure, the real clips first."""
    rows = [(v.label, {m.key: v.value(m) for m in MEASURES}) for v in variants]
    if real is not None:
        check_scores("real", real)
        rows.insert(0, ("real", {m.key: float(real.get(m.key, math.nan)) for m in MEASURES}))
    return rows


def format_table(variants: Sequence[Variant], real: Mapping[str, float] | None = None) -> str:
    """The table for the terminal: a line a sampler, aligned, ASCII.

    Args:
        real: scores of the real clips, by the keys of :data:`SCORES`; the line is left out where they are None.
    """
    rows = table_rows(variants, real)
    cells = [["", *(m.short for m in MEASURES)]]
    cells += [[label, *(format_value(m, figures[m.key]) for m in MEASURES)] for label, figures in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        line[0].ljust(widths[0]) + "".join("  " + text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))
        for line in cells
    )


def format_headline(variants: Sequence[Variant], bars: Bars = BARS) -> str:
    """The three figures for the terminal, a line each, with the bar they are held against."""
    lines = []
    for figure in headline(variants, bars):
        verdict = "not measured" if math.isnan(figure.value) else "met" if figure.met else "missed"
        unit = "x" if figure.unit == "×" else figure.unit
        shown = figure.shown.replace("–", "-")
        lines.append(f"{shown:>7} {unit} {figure.what.replace('’', chr(39))} (bar {figure.bar:g} {unit}: {verdict})")
    return "\n".join(lines)
