"""Flow matching: how a teacher is made.  ``|| (eps - x) - v(x_t, t, c) ||^2`` with the prompt dropped now and then."""

from __future__ import annotations

from vpae import losses
from vpae.flow import interpolate
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.recipe import FlowMatching as Settings
from vpae.roles import Role


class FlowMatching:
    """Train ``student`` (here: the teacher to be) by flow matching with text dropout."""

    name = "flow_matching"

    def __init__(self, settings: Settings, *, student: Role, ema: Role) -> None:
        self.settings, self.student, self.ema = settings, student, ema
        self.turns = settings.steps
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "student": Player("student", dict(student.named_parameters()), settings.optimiser, settings.steps, follow)
        }

    def player_of(self, turn: int) -> str:
        return "student"

    def loss(self, player: str, batch: Batch) -> Outcome:
        t = self.settings.time.quantile(batch.draws.uniform("time"))
        noise = batch.draws.normal_like("noise", batch.x0)
        dropped = batch.draws.uniform("text dropout") < self.settings.text_dropout
        condition = batch.condition.drop(batch.null.text[:1], dropped)
        velocity = self.student.velocity(interpolate(batch.x0, noise, t), t, condition)
        loss = losses.flow_matching(*map(condition.free, (velocity, batch.x0, noise)))
        return Outcome(loss, {"flow_matching": loss.detach()})
