"""APT, adversarial post-training: after a consistency distillation, a GAN on real clips without the teacher.

    x0hat = eps - mu_theta(eps, 1)                                         from pure noise
    D(x)  = d_psi( features of a transformer at the CLEAN x, told t )      t ~ shift(U(0, 1), 12) for videos
            the transformer starts as the teacher's copy and learns with the head
    head turn:     -E log sigmoid D(x) - E log(1 - sigmoid D(x0hat))
                   + lambda E |D(x) - D(x + sigma n)|^2                            moves all of D
    student turn:  -E log sigmoid D(x0hat)                                         moves theta

(arXiv 2501.08316.) t is drawn once a clip and turn, an estimate of the paper's mean over t. The distillation before it
is :mod:`vpae.methods.pcm` without its adversary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpae import losses
from vpae.methods import judging
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.peer_recipe import Apt as Settings
from vpae.roles import Role


class Apt:
    """Adversarial training against a judge that is a whole trainable transformer."""

    name = "apt"

    def __init__(
        self, settings: Settings, *, student: Role, ema: Role, judge: Role, head: nn.Module, taps: tuple[int, ...]
    ) -> None:
        self.settings, self.taps, self.head = settings, taps, head
        self.student, self.ema, self.judge = student, ema, judge
        head_steps = settings.student_steps * settings.head_per_student
        self.turns = settings.student_steps + head_steps
        mine = {f"head.{name}": p for name, p in head.named_parameters()}
        mine |= {f"judge.{name}": p for name, p in judge.named_parameters()}
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "head": Player("head", mine, settings.head_optimiser, head_steps),
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            ),
        }

    def player_of(self, turn: int) -> str:
        last_of_cycle = turn % (self.settings.head_per_student + 1) == self.settings.head_per_student
        return "student" if last_of_cycle else "head"

    def generate(self, batch: Batch) -> Tensor:
        """The 1-NFE sample from pure noise."""
        noise = batch.draws.normal_like("student noise", batch.x0)
        return self.student.x0(noise, noise.new_ones(len(noise)), batch.condition)

    def logits(self, x0: Tensor, batch: Batch) -> Tensor:
        """``D(x0) [B]``; the time is a number alone and the same for all clips that a sample is compared with."""
        t = self.settings.judge_time.quantile(batch.draws.uniform("judge time"))
        return judging.read_logits(self.judge, self.head, self.taps, x0, t, batch.condition)

    def loss(self, player: str, batch: Batch) -> Outcome:
        return self._head_loss(batch) if player == "head" else self._student_loss(batch)

    def _head_loss(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            x0_hat = self.generate(batch)
        real, fake = self.logits(batch.x0, batch), self.logits(x0_hat, batch)
        loss = losses.softplus_discriminator(real, fake)
        scalars = {"adversarial": loss.detach(), **judging.scalars(real, fake)}
        if self.settings.r1_weight > 0:
            noise = self.settings.r1_sigma * batch.draws.normal_like("r1 noise", batch.x0)
            r1 = losses.finite_difference_r1(real, self.logits(batch.x0 + noise, batch))
            scalars["r1"] = r1.detach()
            loss = loss + self.settings.r1_weight * r1
        return Outcome(loss, scalars)

    def _student_loss(self, batch: Batch) -> Outcome:
        x0_hat = self.generate(batch)
        logits = self.logits(x0_hat, batch)
        loss = losses.softplus_generator(logits)
        return Outcome(loss, {"adversarial": loss.detach(), "logit_fake": logits.detach().mean()}, x0_hat.detach())
