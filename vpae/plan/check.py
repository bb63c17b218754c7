"""Before a distillation begins: refuse one that cannot fit, with the plan's words.

A run that is small beside the hardware by a bound of plain arithmetic is not planned at all. The plan itself is made in
a process of its own, since this one has joined its real peers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vpae import recipe as recipes
from vpae.engine.host import GIB, free_memory
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.plan.shapes import Shapes, shapes_of
from vpae.recipe import Distill, Distillation
from vpae.weights import unborn_transformer

_SMALL = 0.25  # of the memory: what is bounded by it is not planned
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
OVERRIDE = "--no-plan-check goes on all the same"


def check_room(recipe: Distillation, processes: Processes) -> None:
    """Refuse a recipe that cannot fit here; all ranks call it.

    On GPUs it is planned with what is free on the fullest of them, where CUDA's context has been taken off already. On
    CPUs it is refused where the weights, their optimiser and gradients alone are more than the machine has left.

    Raises:
        UserError: it does not fit.
    """
    if not isinstance(recipe, Distill):  # a peer's recipe, which is not planned
        return
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes.device.type == "cuda":
        memory = min(processes.gather(torch.cuda.mem_get_info(processes.device)[0]))
        refusal = processes.from_main(lambda: _refused_on_gpus(recipe, processes.size, local_ranks, memory))
    else:
        refusal = processes.from_main(lambda: _refused_on_cpus(recipe, processes, local_ranks))
    if refusal:
        raise UserError(f"{refusal} ({OVERRIDE})")


def _parameters(config: dict) -> int:
    return sum(p.numel() for p in unborn_transformer(config).parameters())


def least_bytes(recipe: Distill, parameters: int) -> int:
    """What a rank of one holds at least: teacher, and of a full student weights, EMA, two moments and gradients."""
    teacher = (2 if recipe.teacher.dtype == "bf16" else 4) * parameters
    return teacher + (20 * parameters if recipe.student.kind == "full" else 0)


def most_bytes(recipe: Distill, parameters: int, shapes: Shapes) -> float:
    """What a rank holds at most, by a generous count: every network with its optimiser, whole and on every rank, and
    every activation of eight passes kept in fp32."""
    config, micro = shapes.config, recipe.engine.micro_batch
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rows = shapes.tokens + shapes.text_rows + shapes.image_tokens
    kept = rows * (48 * width + 8 * config["ffn_dim"])
    if recipe.teacher.attention == "native_math" or recipe.teacher.fold_text_padding:
        kept += 6 * config["num_attention_heads"] * shapes.tokens * rows
    return 64.0 * parameters + 8 * 4.0 * micro * kept * config["num_layers"] + GIB


def _refused_on_cpus(recipe: Distill, processes: Processes, local_ranks: int) -> str:
    free, parameters = free_memory(), _parameters(shapes_of(recipe).config)
    shards = processes.mesh.shape[-1] if processes.mesh is not None else 1
    wanted = local_ranks * least_bytes(recipe, parameters) // shards
    if free is None or wanted <= free:
        return ""
    return (
        f"{recipe.name} does not fit: {local_ranks} ranks on this machine would keep {wanted / GIB:.1f} GiB of "
        f"weights, EMA, moments and gradients in its memory, and {free / GIB:.1f} GiB are free; vpae plan tells more"
    )


def _refused_on_gpus(recipe: Distill, ranks: int, local_ranks: int, memory: int) -> str:
    shapes = shapes_of(recipe)
    if most_bytes(recipe, _parameters(shapes.config), shapes) <= _SMALL * memory:
        return ""
    return planned_refusal(recipe, ranks, max(1, ranks // local_ranks), memory)


def planned_refusal(recipe: Distill, ranks: int, machines: int, memory: int) -> str:
    """What ``vpae plan`` says of a recipe that does not fit; empty where it does.

    Raises:
        UserError: it cannot be planned.
    """
    variables = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    with tempfile.TemporaryDirectory() as name:
        stored, made = Path(name) / "recipe.yaml", Path(name) / "plan.json"
        stored.write_text(recipes.dump(recipe), encoding="utf-8")
        sizes = ["--gpus", str(ranks), "--machines", str(machines), "--gpu-memory", str(memory / GIB), "--in-use"]
        command = [sys.executable, "-m", "vpae", "plan", str(stored), *sizes, "--json", str(made)]
        # no card is touched, so that nothing of it is taken
        done = subprocess.run(command, capture_output=True, text=True, env=variables | {"CUDA_VISIBLE_DEVICES": ""})
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode == 0:
            return ""
        if not made.is_file():
            why = said[-1] if said else (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise UserError(f"the plan of this run could not be made: {why} ({OVERRIDE})")
        return said[-1]
