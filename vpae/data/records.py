"""What a source of clips gives, and the surface that all sources share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vpae.errors import UserError

BAD = ("error", "skip")
CROP = "scaled to fill, cropped about the centre, Lanczos"  # what vpae.data.videos.fit does, for fingerprints
RATE = "frame nearest in time"
_EDGE = 1 << 16  # bytes of a file's head and tail that go into a fingerprint


class Unreachable(UserError):
    """The disk did not answer: this says nothing of the clip, so no rule may leave the clip out for it."""


@dataclass(frozen=True)
class Record:
    """One clip to learn from.

    Attributes:
        name: unique within its source.
        frames: uint8 ``[F, H, W, 3]``; of a clip that the teacher is still to make, its first frame alone.
        caption: its text.
        note: what was done to the file to make it fit, empty where nothing was.
    """

    name: str
    frames: np.ndarray
    caption: str
    note: str = ""


class Source(Protocol):
    """A sequence of records that can say what it is.

    Attributes:
        bad: what becomes of a clip whose reading raises a UserError: ``error`` ends the run, ``skip`` leaves it out of
            a cache. It is no part of the fingerprint: it changes nothing of a cache in which every clip is good.
        folder: where its files lie, which reports leave out of their lines; None where it has none.
    """

    bad: str
    folder: Path | None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """``(frames, height, width)`` of every clip; None where the files decide."""

    def __len__(self) -> int: ...

    def name(self, item: int) -> str:
        """What a clip is called, without reading it."""

    def __getitem__(self, item: int) -> Record:
        """Read a clip.

        Raises:
            UserError: it is bad; the message is one line that names it and says why.
            Unreachable: the disk did not answer.
        """

    def fingerprint(self) -> dict[str, Any]:
        """What decides every record, field by field."""


def answered(path: Path) -> None:
    """Make sure that a file can be opened, or is simply not there (which its reader will say).

    Raises:
        Unreachable: the file is there, or may be, and the system will not let us see.
    """
    try:
        path.open("rb").close()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return
    except OSError as error:
        raise Unreachable(f"{path}: cannot be opened ({error.strerror}); give the command again when it can") from error


def ends(path: Path) -> bytes:
    """Length of a file and the 64 KiB at its ends, which tell videos apart without reading all of them."""
    with path.open("rb") as stream:
        head = stream.read(_EDGE)
        length = stream.seek(0, 2)
        stream.seek(max(length - _EDGE, 0))
        return f"{length}:".encode() + head + stream.read()


def first_fault(faults: Sequence[str]) -> UserError:
    """The error of a list that holds bad clips where ``bad`` is ``error``: the first one, and how many more."""
    more = len(faults) - 1
    others = f" (and {more} more)" if more else ""
    return UserError(f"{faults[0]}{others}; or leave such clips out with bad: skip")
