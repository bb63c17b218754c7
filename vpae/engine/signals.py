"""SIGTERM and SIGINT: noted inside the training loop, which drops its turn and saves; elsewhere an interrupt."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 5.0  # seconds
_received: list[int] = []


def received() -> bool:
    """Whether this process has been asked to stop: what fails after that fails because the other ranks left first."""
    return bool(_received)


def interrupt_on_signals() -> None:
    """Let both signals raise KeyboardInterrupt, and remember that they came.

    A launcher often passes on what the terminal has sent already: what follows at once is the same wish again, and
    would hit the handling of the first.
    """
    last = [-_ECHO]

    def interrupt(number: int, frame: Any) -> None:
        _received.append(number)
        before, last[0] = last[0], time.monotonic()
        if last[0] - before >= _ECHO:
            raise KeyboardInterrupt

    for number in _NUMBERS:
        signal.signal(number, interrupt)


def ignore() -> None:
    """From here on both signals do nothing: the process says its last words."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def noted() -> Iterator[list[int]]:
    """Inside, the signals only join the list that this yields; outside the main thread nothing changes."""
    here: list[int] = []

    def note(number: int, frame: Any) -> None:
        _received.append(number)
        here.append(number)

    try:
        previous = {number: signal.signal(number, note) for number in _NUMBERS}
    except ValueError:  # not the main thread: whoever has it owns the signals
        previous = {}
    try:
        yield here
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
