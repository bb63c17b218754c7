"""How a recipe lays ranks out: who shards with whom, and who shares clips with whom."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from vpae.engine.parallel import PATIENCE, Processes
from vpae.errors import UserError
from vpae.recipe import Engine
from vpae.sequence import SequenceGroup


def placed(processes: Processes, engine: Engine) -> Processes:
    """The processes as a recipe's ``engine`` wants them; all ranks call it together.

    Raises:
        UserError: there are not as many ranks, or ranks a machine, as it takes.
    """
    mesh = processes.mesh
    if engine.parallel == "replicate":
        mesh = None
    elif engine.parallel == "hsdp" and processes.size > 1:
        mesh = _mesh_of_machines(processes, engine.sequence_parallel)
    return replace(processes, mesh=mesh, sequence=_sharing(processes, engine.sequence_parallel))


def _sharing(processes: Processes, degree: int) -> SequenceGroup | None:
    """Neighbouring ranks share clips: they are of one machine wherever its ranks can be split so."""
    if degree == 1:
        return None
    if processes.size % degree:
        raise UserError(
            f"engine.sequence_parallel {degree} needs a multiple of {degree} ranks, and here "
            f"{'is one' if processes.size == 1 else f'are {processes.size}'}"
        )
    group, _ = dist.new_subgroups(degree, timeout=PATIENCE)
    return SequenceGroup(group, processes.rank % degree, degree)


def _mesh_of_machines(processes: Processes, degree: int) -> DeviceMesh:
    """Machines by ranks of one machine; a single machine is sharded over as ever."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if {local} != set(processes.gather(local)) or local < 1:
        raise UserError(
            "engine.parallel: hsdp needs as many ranks on one machine as on another, and LOCAL_WORLD_SIZE (which the "
            "launcher sets) to say how many; choose fsdp"
        )
    if local % degree:
        raise UserError(
            f"engine.parallel: hsdp keeps all but gradients on one machine, and its {local} ranks cannot be split into "
            f"groups of engine.sequence_parallel {degree}; choose fsdp"
        )
    if local == processes.size:
        return processes.mesh
    ranks = torch.arange(processes.size).view(-1, local)
    machine, _ = dist.new_subgroups(local, timeout=PATIENCE)
    across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=PATIENCE)
    names = ("replicate", "shard")
    return DeviceMesh.from_group([across, machine], processes.device.type, ranks, mesh_dim_names=names)
