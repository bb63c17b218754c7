"""Where clips come from: Bounce itself, video files with a caption each, or pictures and prompts for the teacher.

A source is a sequence of :class:`Record` and has a fingerprint, so that whatever was made from it (a cache, a
checkpoint) can tell whether it still is the same data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vpae.data.bounce import SPLITS, Clip, World, make_clip
from vpae.data.listing import CAPTIONS, list_clips
from vpae.data.pictures import PRECISIONS, PictureSource, PromptSource
from vpae.data.records import BAD, CROP, RATE, Record, Source, answered, ends, first_fault
from vpae.data.videos import OTHER_FPS, OTHER_SIZE, SHORT, read_video_noted
from vpae.errors import UserError
from vpae.files import is_path
from vpae.strict import shown

__all__ = [
    "CAPTIONS",
    "BounceSource",
    "PictureSource",
    "PromptSource",
    "Record",
    "Source",
    "VideoFolderSource",
    "open_source",
]


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
        self.bad, self.folder = "error", None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.world.num_frames, self.world.size, self.world.size

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, item: int) -> Clip:
        """The clip with its states, of which ``self[item]`` shows the frames and the caption."""
        try:
            return make_clip(self.world, self.split, self.indices[item])
        except ValueError as error:  # a world in which no such clip can be
            raise UserError(f"data source of kind bounce: {self.split} clip {self.indices[item]}: {error}") from None

    def name(self, item: int) -> str:
        return f"{self.split}-{self.indices[item]:06d}"

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
    """Videos with a caption each, named by a folder, a JSONL or CSV list, or a dataset (see :func:`list_clips`).

    Args:
        path: what :func:`~vpae.data.listing.list_clips` takes; ``columns`` and ``split`` likewise.
        size: height and width of the records, px; ``num_frames``, ``fps``, ``short``, ``other_fps``, ``other_size``
            likewise; see :func:`~vpae.data.videos.read_video_noted`.
        bad: see :class:`~vpae.data.records.Source`.

    Raises:
        UserError: on opening, with the line's number: a list with a mistake, a path that leaves the folder and, unless
            ``bad`` is ``skip``, a missing or empty caption, a missing file, a clip named twice. On reading: a clip
            that has such a fault, or does not read.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int] | None,
        num_frames: int | None,
        fps: float | None,
        *,
        short: Literal["error", "repeat_last"] = "error",
        other_fps: Literal["nearest", "error"] = "nearest",
        other_size: Literal["crop", "error"] = "crop",
        bad: Literal["error", "skip"] = "error",
        columns: tuple[str, str] | None = None,
        split: str | None = None,
    ) -> None:
        self.path, self.size, self.num_frames, self.fps, self.bad = Path(path), size, num_frames, fps, bad
        self.rules = {"short": short, "other_fps": other_fps, "other_size": other_size}
        self.listing = list_clips(self.path, "file", columns, split)
        self.folder = self.listing.folder
        faults = [clip.fault for clip in self.listing.clips if clip.fault]
        if faults and bad == "error":
            raise first_fault(faults)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        return None if self.size is None or self.num_frames is None else (self.num_frames, *self.size)

    def __len__(self) -> int:
        return len(self.listing.clips)

    def name(self, item: int) -> str:
        return self.listing.clips[item].name

    def __getitem__(self, item: int) -> Record:
        clip = self.listing.clips[item]
        if clip.fault:
            raise UserError(clip.fault)
        if clip.file is not None:
            answered(clip.file)
        frames, note = read_video_noted(
            clip.load() if clip.load else clip.file,
            num_frames=self.num_frames,
            fps=self.fps,
            size=self.size,
            **self.rules,
        )
        return Record(clip.name, frames, clip.caption, note)

    def fingerprint(self) -> dict[str, Any]:
        """Besides the reading's rules a digest of every name, caption, file size and the 64 KiB at a file's ends."""
        digest = hashlib.sha256()
        for clip in self.listing.clips:
            digest.update(json.dumps([clip.name, clip.caption]).encode())
            if clip.file is not None and clip.file.is_file():
                digest.update(ends(clip.file))
        for file in self.listing.files:
            digest.update(ends(file))
        return {
            "kind": "videos",
            "size": None if self.size is None else list(self.size),
            "num_frames": self.num_frames,
            "fps": self.fps,
            **self.rules,
            "crop": CROP,
            "rate": RATE,
            "count": len(self),
            "sha256": digest.hexdigest(),
        }


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _rate(value: Any) -> bool:
    return _number(value) and 0 < value <= 1000


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


_Check = tuple[Callable[[Any], bool], str]
_PATH: _Check = (lambda v: isinstance(v, str | Path) and is_path(str(v)), "a path")
_TEXT: _Check = (lambda v: isinstance(v, str), "text")
_COLUMNS: _Check = (
    lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(_is_name(c) for c in v),
    "two names: [FILE, CAPTION]",
)
_SIZE: _Check = (
    lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(_whole(edge, 1) for edge in v),
    "[height, width] in px",
)
_FRAMES: _Check = (lambda v: _whole(v, 1), "a whole number from 1")


def _one_of(known: tuple[str, ...]) -> _Check:
    return (lambda v: isinstance(v, str) and v in known, f"one of {', '.join(known)}")


_BY_THE_TEACHER: dict[str, tuple[bool, _Check]] = {
    "path": (True, _PATH),
    "size": (True, _SIZE),
    "num_frames": (True, _FRAMES),
    "steps": (True, _FRAMES),
    "guidance_scale": (True, (lambda v: _number(v) and v >= 0, "a number from 0")),
    "negative_prompt": (True, _TEXT),
    "seed": (True, (lambda v: _whole(v, 0), "a whole number from 0")),
    "precision": (False, _one_of(PRECISIONS)),
    "attention": (False, _TEXT),
}
_KEYS: dict[str, dict[str, tuple[bool, _Check]]] = {  # of each kind: the keys, whether they must be given, and as what
    "bounce": {
        "split": (True, _one_of(SPLITS)),
        "count": (True, _FRAMES),
        "start": (False, (lambda v: _whole(v, 0), "a whole number from 0")),
        "world": (False, (lambda v: isinstance(v, dict), "a mapping")),
    },
    "videos": {
        "path": (True, _PATH),
        "size": (True, _SIZE),
        "num_frames": (True, _FRAMES),
        "fps": (True, (_rate, "a number of frames/s")),
        "short": (False, _one_of(SHORT)),
        "other_fps": (False, _one_of(OTHER_FPS)),
        "other_size": (False, _one_of(OTHER_SIZE)),
        "bad": (False, _one_of(BAD)),
        "columns": (False, _COLUMNS),
        "split": (False, _TEXT),
    },
    "generate": {
        **_BY_THE_TEACHER,
        "other_size": (False, _one_of(OTHER_SIZE)),
        "bad": (False, _one_of(BAD)),
        "columns": (False, _COLUMNS),
    },
    "prompts": {
        **_BY_THE_TEACHER,
        "bad": (False, _one_of(BAD)),
    },
}


def open_source(spec: dict[str, Any]) -> Source:
    """Open what a recipe names.

    ``kind: bounce``: ``split``, ``count``, ``start``, and in ``world`` the constants of
    :class:`~vpae.data.bounce.World` that differ from its own. ``kind: videos``: the arguments of
    :class:`VideoFolderSource`. ``kind: generate``: those of :class:`~vpae.data.pictures.PictureSource`; ``kind:
    prompts``: of :class:`~vpae.data.pictures.PromptSource`. ``size`` is ``[height, width]``, px.

    Raises:
        UserError: an unknown kind, a key unknown, missing or of the wrong type, or what the source itself finds.
    """
    values = dict(spec)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"data source: kind is {shown(kind)}; write one of {', '.join(_KEYS)}")
    where, keys = f"data source of kind {kind}", _KEYS[kind]
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(shown(key).strip("'"), keys, 1) or list(keys)
            raise UserError(f"{where}: unknown key {shown(key)}; did you mean {' or '.join(near)}?")
    for key, (needed, _) in keys.items():
        if needed and key not in values:
            raise UserError(f"{where}: {key} is missing; give it")
    for key, value in values.items():
        good, wanted = keys[key][1]
        if not good(value):
            raise UserError(f"{where}: {key} is {shown(value)}; it has to be {wanted}")
    for key in ("size", "columns"):
        if key in values:
            values[key] = tuple(values[key])
    if kind == "videos":
        return VideoFolderSource(**values)
    if kind in ("generate", "prompts"):
        return (PictureSource if kind == "generate" else PromptSource)(**values)
    try:
        world = World.from_dict(values.pop("world", {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: world: {error}") from error
    return BounceSource(world, **values)
