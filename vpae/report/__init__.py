"""The report of the main job: a self-contained page, a side-by-side film and strip, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vpae.data.look import contact_sheet, shown_scale, side_by_side
from vpae.data.videos import write_video
from vpae.files import atomic
from vpae.report.page import build_page
from vpae.report.scores import BARS, Bars, Variant, format_headline, format_table, headline

__all__ = ["Bars", "Variant", "format_headline", "format_table", "headline", "write_comparison", "write_report"]

FPS = 8.0
_SHOWN = 256  # px: width of a clip in the film
_PAUSE = 4  # frames the film rests on the last one of each condition


def write_report(
    folder: Path,
    *,
    title: str,
    clips: Sequence[str],
    real: Sequence[np.ndarray],
    variants: Sequence[Variant],
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Mapping[str, str],
    real_scores: Mapping[str, float] | None = None,
    bars: Bars = BARS,
    fps: float = FPS,
) -> Path:
    """Write ``folder/report.html``: headline, table, playing clips, curves and facts in one file.

    Args:
        clips: the caption of each condition shown.
        real: the real clip of each condition, uint8 ``[F, H, W, 3]``.
        variants: in the order of the columns; the headline compares the ``student`` of fewest steps with the
            ``teacher`` of most.
        logs: for each phase the records of its log: ``turn`` and scalars by tag.
        facts: lines about recipe, machine and times; a value of several lines is folded away.
        real_scores: scores of the real clips, by the same keys as a variant's; None leaves them out of the table.
        bars: what the student is held against.
        fps: of the clips.

    Returns:
        The file.

    Raises:
        ValueError: no student or teacher, an unknown score, or a column with more or fewer clips than captions.
        UserError: the file cannot be written.
    """
    for name, frames in [("real", real)] + [(v.label, v.frames) for v in variants if v.frames]:
        if len(frames) != len(clips):
            raise ValueError(f"{name}: {len(frames)} clips for {len(clips)} captions")
    page = build_page(title, clips, real, variants, logs, facts, real_scores=real_scores, bars=bars, fps=fps)
    path = Path(folder) / "report.html"
    with atomic(path) as draft:
        draft.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def write_comparison(
    folder: Path,
    captions: Sequence[str],
    columns: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    fps: float = FPS,
) -> tuple[Path, Path]:
    """Write ``comparison.mp4``, the conditions one after another, and ``comparison.png``, their frames as strips.

    Args:
        captions: one a condition.
        columns: a label and its clips, one a condition, uint8 ``[F, H, W, 3]`` of one shape.

    Returns:
        The film (H.264, yuv420p, plays in browsers) and the strip.

    Raises:
        ValueError: no condition, a column of another length, or clips of different shapes.
        UserError: a file cannot be written.
    """
    for label, clips in columns:
        if len(clips) != len(captions):
            raise ValueError(f"{label}: {len(clips)} clips for {len(captions)} captions")
    if not captions or not columns:
        raise ValueError("a comparison needs a condition and a column")
    width = columns[0][1][0].shape[2]
    scale = shown_scale(width, _SHOWN)
    scenes = [
        side_by_side([(caption, side_by_side([(label, clips[i]) for label, clips in columns], scale=scale))])
        for i, caption in enumerate(captions)
    ]
    height = max(scene.shape[1] for scene in scenes)  # captions wrap to one line or to several
    film = np.concatenate([_rest(_pad(scene, height)) for scene in scenes])
    video, strip = Path(folder) / "comparison.mp4", Path(folder) / "comparison.png"
    write_video(video, film, fps)
    rows = []
    for i, caption in enumerate(captions):
        for place, (label, clips) in enumerate(columns):
            rows.append((f"{label}. {caption}" if place == 0 else label, clips[i]))
    contact_sheet(rows, strip, scale=scale // 2 if scale >= 2 else scale / 2)
    return video, strip


def _pad(scene: np.ndarray, height: int) -> np.ndarray:
    return np.pad(scene, ((0, 0), (0, height - scene.shape[1]), (0, 0), (0, 0)), constant_values=255)


def _rest(scene: np.ndarray) -> np.ndarray:
    return np.concatenate([scene, scene[-1:].repeat(_PAUSE, axis=0)])
