"""A sheet of cards, one a clip: three frames, what it is called, its caption, and how much it moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpae.data.look import FAINT, INK, enlarge, shown_scale, wrap
from vpae.files import atomic

_DESK, _CARD, _EDGE, _BAR, _TRACK = (244, 245, 247), (255, 255, 255), (222, 225, 231), (52, 101, 164), (230, 233, 239)
_PAD, _GAP, _BETWEEN = 12, 4, 14
_NAME, _TEXT, _SMALL, _TITLE = 15, 14, 12, 24  # px
_FRAME = 208  # px, the most that a frame is wide
_LINES = 3  # of a caption


@dataclass(frozen=True)
class Card:
    """One clip.

    Attributes:
        frames: numbers and pictures uint8 ``[H, W, 3]``, of one size over all cards.
        facts: a short line beside the name.
        note: what was done to the clip, if anything.
        level: 0 to 1, drawn as a bar.
    """

    name: str
    frames: list[tuple[int, np.ndarray]]
    caption: str
    facts: str
    note: str
    level: float


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _clipped(text: str, size: int, width: int, lines: int) -> str:
    """Wrap to at most ``lines`` lines; what is more is cut off with an ellipsis."""
    rows = wrap(" ".join(text.split()), _font(size), width).split("\n")
    if len(rows) <= lines:
        return "\n".join(rows)
    last = rows[lines - 1]
    while last and _font(size).getlength(last + " ...") > width:
        last = last[:-1]
    return "\n".join([*rows[: lines - 1], last.rstrip() + " ..."])


def _inner(width: int) -> int:
    """Of a card with three frames of ``width`` px."""
    return max(3 * width + 2 * _GAP, 300)


def _texts(card: Card, inner: int) -> tuple[str, str]:
    """Caption and note as they are drawn."""
    return _clipped(card.caption, _TEXT, inner, _LINES), _clipped(card.note, _SMALL, inner, 2)


def _face(card: Card, scale: float, lines: tuple[int, int]) -> Image.Image:
    """One card, with room for so many lines of caption and of note."""
    tiles = [(number, enlarge(picture, scale)) for number, picture in card.frames]
    width, height = tiles[0][1].size
    inner = _inner(width)
    caption, note = _texts(card, inner)
    rows = _PAD + 22 + height + 18 + 10 + lines[0] * (_TEXT + 4) + lines[1] * (_SMALL + 4) + 4 + _PAD
    face = Image.new("RGB", (inner + 2 * _PAD, rows), _CARD)
    draw = ImageDraw.Draw(face)
    draw.rectangle((0, 0, face.width - 1, face.height - 1), outline=_EDGE)
    facts = _font(_SMALL).getlength(card.facts)
    draw.text((_PAD, _PAD - 2), _clipped(card.name, _NAME, int(inner - facts - 12), 1), font=_font(_NAME), fill=INK)
    draw.text((_PAD + inner - facts, _PAD), card.facts, font=_font(_SMALL), fill=FAINT)
    top = _PAD + 22
    for place, (number, tile) in enumerate(tiles):
        left = _PAD + place * (width + _GAP)
        face.paste(tile, (left, top))
        draw.text((left, top + height + 2), f"frame {number}", font=_font(_SMALL - 1), fill=FAINT)
    top += height + 18
    draw.rectangle((_PAD, top + 2, _PAD + inner - 1, top + 5), fill=_TRACK)
    draw.rectangle((_PAD, top + 2, _PAD + max(1, round(card.level * (inner - 1))), top + 5), fill=_BAR)
    draw.multiline_text((_PAD, top + 10), caption, font=_font(_TEXT), fill=INK, spacing=3)
    low = face.height - _PAD - (note.count("\n") + 1) * (_SMALL + 4)
    draw.multiline_text((_PAD, low), note, font=_font(_SMALL), fill=FAINT, spacing=3)
    return face


def _bars(title: str, histogram: dict[str, Any], size: tuple[int, int]) -> Image.Image:
    """A small histogram (``counts`` and ``edges``) with its range below."""
    width, height = size
    picture = Image.new("RGB", size, _DESK)
    draw = ImageDraw.Draw(picture)
    counts, edges = histogram["counts"], histogram["edges"]
    bottom, step = height - 18, width / len(counts)
    for place, count in enumerate(counts):
        if count:
            tall = max(2, round((bottom - 2) * count / max(counts)))
            draw.rectangle((place * step, bottom - tall, (place + 1) * step - 2, bottom - 1), fill=_BAR)
    draw.line((0, bottom, width, bottom), fill=_EDGE)
    small = _font(_SMALL)
    for text, at in ((f"{edges[0]:.3g}", "l"), (title, "m"), (f"{edges[-1]:.3g}", "r")):
        place = {"l": 0, "m": (width - small.getlength(text)) / 2, "r": width - small.getlength(text)}[at]
        draw.text((place, bottom + 3), text, font=small, fill=FAINT)
    return picture


def card_sheet(
    title: str, lines: Sequence[str], cards: Sequence[Card], path: str | Path, histogram: tuple[str, dict[str, Any]]
) -> np.ndarray:
    """Write a PNG: a heading with ``lines`` and a histogram, then the cards in two columns.

    Returns:
        the sheet, uint8 ``[H, W, 3]``.

    Raises:
        UserError: the file cannot be written.
        ValueError: no card.
    """
    if not cards:
        raise ValueError("a sheet needs a card")
    shown = cards[0].frames[0][1].shape[1]
    scale = shown_scale(shown, _FRAME) if 2 * shown <= _FRAME else _FRAME / shown
    texts = [_texts(card, _inner(round(shown * scale))) for card in cards]
    most = tuple(max(text[k].count("\n") + bool(text[k]) for text in texts) for k in (0, 1))
    faces = [_face(card, scale, most) for card in cards]
    wide, tall = faces[0].size
    columns = 2 if len(faces) > 1 else 1
    width = columns * wide + (columns + 1) * _BETWEEN
    bars = (260, 84)
    beside = columns == 2
    texts = [wrap(line, _font(_TEXT), width - 2 * _BETWEEN - (bars[0] + 20 if beside else 0)) for line in lines]
    head = 24 + _TITLE + sum((text.count("\n") + 1) * (_TEXT + 6) for text in texts)
    head = max(head, bars[1] + 2 * _BETWEEN) if beside else head + bars[1]
    rows = -(-len(faces) // columns)
    sheet = Image.new("RGB", (width, head + rows * (tall + _BETWEEN)), _DESK)
    draw = ImageDraw.Draw(sheet)
    draw.text((_BETWEEN, _BETWEEN - 4), title, font=_font(_TITLE), fill=INK)
    top = _BETWEEN + _TITLE + 6
    for text in texts:
        draw.multiline_text((_BETWEEN, top), text, font=_font(_TEXT), fill=FAINT, spacing=4)
        top += (text.count("\n") + 1) * (_TEXT + 6)
    place = (width - bars[0] - _BETWEEN, _BETWEEN) if beside else (_BETWEEN, head - bars[1] - 6)
    sheet.paste(_bars(*histogram, bars), place)
    for number, face in enumerate(faces):
        row, column = divmod(number, columns)
        sheet.paste(face, (_BETWEEN + column * (wide + _BETWEEN), head + row * (tall + _BETWEEN)))
    with atomic(Path(path)) as draft:
        sheet.save(draft, format="PNG")
    return np.asarray(sheet)
