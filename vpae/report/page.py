"""The page of the report: one HTML file that asks for nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

from vpae.data.videos import write_video
from vpae.report.curves import PANELS, draw_panel
from vpae.report.scores import (
    MEASURES,
    STUDENT,
    Bars,
    Figure,
    Measure,
    Variant,
    contestants,
    format_value,
    headline,
    table_rows,
)

_PHASES = {
    "priming": "Phase I: stability priming",
    "equilibrium": "Phase II: adversarial equilibrium",
    "consistency": "Consistency distillation",
    "dmd2": "DMD2",
    "apt": "APT: adversarial post-training",
    "pcm": "Consistency distillation",
    "ladd": "LADD",
    "mse": "Regression",
}
_SMALL = 160  # px; below it a frame is doubled, since yuv420p halves the resolution of its colour
_CRF = 16


def _asset(name: str) -> str:
    return (resources.files("vpae") / "assets" / "report" / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    """The word by which a content security policy admits this inline text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _figure(figure: Figure) -> str:
    """One figure of the headline, above a meter on which the bar is a tick."""
    measured = math.isfinite(figure.value)
    value = figure.value if measured else 0.0
    verdict = "not measured" if not measured else "met" if figure.met else "missed"
    spoken = f"{figure.shown} {figure.unit}, the bar is {figure.bar:g}" if measured else verdict
    shown = f'<data value="{value!r}">{figure.shown}</data><span class="unit">{figure.unit}</span>'
    full = 1.12 * max(figure.bar, value)
    filled, mark = 100 * value / full, 100 * figure.bar / full
    return (
        f'<li class="{verdict.replace(" ", "-")}"><p class="figure">{shown if measured else "–"}</p>'
        f'<p class="what">{escape(figure.what)}</p>'
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{spoken}">'
        f'<rect class="track" y="3" width="100" height="4"/><rect class="fill" y="3" width="{filled:.2f}" height="4"/>'
        f'<rect class="tick-mark" x="{mark:.2f}" width="0.6" height="10"/></svg>'
        f'<p class="small">Bar {figure.bar:g} {figure.unit}, <b>{verdict}</b>. {escape(figure.detail)}.</p></li>'
    )


def _cell(measure: Measure, value: float, mark: str) -> str:
    shown = format_value(measure, value, "–")
    return f"<td{mark}>–</td>" if shown == "–" else f'<td{mark}><data value="{value!r}">{shown}</data></td>'


def _table(variants: Sequence[Variant], real: Mapping[str, float] | None) -> str:
    """A row a measure: so few columns fit a phone, and a measure has room to say what it is."""
    figures = [values for _, values in table_rows(variants, real)]
    heads = [
        (v.network, f"{v.nfe} NFE" if v.nfe else "clips", ' class="mine"' if v.network == STUDENT else "")
        for v in variants
    ]
    if real is not None:
        heads.insert(0, ("real", "clips", ""))
    head = "".join(f'<th scope="col"{mark}>{escape(name)} <span>{below}</span></th>' for name, below, mark in heads)
    lines = []
    for m in MEASURES:
        cells = [_cell(m, values[m.key], mark) for values, (_, _, mark) in zip(figures, heads, strict=True)]
        kind = ' class="sum"' if m.key == "mean" else ""
        name = f'<th scope="row">{escape(m.name)} <small>{escape(m.note)}</small></th>'
        lines.append(f"<tr{kind}>{name}{''.join(cells)}</tr>")
    notes = "".join(f"<dt>{escape(m.name)}</dt><dd>{escape(m.note)}</dd>" for m in MEASURES)
    many = " many" if len(heads) > 4 else ""
    return (
        '<section aria-labelledby="scores"><h2 id="scores">Scores</h2>'
        '<p class="aside">Higher is better where nothing else is said.</p>'
        f'<div class="table{many}"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
        f'<details class="notes"><summary>What is measured</summary><dl>{notes}</dl></details></section>'
    )


def encode_clip(frames: np.ndarray, fps: float, folder: Path) -> bytes:
    """An H.264 mp4 of a clip uint8 ``[F, H, W, 3]``; small or odd frames at twice their size, pixel by pixel."""
    height, width = frames.shape[1:3]
    if min(height, width) < _SMALL or height % 2 or width % 2:
        frames = frames.repeat(2, axis=1).repeat(2, axis=2)
    path = folder / "clip.mp4"
    write_video(path, frames, fps, crf=_CRF)
    return path.read_bytes()


def _clip(label: str, mine: bool, caption: str, frames: np.ndarray, fps: float, folder: Path) -> str:
    data = base64.b64encode(encode_clip(frames, fps, folder)).decode()
    height, width = frames.shape[1:3]
    mark = ' class="mine-clip"' if mine else ""
    return (
        f"<div{mark}><p>{escape(label)}</p>"
        f'<video autoplay loop muted playsinline width="{width}" height="{height}" '
        f'aria-label="{escape(label)}: {escape(caption)}" src="data:video/mp4;base64,{data}"></video></div>'
    )


def _clips(captions: Sequence[str], columns: Sequence[tuple[str, bool, Sequence[np.ndarray]]], fps: float) -> str:
    """A figure a condition: its caption, and under it the clip of each column (label, whether a student's, clips)."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for i, caption in enumerate(captions):
            row = "".join(_clip(name, mine, caption, clips[i], fps, Path(folder)) for name, mine, clips in columns)
            figures.append(
                f'<figure class="clip"><figcaption><span>{i + 1}</span>{escape(caption)}</figcaption>'
                f'<div class="row">{row}</div></figure>'
            )
    last = max(len(clip) for _, _, clips in columns for clip in clips) - 1
    return (
        '<section aria-labelledby="clips"><h2 id="clips">Clips</h2>'
        '<p class="aside">Every column is given the first frame and the caption of the real clip.</p>'
        f'<div class="controls" data-fps="{fps:g}" hidden><button type="button">Pause all</button>'
        f'<input type="range" min="0" max="{last}" value="0" step="1" aria-label="Frame of all clips">'
        f'<output aria-live="off">frame 0</output></div>\n{chr(10).join(figures)}</section>'
    )


def _curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    phases = []
    for number, (phase, records) in enumerate(logs.items()):
        panels = [draw_panel(panel, records, f"c{number}-{i}") for i, panel in enumerate(PANELS)]
        if any(panels):
            title = escape(_PHASES.get(phase, phase))
            phases.append(f'<div class="phase"><h3>{title}</h3><div class="panels">{"".join(panels)}</div></div>')
    if not phases:
        return ""
    return (
        '<section aria-labelledby="training"><h2 id="training">Training</h2>'
        '<p class="aside">By turn of the run. Pale lines are the log, strong lines its running mean; '
        "the number beside a name is the last value.</p>"
        f"{chr(10).join(phases)}</section>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    items = []
    for name, text in facts.items():
        shown = escape(text)
        if "\n" in text.strip():
            shown = f"<details><summary>show</summary><pre>{escape(text.strip())}</pre></details>"
        items.append(f"<div><dt>{escape(name)}</dt><dd>{shown}</dd></div>")
    return (
        '<section aria-labelledby="facts"><h2 id="facts">How it was made</h2>'
        f'<dl class="facts">{"".join(items)}</dl></section>'
    )


def build_page(
    title: str,
    captions: Sequence[str],
    real: Sequence[np.ndarray],
    variants: Sequence[Variant],
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Mapping[str, str],
    *,
    real_scores: Mapping[str, float] | None,
    bars: Bars,
    fps: float,
) -> str:
    """The whole page as text; the arguments are those of :func:`vpae.report.write_report`."""
    style, script = _asset("style.css"), _asset("script.js")
    student, teacher = contestants(variants)
    columns = [("real", False, real)] + [(v.label, v.network == STUDENT, v.frames) for v in variants if v.frames]
    times = "one evaluation" if student.nfe == 1 else f"{student.nfe} evaluations"
    sections = [_table(variants, real_scores)]
    if captions:
        sections.append(_clips(captions, columns, fps))
    sections += [_curves(logs), _facts(facts)]
    policy = (
        f"default-src 'none'; media-src data:; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=escape(title),
        lead=f"The student makes a clip in {times} of the network (NFE). Its teacher takes {teacher.nfe}.",
        headline="\n".join(_figure(figure) for figure in headline(variants, bars)),
        sections="\n".join(part for part in sections if part),
        style=style,
        script=script,
    )
