from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vpae.data.look import _font, _spread, contact_sheet, side_by_side, wrap
from vpae.data.videos import read_video, write_video
from vpae.errors import UserError


def flat(count: int, height: int, width: int, first: int = 10) -> np.ndarray:
    levels = first + 10 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def ink(picture: np.ndarray) -> int:
    """Pixels as dark as the text."""
    return int((picture.max(axis=-1) < 60).sum())


def test_spread_takes_first_and_last_and_none_twice():
    assert _spread(17, 9) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert _spread(3, 9) == [0, 1, 2] and _spread(1, 9) == [0] and _spread(5, 1) == [0]


def test_wrap_fits_and_loses_nothing():
    text = "a ball passes-through_another one incomprehensibilities"
    for width in (40, 90, 200):
        lines = wrap(text, _font(), width).split("\n")
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(_font().getlength(line) <= width for line in lines)


def test_contact_sheet(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    contact_sheet([("real clip", flat(17, 16, 16)), ("other", flat(3, 8, 24, 200))], path, columns=9, scale=2)
    sheet = np.asarray(Image.open(path))
    for level in [10 + 20 * i for i in range(9)] + [200, 210, 220]:  # every tile whole, at twice its size
        rows, columns = np.nonzero(np.all(sheet == level, axis=-1))
        height, width = (16, 48) if level >= 200 else (32, 32)
        inside = (rows >= rows.min()) & (rows < rows.min() + height)
        assert inside.sum() >= height * width * 0.95, level
    assert ink(sheet[:40, :150]) > 50 and ink(sheet[60:, :150]) > 20
    contact_sheet([("real clip", flat(17, 16, 16)), ("other", flat(3, 8, 24, 200))], tmp_path / "again.png", scale=2)
    assert path.read_bytes() == (tmp_path / "again.png").read_bytes()


def test_contact_sheet_of_large_frames_is_scaled_down(tmp_path):
    contact_sheet([("big", flat(5, 100, 200))], tmp_path / "a.png", columns=5, scale=0.1)
    width, height = Image.open(tmp_path / "a.png").size
    assert width < 150 + 5 * 30 and height < 60


@pytest.mark.parametrize(("width", "shown"), [(16, 128), (64, 128), (100, 100), (200, 200), (832, 256), (1280, 256)])
def test_frames_of_a_sheet_are_of_a_size_to_look_at(tmp_path, width, shown):
    sheet = contact_sheet([("clip", flat(3, 16, width))], tmp_path / "a.png")
    assert np.array_equal(sheet, np.asarray(Image.open(tmp_path / "a.png")))
    assert sheet.shape[1] == 150 + 3 * (shown + 4)


def test_contact_sheet_mistakes(tmp_path):
    with pytest.raises(ValueError, match="row"):
        contact_sheet([], tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        contact_sheet([("a", flat(3, 8, 8))], tmp_path / "file" / "a.png")


def test_side_by_side_shows_each_clip_under_its_label(tmp_path):
    first, second = flat(4, 16, 16, 70), flat(4, 16, 16, 150)
    shown = side_by_side([("real", first), ("student at 1 NFE", second)], scale=4)
    assert shown.dtype == np.uint8 and len(shown) == 4
    assert shown.shape[1] % 2 == 0 and shown.shape[2] % 2 == 0
    middle = shown.shape[2] // 2
    for number in range(4):
        for half, clip in ((shown[number, :, :middle], first), (shown[number, :, middle:], second)):
            assert np.all(half == clip[number, 0, 0], axis=-1).sum() >= 64 * 64
            assert ink(half) > 30
    write_video(tmp_path / "a.mp4", shown, 8)
    assert read_video(tmp_path / "a.mp4").shape == shown.shape


def test_side_by_side_wants_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([("a", flat(4, 16, 16)), ("b", flat(5, 16, 16))])
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([])
