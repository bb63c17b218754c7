"""Folders that one run at a time may fill."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from typing import TextIO

from vpae.engine.parallel import Processes


@contextlib.contextmanager
def alone(opened: Callable[[], TextIO | None], what: str, processes: Processes) -> Iterator[None]:
    """Let one run at a time (all its ranks) look at and fill a folder; another that wants it waits.

    Args:
        opened: opens the file to lock, on the main rank; None where there is nothing to guard.
        what: the folder, in words.
    """
    lock = processes.together(opened, main_only=True)
    if lock is None:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that is using {what} ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            print(f"{what} cannot be locked ({error.strerror}): let one run fill it at a time", flush=True)
        yield
