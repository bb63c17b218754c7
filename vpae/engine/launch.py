"""Several ranks from one command: torchrun's own agent, without its traceback when somebody presses Ctrl-C."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import uuid

import torch

from vpae.engine import restarts

# seconds a rank has after a signal to end its micro-batch and to save: 271 GB of a 14B student at 0.15 GB/s
_PATIENCE = 1800
_MISTAKE = 2  # exit status: the user's to mend, so that another attempt would end the same
_SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h


def default_ranks(batch: int) -> int:
    """As many ranks as can share ``batch`` samples evenly: up to one a GPU, or two on a CPU that has the cores.

    One rank leaves most of a second core idle.
    """
    most = torch.cuda.device_count() if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))
    return max(ranks for ranks in range(1, max(1, most) + 1) if batch % ranks == 0)


def launch(ranks: int, arguments: list[str], max_restarts: int = 0) -> int:
    """Run ``python -m vpae ARGUMENTS`` on ``ranks`` ranks of this machine; returns the exit status.

    A signal is passed on to the ranks, which drop the turn at hand, save and say how to go on; the status is 0 then,
    and 1 where they could not.

    Args:
        max_restarts: how often all ranks are started again, from the last checkpoint, after one was lost. A mistake of
            the user's ends the run at once.
    """
    # torch 2.11 knows no such setting: there it is 30 s
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_PATIENCE))
    if not os.environ.get("OMP_NUM_THREADS"):  # an empty one lets every rank take all cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    # the ranks themselves say what went wrong; set here, since importing torch resets the levels of its loggers
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="vpae-launch-") as folder:
        os.environ[restarts.FOLDER] = folder
        try:
            for restart in range(max_restarts + 1):
                status, words = _attempt(ranks, arguments)
                if status in (0, _MISTAKE) or not words:
                    return status
                if restart < max_restarts:
                    _say(f"{words}; starting all ranks again, restart {restart + 1} of {max_restarts}")
            _say(
                f"error: {words}; what was saved is whole: give the command again to go on, distill and finetune with "
                "--resume"
            )
            return status
        finally:
            del os.environ[restarts.FOLDER]  # its folder goes now


def _attempt(ranks: int, arguments: list[str]) -> tuple[int, str]:
    """Exit status of one start of all ranks, and what became of the one that was lost (empty: the user stopped it)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # torchrun's own would begin a run again that the user has to mend
    )
    restarts.forget_saved()
    try:
        elastic_launch(config, sys.executable)("-m", "vpae", *arguments)
    except SignalException:
        return (0 if restarts.saved() else 1), ""
    except ChildFailedError as error:
        if any(failure.exitcode == _MISTAKE for failure in error.failures.values()):
            return _MISTAKE, ""
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode, f"rank {rank} ended with status {failure.exitcode} (its words are above)"
        name = signal.Signals(-failure.exitcode).name  # it had no time for words
        return 1, f"rank {rank} was ended by {name} (the system's memory may have run out)"
    return 0, ""


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def leave_with_the_launcher() -> None:
    """Where torchrun's agent started this rank: have the system send SIGTERM when the agent dies, even by SIGKILL.

    Otherwise its ranks hold their GPUs until their next collective fails. They save first, as after any SIGTERM.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
