"""Clips for the eye: contact sheets as PNG, clips side by side as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpae.files import atomic

PAPER, INK, FAINT = (255, 255, 255), (24, 26, 32), (120, 124, 134)
_GAP = 4
_LABEL_WIDTH = 150  # px of a contact sheet's left column
_TEXT = 15  # px


def _font(size: int = _TEXT) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break after blanks, hyphens and underscores, and inside a word only where it is wider than the line."""
    lines = [""]
    for word in re.findall(r"[^\s_-]*[\s_-]?", text):
        if font.getlength((lines[-1] + word).rstrip()) <= width:
            lines[-1] += word
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            lines += [""] * (bool(lines[-1]) and font.getlength((lines[-1] + letter).rstrip()) > width)
            lines[-1] += letter
    return "\n".join(line.rstrip() for line in lines)


def _text_height(text: str, font: ImageFont.FreeTypeFont) -> int:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(np.ceil(box[3]))


def shown_scale(width: int, most: int) -> float:
    """The scale at which a clip of ``width`` px is shown: as large a whole number as ``most`` px allow, or smaller."""
    return float(most // width) if width <= most else most / width


def sheet_scale(width: int) -> float:
    """The scale of a sheet's frames: small ones about 128 px wide, larger ones as they are up to 256 px."""
    return shown_scale(width, 128) if width <= 128 else min(1.0, 256 / width)


def enlarge(picture: np.ndarray, scale: float) -> Image.Image:
    """A picture ``[H, W, 3]`` at ``scale`` times its size: whole numbers show its pixels, others are Lanczos."""
    height, width = picture.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.NEAREST if float(scale).is_integer() else Image.Resampling.LANCZOS
    return Image.fromarray(picture).resize(size, how)


def _spread(count: int, columns: int) -> list[int]:
    """``columns`` frames over the whole clip, first and last among them, none twice."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(columns, count))})


def _strip(label: str, frames: np.ndarray, columns: int, scale: float) -> Image.Image:
    """One row: the label, then frames with their numbers below."""
    tiles = [(i, enlarge(frames[i], scale)) for i in _spread(len(frames), columns)]
    font, small = _font(), _font(11)
    text = wrap(label, font, _LABEL_WIDTH - 2 * _GAP)
    width, height = tiles[0][1].size
    size = (_LABEL_WIDTH + len(tiles) * (width + _GAP), max(height + 14, _text_height(text, font)) + _GAP)
    row = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(row)
    draw.multiline_text((_GAP, 0), text, font=font, fill=INK)
    for place, (number, tile) in enumerate(tiles):
        left = _LABEL_WIDTH + place * (width + _GAP)
        row.paste(tile, (left, 0))
        draw.text((left, height), str(number), font=small, fill=FAINT)
    return row


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], path: str | Path, *, columns: int = 9, scale: float | None = None
) -> np.ndarray:
    """Write a PNG with a row a clip: its label, and ``columns`` frames spread over it, numbered.

    Args:
        rows: labels and frames uint8 ``[F, H, W, 3]``; sizes and lengths may differ.
        path: the file; its folder is made, and it appears only when it is whole.
        columns: frames a row, fewer where a clip has fewer.
        scale: of the frames; None: :func:`sheet_scale` of the first row's.

    Returns:
        the sheet, uint8 ``[H, W, 3]``.

    Raises:
        UserError: the file cannot be written.
        ValueError: no row.
    """
    if not rows:
        raise ValueError("a contact sheet needs a row")
    if scale is None:
        scale = sheet_scale(rows[0][1].shape[2])
    strips = [_strip(label, frames, columns, scale) for label, frames in rows]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height + _GAP for strip in strips) + _GAP), PAPER)
    top = _GAP
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + _GAP
    with atomic(Path(path)) as draft:
        sheet.save(draft, format="PNG")
    return np.asarray(sheet)


def side_by_side(clips: Sequence[tuple[str, np.ndarray]], *, scale: float = 1) -> np.ndarray:
    """Put clips beside one another, each under its label, as one clip of even size.

    Args:
        clips: labels and frames uint8 ``[F, H, W, 3]``, all of the same shape.
        scale: of the frames; small ones want 4 or so, for the label's sake too.

    Returns:
        uint8 ``[F, H', W', 3]``.

    Raises:
        ValueError: no clip, or clips of different shapes.
    """
    shapes = {frames.shape for _, frames in clips}
    if len(shapes) != 1:
        raise ValueError(f"side by side go clips of one shape, not {sorted(shapes)}")
    frames = clips[0][1]
    width, height = enlarge(frames[0], scale).size
    font = _font()
    texts = [wrap(label, font, width) for label, _ in clips]
    head = max(_text_height(text, font) for text in texts) + _GAP
    total = (len(clips) * (width + _GAP) + _GAP, head + height + 2 * _GAP)
    canvas = Image.new("RGB", (total[0] + total[0] % 2, total[1] + total[1] % 2), PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = [_GAP + place * (width + _GAP) for place in range(len(clips))]
    for left, text in zip(lefts, texts, strict=True):
        draw.multiline_text((left, _GAP // 2), text, font=font, fill=INK)
    shown = np.repeat(np.asarray(canvas)[None], len(frames), axis=0)
    for left, (_, clip) in zip(lefts, clips, strict=True):
        for number, picture in enumerate(clip):
            shown[number, head + _GAP : head + _GAP + height, left : left + width] = enlarge(picture, scale)
    return shown
