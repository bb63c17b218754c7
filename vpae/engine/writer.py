"""Checkpoints written at once, or by a thread from a copy in host memory while training goes on.

The copy is as large as the checkpoint's part of this rank and is kept for the next one; while a file of it is written,
torch holds up to three times that file's bytes besides (2 GiB a file).
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpae.engine import checkpoint as checkpoints
from vpae.engine.host import host_like
from vpae.engine.parallel import Processes, aside, local

_LAST_WORDS = 120.0  # seconds that a run which ends with an error waits for the checkpoint under way


class Writer:
    """Writes a trainer's checkpoints, one after another.

    Args:
        root: where they lie.
        keep: how many.
        beside: in a thread. All ranks then take part with messages of their own, and whatever fails, fails on all.
    """

    def __init__(self, root: Path, keep: int, processes: Processes, beside: bool) -> None:
        self.root, self.keep, self.beside = root, keep, beside
        self.processes = aside(processes) if beside else processes
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, turn: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write checkpoint ``turn``; where it is written beside training, come back when its tensors are copied.

        Raises:
            UserError: this one, or the one before, cannot be written.
        """
        if not self.beside:
            return checkpoints.save(self.root, turn, tensors, state, self.processes, self.keep)
        self.wait()
        work = (turn, self._staged(tensors), copy.deepcopy(state))
        self._thread = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._thread.start()
        return checkpoints.folder_of(self.root, turn)

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody was told yet."""
        return self._failure is not None

    def wait(self) -> None:
        """Come back when the checkpoint under way is whole.

        Raises:
            UserError: it cannot be written; the same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let the checkpoint under way be finished where something else has gone wrong already."""
        if self._thread is not None:
            self._thread.join(_LAST_WORDS)

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, sharded as they are, in host memory."""
        device = self.processes.device
        if self._copies.keys() != tensors.keys():
            self._copies = {name: host_like(tensor, device) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            local(self._copies[name]).copy_(local(tensor.detach()), non_blocking=True)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return self._copies

    def _write(self, turn: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            checkpoints.save(self.root, turn, tensors, state, self.processes, self.keep)
        except BaseException as error:  # told in the main thread, at the next turn
            self._failure = error
