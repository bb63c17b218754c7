"""Commands of vpae on several ranks, to be killed: what the benchmarks of reliability share."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import vpae

Ranks = list[subprocess.Popen]
_started: Ranks = []


def start(arguments: list[str], count: int = 1, folder: Path | None = None) -> Ranks:
    """``python -m vpae ARGUMENTS`` on ``count`` ranks of one group, each the head of a session of its own.

    Args:
        folder: to run in; what the ranks say goes to ``said.txt`` in it. None: here, and to the terminal.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group["OMP_NUM_THREADS"] = max(1, len(os.sched_getaffinity(0)) // count)
    where = [str(Path(vpae.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    group["PYTHONPATH"] = os.pathsep.join(where)
    command, ranks = [sys.executable, "-m", "vpae", *arguments], []
    for rank in range(count):
        variables = group | ({"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {})
        options = {"env": os.environ | {k: str(v) for k, v in variables.items()}, "start_new_session": True}
        if folder is None:
            ranks.append(subprocess.Popen(command, **options))
            continue
        with (folder / "said.txt").open("a") as said:
            ranks.append(subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, **options))
    _started.extend(ranks)
    return ranks


def kill(ranks: Ranks) -> None:
    """Kill -9 the ranks and all that they started, as when a machine dies."""
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def ended(ranks: Ranks, seconds: float = float("inf")) -> bool:
    """Whether all ranks came to their end within ``seconds``; leaves the benchmark where one failed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
        if any(rank.returncode for rank in ranks):
            break
        time.sleep(min(0.05, max(0.0, until - time.monotonic())))
    if any(rank.returncode for rank in ranks):
        kill(ranks)
        sys.exit(f"a command failed with status {[rank.returncode for rank in ranks]}")
    return all(rank.returncode == 0 for rank in ranks)


atexit.register(lambda: kill(_started))  # they would outlive a benchmark that is interrupted
