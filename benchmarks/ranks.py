"""Commands of vpae on several ranks, to be killed: what the benchmarks of reliability share."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import vpae
from vpae.__main__ import main


class Forked:
    """A command run by a copy of this process, which has imported everything: it begins at once.

    It is like a Popen as far as it is used here.
    """

    def __init__(self, arguments: list[str], folder: Path | None, variables: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            os.environ.update(variables)
            if folder is not None:
                os.chdir(folder)
                said = os.open("said.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(said, 1)
                os.dup2(said, 2)
            sys.argv = ["vpae", *arguments]
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        return self._reap(0)


Ranks = list[subprocess.Popen | Forked]
_started: Ranks = []


def start(arguments: list[str], count: int = 1, folder: Path | None = None, *, fork: bool = False) -> Ranks:
    """``python -m vpae ARGUMENTS`` on ``count`` ranks of one group, each the head of a session of its own.

    Args:
        folder: to run in; what the ranks say goes to ``said.txt`` in it. None: here, and to the terminal.
        fork: from this process, which must have imported what they need and have computed nothing.
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
        variables = {k: str(v) for k, v in variables.items()}
        if fork:
            ranks.append(Forked(arguments, folder, variables))
            continue
        options = {"env": os.environ | variables, "start_new_session": True}
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
