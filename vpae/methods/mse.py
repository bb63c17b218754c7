"""Regression of the teacher: the floor under every other method.

    x_T ~ N(0, I),  x the teacher's own sample from it, made once with its sampler and guidance
    student turn:  || x - f_theta(x_T, 1) ||^2                                      moves theta

Where several clips fit one noise and condition to the eye, their mean is what this learns.
"""

from __future__ import annotations

from vpae import losses
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.peer_recipe import Mse as Settings
from vpae.roles import Role


class Mse:
    """One-step regression on pairs of noise and the teacher's sample (the batch carries both)."""

    name = "mse"

    def __init__(self, settings: Settings, *, student: Role, ema: Role) -> None:
        self.settings, self.student, self.ema = settings, student, ema
        self.turns = settings.student_steps
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            )
        }

    def player_of(self, turn: int) -> str:
        return "student"

    def loss(self, player: str, batch: Batch) -> Outcome:
        x0_hat = self.student.x0(batch.noise, batch.noise.new_ones(len(batch.noise)), batch.condition)
        loss = losses.regression(*map(batch.condition.free, (x0_hat, batch.x0)))
        return Outcome(loss, {"regression": loss.detach()}, x0_hat.detach())
