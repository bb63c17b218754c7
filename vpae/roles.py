"""Who answers with which weights: teacher, student, its EMA, fake score, judge.

V-PAE's four networks are one architecture. A role is a view of a backbone: *full* roles own their weights, *LoRA* roles
are named adapters on the teacher's frozen base. A phase never knows which it holds.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vpae.backbone import Backbone, Prediction
from vpae.conditioning import Condition
from vpae.draws import generator_of
from vpae.errors import UserError
from vpae.flow import guide, x0_from_velocity
from vpae.recipe import Lora


@dataclass(frozen=True)
class Role:
    """A network of the method.

    Attributes:
        name: teacher, student, ema, fake_score or judge.
        backbone: shared between roles that are adapters of one base.
        adapter: the LoRA that answers for this role; None: the backbone's own weights.
    """

    name: str
    backbone: Backbone
    adapter: str | None = None

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[int] = (), stop_at_last_tap: bool = False
    ) -> Prediction:
        return self.backbone(x_t, t, condition, taps, stop_at_last_tap, adapter=self.adapter)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``[B, C, T, h, w]``."""
        return self(x_t, t, condition).velocity

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Clean prediction ``x_t - t v``; a frame that the condition gives is as given."""
        return x0_from_velocity(condition.hold(x_t), self.velocity(x_t, t, condition), t)

    def guided_velocity(
        self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, guidance_scale: float
    ) -> Tensor:
        """``v_null + w (v_cond - v_null)``; w = 1 costs one forward and no null branch."""
        conditional = self.velocity(x_t, t, condition)
        if guidance_scale == 1.0:
            return conditional
        return guide(conditional, self.velocity(x_t, t, null), guidance_scale)

    def guided_x0(self, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, guidance_scale: float) -> Tensor:
        """Clean prediction under guidance."""
        velocity = self.guided_velocity(x_t, t, condition, null, guidance_scale)
        return x0_from_velocity(condition.hold(x_t), velocity, t)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that are this role's own: its adapter's, or all that are no adapter's."""
        for name, parameter in self.backbone.transformer.named_parameters():
            owner = _adapter_of(name)
            if owner == self.adapter:
                yield name.replace(f".{owner}.", ".") if owner else name, parameter

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def requires_grad_(self, value: bool) -> Role:
        for parameter in self.parameters():
            parameter.requires_grad_(value)
        return self


def _adapter_of(parameter_name: str) -> str | None:
    """``blocks.0.attn1.to_q.lora_A.student.weight`` belongs to ``student``."""
    parts = parameter_name.split(".")
    for i, part in enumerate(parts):
        if part.startswith("lora_") and i + 1 < len(parts):
            return parts[i + 1]
    return None


def add_lora(backbone: Backbone, name: str, lora: Lora, seed: int) -> Role:
    """Put a zero-initialised LoRA called ``name`` on the backbone: at first it answers exactly as the base does.

    Raises:
        UserError: a target names no linear layer of the transformer.
    """
    linear = [n for n, m in backbone.transformer.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    known = {n.removesuffix(".base_layer") for n in linear}
    for target in lora.targets:
        if not any(n == target or n.endswith("." + target) for n in known):
            names = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in known}))
            raise UserError(f"LoRA target {target!r} names no linear layer of the transformer; known: {names}")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), init_lora_weights=False)
    device = next(backbone.transformer.parameters()).device
    # on the meta device from the start where the base is: peft would leave a second adapter behind on the CPU
    where = device if device.type == "meta" else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), where:  # its draws are replaced below
        warnings.simplefilter("ignore")
        backbone.transformer.add_adapter(config, adapter_name=name)
    role = Role(name, backbone, name)
    for parameter in role.parameters():
        parameter.data = parameter.data.float()  # peft gives an adapter its base's dtype; in bf16 an EMA stands still
    backbone.adapter_seeds[name] = seed
    backbone.transformer.requires_grad_(False)
    start_lora(role)
    return role


@torch.no_grad()
def start_lora(role: Role) -> None:
    """Give an adapter its first weights: A as ``nn.Linear`` draws its own (peft's choice), B zero.

    Each A has a generator of its own name, so that every rank finds its shard of the same whole.
    """
    for name, parameter in role.named_parameters():
        if parameter.is_meta:  # start_lora comes again when there is memory
            continue
        if name.endswith("lora_B.weight"):
            parameter.zero_()
            continue
        whole = torch.empty(parameter.shape)
        generator = generator_of(role.backbone.adapter_seeds[role.name], "lora", role.name, name)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        set_whole(parameter, whole)


@torch.no_grad()
def set_whole(parameter: nn.Parameter, whole: Tensor) -> None:
    """Give a parameter (sharded or not) its part of a tensor that every rank holds alike, so that nothing travels."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(whole)


def full_copy(role: Role, name: str) -> Role:
    """A role with its own weights, equal to those of ``role`` (whose adapters, if any, are not copied).

    Raises:
        ValueError: ``role`` is an adapter.
    """
    if role.adapter is not None or hasattr(role.backbone.transformer, "peft_config"):
        raise ValueError(f"a full copy is made of plain weights; {role.name} is or carries an adapter")
    twin = Role(name, copy.deepcopy(role.backbone))
    twin.backbone.transformer.requires_grad_(False)
    return twin


def copy_weights(source: Role, target: Role) -> None:
    """Make ``target``'s own weights equal to ``source``'s (same kind of role)."""
    pairs = dict(source.named_parameters()), dict(target.named_parameters())
    if pairs[0].keys() != pairs[1].keys():
        raise ValueError(f"{source.name} and {target.name} are not the same kind of role")
    with torch.no_grad():
        for name, parameter in pairs[1].items():
            parameter.copy_(pairs[0][name])


@torch.no_grad()
def merge_adapter(role: Role) -> nn.Module:
    """The role as a transformer without adapters (for export): its own, or a copy with its adapter folded in."""
    if not hasattr(role.backbone.transformer, "peft_config"):
        return role.backbone.transformer
    transformer = copy.deepcopy(role.backbone.transformer)
    if role.adapter is None:
        transformer.unload_lora()
        return transformer
    transformer.set_adapter(role.adapter)
    others = [name for name in transformer.peft_config if name != role.adapter]
    if others:
        transformer.delete_adapters(others)
    transformer.fuse_lora()
    transformer.unload_lora()
    return transformer
