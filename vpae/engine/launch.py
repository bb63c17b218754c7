"""Several ranks from one command: torchrun's own agent, without its traceback when somebody presses Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

import torch

SAVED_NOTE = "VPAE_SAVED_NOTE"  # environment: the file by which rank 0 says that it saved after a signal
_PATIENCE = 300  # seconds a rank has to finish its turn and save after a signal


def default_ranks(batch: int) -> int:
    """As many ranks as can share ``batch`` samples evenly: up to one a GPU, or two on a CPU that has the cores.

    One rank leaves most of a second core idle.
    """
    most = torch.cuda.device_count() if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))
    return max(ranks for ranks in range(1, max(1, most) + 1) if batch % ranks == 0)


def launch(ranks: int, arguments: list[str]) -> int:
    """Run ``python -m vpae ARGUMENTS`` on ``ranks`` ranks of this machine; returns the exit status.

    A signal is passed on to the ranks, which finish the turn, save and say how to go on; the status is 0 then, and 1
    where they could not.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch 2.11 knows no such setting: there it is 30 s
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_PATIENCE))
    if not os.environ.get("OMP_NUM_THREADS"):  # an empty one lets every rank take all cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    # the ranks themselves say what went wrong; set here, since importing torch resets the levels of its loggers
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "saved"
        os.environ[SAVED_NOTE] = str(note)
        try:
            elastic_launch(config, sys.executable)("-m", "vpae", *arguments)
        except SignalException:
            return 0 if note.exists() else 1
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:  # it had no time for words
                name = signal.Signals(-failure.exitcode).name
                print(
                    f"error: rank {rank} was ended by {name} (the system's memory may have run out); what was saved is "
                    "whole: give the command again to go on, distill and finetune with --resume",
                    file=sys.stderr,
                    flush=True,
                )
            return max(1, failure.exitcode)
        finally:
            del os.environ[SAVED_NOTE]  # its folder goes now
    return 0


def note_saved() -> None:
    """Tell the launcher, where there is one, that a signal was answered and everything is saved."""
    if SAVED_NOTE in os.environ:
        Path(os.environ[SAVED_NOTE]).touch()
