"""Processes, devices and sharding. Models know nothing of this file.

torch's ``fully_shard`` is used directly: accelerate's FSDP2 path takes one model and cannot run without GPUs, and a
distillation needs several models under one mesh. ``torchrun`` starts us, or anything that sets its variables.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vpae.backbone import Backbone
from vpae.errors import UserError
from vpae.sequence import SequenceGroup

T = TypeVar("T")


class Echo(UserError):
    """Another rank's failure, which that rank tells of."""


# ranks wait for each other while clips are encoded, a cache is hashed or rank 0 exports: longer than torch expects
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: 0 .. size - 1.
        size: number of processes.
        device: where this rank computes.
        mesh: the mesh that weights are sharded over; None for a single process, and where every rank holds them whole.
            With two dimensions the first is the machines, which hold the same shards.
        sequence: the ranks that share each clip with this one; None where every rank has its own.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    sequence: SequenceGroup | None = None
    group: dist.ProcessGroup | None = None  # in which plain objects travel; None: the one of all

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def degree(self) -> int:
        """Ranks that share a clip."""
        return 1 if self.sequence is None else self.sequence.degree

    @property
    def data_size(self) -> int:
        """Into how many parts a batch is split; ranks that share clips have the same part."""
        return self.size // self.degree

    @property
    def data_rank(self) -> int:
        """Which of these parts is this rank's."""
        return self.rank // self.degree

    def share(self, batch: int) -> int:
        """Samples of a global ``batch`` that each rank sees.

        Raises:
            UserError: it cannot be split evenly.
        """
        if batch % self.data_size:
            groups = "" if self.degree == 1 else f" of which {self.degree} share each clip (engine.sequence_parallel)"
            raise UserError(
                f"engine.global_batch {batch} cannot be split over {self.size} ranks{groups}: make it a multiple of "
                f"{self.data_size}"
            )
        return batch // self.data_size

    def agree(self, flags: Iterable[bool]) -> list[bool]:
        """Logical OR of each flag over all ranks."""
        if self.size == 1:  # a way through the device would make the host wait for all it was given
            return [bool(f) for f in flags]
        mine = torch.tensor([float(f) for f in flags], device=self.device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return [bool(f) for f in mine.tolist()]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Mean of each value over ranks; all ranks pass the same keys."""
        if self.size == 1 or not values:
            return values
        keys = sorted(values)
        mine = torch.tensor([values[k] for k in keys], dtype=torch.float64, device=self.device)
        dist.all_reduce(mine)
        return dict(zip(keys, (mine / self.size).tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order, on every rank; for plain objects and arrays."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def together(self, action: Callable[[], T], *, main_only: bool = False) -> T | None:
        """Run ``action`` on every rank (or on rank 0) and come back on all of them, or raise on all of them.

        A rank that raised alone would leave its peers waiting in their next collective until the launcher kills them.

        Returns:
            what the action returned; None on the other ranks where ``main_only``.

        Raises:
            UserError: it, or an OSError, on the first rank it happened to; on the others one that is not told to the
                user again.
        """
        failure: Exception | None = None
        result = None
        if self.is_main or not main_only:
            try:
                result = action()
            except (UserError, OSError) as error:
                failure = error
        if self.agree([failure is not None])[0]:
            first = self.gather(failure is not None).index(True)
            if first == self.rank:
                failure.first = True
                raise failure
            raise Echo(f"rank {self.rank} stops because rank {first} failed")
        return result

    def from_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone and have its result on every rank; for plain objects.

        Raises:
            UserError: as :meth:`together`.
        """
        return self.gather(self.together(action, main_only=True))[0]


def device_of_rank() -> torch.device:
    """The GPU of this local rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def alone() -> Processes:
    """This process by itself: what is sampled, judged or exported is loaded whole, without the other ranks."""
    return Processes(0, 1, device_of_rank(), None)


def start() -> Processes:
    """Join the process group that the launcher describes (gloo on CPU, NCCL on GPU), or be the only process."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = device_of_rank()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return Processes(0, 1, device, None)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, **_store_of_this_attempt(rank, size))
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return Processes(rank, size, device, mesh)


def _store_of_this_attempt(rank: int, size: int) -> dict[str, Any]:
    """Where torchrun starts its ranks again: keys of their own.

    Its agents share one store with the ranks of all attempts (pytorch issue 135712), so that those of the second would
    find the addresses of the first. Agents of several machines count attempts each for itself; there torchrun itself
    has to make a store for each.

    Raises:
        UserError: it does not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise UserError(
            "torchrun --max-restarts on several machines lets new ranks find the addresses of lost ones; give it "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, as launch/train_multinode.sh does"
        )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, size, is_master=False, timeout=PATIENCE)
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": size}


def leave(status: int, together: bool = True) -> None:
    """End this process, after the other ranks are done too where ``together``. Several ranks skip interpreter shutdown.

    gloo's worker threads abort the interpreter's finalisation now and then (about 1 run in 10 on CPU), after all work
    is done; a barrier and an immediate exit avoid it.
    """
    if dist.is_initialized():
        if status == 0 and together:
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone (gloo says so in words alone)."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def speaks(error: Exception) -> bool:
    """Whether this rank tells the user of a mistake, so that it is told once.

    It is the one that :meth:`Processes.together` found it on; what ranks find outside of that they all find, and rank 0
    tells (before they are joined, one a node).
    """
    if isinstance(error, Echo):
        return False
    if getattr(error, "first", False):
        return True
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("LOCAL_RANK", "0") == "0"


def aside(processes: Processes) -> Processes:
    """The same processes for a thread of their own, whose messages must not meet those of training; all call this."""
    if processes.size == 1:
        return processes
    return replace(processes, group=dist.new_group(backend="gloo", timeout=PATIENCE))


_BUCKET = 1 << 24  # elements that travel at once: 64 MB in fp32


def average_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Mean of the gradients over ranks that hold their weights whole; FSDP averages its shards itself."""
    if processes.size == 1 or processes.mesh is not None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    while gradients:
        bucket = [gradients.pop()]
        total = bucket[0].numel()
        while gradients and total + gradients[-1].numel() <= _BUCKET and gradients[-1].dtype == bucket[0].dtype:
            bucket.append(gradients.pop())
            total += bucket[-1].numel()
        flat = torch.cat([g.flatten() for g in bucket])
        dist.all_reduce(flat)
        flat /= processes.size
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def shard_backbone(backbone: Backbone, processes: Processes, *, on_host: bool = False) -> None:
    """Shard a backbone in place, one unit a block, and its clips' tokens where ranks share them.

    Does nothing for a single process or when it is sharded already.

    Weights are gathered in fp32 whatever the compute precision, so that one process and many compute the same.

    Args:
        on_host: keep its shards in host memory; each block's comes to the device when the block is gathered.
    """
    if processes.sequence is not None:
        backbone.share_tokens(processes.sequence)
    if processes.mesh is None or isinstance(backbone.transformer, FSDPModule):
        return
    policy = CPUOffloadPolicy(pin_memory=processes.device.type == "cuda") if on_host else OffloadPolicy()
    for block in backbone.transformer.blocks:
        fully_shard(block, mesh=processes.mesh, offload_policy=policy)
    # the root keeps its default (no reshard after forward): a backward that starts at a tapped feature needs it
    fully_shard(backbone.transformer, mesh=processes.mesh, offload_policy=policy)


def shard_module(module: nn.Module, processes: Processes) -> None:
    """Shard a small module (a head) as one fp32 unit."""
    if processes.mesh is not None and not isinstance(module, FSDPModule):
        fully_shard(module, mesh=processes.mesh)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free what a forward left unsharded, so that in-place changes of the shards are seen by the next one.

    Blocks too: where the first forward of all stopped at a tap, those after it became roots of their own.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def autocast(processes: Processes, precision: str):
    """The compute precision of a run: bf16 matrix products over fp32 weights, or plain fp32.

    Where weights are sharded no bf16 copy outlives its block: autocast's cache would hold all of them to the end of
    the turn. (The backward pass still holds those it needs; ``engine.checkpointing`` makes them anew, block by block.)
    """
    if precision == "bf16":
        return torch.autocast(processes.device.type, torch.bfloat16, cache_enabled=processes.mesh is None)
    return contextlib.nullcontext()
