"""Students of the micro pipeline that were never trained, and a way to read exports without a process a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vpae import recipe as recipes
from vpae.backbone import Backbone
from vpae.data.encoders import load_transformer
from vpae.draws import generator_of
from vpae.export import proof, reload
from vpae.loading import Model
from vpae.recipe import Lora
from vpae.roles import Role, add_lora


def _moved(parameters, size: float) -> None:
    with torch.no_grad():
        for i, (_, parameter) in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=generator_of("student", i))
            parameter.add_(size * noise)


@pytest.fixture
def full_student(micro_recipe, micro_pipeline) -> Model:
    """Every weight of it, norms and biases too, differs from its teacher's."""
    role = Role("ema", Backbone(load_transformer(micro_pipeline), fold_text_padding=True))
    _moved(role.named_parameters(), 0.02)
    role.requires_grad_(False)
    return Model(role, Path(micro_pipeline), recipes.from_plain(micro_recipe, "test"), "ema of a test")


@pytest.fixture
def lora_student(micro_recipe, micro_pipeline) -> Model:
    """A LoRA whose alpha is not its rank, on every kind of linear layer that diffusers' reader knows."""
    targets = ("to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "net.0.proj", "time_proj", "proj_out")
    targets += ("text_embedder.linear_1", "text_embedder.linear_2")
    role = add_lora(Backbone(load_transformer(micro_pipeline), fold_text_padding=True), "ema", Lora(2, 3.0, targets), 0)
    _moved(role.named_parameters(), 0.1)
    micro_recipe["student"]["kind"] = "lora"
    return Model(role, Path(micro_pipeline), recipes.from_plain(micro_recipe, "test"), "ema of a test")


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Exports are read in this process: seconds less, where the process is not what is tested."""
    monkeypatch.setattr(proof, "_answer_in_fresh_process", reload.main)
