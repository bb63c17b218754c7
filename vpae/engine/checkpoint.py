"""Checkpoints: torch.distributed.checkpoint into safetensors, whole or not at all.

A checkpoint is a folder ``step-00000120`` that holds safetensors files of every rank (each writes its own shards; any
number of ranks reads them back) and ``state.json``: turn, players' steps, recipe, fingerprints, files with their sizes
and checksums (:mod:`vpae.engine.integrity`). It is written under another name and renamed when all of it is on disk, so
a folder of that name is complete. No pickle is written or read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from vpae.engine import integrity, signals
from vpae.engine.parallel import Processes, local
from vpae.errors import UserError

_PREFIX, _PARTIAL, _STATE = "step-", ".partial", "state.json"
_NAME = re.compile(_PREFIX + r"(\d{8,})")
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def turn(self) -> int:
        return self.state["turn"]

    def part(self, name: str, kind: type[T] | tuple[type, ...]) -> T:
        """An entry of the state.

        Raises:
            UserError: it is not there, or something else.
        """
        value = self.state.get(name)
        if not isinstance(value, kind):
            raise damaged(self.folder, f"{_STATE} says nothing usable of {name}")
        return value


def damaged(folder: Path, what: str) -> UserError:
    """The error that names what is wrong with a checkpoint."""
    return UserError(f"checkpoint {folder} is damaged ({what}); remove {folder} to go on from the one before it")


def kept_bytes(sizes: Sequence[float], keep: int) -> float:
    """Disk that a run takes at most: of each phase ``keep`` checkpoints of its size, and the one that is being
    written."""
    return keep * sum(sizes) + max(sizes, default=0)


def folder_of(root: Path, turn: int) -> Path:
    """Where checkpoint ``turn`` lies once it is whole."""
    return root / f"{_PREFIX}{turn:08d}"


def save(
    root: Path, turn: int, tensors: dict[str, Tensor], state: dict[str, Any], processes: Processes, keep: int
) -> Path:
    """Write checkpoint ``turn`` atomically, then drop all but the last ``keep``.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = folder_of(root, turn)
    partial = final.with_name(final.name + _PARTIAL)
    failure = ""
    if processes.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            failure = _reason(error)
    _all_written(final, failure, processes)
    sums: dict[str, int] = {}
    try:
        writer = HuggingFaceStorageWriter(str(partial), _files(tensors), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=processes.group, no_dist=processes.size == 1)
        # DCP names a rank's files so; on a cluster only this rank's node is sure to have their bytes at hand
        mine = sorted(partial.glob(f"shard-{processes.rank + 1:05d}-*"))
        for file in mine:
            _sync(file)
        sums = integrity.checksums(mine)
    except (OSError, dcp.CheckpointException) as error:
        failure = _reason(error)
    _all_written(final, failure, processes, partial)
    of_all = {name: value for part in processes.gather(sums) for name, value in part.items()}
    if processes.is_main:
        try:
            _complete(partial, final, state | {"turn": turn, "tensors": len(tensors)}, of_all)
        except OSError as error:
            failure = _reason(error)
    _all_written(final, failure, processes, partial)
    if processes.is_main:
        _prune(root, keep)
    return final


def _complete(partial: Path, final: Path, state: dict[str, Any], sums: dict[str, int]) -> None:
    """Write the state beside the files and, with all of it on disk, give the folder its name."""
    files = sorted(partial.iterdir())
    sums = {f.name: sums[f.name] if f.name in sums else integrity.checksum(f) for f in files}
    state = integrity.sealed(state | {"files": {f.name: f.stat().st_size for f in files}}, sums)
    _write(partial / _STATE, json.dumps(state, indent=1))
    for file in (*partial.iterdir(), partial):
        _sync(file)
    if final.exists():
        _drop(final)
    os.replace(partial, final)
    _sync(final.parent)


_FILE = 1 << 31  # bytes that a rank puts into one file: torch holds a file's bytes up to three times while it writes it


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number of the file that each tensor goes to, from 1, on every rank."""
    number, filled, files = 1, 0, {}
    for name, tensor in tensors.items():
        size = local(tensor).numel() * tensor.element_size()
        if filled and filled + size > _FILE:
            number, filled = number + 1, 0
        files[name], filled = number, filled + size
    return files


def _all_written(final: Path, failure: str, processes: Processes, partial: Path | None = None) -> None:
    """Raise on every rank what went wrong on any."""
    failures = [text for text in processes.gather(failure) if text]
    if failures:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written ({failures[0]}); earlier checkpoints are untouched: free some "
            "space and go on with --resume"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(sorted({str(wrapped[0]).strip() for wrapped in error.failures.values()}))
    return str(error)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(root: Path, keep: int) -> None:
    for old in _folders(root)[:-keep]:
        _drop(old)
    for stale in root.glob(f"{_PREFIX}*{_PARTIAL}"):
        shutil.rmtree(stale, ignore_errors=True)


def _drop(folder: Path) -> None:
    """Remove a checkpoint by way of another name: a kill on the way leaves no half of it under its own."""
    aside = folder.with_name(f"{folder.name}.old{_PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    """Checkpoints by their turns; what is half written has another name."""
    named = [(int(found[1]), path) for path in Path(root).glob(f"{_PREFIX}*") if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def find(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint under ``root``, None if there is none.

    Raises:
        UserError: the newest one was damaged after it was written.
    """
    folders = _folders(root)
    return read(folders[-1]) if folders else None


def find_agreed(root: Path, processes: Processes) -> Checkpoint | None:
    """The newest complete checkpoint as rank 0 sees it, on every rank (file systems of several nodes may lag).

    Raises:
        UserError: as :func:`find`, or a rank does not see that checkpoint.
    """
    found = processes.from_main(lambda: find(root))
    if found is not None:
        processes.together(lambda: _seen(found.folder))
    return found


def _seen(folder: Path) -> None:
    if not (folder / _STATE).is_file():
        raise UserError(f"checkpoint {folder} is not seen by every rank; put the run on a file system that all share")


def read(folder: Path) -> Checkpoint:
    """Open a checkpoint and check that its files are there, of the sizes that were written; :func:`load` looks inside.

    Raises:
        UserError: a file is missing, cut, one too many or unreadable.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        files, turn = state["files"], state["turn"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged(folder, f"{_STATE} is missing or unreadable") from None
    plain = isinstance(files, dict) and all(Path(name).name == name for name in files)
    if not plain or not isinstance(turn, int) or not integrity.is_sealed(state):
        raise damaged(folder, f"{_STATE} is not as it was written")
    if not (named := _NAME.fullmatch(folder.name)) or int(named[1]) != turn:
        raise damaged(folder, f"{_STATE} is that of turn {turn}")
    for name, size in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise damaged(folder, f"{name} is missing or cut")
    if more := sorted(f.name for f in folder.glob("*.safetensors") if f.name not in files):
        raise damaged(folder, f"{more[0]} is none of its files")  # DCP would read it as well
    return Checkpoint(Path(folder), state)


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], processes: Processes, *, everything: bool = False) -> None:
    """Read the checkpoint into ``tensors`` in place; every name must be there with its shape.

    Args:
        everything: refuse a checkpoint that holds tensors besides these.

    Raises:
        UserError: a file was changed after it was written, or a tensor is missing, of another shape, or one too many.
    """
    processes.together(lambda: _check_sums(checkpoint, processes))
    stored = _stored(checkpoint.folder)
    if everything and (more := sorted(set(stored) - set(tensors))):
        raise UserError(
            f"checkpoint {checkpoint.folder} holds {more[0]!r}, which this run has not: it belongs to another recipe"
        )
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"checkpoint {checkpoint.folder} has no tensor {name!r}: it belongs to another recipe")
        if stored[name] != tuple(tensor.shape):
            raise UserError(
                f"checkpoint {checkpoint.folder}: tensor {name!r} is {stored[name]}, this run needs "
                f"{tuple(tensor.shape)}: it belongs to another architecture"
            )
    try:
        read_tensors(checkpoint.folder, tensors, processes)
    except CheckpointException as error:
        raise UserError(f"checkpoint {checkpoint.folder} cannot be read: {_first(error)}") from error


def _check_sums(checkpoint: Checkpoint, processes: Processes) -> None:
    """Read every file and compare its checksum, each rank a part of them."""
    part = slice(processes.rank, None, processes.size)
    for name in integrity.differing(checkpoint.folder, checkpoint.state, part):
        raise damaged(checkpoint.folder, f"{name} is not as it was written: its checksum differs")


def _stored(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        return stored_shapes(folder)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(folder, f"its tensors cannot be read: {str(error).strip() or type(error).__name__}") from None


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files (their headers alone are read).

    Raises:
        ValueError: of a sharded tensor a part is missing, or there twice.
    """
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in found.items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise ValueError(f"the files in {folder} do not hold {name!r} once and whole")
    return {name: tuple(tensor.size) for name, tensor in found.items()}


def read_tensors(folder: Path, tensors: dict[str, Tensor], processes: Processes) -> None:
    """Fill ``tensors`` in place from a folder's safetensors files, converting their dtype; of a sharded one, each rank
    reads its own slice.

    Raises:
        CheckpointException: a file cannot be read, on any rank.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(dict(tensors), storage_reader=reader, no_dist=processes.size == 1)
    except CheckpointException:  # it wraps whatever came, a KeyboardInterrupt too
        if signals.received():
            raise KeyboardInterrupt from None
        raise


def _first(error: CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]
