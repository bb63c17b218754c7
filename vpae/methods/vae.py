"""How the tiny VAE is made: reconstruction with a small KL term, over a curriculum of longer and longer clips."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional as F

from vpae.draws import Draws
from vpae.methods.base import Ema, Outcome, Player
from vpae.recipe import VaeStage
from vpae.recipe import VaeTraining as Settings

_DECODER = ("vae.decoder.", "vae.post_quant_conv.")


@dataclass(frozen=True)
class Frames:
    """Pixels ``[B, 3, F, H, W]`` on [-1, 1] and the random numbers of these samples."""

    pixels: Tensor
    draws: Draws


class Autoencoder(nn.Module):
    """Encode, sample the posterior, decode: one forward, so that sharding sees it whole."""

    def __init__(self, vae: AutoencoderKLWan, trains_encoder: bool) -> None:
        super().__init__()
        self.vae, self.trains_encoder = vae, trains_encoder

    def forward(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """Reconstruction ``[B, 3, F, H, W]`` and KL per latent element (a scalar)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_encoder):
            posterior = self.vae.encode(frames.pixels).latent_dist
        latents = posterior.mean + posterior.std * frames.draws.normal_like("posterior", posterior.mean)
        # diffusers sums channels, frames and rows and leaves columns
        kl = posterior.kl().flatten(1).sum(1).mean() / posterior.mean[0].numel()
        return self.vae.decode(latents).sample, kl


class VaeMethod:
    """One player, the autoencoder."""

    name = "vae"

    def __init__(self, settings: Settings, vae: AutoencoderKLWan) -> None:
        self.settings = settings
        self.model = Autoencoder(vae, settings.trained == "all")
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.turns = sum(stage.steps for stage in settings.stages)
        self.attach()

    def attach(self) -> None:
        """(Re)collect the parameters; called again after sharding, which replaces them."""
        follow = Ema("ema", dict(self.ema.named_parameters()), self.settings.ema_decay)
        mine = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if self.model.trains_encoder or name.startswith(_DECODER)
        }
        self.players = {"vae": Player("vae", mine, self.settings.optimiser, self.turns, follow)}

    def player_of(self, turn: int) -> str:
        return "vae"

    def stage(self, turn: int) -> VaeStage:
        """The part of the curriculum that ``turn`` belongs to."""
        return self._locate(turn)[0]

    def portion(self, turn: int) -> tuple[int, int]:
        """First stream position and batch of a turn."""
        stage, first = self._locate(turn)
        return first, stage.batch

    def _locate(self, turn: int) -> tuple[VaeStage, int]:
        first = 0
        for stage in self.settings.stages:
            if turn < stage.steps:
                return stage, first + turn * stage.batch
            turn, first = turn - stage.steps, first + stage.steps * stage.batch
        raise IndexError("the run is over")

    def loss(self, player: str, batch: Frames) -> Outcome:
        decoded, kl = self.model(batch)
        squared, absolute = F.mse_loss(decoded, batch.pixels), F.l1_loss(decoded, batch.pixels)
        loss = squared + self.settings.absolute_weight * absolute + self.settings.kl_weight * kl
        psnr = 10 * torch.log10(4 / squared.detach())
        return Outcome(
            loss, {"squared": squared.detach(), "absolute": absolute.detach(), "kl": kl.detach(), "psnr": psnr}
        )
