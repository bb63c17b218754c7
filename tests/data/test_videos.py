from __future__ import annotations

import resource
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from vpae.data.bounce import COLOURS, World, make_clip
from vpae.data.videos import _resampled, fit, probe_video, read_video, read_video_noted, write_video
from vpae.errors import UserError
from vpae.files import atomic


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of one grey each, from which the number of a frame can be read back: 3 times it."""
    return np.broadcast_to(3 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    return [int(n) for n in frames[:, 5, 5, 0] // 3]


def textured(count: int) -> np.ndarray:
    """A drifting noise: hard to encode, so that a cut in the middle of the file cuts the middle of the clip."""
    noise = np.random.default_rng(0).integers(0, 256, (64 + count, 64 + count, 3), dtype=np.uint8)
    return np.stack([noise[i : i + 64, i : i + 64] for i in range(count)])


def write_plain(path, frames, container: str, options: dict[str, str] | None = None) -> None:
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.fixture
def clip():
    return make_clip(World(), "test", 3)


def test_lossless_returns_the_same_bits(tmp_path, clip):
    write_video(tmp_path / "clip.mp4", clip.frames, 8, lossless=True)
    assert np.array_equal(read_video(tmp_path / "clip.mp4"), clip.frames)


def test_default_is_near_and_what_browsers_play(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    write_video(path, clip.frames, 8)
    assert psnr(read_video(path), clip.frames) > 30
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_flat_colours_keep_their_values(tmp_path):
    for name, colour in COLOURS.items():
        frames = np.tile(np.array(colour, np.uint8), (3, 32, 32, 1))
        write_video(tmp_path / "flat.mp4", frames, 8)
        error = np.abs(read_video(tmp_path / "flat.mp4").astype(int) - frames).max()
        assert error <= 3, (name, error)  # a wrong colour matrix is off by twenty and more


def test_same_frames_same_bytes_and_no_leftovers(tmp_path, clip):
    for lossless in (False, True):
        write_video(tmp_path / "new" / "a.mp4", clip.frames, 8, lossless=lossless)
        write_video(tmp_path / "new" / "b.mp4", clip.frames, 8, lossless=lossless)
        assert (tmp_path / "new" / "a.mp4").read_bytes() == (tmp_path / "new" / "b.mp4").read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.mp4", "b.mp4"]


def test_a_name_with_a_colon_is_a_name(tmp_path, clip):
    write_video(tmp_path / "http:a.mp4", clip.frames, 8)
    assert read_video(tmp_path / "http:a.mp4").shape == clip.frames.shape


def test_write_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="even width and height"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 31, 32, 3), np.uint8), 8)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.float32), 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_video(tmp_path / "file" / "a.mp4", numbered(3), 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("missing", [1, 400, 20_000])
def test_a_full_disk_keeps_the_old_file(tmp_path, missing):
    path, frames = tmp_path / "a.mp4", textured(12)
    write_video(path, frames, 8)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) - missing, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            write_video(path, frames, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_atomic_takes_place_only_at_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_probe(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(21), 8)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.frames, info.fps, info.width, info.height, info.duration) == (21, 8.0, 48, 32, 21 / 8)


def test_rate_is_changed_by_nearest_frames(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, numbered(9), 8, lossless=True)
    assert numbers(read_video(path)) == list(range(9))
    doubled, note = read_video_noted(path, fps=16)
    assert numbers(doubled) == [n for n in range(9) for _ in range(2)]
    assert "8 fps read at 16 fps" in note
    assert numbers(read_video(path, fps=4)) == [0, 2, 4, 6]
    assert numbers(read_video(path, fps=16, num_frames=5)) == [0, 0, 1, 1, 2]
    assert read_video_noted(path, fps=8, num_frames=9)[1] == ""


def test_resampling_is_nearest_in_time_on_irregular_stamps():
    rng = np.random.default_rng(0)
    for _ in range(50):
        gaps = [Fraction(int(n), 600) for n in rng.integers(1, 100, rng.integers(1, 12))]
        times = [sum(gaps[:i], Fraction(0)) for i in range(len(gaps))]
        fps, shown = Fraction(int(rng.integers(2, 40))), Fraction(1, 10)
        got = list(_resampled(iter(zip(times, range(len(times)), strict=True)), fps, shown))
        want = [min(range(len(times)), key=lambda i: (abs(times[i] - k / fps), i)) for k in range(len(got))]
        assert got == want
        assert len(got) == 1 or abs(len(got) - (times[-1] + shown) * fps) <= Fraction(1, 2)


def test_number_of_frames(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, numbered(10), 8, lossless=True)
    frames, note = read_video_noted(path, num_frames=9)
    assert numbers(frames) == list(range(9)) and "cut after frame 9" in note
    with pytest.raises(UserError, match=r"a\.mp4: 10 frames at 8 fps, 11 wanted"):
        read_video(path, num_frames=11)
    frames, note = read_video_noted(path, num_frames=13, short="repeat_last")
    assert numbers(frames) == [*range(10), 9, 9, 9] and "repeated 3 more times" in note
    with pytest.raises(ValueError, match="short"):
        read_video(path, short="loop")


def test_fit_crops_about_the_centre_and_keeps_the_aspect():
    picture = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    assert np.array_equal(fit(picture, (40, 40)), picture[:, 40:80])
    assert np.array_equal(fit(picture.transpose(1, 0, 2), (40, 40)), picture[:, 40:80].transpose(1, 0, 2))
    y, x = np.mgrid[:80, :120]
    disc = np.where(np.hypot(y - 39.5, x - 59.5) < 20, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)
    for size, radius in (((160, 160), 40), ((40, 30), 10)):
        mask = fit(disc, size)[..., 0] > 127
        assert abs(mask.any(0).sum() - 2 * radius) <= 1 and abs(mask.any(1).sum() - 2 * radius) <= 1
    wide = fit(disc, (80, 80), pixel_aspect=2.0)[..., 0] > 127
    assert abs(wide.any(0).sum() - 80) <= 1 and abs(wide.any(1).sum() - 40) <= 1


def test_size(tmp_path):
    write_video(tmp_path / "a.mp4", numbered(3), 8, lossless=True)
    frames, note = read_video_noted(tmp_path / "a.mp4", size=(40, 40))
    assert frames.shape == (3, 40, 40, 3) and numbers(frames) == [0, 1, 2]
    assert note == "48x32 scaled and cropped to 40x40"


def test_a_phone_held_upright_is_read_upright(tmp_path):
    path = tmp_path / "a.mp4"
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :16] = 255  # top left as stored: top right when turned clockwise
    write_video(path, frames, 8, lossless=True)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    info, read = probe_video(path), read_video(path)
    assert (info.width, info.height) == (32, 64)
    assert np.array_equal(read, np.rot90(frames, k=-1, axes=(1, 2)))
    assert read[0, 0, -1, 0] == 255 and read[0, 0, 0, 0] == 0


@pytest.mark.parametrize("reader", [read_video, probe_video])
def test_what_is_no_video_is_named(tmp_path, reader):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "text.txt").write_text("hello " * 100)
    write_video(tmp_path / "good.mp4", numbered(3), 8)
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile good.mp4\n")
    for name, word in {
        "none.mp4": "No such file",
        ".": "directory",
        "empty.mp4": "0 bytes",
        "text.mp4": "not a video",
        "text.txt": "not a video",
        "list.ffconcat": "not a video",
    }.items():
        with pytest.raises(UserError, match=word) as caught:
            reader(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    with pytest.raises(UserError, match="no video stream"):
        read_video(path)


FORMS = {
    "index in front": ("mp4", {"movflags": "+faststart"}),
    "index behind": ("mp4", {}),
    "fragments": ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "matroska": ("matroska", {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_file_is_never_quietly_short(tmp_path, form):
    container, options = FORMS[form]
    path, frames = tmp_path / "clip", textured(40)
    write_plain(path, frames, container, options)
    assert len(read_video(path, num_frames=40)) == 40
    data = path.read_bytes()
    for share in (0.01, 0.02, 0.05, 0.3, 0.6, 0.85):
        path.write_bytes(data[: int(share * len(data))])
        for wanted in ({}, {"num_frames": 40}, {"num_frames": 40, "short": "repeat_last"}, {"fps": 8}):
            with pytest.raises(UserError, match="cut off"):
                read_video(path, **wanted)
        with pytest.raises(UserError, match="cut off"):
            probe_video(path)


def test_one_byte_less_is_cut(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, textured(12), 8)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut off"):
        read_video(path, num_frames=12, short="repeat_last")


@pytest.mark.parametrize("form", FORMS)
def test_a_hole_in_the_middle_is_damage(tmp_path, form):
    container, options = FORMS[form]
    path = tmp_path / "clip"
    write_plain(path, textured(40), container, options)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_video(path, num_frames=40, short="repeat_last")
