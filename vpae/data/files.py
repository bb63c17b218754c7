"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vpae.errors import UserError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a neighbour of ``path`` to write to; it takes ``path``'s place when all went well, and is removed if not.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:  # FFmpeg's own errors of the file system are OSErrors too
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another"
        ) from error
    finally:
        if path.parent.is_dir():
            draft.unlink(missing_ok=True)
