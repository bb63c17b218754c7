"""Checksums of a checkpoint: a bit that flips on the disk is found before anything is trained on it.

``state.json`` holds the CRC-32 of every file beside it and a SHA-256 of itself. CRC-32 finds every flip of up to 32
neighbouring bits and all but one in 4e9 of other changes, at twice the speed of SHA-256 (2.5 against 1.2 GB/s a core
where this was written: 12 s a rank for the 31 GB that each of eight ranks keeps of a 14B model). It is no signature:
whoever wants to deceive can. Each rank sums what it wrote itself; all share the files when they are read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SUMS, _SEAL = "crc32", "sha256"
_BLOCK, _THREADS = 1 << 22, 4


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def checksums(paths: Iterable[Path]) -> dict[str, int]:
    """CRC-32 of each file by its name."""
    paths = list(paths)
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib lets go of the interpreter
        return dict(zip((path.name for path in paths), pool.map(checksum, paths), strict=True))


def sealed(state: dict[str, Any], sums: dict[str, int]) -> dict[str, Any]:
    """The state as it is written: with the files' checksums and its own."""
    state = json.loads(json.dumps(state | {_SUMS: sums}))
    return state | {_SEAL: _digest(state)}


def is_sealed(state: dict[str, Any]) -> bool:
    """Whether a state that was read is the one that was written.

    One that holds no checksum at all, as checkpoints did before there were any, passes; a flipped bit cannot make one.
    """
    if _SUMS not in state and _SEAL not in state:
        return True
    sums, files = state.get(_SUMS), state.get("files")
    same = isinstance(sums, dict) and isinstance(files, dict) and sums.keys() == files.keys()
    return same and state.get(_SEAL) == _digest({key: value for key, value in state.items() if key != _SEAL})


def differing(folder: Path, state: dict[str, Any], part: slice = slice(None)) -> list[str]:
    """Names of the files (of a ``part`` of them) that are not those that were written.

    Raises:
        OSError: a file cannot be read.
    """
    known = state.get(_SUMS, {})
    return [n for n, value in checksums(folder / name for name in sorted(known)[part]).items() if value != known[n]]


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
