"""Every turn of V-PAE as a bare loop: diffusers' transformer, its LoRA, torch's AdamW, and nothing of our engine.

The reference for the overhead of ``vpae`` in ``train_step.py``: the same networks, players and FLOPs, full student.
What the recipe leaves to choose is written out as the recipes that ship have it (DMD's normaliser, hinge, ST-R1 on real
clips, separate, the judge on noised clips). The head is ours, a plain torch module.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from vpae.extras import ATTENTION_BACKENDS
from vpae.methods.base import Batch
from vpae.recipe import Distill


def _at(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).view(-1, *([1] * (x.ndim - 1)))


class BareStep:
    """One phase; ``BareStep(...).turns[player](batch)`` is one optimiser step.

    Args:
        config: of the transformer; teacher, student and EMA start from the same random weights, in fp32.
        device: where they are.
        head: the discriminator of phase II.
        taps: blocks it reads.
    """

    def __init__(
        self,
        recipe: Distill,
        phase: str,
        config: dict[str, Any],
        device: torch.device,
        head: nn.Module | None,
        taps: tuple[int, ...],
    ) -> None:
        self.recipe, self.settings, self.head, self.taps = recipe, getattr(recipe, phase), head, taps
        self.device, self.dtype = device, torch.float32
        transformer = WanTransformer3DModel.from_config(config).to(device).eval()
        transformer.set_attention_backend(ATTENTION_BACKENDS[recipe.teacher.attention].dispatcher)
        self.teacher = copy.deepcopy(transformer).requires_grad_(False)
        self.student, self.ema = copy.deepcopy(transformer), copy.deepcopy(transformer).requires_grad_(False)
        for network in (self.teacher, self.student, self.ema):
            if recipe.engine.checkpointing:
                network.enable_gradient_checkpointing()
        self.turns: dict[str, Callable[[Batch], Tensor]] = {"student": self._student_of(phase)}
        mine = {"student": list(self.student.requires_grad_(True).parameters())}
        if phase == "priming":
            lora = self.settings.fake_lora
            config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
            self.teacher.add_adapter(config, adapter_name="fake")
            mine["fake_score"] = [p for n, p in self.teacher.named_parameters() if "lora_" in n]
            self.turns["fake_score"] = self._fake_turn
        else:
            mine["head"] = list(head.parameters())
            self.turns["head"] = self._head_turn
        settings = {
            "student": self.settings.student_optimiser,
            "fake_score": getattr(self.settings, "fake_optimiser", None),
            "head": getattr(self.settings, "head_optimiser", None),
        }
        self.players = {
            name: (
                parameters,
                torch.optim.AdamW(
                    parameters, settings[name].learning_rate, settings[name].betas, weight_decay=0.0, foreach=True
                ),
                settings[name].clip_norm,
            )
            for name, parameters in mine.items()
        }

    def _student_of(self, phase: str) -> Callable[[Batch], Tensor]:
        return self._vsd_turn if phase == "priming" else self._adversarial_turn

    @contextlib.contextmanager
    def _precision(self, enabled: bool = True) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled and self.recipe.engine.precision == "bf16"):
            yield

    def step(self, player: str, batch: Batch) -> float:
        """One turn of ``player``: loss, backward, clipping, AdamW, EMA."""
        parameters, optimiser, limit = self.players[player]
        for name, (others, _, _) in self.players.items():
            for parameter in others:
                parameter.requires_grad_(name == player)
        with self._precision():
            loss = self.turns[player](batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, limit)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if player == "student":
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), parameters, 1 - self.settings.ema_decay)
        return float(loss.detach())

    def _ask(self, network: nn.Module, x_t: Tensor, t: Tensor, batch: Batch, text: Tensor | None = None) -> Tensor:
        condition = batch.condition
        text = condition.text if text is None else text
        (velocity,) = network(
            hidden_states=torch.cat([x_t, condition.mask, condition.latent], 1).to(self.dtype),
            timestep=1000 * t.float(),
            encoder_hidden_states=F.pad(text, (0, 0, 0, 512 - text.shape[1])).to(self.dtype),
            encoder_hidden_states_image=condition.image.to(self.dtype),
            return_dict=False,
        )
        return velocity.float()

    def _noised(self, x0: Tensor, law: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A time of the law, noise, and the clips under it."""
        t = law.quantile(torch.rand(len(x0), dtype=torch.float64)).to(x0.device)
        noise = torch.randn_like(x0)
        return (1 - _at(t, x0)) * x0 + _at(t, x0) * noise, t, noise

    def _primed(self, batch: Batch) -> Tensor:
        x_s, s, _ = self._noised(batch.x0, self.settings.student_time)
        return x_s - _at(s, x_s) * self._ask(self.student, x_s, s, batch)

    def _fake_turn(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            x0 = self._primed(batch)
        x_t, t, noise = self._noised(x0, self.settings.fake_time)
        self.teacher.enable_adapters()
        self._only("fake_score")
        return F.mse_loss(self._ask(self.teacher, x_t, t, batch), noise - x0)

    def _only(self, player: str) -> None:
        """peft's switches turn gradients on; only the player's are wanted."""
        for name, (parameters, _, _) in self.players.items():
            for parameter in parameters:
                parameter.requires_grad_(name == player)

    def _guided(self, x_t: Tensor, t: Tensor, batch: Batch, scale: float) -> Tensor:
        null = self._ask(self.teacher, x_t, t, batch, batch.null.text)
        return x_t - _at(t, x_t) * (null + scale * (self._ask(self.teacher, x_t, t, batch) - null))

    def _vsd_turn(self, batch: Batch) -> Tensor:
        x0 = self._primed(batch)
        with torch.no_grad():
            x_t, t, _ = self._noised(x0, self.settings.score_time)
            self.teacher.enable_adapters()
            fake = x_t - _at(t, x_t) * self._ask(self.teacher, x_t, t, batch)
            self.teacher.disable_adapters()
            real = self._guided(x_t, t, batch, self.settings.guidance_scale)
            scale = (x0 - real).abs().flatten(1).mean(1).clamp_min(1e-6)
            target = x0 - (fake - real) / _at(scale, x0)
        return 0.5 * F.mse_loss(x0, target)

    def _generated(self, batch: Batch) -> Tensor:
        noise = torch.randn_like(batch.x0)
        return noise - self._ask(self.student, noise, noise.new_ones(len(noise)), batch)

    def _logits(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        features: dict[int, Tensor] = {}
        blocks = self.ema.blocks
        hooks = [
            blocks[k].register_forward_hook(lambda m, a, out, k=k: features.__setitem__(k, out)) for k in self.taps
        ]
        self.ema.blocks = blocks[: max(self.taps) + 1]
        try:
            self._ask(self.ema, x_t, t, batch)
        finally:
            self.ema.blocks = blocks
            for hook in hooks:
                hook.remove()
        grid = (x_t.shape[2], x_t.shape[3] // 2, x_t.shape[4] // 2)
        condition = batch.condition
        with self._precision(enabled=False):
            tapped = [features[k] for k in self.taps]
            return self.head(tapped, grid, condition.image, condition.text, condition.text_mask)

    def _head_turn(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            x0 = self._generated(batch)
        real_t, t, _ = self._noised(batch.x0, self.settings.judge_time)
        noise = torch.randn_like(x0)
        real = self._logits(real_t, t, batch)
        fake = self._logits((1 - _at(t, x0)) * x0 + _at(t, x0) * noise, t, batch)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        r1, noise = self.settings.r1, torch.randn_like(x0)
        moves = r1.spatial_sigma * noise[:, :, :1], r1.temporal_sigma * noise[:, :, :, :1, :1]
        exact = r1.precision == "fp32" and self.recipe.engine.precision == "bf16"
        with self._precision(enabled=not exact):
            clean = self._logits(real_t, t, batch) if exact else real
            for move in moves:
                loss = loss + r1.weight * r1.every * (clean - self._logits(real_t + move, t, batch)).square().mean()
        return loss

    def _adversarial_turn(self, batch: Batch) -> Tensor:
        x0 = self._generated(batch)
        x_t, t, _ = self._noised(x0, self.settings.judge_time)
        loss = -self._logits(x_t, t, batch).mean()
        sds = self.settings.sds
        with torch.no_grad():
            x_t, t, _ = self._noised(x0, sds.time)
            target = self._guided(x_t, t, batch, sds.guidance_scale)
        return loss + sds.weight * F.mse_loss(x0, target)
