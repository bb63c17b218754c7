"""DMD2: distribution matching with a fake score that also judges, on two time scales.

    x0hat = eps - mu_theta(eps, 1)                                         from pure noise
    D(x)  = d_psi( features of mu_phi at (1 - t) x + t eps', t )           head psi on the fake score's blocks
    critic turn:   || (eps' - x0hat) - mu_phi(x_t, t) ||^2
                   + w_D E[ softplus(-D(x)) + softplus(D(x0hat)) ]                 moves phi (all of it) and psi
    student turn:  grad = (x0_fake - x0_real) / mean |x0hat - x0_real|
                   + w_G E softplus(-D(x0hat))                                     moves theta
    five critic turns a student turn; no regression loss

(arXiv 2405.14867; weights w_G, w_D as in its code for SDXL.) The paper has the teacher's guidance in x0_real, draws t
and noise for real and generated clips independently, and judges real ones. Its few-step form is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpae import losses
from vpae.flow import interpolate
from vpae.methods import judging
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.peer_recipe import Dmd2 as Settings
from vpae.roles import Role


class Dmd2:
    """VSD and a GAN at once, against one critic: fake score and head."""

    name = "dmd2"

    def __init__(
        self,
        settings: Settings,
        *,
        teacher: Role,
        student: Role,
        ema: Role,
        fake_score: Role,
        head: nn.Module,
        taps: tuple[int, ...],
    ) -> None:
        self.settings, self.taps, self.head = settings, taps, head
        self.teacher, self.student, self.ema, self.fake_score = teacher, student, ema, fake_score
        critic_steps = settings.student_steps * settings.critic_per_student
        self.turns = settings.student_steps + critic_steps
        critic = {f"fake_score.{name}": p for name, p in fake_score.named_parameters()}
        critic |= {f"head.{name}": p for name, p in head.named_parameters()}
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "critic": Player("critic", critic, settings.critic_optimiser, critic_steps),
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            ),
        }

    def player_of(self, turn: int) -> str:
        last_of_cycle = turn % (self.settings.critic_per_student + 1) == self.settings.critic_per_student
        return "student" if last_of_cycle else "critic"

    def generate(self, batch: Batch) -> Tensor:
        """The 1-NFE sample from pure noise."""
        noise = batch.draws.normal_like("student noise", batch.x0)
        return self.student.x0(noise, noise.new_ones(len(noise)), batch.condition)

    def logits(self, x0: Tensor, batch: Batch, which: str) -> Tensor:
        """``D(x0) [B]``, at a time and under noise of its own for ``which`` of real and fake clips."""
        t = self.settings.judge_time.quantile(batch.draws.uniform(f"judge time on {which}"))
        x_t = interpolate(x0, batch.draws.normal_like(f"judge noise on {which}", x0), t)
        return judging.read_logits(self.fake_score, self.head, self.taps, x_t, t, batch.condition)

    def loss(self, player: str, batch: Batch) -> Outcome:
        return self._critic_loss(batch) if player == "critic" else self._student_loss(batch)

    def _critic_loss(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            x0_hat = self.generate(batch)
        t = self.settings.fake_time.quantile(batch.draws.uniform("fake time"))
        noise = batch.draws.normal_like("fake noise", x0_hat)
        velocity = self.fake_score.velocity(interpolate(x0_hat, noise, t), t, batch.condition)
        denoising = losses.flow_matching(*map(batch.condition.free, (velocity, x0_hat, noise)))
        real, fake = self.logits(batch.x0, batch, "real"), self.logits(x0_hat, batch, "fake")
        adversarial = losses.softplus_discriminator(real, fake)
        scalars = {"flow_matching": denoising.detach(), "adversarial": adversarial.detach()}
        loss = denoising + self.settings.critic_gan_weight * adversarial
        return Outcome(loss, scalars | judging.scalars(real, fake))

    def _student_loss(self, batch: Batch) -> Outcome:
        x0_hat = self.generate(batch)
        with torch.no_grad():
            t = self.settings.score_time.quantile(batch.draws.uniform("score time"))
            x_t = interpolate(x0_hat, batch.draws.normal_like("score noise", x0_hat), t)
            fake = self.fake_score.x0(x_t, t, batch.condition)
            real = self.teacher.guided_x0(x_t, t, batch.condition, batch.null, self.settings.guidance_scale)
            made, real, fake = map(batch.condition.free, (x0_hat.detach(), real, fake))
            gradient = losses.vsd_gradient(made, real, fake, self.settings.normaliser, t)
        matching = losses.vsd(batch.condition.free(x0_hat), gradient)
        logits = self.logits(x0_hat, batch, "fake")
        adversarial = losses.softplus_generator(logits)
        scalars = {
            "vsd": matching.detach(),
            "adversarial": adversarial.detach(),
            "logit_fake": logits.detach().mean(),
            "fake_real_distance": (fake - real).abs().mean(),
        }
        return Outcome(matching + self.settings.student_gan_weight * adversarial, scalars, x0_hat.detach())
