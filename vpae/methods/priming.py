"""Phase I of V-PAE, stability priming: variational score distillation at the noisy end.

    x_s   = (1 - s) x + s eps,   s in [0.9, 1],  x real      the student's input is a heavily noised real clip
    x0hat = x_s - s mu_theta(x_s, s)
    x_t   = (1 - t) x0hat + t eps'
    fake turn:     || (eps' - x0hat) - mu_phi(x_t, t) ||^2                          moves the LoRA phi
    student turn:  grad = (x0_fake - x0_real) / mean |x0hat - x0_real|              moves theta

(arXiv 2508.21019, v1 figure and equations of phase I.) The paper leaves open the ratio of turns, the laws of t, the
normaliser and the teacher's guidance: all are recipe fields.
"""

from __future__ import annotations

import torch

from vpae import losses
from vpae.flow import interpolate
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.recipe import Priming as Settings
from vpae.roles import Role


class Priming:
    """VSD of a student against a frozen teacher, with a fake score that is the teacher plus a LoRA."""

    name = "priming"

    def __init__(self, settings: Settings, *, teacher: Role, student: Role, fake_score: Role, ema: Role) -> None:
        self.settings = settings
        self.teacher, self.student, self.fake_score, self.ema = teacher, student, fake_score, ema
        fake_steps = settings.student_steps * settings.fake_per_student
        self.turns = settings.student_steps + fake_steps
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "fake_score": Player(
                "fake_score", dict(fake_score.named_parameters()), settings.fake_optimiser, fake_steps
            ),
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            ),
        }

    def player_of(self, turn: int) -> str:
        last_of_cycle = turn % (self.settings.fake_per_student + 1) == self.settings.fake_per_student
        return "student" if last_of_cycle else "fake_score"

    def generate(self, batch: Batch) -> torch.Tensor:
        """The student's clean sample from a heavily noised real clip."""
        s = self.settings.student_time.quantile(batch.draws.uniform("student time"))
        x_s = interpolate(batch.x0, batch.draws.normal_like("student noise", batch.x0), s)
        return self.student.x0(x_s, s, batch.condition)

    def loss(self, player: str, batch: Batch) -> Outcome:
        return self._fake_loss(batch) if player == "fake_score" else self._student_loss(batch)

    def _fake_loss(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            x0_hat = self.generate(batch)
        t = self.settings.fake_time.quantile(batch.draws.uniform("fake time"))
        noise = batch.draws.normal_like("fake noise", x0_hat)
        velocity = self.fake_score.velocity(interpolate(x0_hat, noise, t), t, batch.condition)
        loss = losses.flow_matching(*map(batch.condition.free, (velocity, x0_hat, noise)))
        return Outcome(loss, {"flow_matching": loss.detach()})

    def _student_loss(self, batch: Batch) -> Outcome:
        x0_hat = self.generate(batch)
        with torch.no_grad():
            t = self.settings.score_time.quantile(batch.draws.uniform("score time"))
            x_t = interpolate(x0_hat, batch.draws.normal_like("score noise", x0_hat), t)
            fake = self.fake_score.x0(x_t, t, batch.condition)
            real = self.teacher.guided_x0(x_t, t, batch.condition, batch.null, self.settings.guidance_scale)
            made, real, fake = map(batch.condition.free, (x0_hat.detach(), real, fake))
            gradient = losses.vsd_gradient(made, real, fake, self.settings.normaliser, t)
        loss = losses.vsd(batch.condition.free(x0_hat), gradient)
        scalars = {
            "vsd": loss.detach(),
            "vsd_gradient": losses.per_sample_mean(gradient.square()).sqrt().mean(),
            "teacher_distance": (made - real).abs().mean(),
            "fake_real_distance": (fake - real).abs().mean(),
        }
        return Outcome(loss, scalars, x0_hat.detach())
