"""Optimisers, schedules, clipping and EMA of the players."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from vpae.engine.adam import HalfAdamW, HostAdamW, byte_adamw
from vpae.engine.host import buckets, pass_through
from vpae.engine.parallel import local, whole
from vpae.methods.base import Ema, Player
from vpae.recipe import Optimiser


def build_optimiser(
    player: Player, state: str = "fp32", device: torch.device | str = "cpu", seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW over exactly the player's parameters, its state allocated (so that a checkpoint can be read into it).

    Args:
        state: the recipe's ``engine.optimiser_state``.
        device: where the player computes.
        seed: of the run, for what is rounded at random.

    Raises:
        UserError: ``int8`` without torchao.
    """
    settings = player.optimiser
    if state == "bf16":
        return HalfAdamW(player.parameters, settings, seed, "optimiser", player.name)
    if state == "cpu":
        return HostAdamW(player.parameters, settings, torch.device(device))
    if state == "int8":
        return byte_adamw(player.parameters, settings)
    parameters = list(player.parameters.values())
    optimiser = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    for parameter in parameters:
        optimiser.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimiser


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's way
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(settings: Optimiser, step: int, total: int) -> float:
    """Learning rate of the ``step``-th of ``total`` steps: linear warm-up, then constant or cosine to a tenth."""
    rate = settings.learning_rate
    if step < settings.warmup_steps:
        return rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return rate
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """Global L2 norm of the gradients; the same number on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients)).float()


def clip_(parameters: Iterable[torch.nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients in place so that their global norm is at most ``limit``."""
    if limit is None:
        return
    scale = float((limit / (norm + 1e-6)).clamp(max=1.0))
    if scale < 1.0:
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], scale)


@torch.no_grad()
def follow(ema: Ema, player: Player) -> None:
    """``ema <- decay ema + (1 - decay) weights`` on this rank's shards, in the EMA's own (fp32) precision.

    In bf16 at decay 0.995 nearly all elements would never move. Shards in host memory pass through the weights' device.
    """
    targets = [local(ema.parameters[name]) for name in player.parameters]
    sources = [local(p) for p in player.parameters.values()]
    if not targets or targets[0].device == sources[0].device:
        torch._foreach_lerp_(targets, sources, 1 - ema.decay)
        return
    parts = list(buckets([t.numel() for t in targets]))

    def lerp(i: int, copies: list[Tensor]) -> None:
        torch._foreach_lerp_(copies, sources[parts[i]], 1 - ema.decay)

    pass_through([targets[part] for part in parts], sources[0].device, lerp)
