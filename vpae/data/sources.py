"""Where records come from: Bounce itself, or a folder of video files with a caption each.

A source is a sequence of :class:`Record` and has a fingerprint, so that whatever was made from it (a cache, a
checkpoint) can tell whether it still is the same data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np

from vpae.data.bounce import SPLITS, Clip, World, make_clip
from vpae.data.videos import SHORT, read_video_noted
from vpae.errors import UserError

CAPTIONS = "captions.jsonl"
_EDGE = 1 << 16  # bytes of a file's head and tail that go into a folder's fingerprint


@dataclass(frozen=True)
class Record:
    """One clip to learn from.

    Attributes:
        name: unique within its source.
        frames: uint8 ``[F, H, W, 3]``.
        caption: its text.
        note: what was done to the file to make it fit, empty where nothing was.
    """

    name: str
    frames: np.ndarray
    caption: str
    note: str = ""


class Source(Protocol):
    """A sequence of records that can say what it is."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> Record: ...

    def fingerprint(self) -> dict[str, Any]: ...


class BounceSource:
    """Clips ``start .. start + count - 1`` of a split of Bounce, simulated when asked for.

    Raises:
        UserError: an unknown split, a negative start, or no clip at all.
    """

    def __init__(self, world: World, split: str, count: int, start: int = 0) -> None:
        if split not in SPLITS:
            raise UserError(f"bounce source: unknown split {split!r}; name one of {', '.join(SPLITS)}")
        if count < 1 or start < 0:
            raise UserError(f"bounce source: needs count >= 1 and start >= 0, not {count} and {start}")
        self.world, self.split, self.indices = world, split, range(start, start + count)

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, item: int) -> Clip:
        """The clip with its states, of which ``self[item]`` shows the frames and the caption."""
        try:
            return make_clip(self.world, self.split, self.indices[item])
        except ValueError as error:  # a world in which no such clip can be
            raise UserError(f"data source of kind bounce: {self.split} clip {self.indices[item]}: {error}") from None

    def __getitem__(self, item: int) -> Record:
        clip = self.clip(item)
        return Record(clip.name, clip.frames, clip.caption)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": "bounce",
            "world": self.world.fingerprint(),
            "split": self.split,
            "start": self.indices.start,
            "count": len(self),
        }


class VideoFolderSource:
    """Video files named by a JSONL file of ``{"file": ..., "caption": ...}`` lines, paths relative to its folder.

    Args:
        path: the JSONL file, or a folder that holds ``captions.jsonl``.
        size: height and width of the records, px; ``num_frames`` and ``fps`` likewise; see ``read_video_noted``.
        short: what to do with a clip of too few frames.

    Raises:
        UserError: on opening, with the line's number: bad JSON, a missing key or caption, a missing file, a path
            that leaves the folder, a file named twice. On reading: a file that does not read.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int] | None,
        num_frames: int | None,
        fps: float | None,
        *,
        short: Literal["error", "repeat_last"] = "error",
    ) -> None:
        path = Path(path)
        self.path = path / CAPTIONS if path.is_dir() else path
        self.folder = self.path.parent
        self.size, self.num_frames, self.fps, self.short = size, num_frames, fps, short
        self.lines = list(_read_captions(self.path))
        if not self.lines:
            raise UserError(f"{self.path}: names no clip; give it one line of JSON a clip")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, item: int) -> Record:
        file, caption = self.lines[item]
        frames, note = read_video_noted(
            self.folder / file, num_frames=self.num_frames, fps=self.fps, size=self.size, short=self.short
        )
        return Record(str(PurePosixPath(file).with_suffix("")), frames, caption, note)

    def fingerprint(self) -> dict[str, Any]:
        """Besides the reading's numbers a digest of every name, caption, file size and the 64 KiB at a file's ends."""
        digest = hashlib.sha256()
        for file, caption in self.lines:
            with (self.folder / file).open("rb") as stream:
                head = stream.read(_EDGE)
                length = stream.seek(0, 2)
                stream.seek(max(length - _EDGE, 0))
                digest.update(json.dumps([file, caption, length]).encode() + head + stream.read())
        return {
            "kind": "videos",
            "size": None if self.size is None else list(self.size),
            "num_frames": self.num_frames,
            "fps": self.fps,
            "short": self.short,
            "count": len(self),
            "sha256": digest.hexdigest(),
        }


def _read_captions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a JSONL file, or a folder with {CAPTIONS}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; name the JSONL file of captions, saved as UTF-8") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            ) from error
        if not isinstance(entry, dict):
            raise UserError(f'{where}: not an object; write {{"file": ..., "caption": ...}}')
        for key in ("file", "caption"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise UserError(f"{where}: no {key}; give {key!r} a text")
        _check_inside(path.parent, entry["file"], where)
        name = str(PurePosixPath(entry["file"]).with_suffix(""))
        if name in seen:
            raise UserError(f"{where}: {name} is named by line {seen[name]} too; name each clip once")
        seen[name] = number
        yield entry["file"], entry["caption"].strip()


def _check_inside(folder: Path, file: str, where: str) -> None:
    relative, path = PurePosixPath(file), folder / file
    leaves = relative.is_absolute() or ".." in relative.parts
    if leaves or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {file} lies outside {folder}; keep the clips in the folder of their captions")
    if not path.is_file():
        raise UserError(f"{where}: {path} does not exist; mend the name or remove the line")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1000


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "world": (lambda v: isinstance(v, dict), "a mapping"),
    "split": (lambda v: v in SPLITS, f"one of {', '.join(SPLITS)}"),
    "count": (lambda v: _whole(v, 1), "a whole number from 1"),
    "start": (lambda v: _whole(v, 0), "a whole number from 0"),
    "path": (lambda v: isinstance(v, str | Path) and bool(str(v)), "a path"),
    "size": (
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(_whole(edge, 1) for edge in v),
        "[height, width] in px",
    ),
    "num_frames": (lambda v: _whole(v, 1), "a whole number from 1"),
    "fps": (_rate, "a number of frames/s"),
    "short": (lambda v: v in SHORT, f"one of {', '.join(SHORT)}"),
}
_KEYS: dict[str, dict[str, bool]] = {  # of each kind: the keys, and whether they must be given
    "bounce": {"world": False, "split": True, "count": True, "start": False},
    "videos": {"path": True, "size": True, "num_frames": True, "fps": True, "short": False},
}


def open_source(spec: dict[str, Any]) -> Source:
    """Open what a recipe names: ``{"kind": "bounce", "split", "count", ...}`` or ``{"kind": "videos", "path", ...}``.

    ``world`` holds constants of :class:`~vpae.data.bounce.World` that differ from its own; ``size`` is
    ``[height, width]``; ``short`` is ``error`` or ``repeat_last``.

    Raises:
        UserError: an unknown kind, a key unknown, missing or of the wrong type, or what the source itself finds.
    """
    values = dict(spec)
    kind = values.pop("kind", None)
    if kind not in _KEYS:
        raise UserError(f"data source: kind is {kind!r}; write one of {', '.join(_KEYS)}")
    where = f"data source of kind {kind}"
    for key in values:
        if key not in _KEYS[kind]:
            near = difflib.get_close_matches(key, _KEYS[kind], 1) or list(_KEYS[kind])
            raise UserError(f"{where}: unknown key {key!r}; did you mean {' or '.join(near)}?")
    for key, needed in _KEYS[kind].items():
        if needed and key not in values:
            raise UserError(f"{where}: {key} is missing; give it")
    for key, value in values.items():
        good, wanted = _CHECKS[key]
        if not good(value):
            raise UserError(f"{where}: {key} is {value!r}; it has to be {wanted}")
    if kind == "videos":
        return VideoFolderSource(**{**values, "size": tuple(values["size"])})
    try:
        world = World.from_dict(values.pop("world", {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: world: {error}") from error
    return BounceSource(world, **values)
