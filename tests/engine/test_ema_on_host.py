"""The EMA of a sharded student in host memory: the numbers of one on the device, in both phases."""

from __future__ import annotations

import pytest
import torch
from helpers import differing, read_tensors, write_recipe

from vpae import recipe as recipes
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.models import preflight


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
