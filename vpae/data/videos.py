"""Video files in and out, with PyAV alone.

Reading is one pass that keeps only the frames asked for. A file is read whole or not at all: whatever
was cut off or damaged is an error that names the file, never a quietly shorter clip. A file may also lie in memory
(:class:`VideoBytes`), as it does inside a table of clips.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
from PIL import Image

from vpae.errors import UserError
from vpae.files import atomic

# Containers that hold one video in one file: no playlists or lists of further files, no text shown as a video, and
# no GIF, whose missing end nobody can tell.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
SHORT = ("error", "repeat_last")
OTHER_FPS = ("nearest", "error")
OTHER_SIZE = ("crop", "error")
_BT709, _LIMITED, _BITEXACT = 1, 1, 0x400  # numbers of the H.264 tables and of libavformat's flag


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds: frames, frames/s, displayed width and height in px, duration in s."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True)
class VideoBytes:
    """The bytes of a video file that lies in no folder, under the name by which errors call it."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


Readable = Path | VideoBytes  # what the functions below take for a file, beside a path as text


def _file(path: str | Readable) -> Readable:
    return Path(path) if isinstance(path, str) else path


def _size(path: Readable) -> int:
    return len(path.data) if isinstance(path, VideoBytes) else path.stat().st_size


def _stream(path: Readable) -> BinaryIO:
    return io.BytesIO(path.data) if isinstance(path, VideoBytes) else path.open("rb")


@contextmanager
def _opened(path: Readable) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        if _size(path) == 0:
            raise UserError(f"{path}: the file is empty (0 bytes); fetch or write it again")
        file = _stream(path)  # a file object: a name with a colon in it would be taken for a protocol
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check the name") from error
    with file:
        try:
            container = av.open(file, options={"format_whitelist": CONTAINERS})
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(
                f"{path}: not a video file ({CONTAINERS}), or cut off before its index; fetch or encode it again"
            ) from error
        with container:
            covers = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & covers]
            if not streams:
                raise UserError(
                    f"{path}: holds no video stream, or was cut off within its header; name a whole video file"
                )
            if streams[0].codec_context is None:
                raise _damaged(path, "or of a codec that this PyAV does not decode")
            # One thread: libavcodec's frame threads drop broken frames without a word.
            streams[0].thread_type = "NONE"
            streams[0].codec_context.options = {"err_detect": "explode"}
            try:
                yield container, streams[0]
            except av.error.FFmpegError as error:
                raise _damaged(path, error.strerror) from error


def _damaged(path: Readable, how: str) -> UserError:
    return UserError(f"{path}: cut off or damaged ({how}); fetch or encode it again")


def _check_index(path: Readable, stream: av.VideoStream) -> None:
    """A cut mp4 whose index stands in front still promises frames that lie beyond the file's end."""
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > _size(path):
        raise _damaged(path, f"its index reaches to byte {end}, the file ends at {_size(path)}")


def _packets(path: Readable, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of ``stream``; at the end, the containers without a full index are held to their stated length."""
    _check_index(path, stream)
    first, last = None, Fraction(0)
    for packet in container.demux():
        if packet.is_corrupt:
            raise _damaged(path, f"a broken packet at byte {packet.pos}")
        if packet.pts is not None:
            first = packet.pts * packet.time_base if first is None else first
            last = max(last, (packet.pts + (packet.duration or 0)) * packet.time_base - first)
        if packet.stream_index == stream.index:
            yield packet
    stated = Fraction(container.duration or 0, av.time_base)
    slack = max(Fraction(1, 4), 2 / _rate(path, stream))  # rounding, and a last packet that states no duration
    if "mp4" not in container.format.name and last + slack < stated:
        raise _damaged(path, f"it says {float(stated):.2f} s and ends after {float(last):.2f} s")


def _rate(path: Readable, stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"{path}: states no frame rate; encode it again with one")
    return rate


def _timed_frames(
    path: Readable, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decode frame by frame, with the seconds since the first frame."""
    start = None
    for packet in _packets(path, container, stream):
        for frame in packet.decode():
            if frame.is_corrupt:
                raise _damaged(path, "a frame that does not decode whole")
            if frame.pts is None:
                raise UserError(f"{path}: a frame without a time stamp; encode it again")
            time = frame.pts * frame.time_base
            start = time if start is None else start
            yield time - start, frame


def _resampled(
    timed: Iterator[tuple[Fraction, av.VideoFrame]], fps: Fraction | None, shown: Fraction
) -> Iterator[av.VideoFrame]:
    """The frame nearest to each time k / fps (of two as near, the earlier); the last is ``shown`` so many seconds."""
    tick, before, frame = 0, None, None
    for time, following in timed:
        if fps is None:
            yield following
        while fps is not None and before is not None and Fraction(2 * tick) <= (before + time) * fps:
            yield frame
            tick += 1
        before, frame = time, following
    while fps is not None and frame is not None and (tick == 0 or tick + Fraction(1, 2) < (before + shown) * fps):
        yield frame
        tick += 1


def fit(picture: np.ndarray, size: tuple[int, int], *, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scale a picture to fill ``size``, keeping its aspect, and crop the overhang equally on both sides (Lanczos).

    Args:
        picture: uint8 ``[H, W, 3]``.
        size: height and width wanted, px.
        pixel_aspect: width of a stored pixel over its height.

    Returns:
        uint8 ``[size[0], size[1], 3]``.
    """
    height, width = picture.shape[:2]
    if (height, width) == tuple(size) and pixel_aspect == 1:
        return picture
    scale = max(size[0] / height, size[1] / (width * pixel_aspect))
    keep_h, keep_w = size[0] / scale, size[1] / scale / pixel_aspect
    left, top = max((width - keep_w) / 2, 0.0), max((height - keep_h) / 2, 0.0)
    box = (left, top, min(left + keep_w, width), min(top + keep_h, height))
    return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box))


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90)) if frame.rotation else picture


def probe_video(path: str | Readable) -> VideoInfo:
    """Count a file's frames and read its rate and size, decoding the first frame only.

    Raises:
        UserError: the file is missing, empty, cut off, or no video.
    """
    path = _file(path)
    with _opened(path) as (container, stream):
        rate, first, count, times = _rate(path, stream), None, 0, []
        for packet in _packets(path, container, stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.size and not packet.is_discard:
                count += 1
                times.append(packet.pts)
        if first is None or any(time is None for time in times):
            raise _damaged(path, "no frame decodes, or frames lack time stamps")
        duration = (max(times) - min(times)) * stream.time_base + 1 / rate
    height, width = _to_rgb(first).shape[:2]
    return VideoInfo(count, float(rate), width, height, float(duration))


def read_video(
    path: str | Readable,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    short: Literal["error", "repeat_last"] = "error",
) -> np.ndarray:
    """Read a clip: uint8 ``[F, H, W, 3]``. The arguments are those of :func:`read_video_noted`."""
    return read_video_noted(path, num_frames=num_frames, fps=fps, size=size, short=short)[0]


def read_video_noted(
    path: str | Readable,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    short: Literal["error", "repeat_last"] = "error",
    other_fps: Literal["nearest", "error"] = "nearest",
    other_size: Literal["crop", "error"] = "crop",
) -> tuple[np.ndarray, str]:
    """Read a clip and say what was done to make it fit.

    Args:
        num_frames: frames wanted; a longer clip gives its first ones.
        fps: frames/s wanted; each frame is the one nearest in time (none is blended), all frames as they come
            unless given.
        size: height and width wanted, px: scaled to fill, cropped about the centre.
        short: for a clip of fewer than ``num_frames`` frames at ``fps``: an error, or repeat its last frame.
        other_fps: for a clip of another rate than ``fps``: read it as said there, or an error.
        other_size: for a clip of another displayed size than ``size``: fit it as said there, or an error.

    Returns:
        frames uint8 ``[F, H, W, 3]``, and a line of what was changed, empty where nothing was.

    Raises:
        UserError: the file is missing, empty, no video, cut off, damaged, too short, or of a rate or size that the
            arguments do not allow.
    """
    path = _file(path)
    for name, known, value in (
        ("short", SHORT, short),
        ("other_fps", OTHER_FPS, other_fps),
        ("other_size", OTHER_SIZE, other_size),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
    kept: list[np.ndarray] = []
    notes: list[str] = []
    with _opened(path) as (container, stream):
        rate = _rate(path, stream)
        target = None if fps is None else Fraction(fps).limit_denominator(100_000)
        if other_fps == "error" and target not in (None, rate):
            raise UserError(
                f"{path}: {float(rate):g} fps, {float(target):g} wanted; encode it so, or say other_fps: nearest"
            )
        aspect = float(stream.sample_aspect_ratio or 1)
        latest = stored = None
        for frame in _resampled(_timed_frames(path, container, stream), target, 1 / rate):
            if len(kept) == num_frames:
                notes.append(f"cut after frame {num_frames}")
                break
            if frame is latest:
                kept.append(kept[-1])
                continue
            latest, picture = frame, _to_rgb(frame)
            stored = picture.shape[:2]
            ratio = 1 / aspect if frame.rotation % 180 else aspect
            if other_size == "error" and size is not None and (stored != tuple(size) or ratio != 1):
                raise UserError(
                    f"{path}: {stored[1]}x{stored[0]}, {size[1]}x{size[0]} wanted; scale it, or say other_size: crop"
                )
            kept.append(picture if size is None else fit(picture, size, pixel_aspect=ratio))
    if not kept:
        raise _damaged(path, "no frame decodes")
    if size is not None and stored != tuple(size):
        notes.insert(0, f"{stored[1]}x{stored[0]} scaled and cropped to {size[1]}x{size[0]}")
    if target is not None and target != rate:
        notes.insert(0, f"{float(rate):g} fps read at {float(target):g} fps, nearest frame")
    missing = (num_frames or 0) - len(kept)
    if missing > 0:
        if short == "error":
            at = f"at {float(target or rate):g} fps"
            raise UserError(
                f"{path}: {len(kept)} frames {at}, {num_frames} wanted; ask for fewer, or say short: repeat_last"
            )
        notes.append(f"last frame repeated {missing} more time{'s' * (missing > 1)}")
        kept += kept[-1:] * missing
    return np.stack(kept), "; ".join(notes)


def write_video(path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 16, lossless: bool = False) -> None:
    """Write an H.264 mp4 with its index in front; the same frames give the same bytes.

    The default, yuv420p in BT.709, plays in every browser but halves the colour's resolution. ``lossless`` encodes
    RGB (libx264rgb at crf 0), which reads back bit for bit and which ffmpeg and mpv play but browsers may not.

    Args:
        path: the file; its folder is made, and it appears only when it is whole.
        frames: uint8 ``[F, H, W, 3]``.
        fps: frames/s.
        crf: x264's quality, 0 best; not used by ``lossless``.

    Raises:
        UserError: odd sizes for yuv420p, or the file cannot be written.
        ValueError: not frames.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames are uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    height, width = frames.shape[1:3]
    if not lossless and (height % 2 or width % 2):
        raise UserError(
            f"{path}: yuv420p needs an even width and height, not {width}x{height}; crop, or write it lossless"
        )
    with atomic(path) as draft, av.open(f"file:{draft}", "w", format="mp4", options={"movflags": "+faststart"}) as out:
        out.flags |= _BITEXACT
        codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
        rate = Fraction(fps).limit_denominator(100_000)
        stream = out.add_stream(codec, rate=rate, options={"crf": str(0 if lossless else crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count = 1  # x264's bits depend on the number of threads
        if not lossless:
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if not lossless:
                frame = frame.reformat(format=pixels, dst_colorspace=_BT709, dst_color_range=_LIMITED)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
