"""Tensors kept in the machine's own memory, which pass through the device when they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vpae.engine.parallel import local
from vpae.errors import UserError

GIB = 2**30
BUCKET = 1 << 25  # elements that pass through the device at once: 128 MiB a tensor of each kind in fp32


def host_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Zeros like ``tensor`` (sharded as it is) in host memory; pinned where ``device`` is a GPU that copies from it."""
    return torch.zeros_like(tensor, device="cpu", pin_memory=device.type == "cuda", requires_grad=False)


def buckets(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of neighbours of at most ``BUCKET`` elements together (or one that is larger by itself)."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > BUCKET:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def pass_through(
    groups: Sequence[Sequence[Tensor]], device: torch.device, work: Callable[[int, list[Tensor]], None]
) -> None:
    """Let ``work(i, copies)`` change copies on ``device`` of every group of host tensors, which then take the changes.

    On a GPU the next group comes and the last one goes while one is worked on: three groups are there at most.
    """
    cuda = device.type == "cuda"
    coming, going = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if cuda else (None, None)
    here = torch.cuda.current_stream(device) if cuda else None

    def fetch(group: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(coming):
            return [tensor.to(device, non_blocking=True, copy=True) for tensor in group]

    ahead = fetch(groups[0]) if groups else []
    for i, group in enumerate(groups):
        copies = ahead
        if cuda:
            here.wait_stream(coming)
            coming.wait_stream(going)  # the group before has left
        ahead = fetch(groups[i + 1]) if i + 1 < len(groups) else []
        work(i, copies)
        if cuda:
            going.wait_stream(here)
        with torch.cuda.stream(going):
            for tensor, copy in zip(group, copies, strict=True):
                tensor.copy_(copy, non_blocking=True)
                if cuda:
                    copy.record_stream(here)
                    copy.record_stream(going)
    if cuda:
        going.synchronize()  # whoever reads the host tensors next reads them on the CPU


def local_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of this rank's parts."""
    return sum(local(t).numel() * t.element_size() for t in tensors)


def free_memory() -> int | None:
    """Bytes that this machine (and this process's control group) can still give; None where the system does not say."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    root = Path("/sys/fs/cgroup")
    first = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in (first, ("memory.max", "memory.current")):  # of both versions
        try:
            found.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, min(found))


def require_memory(wanted: dict[str, int]) -> None:
    """Refuse to keep more in host memory than there is: the system would end the run without a word.

    Args:
        wanted: bytes of one rank by the recipe's key and value that ask for them; every rank of this machine keeps as
            much.

    Raises:
        UserError: it does not fit.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total, free = ranks * sum(wanted.values()), free_memory()
    if free is None or total <= free:
        return
    parts = ", ".join(f"{key} {ranks * size / 2**30:.1f} GiB" for key, size in wanted.items())
    raise UserError(
        f"this machine has {free / 2**30:.1f} GiB of memory free and its {ranks} ranks would keep {total / 2**30:.1f} "
        f"GiB there ({parts}): keep them elsewhere, or use more machines"
    )
