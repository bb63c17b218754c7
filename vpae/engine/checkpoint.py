"""Checkpoints: torch.distributed.checkpoint into safetensors, whole or not at all.

A checkpoint is a folder ``step-00000120`` that holds safetensors files of every rank (each writes its own shards; any
number of ranks reads them back) and ``state.json``: turn, players' steps, recipe, fingerprints, files and sizes. It is
written under another name and renamed when all of it is on disk, so a folder of that name is complete. No pickle is
written or read.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from vpae.engine import signals
from vpae.engine.parallel import Processes, local
from vpae.errors import UserError

_PREFIX, _PARTIAL, _STATE = "step-", ".partial", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def turn(self) -> int:
        return int(self.state["turn"])


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
    try:
        writer = HuggingFaceStorageWriter(str(partial), _files(tensors), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=processes.group, no_dist=processes.size == 1)
        processes.barrier()
        if processes.is_main:
            files = {f.name: f.stat().st_size for f in sorted(partial.iterdir())}
            _write(
                partial / _STATE, json.dumps(state | {"turn": turn, "files": files, "tensors": len(tensors)}, indent=1)
            )
            for file in (*partial.iterdir(), partial):
                _sync(file)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            _sync(root)
    except (OSError, dcp.CheckpointException) as error:
        failure = _reason(error)
    _all_written(final, failure, processes, partial)
    if processes.is_main:
        _prune(root, keep)
    return final


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
    for old in sorted(p for p in root.glob(f"{_PREFIX}*") if not p.name.endswith(_PARTIAL))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in root.glob(f"{_PREFIX}*{_PARTIAL}"):
        shutil.rmtree(stale, ignore_errors=True)


def find(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint under ``root``, None if there is none.

    Raises:
        UserError: the newest one was damaged after it was written.
    """
    folders = sorted(p for p in Path(root).glob(f"{_PREFIX}*") if not p.name.endswith(_PARTIAL))
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
    """Open a checkpoint and check that its files are the ones that were written.

    Raises:
        UserError: a file is missing, cut or unreadable.
    """
    mend = f"remove {folder} to go on from the one before it"
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        files = dict(state["files"])
        int(state["turn"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {folder} is damaged ({_STATE} is missing or unreadable); {mend}") from None
    for name, size in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"checkpoint {folder} is damaged ({name} is missing or cut); {mend}")
    return Checkpoint(Path(folder), state)


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], processes: Processes, *, everything: bool = False) -> None:
    """Read the checkpoint into ``tensors`` in place; every name must be there with its shape.

    Args:
        everything: refuse a checkpoint that holds tensors besides these.

    Raises:
        UserError: a tensor is missing, of another shape, or one too many.
    """
    stored = stored_shapes(checkpoint.folder)
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


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files (their headers alone are read)."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
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
