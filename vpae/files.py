"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vpae.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around calls that write ``path`` (a file or a folder): whatever the file system refuses becomes one line.

    Raises:
        UserError: ``path`` cannot be written, or the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # FFmpeg's and shutil's own errors are OSErrors too
        raise UserError(
            f"{path}: cannot be written ({_reason(error)}); free some space or choose another place"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])  # the first of the files that could not be copied
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a neighbour of ``path`` to write to; it takes ``path``'s place when all went well, and is removed if not.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(path)
    finally:
        if path.parent.is_dir():
            draft.unlink(missing_ok=True)


def is_path(text: str) -> bool:
    """Whether a file system can be asked about a path at all: neither empty nor too long, and without a NUL."""
    parts = [len(part.encode("utf-8", "surrogatepass")) for part in text.split("/")]
    return bool(text) and "\0" not in text and max(parts) < 256 and sum(parts) + len(parts) < 4096


def share(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors makes files that nobody else may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN, which JSON has not, becomes null."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def feed(digest: hashlib._Hash, path: Path) -> None:
    """Add a file's bytes to a hash, a MiB at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
