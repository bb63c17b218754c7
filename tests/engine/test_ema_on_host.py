"""The EMA of a sharded student in host memory: the numbers of one on the device, in both phases."""

from __future__ import annotations

import pytest
import torch
from helpers import differing, read_tensors, write_recipe

from vpae import recipe as recipes
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.models import preflight


@pytest.mark.slow
def test_shards_in_host_memory_give_the_same_numbers(vpae, micro_recipe, tmp_path):
    """Two ranks; in phase II its blocks judge, with a gradient through them."""
    micro_recipe["priming"]["student_steps"], micro_recipe["equilibrium"]["student_steps"] = 1, 2
    for place in ("device", "cpu"):
        micro_recipe["engine"]["ema_on"] = place
        recipe = write_recipe(micro_recipe, tmp_path / f"{place}.yaml")
        done = vpae("distill", recipe, "--output", tmp_path / place, ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
    for phase in ("priming", "equilibrium"):
        one, two = (read_tensors(tmp_path / place / phase) for place in ("device", "cpu"))
        assert differing(one, two) == [] and any(name.startswith("ema.") for name in one)


def test_where_the_ema_cannot_be_kept_on_the_host(micro_recipe, monkeypatch):
    micro_recipe["engine"]["ema_on"] = "cpu"
    recipe = recipes.from_plain(micro_recipe, "test")
    preflight(recipe.teacher, recipe.engine, Processes(0, 1, torch.device("cpu"), None))  # it lies there anyway
    with pytest.raises(UserError, match=r"engine.ema_on: cpu .* not sharded: set it to device, or use .* fsdp"):
        preflight(recipe.teacher, recipe.engine, Processes(0, 1, torch.device("cuda"), None))
    micro_recipe["student"]["kind"] = "lora"
    with pytest.raises(UserError, match=r"engine.ema_on is cpu, and the EMA of a LoRA student .* set it to device"):
        recipes.from_plain(micro_recipe, "test")


def test_only_the_ema_goes_to_host_memory(micro_recipe, monkeypatch):
    """As FSDP is told, on a CPU and on a GPU."""
    from types import SimpleNamespace

    from torch.distributed.fsdp import CPUOffloadPolicy

    from vpae import models
    from vpae.engine import parallel

    told = []
    monkeypatch.setattr(parallel, "fully_shard", lambda module, mesh, offload_policy: told.append(offload_policy))
    recipe = recipes.from_plain(micro_recipe, "test")
    cast = models.distillation_cast(recipe.teacher, recipe.student, recipe.engine, 0)
    for kind in ("cpu", "cuda"):
        processes = Processes(0, 1, torch.device(kind), SimpleNamespace(shape=(2,)))
        for name, backbone in zip(("teacher", "student", "ema"), cast.backbones, strict=True):
            told.clear()
            parallel.shard_backbone(backbone, processes, on_host=name == "ema")
            assert len(told) == 5 and {isinstance(policy, CPUOffloadPolicy) for policy in told} == {name == "ema"}
        assert {policy.pin_memory for policy in told} == {kind == "cuda"}
    placed, processes = [], Processes(0, 1, torch.device("cpu"), SimpleNamespace(shape=(2,)))
    monkeypatch.setattr(models, "shard_backbone", lambda backbone, processes, on_host: placed.append(on_host))
    for name in ("give_memory", "read_weights", "copy_base"):
        monkeypatch.setattr(models, name, lambda *arguments, **options: None)
    for place in ("cpu", "device"):
        models.materialise(cast, processes, place)
    assert placed == [False, False, True, False, False, False]
    monkeypatch.setattr("vpae.engine.host.free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"would keep .* \(engine.ema_on: cpu "):
        models.materialise(cast, processes, "cpu")
