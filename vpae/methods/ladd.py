"""LADD: a GAN on the frozen teacher's features, against clips that the teacher made.

    x_s   = (1 - s) x + s eps,   s of a few times (one step: s = 1),  x the teacher's own sample
    x0hat = x_s - s mu_theta(x_s, s)
    D(x)  = heads, one a block, on the frozen teacher's features at (1 - t) x + t eps',  t logit-normal
    head turn:     E max(0, 1 - D(x)) + E max(0, 1 + D(x0hat))                     moves the heads
    student turn:  -E D(x0hat)                                                     moves theta

(arXiv 2403.12015.) There is no distillation loss: the teacher's knowledge is in its clips and its features. Means are
over the heads too, each of which has its own hinge.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpae import losses
from vpae.flow import interpolate
from vpae.methods import judging
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.peer_recipe import Ladd as Settings
from vpae.roles import Role


class Ladd:
    """Adversarial training of the student against heads on the frozen teacher."""

    name = "ladd"

    def __init__(
        self, settings: Settings, *, teacher: Role, student: Role, ema: Role, head: nn.Module, taps: tuple[int, ...]
    ) -> None:
        self.settings, self.taps, self.head = settings, taps, head
        self.teacher, self.student, self.ema = teacher, student, ema
        self.adversary = losses.ADVERSARIAL[settings.adversarial]
        head_steps = settings.student_steps * settings.head_per_student
        self.turns = settings.student_steps + head_steps
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "head": Player("head", dict(head.named_parameters()), settings.head_optimiser, head_steps),
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            ),
        }

    def player_of(self, turn: int) -> str:
        last_of_cycle = turn % (self.settings.head_per_student + 1) == self.settings.head_per_student
        return "student" if last_of_cycle else "head"

    def generate(self, batch: Batch) -> Tensor:
        """The student's sample from one of its noise levels."""
        edges = torch.tensor(self.settings.student_weights, dtype=torch.float64).cumsum(0)
        u = batch.draws.uniform("student time")
        chosen = torch.bucketize(u * edges[-1].item(), edges.to(u.device), right=True).clamp(max=len(edges) - 1)
        s = torch.tensor(self.settings.student_times, device=u.device)[chosen]
        x_s = interpolate(batch.x0, batch.draws.normal_like("student noise", batch.x0), s)
        return self.student.x0(x_s, s, batch.condition)

    def logits(self, x0: Tensor, batch: Batch, which: str) -> Tensor:
        """``D(x0) [B, taps]``, at a time that real and generated clips share."""
        t = self.settings.judge_time.quantile(batch.draws.uniform("judge time"))
        purpose = "judge noise" if self.settings.share_noise else f"judge noise on {which}"
        x_t = interpolate(x0, batch.draws.normal_like(purpose, x0), t)
        return judging.read_logits(self.teacher, self.head, self.taps, x_t, t, batch.condition)

    def loss(self, player: str, batch: Batch) -> Outcome:
        return self._head_loss(batch) if player == "head" else self._student_loss(batch)

    def _head_loss(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            x0_hat = self.generate(batch)
        real, fake = self.logits(batch.x0, batch, "real"), self.logits(x0_hat, batch, "fake")
        loss = self.adversary[0](real, fake)
        return Outcome(loss, {"adversarial": loss.detach(), **judging.scalars(real, fake)})

    def _student_loss(self, batch: Batch) -> Outcome:
        x0_hat = self.generate(batch)
        logits = self.logits(x0_hat, batch, "fake")
        loss = self.adversary[1](logits)
        return Outcome(loss, {"adversarial": loss.detach(), "logit_fake": logits.detach().mean()}, x0_hat.detach())
