"""Phase II of V-PAE, unified adversarial equilibrium: the student's own EMA judges it.

    x0hat = eps - mu_theta(eps, 1)                                        from pure noise
    D(x)  = d_psi( theta^-((1 - t) x + t eps', t),  q, e_i, e_t )         theta^- = EMA of theta, up to its last tap
    head turn:     E max(0, 1 - D(x)) + E max(0, 1 + D(x0hat)) + L_STR1               moves psi
    student turn:  -E D(x0hat) + lambda || x0hat - sg f_real(sg x_t', t') ||^2        moves theta
    theta^- <- 0.995 theta^- + 0.005 theta

(arXiv 2508.21019, equations of phase II.) The paper's figure prints t = 1 for the judge, which would multiply x0hat by
zero; t is drawn here, the same for real and generated, from a law of the recipe that ends below 1.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from vpae import losses
from vpae.conditioning import Condition
from vpae.flow import interpolate
from vpae.methods import judging
from vpae.methods.base import Batch, Ema, Outcome, Player
from vpae.recipe import Equilibrium as Settings
from vpae.roles import Role


class Equilibrium:
    """Adversarial training of a primed student against a head on its own EMA.

    Args:
        judge: whose blocks feed the head: the ``ema`` role itself (unified), a frozen role, or a trainable one that
            moves in the head's turn (the paper's ablation).
        taps: block indices.
    """

    name = "equilibrium"

    def __init__(
        self,
        settings: Settings,
        *,
        teacher: Role,
        student: Role,
        ema: Role,
        judge: Role,
        head: nn.Module,
        taps: tuple[int, ...],
    ) -> None:
        self.settings, self.taps, self.head = settings, taps, head
        self.teacher, self.student, self.judge, self.ema = teacher, student, judge, ema
        self.adversary = losses.ADVERSARIAL[settings.adversarial]
        head_steps = settings.head_warmup_turns + settings.student_steps * settings.head_per_student
        self.turns = settings.student_steps + head_steps
        mine = {f"head.{name}": p for name, p in head.named_parameters()}
        if settings.judge == "trainable":
            mine |= {f"judge.{name}": p for name, p in judge.named_parameters()}
        follow = Ema("ema", dict(ema.named_parameters()), settings.ema_decay)
        self.players = {
            "head": Player("head", mine, settings.head_optimiser, head_steps),
            "student": Player(
                "student", dict(student.named_parameters()), settings.student_optimiser, settings.student_steps, follow
            ),
        }

    def player_of(self, turn: int) -> str:
        place = (turn - self.settings.head_warmup_turns) % (self.settings.head_per_student + 1)
        warm = turn >= self.settings.head_warmup_turns
        return "student" if warm and place == self.settings.head_per_student else "head"

    def _head_turns_before(self, turn: int) -> int:
        """How many of the turns before this one were the head's."""
        late = max(0, turn - self.settings.head_warmup_turns)
        return turn - late // (self.settings.head_per_student + 1)

    def generate(self, batch: Batch) -> Tensor:
        """The 1-NFE sample from pure noise."""
        noise = batch.draws.normal_like("student noise", batch.x0)
        return self.student.x0(noise, noise.new_ones(len(noise)), batch.condition)

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``D(x_t) [B]``: the judge's tapped blocks, read by the head."""
        return judging.read_logits(self.judge, self.head, self.taps, x_t, t, condition)

    def loss(self, player: str, batch: Batch) -> Outcome:
        return self._head_loss(batch) if player == "head" else self._student_loss(batch)

    def _shown(self, x0: Tensor, t: Tensor, batch: Batch, which: str) -> Tensor:
        """What the judge sees of clips at the time t that real and generated ones share: noised to it, or clean."""
        if self.settings.judge_input == "clean":
            return x0
        purpose = "judge noise" if self.settings.share_noise else f"judge noise on {which}"
        return interpolate(x0, batch.draws.normal_like(purpose, x0), t)

    def _judge_time(self, batch: Batch) -> Tensor:
        return self.settings.judge_time.quantile(batch.draws.uniform("judge time"))

    def _head_loss(self, batch: Batch) -> Outcome:
        with torch.no_grad():
            x0_hat = self.generate(batch)
        t = self._judge_time(batch)
        real_t, fake_t = self._shown(batch.x0, t, batch, "real"), self._shown(x0_hat, t, batch, "fake")
        real, fake = self.logits(real_t, t, batch.condition), self.logits(fake_t, t, batch.condition)
        adversarial = self.adversary[0](real, fake)
        scalars = {"adversarial": adversarial.detach(), **judging.scalars(real, fake)}
        loss = adversarial
        every = self.settings.r1.every
        if self.settings.r1.weight > 0 and self._head_turns_before(batch.turn) % every == 0:
            r1 = self._st_r1(real, real_t, t, batch, "real")
            if self.settings.r1.on == "both":
                r1 = r1 + self._st_r1(fake, fake_t, t, batch, "fake")
            scalars["st_r1"] = r1.detach()
            loss = loss + self.settings.r1.weight * every * r1
        return Outcome(loss, scalars)

    def _st_r1(self, logits: Tensor, x_t: Tensor, t: Tensor, batch: Batch, which: str) -> Tensor:
        """Finite differences at the judge's input, the same noise level on both sides of the difference."""
        r1 = self.settings.r1
        spatial = losses.spatial_perturbation(batch.draws.normal_like(f"spatial {which}", x_t), r1.spatial_sigma)
        perturbed_in_time = losses.difference_perturbation if r1.form == "differences" else losses.temporal_perturbation
        temporal = perturbed_in_time(batch.draws.normal_like(f"temporal {which}", x_t), r1.temporal_sigma)
        moves = [spatial + temporal] if r1.form == "joint" else [spatial, temporal]
        device = x_t.device.type
        exact = r1.precision == "fp32" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if exact else contextlib.nullcontext():
            clean = self.logits(x_t, t, batch.condition) if exact else logits
            terms = [losses.finite_difference_r1(clean, self.logits(x_t + n, t, batch.condition)) for n in moves]
        return torch.stack(terms).sum()

    def _student_loss(self, batch: Batch) -> Outcome:
        x0_hat = self.generate(batch)
        t = self._judge_time(batch)
        logits = self.logits(self._shown(x0_hat, t, batch, "fake"), t, batch.condition)
        adversarial = self.adversary[1](logits)
        scalars = {"adversarial": adversarial.detach(), "logit_fake": logits.detach().mean()}
        loss = adversarial
        if self.settings.sds.weight > 0:
            sds = self._conditional_sds(x0_hat, batch)
            scalars["c_sds"] = sds.detach()
            loss = loss + self.settings.sds.weight * sds
        return Outcome(loss, scalars, x0_hat.detach())

    def _conditional_sds(self, x0_hat: Tensor, batch: Batch) -> Tensor:
        settings = self.settings.sds
        with torch.no_grad():
            t = settings.time.quantile(batch.draws.uniform("sds time"))
            x_t = interpolate(x0_hat, batch.draws.normal_like("sds noise", x0_hat), t)
            target = self.teacher.guided_x0(x_t, t, batch.condition, batch.null, settings.guidance_scale)
        # a frame that is given is no error, and weighs nothing in the mean
        first_frame_weight = 0.0 if batch.condition.given else settings.first_frame_weight
        return losses.conditional_sds(x0_hat, target, first_frame_weight)
