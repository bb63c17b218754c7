"""Consistency distillation in one phase: LCM, and with its adversary PCM.

    0 = t_0 < ... < t_N = 1,  k uniform,  t = t_k, s = t_(k-1),  w in [w_min, w_max]
    x_t = (1 - t) x + t eps,  x real
    x_s = x_t + (s - t) v_w(x_t, t)                                        one Euler step of the guided teacher
    f(x_t, t) = x_t - t mu_theta(x_t, t)                                   so f(x, 0) = x holds by itself
    y   = f_theta-(x_s, s)                                                 theta-: EMA of theta, or theta; no gradient
    student turn:  d(f_theta(x_t, t), y) + w_adv E max(0, 1 - D(f_theta(x_t, t)))  moves theta
    head turn:     E max(0, 1 - D(y)) + E max(0, 1 + D(f_theta(x_t, t)))           moves the heads
    D(x) = heads on the frozen teacher's blocks at (1 - r) x + r eps', r uniform on t_0 ... t_(N-1)

(PCM, arXiv 2405.18407, and its code for flow matching, with one phase: both sides are mapped to t = 0. Without the
adversary LCM, arXiv 2310.04378.) d is the pseudo-Huber distance, or the squared one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpae import losses
from vpae.flow import expand_time, guide, interpolate, shift_time
from vpae.methods import judging
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.peer_recipe import Adversary, Consistency
from vpae.roles import Role


class Pcm:
    """Consistency distillation of a guided teacher.

    Args:
        adversary: None for plain LCM; ``head`` and ``taps`` are not used then.
    """

    name = "pcm"

    def __init__(
        self,
        settings: Consistency,
        adversary: Adversary | None,
        *,
        teacher: Role,
        student: Role,
        ema: Role,
        head: nn.Module | None = None,
        taps: tuple[int, ...] = (),
    ) -> None:
        self.settings, self.adversary, self.head, self.taps = settings, adversary, head, taps
        self.teacher, self.student, self.ema = teacher, student, ema
        self.head_per_student = 0 if adversary is None else adversary.head_per_student
        self.turns = settings.student_steps * (1 + self.head_per_student)
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            )
        }
        if adversary is not None:
            steps = settings.student_steps * adversary.head_per_student
            self.players["head"] = Player("head", dict(head.named_parameters()), adversary.head_optimiser, steps)

    def player_of(self, turn: int) -> str:
        return "student" if turn % (self.head_per_student + 1) == self.head_per_student else "head"

    def grid_time(self, k: Tensor) -> Tensor:
        """``t_k [B]``: k / N under the shift."""
        return shift_time(k / self.settings.grid_steps, self.settings.grid_shift).float()

    def _index(self, batch: Batch, purpose: str) -> Tensor:
        """Uniform on 0 ... N - 1, ``[B]``."""
        return (batch.draws.uniform(purpose) * self.settings.grid_steps).floor()

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t``, ``t`` and the target that ``f(x_t, t)`` is to match."""
        k, (low, high) = self._index(batch, "grid") + 1, self.settings.guidance_range
        t, s = self.grid_time(k), self.grid_time(k - 1)
        x_t = interpolate(batch.x0, batch.draws.normal_like("noise", batch.x0), t)
        with torch.no_grad():
            scale = expand_time(low + (high - low) * batch.draws.uniform("guidance"), x_t)
            unconditional = self.teacher.velocity(x_t, t, batch.null)
            velocity = guide(self.teacher.velocity(x_t, t, batch.condition), unconditional, scale)
            x_s = x_t + expand_time(s - t, x_t) * velocity
            answers = self.ema if self.settings.target == "ema" else self.student
            return x_t, t, answers.x0(x_s, s, batch.condition)

    def logits(self, x0: Tensor, batch: Batch, which: str) -> Tensor:
        """``D(x0) [B, taps]``, at a time that the target and the prediction share."""
        t = self.grid_time(self._index(batch, "judge time"))
        x_t = interpolate(x0, batch.draws.normal_like(f"judge noise on {which}", x0), t)
        return judging.read_logits(self.teacher, self.head, self.taps, x_t, t, batch.condition)

    def loss(self, player: str, batch: Batch) -> Outcome:
        return self._head_loss(batch) if player == "head" else self._student_loss(batch)

    def _head_loss(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            x_t, t, target = self.pair(batch)
            x0_hat = self.student.x0(x_t, t, batch.condition)
        real, fake = self.logits(target, batch, "target"), self.logits(x0_hat, batch, "prediction")
        loss = losses.hinge_discriminator(real, fake)
        return Outcome(loss, {"adversarial": loss.detach(), **judging.scalars(real, fake)})

    def _student_loss(self, batch: Batch) -> Outcome:
        x_t, t, target = self.pair(batch)
        x0_hat = self.student.x0(x_t, t, batch.condition)
        made, wanted = map(batch.condition.free, (x0_hat, target))
        if self.settings.distance == "huber":
            loss = losses.pseudo_huber(made, wanted, self.settings.huber_c)
        else:
            loss = losses.regression(made, wanted)
        scalars = {"consistency": loss.detach()}
        if self.adversary is not None:
            logits = self.logits(x0_hat, batch, "prediction")
            adversarial = losses.hinge_margin_generator(logits)
            scalars |= {"adversarial": adversarial.detach(), "logit_fake": logits.detach().mean()}
            loss = loss + self.adversary.weight * adversarial
        return Outcome(loss, scalars)
