"""What a rank that a launcher starts again must know of the attempts before it.

torchrun (and accelerate, which calls it) starts all ranks again when one is lost, with the same arguments. Two notes in
a folder that the launcher keeps over its attempts, one a machine, tell the new ranks what to do: that the output folder
is theirs, so that they go on from its newest checkpoint without ``--resume``; and that a mistake of the user's was
found, which the same command would only find again. No torch here: a rank that leaves at once need not import it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FOLDER = "VPAE_LAUNCH_FOLDER"  # environment: where our own launcher keeps its notes
_SAVED, _CLAIMED, _MISTAKE = "saved", "claimed", "mistake"


def folder() -> Path | None:
    """The folder that this rank's launcher keeps over its attempts; None where there is no launcher, or another one.

    torchrun hands each rank an error file, ``RUN/attempt_1/RANK/error.json``; RUN is private to it and goes with it.
    """
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if len(file.parents) > 2 and file.parents[1].name.startswith("attempt_"):
        return file.parents[2]
    return None


def _note(name: str, text: str = "") -> None:
    kept = folder()
    if kept is not None:
        # where it cannot be written (a full disk is one of the mistakes) the launcher's attempts repeat themselves
        with contextlib.suppress(OSError):
            (kept / name).write_text(text, encoding="utf-8")


def _noted(name: str) -> bool:
    kept = folder()
    return kept is not None and (kept / name).is_file()


def note_claim() -> None:
    """The output folder is this run's: a later attempt goes on in it."""
    _note(_CLAIMED)


def claimed() -> bool:
    """Whether an earlier attempt of this launcher has begun this run."""
    return _noted(_CLAIMED)


def note_saved() -> None:
    """A signal was answered and everything is saved."""
    _note(_SAVED)


def forget_saved() -> None:
    """What the attempt before this one saved says nothing about this one."""
    kept = folder()
    if kept is not None:
        (kept / _SAVED).unlink(missing_ok=True)


def saved() -> bool:
    return _noted(_SAVED)


def note_mistake(words: str) -> None:
    """The user must mend something before any attempt can get further."""
    if words or not _noted(_MISTAKE):
        _note(_MISTAKE, words)


def mistake() -> str | None:
    """What :func:`note_mistake` was told in an earlier attempt; empty on a machine whose ranks found nothing."""
    kept = folder()
    try:
        return None if kept is None else (kept / _MISTAKE).read_text(encoding="utf-8")
    except OSError:
        return None


def is_last_attempt() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS")
