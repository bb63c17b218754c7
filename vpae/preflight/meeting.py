"""Ranks that meet for a look at the network, under a clock: one that hangs is named instead of waited for.

NCCL has not been measured here yet, gloo has.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from vpae.engine.parallel import Processes, device_of_rank
from vpae.errors import UserError
from vpae.preflight.machine import Line

_ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}  # fp32: 256 MiB, 16 MiB
_SLOW = {"cuda": 5e9, "cpu": 0.0}  # bytes/s; our guess: below PCIe, and 13 s for each pass over 14B of weights in fp32
_ALL_HANG = (
    "every rank is in it and none comes out: a firewall between the machines, or a network card that the others do not "
    "reach: name the right one in NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME), and see what NCCL_DEBUG=INFO says"
)


class Meeting:
    """The ranks' way to each other: a store, in which each notes the stages it enters and leaves, and a group.

    Args:
        patience: seconds that a stage may take.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = device_of_rank()
        self.processes = Processes(self.rank, self.size, self.device, None)
        self.store = self.clock_store = None

    def begin(self) -> None:
        """Meet all ranks.

        Raises:
            UserError: rank 0's machine cannot be reached.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size == 1:
            return
        self.store, self.clock_store = self._connect(os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"), None
        self.clock_store = self._connect(False)  # a client of its own: the other may be waiting in a call
        self.store.set(f"host/{self.rank}", socket.gethostname())
        with self.stage("start"):
            self.store.wait([f"start/in/{rank}" for rank in range(self.size)], timedelta(seconds=2 * self.patience))
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with self.stage(f"joining over {backend}"):
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=2 * self.patience),
            )
            self.processes.barrier()

    def _connect(self, hosts: bool) -> dist.Store:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=self.patience)
        try:
            store = dist.TCPStore(host, port, is_master=hosts and self.rank == 0, timeout=limit, wait_for_workers=False)
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank} ({socket.gethostname()}) does not reach rank 0 at {host}:{port} within "
                f"{self.patience:g} s ({str(error).splitlines()[0]}); is that machine up, its port free and open to "
                "this one, and MASTER_ADDR its name?"
            ) from None
        return dist.PrefixStore("preflight", store)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around what ranks do together; the process ends with a line on why when it takes longer than the patience.

        What a rank does by itself stands before it: one that hangs there is the one that does not come.
        """
        if self.clock_store is None:
            yield
            return
        self.store.set(f"{name}/in/{self.rank}", "1")
        clock = threading.Timer(self.patience, self._overdue, [name])
        clock.daemon = True
        clock.start()
        try:
            yield
        finally:
            clock.cancel()
        self.store.set(f"{name}/out/{self.rank}", "1")

    def _overdue(self, name: str) -> None:
        """The first rank that waits speaks; then all leave."""
        known = self.clock_store
        inside = [r for r in range(self.size) if known.check([f"{name}/in/{r}"])]
        missing = [r for r in range(self.size) if r not in inside]
        late = [r for r in inside if not known.check([f"{name}/out/{r}"])]
        if self.rank == min(late, default=self.rank):
            print(f"error: {self._why(name, missing, late)}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # its launcher ends all ranks as soon as one has left
        os._exit(2)

    def _why(self, name: str, missing: list[int], late: list[int]) -> str:
        if not missing and len(late) == self.size:
            return f"preflight: '{name}' takes longer than {self.patience:g} s: {_ALL_HANG}"
        culprits = missing or late
        named = ", ".join(f"rank {rank} ({self._host(rank)})" for rank in culprits)
        did = "did not come to" if missing else "did not get through"
        return (
            f"preflight: {named} {did} '{name}' within {self.patience:g} s; look at what "
            f"{'they print' if len(culprits) > 1 else 'it prints'} and at that machine (--timeout waits longer)"
        )

    def _host(self, rank: int) -> str:
        key = f"host/{rank}"
        return self.clock_store.get(key).decode() if self.clock_store.check([key]) else "never seen"

    def collectives(self) -> list[Line]:
        """All-reduce and all-gather of known numbers: right, and how fast (bytes a rank sends, per second)."""
        if self.size == 1:
            return []
        backend, elements = dist.get_backend(), _ELEMENTS[self.device.type]
        lines, n = [], self.size
        mine = torch.arange(elements, device=self.device, dtype=torch.float32).remainder_(997) + self.rank

        def reduced() -> bool:
            dist.all_reduce(total := mine.clone())
            expected = n * (mine - self.rank) + n * (n - 1) / 2
            return torch.equal(total, expected)

        share = mine[: elements // n]

        def gathered() -> bool:
            parts = torch.empty(n * len(share), device=self.device)
            dist.all_gather_into_tensor(parts, share)
            return all(torch.equal(part, share - self.rank + r) for r, part in enumerate(parts.split(len(share))))

        for name, check, call, sent in (
            ("all-reduce", reduced, lambda: dist.all_reduce(mine.clone()), 8 * elements * (n - 1) / n),
            ("all-gather", gathered, lambda: self._gather(share), 4 * len(share) * (n - 1)),
        ):
            with self.stage(f"{name} over {backend}"):
                right = all(self.processes.gather(check()))
                call()
                seconds = self._seconds(call)
            rate = sent / max(self.processes.gather(seconds))
            text = f"{name} over {backend} of {4 * elements >> 20} MiB: {rate / 1e9:.2f} GB/s a rank"
            if not right:
                mend = (
                    "a card or a cable is at fault, or NCCL's transport: try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1"
                )
                lines.append(Line("fails", "network", f"{name} over {backend} gives wrong numbers", mend))
            elif rate < _SLOW[self.device.type]:
                mend = "NCCL_DEBUG=INFO says which path it takes; see nvidia-smi topo -m, and NCCL_* set here"
                lines.append(Line("warning", "network", text, mend))
            else:
                lines.append(Line("ok", "network", text))
        return lines

    def _gather(self, share: torch.Tensor) -> None:
        parts = torch.empty(self.size * len(share), device=self.device)
        dist.all_gather_into_tensor(parts, share)

    def _seconds(self, call) -> float:
        """Of one call, in the mean of three."""
        self._settle()
        started = time.perf_counter()
        for _ in range(3):
            call()
        self._settle()
        return (time.perf_counter() - started) / 3

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.processes.barrier()
