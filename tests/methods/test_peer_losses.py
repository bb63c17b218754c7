"""Each peer's loss against numbers by hand: signs, factors, what is noised and to which time, on whom it settles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from vpae import losses
from vpae.conditioning import Condition
from vpae.draws import Draws
from vpae.flow import TimeLaw, expand_time
from vpae.methods.base import Batch
from vpae.methods.dmd2 import Dmd2
from vpae.methods.pcm import Pcm


def leaf(stage, batch):
    """Let the student's sample be a leaf, so that its gradient can be read."""
    x0_hat = stage.method.generate(batch).detach().requires_grad_()
    stage.method.generate = lambda batch: x0_hat
    stage.calls.clear()
    return x0_hat


def linear(stage, shape, heads=None):
    """Put ``D(x) = <w, x>`` (one w a head) in the place of judge and head; returns w and the clips it is shown."""
    w = Draws(3, range(heads or 1)).normal("w", shape[1:]) * 0.05
    w.requires_grad_()
    shown = []

    def logits(x0, *_):
        shown.append(x0)
        values = torch.einsum("bcthw,kcthw->bk", x0, w)
        return values if heads else values.squeeze(1)

    stage.method.logits = logits
    return w, shown


def given(batch):
    return dataclasses.replace(batch, noise=batch.draws.normal_like("a sample's noise", batch.x0))


def test_pseudo_huber_and_its_gradient():
    x, target = (
        torch.tensor([[3.0, 0.0, -0.5]], requires_grad=True),
        torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True),
    )
    loss = losses.pseudo_huber(x, target, 0.1)
    loss.backward()
    error = torch.tensor([2.0, 0.0, -0.5])
    root = (error**2 + 0.01).sqrt()
    assert float(loss.detach()) == pytest.approx(float((root - 0.1).mean()), rel=1e-6)
    torch.testing.assert_close(x.grad, (error / root / 3)[None])
    assert target.grad is None


def test_the_margin_of_pcms_generator_stops_pulling_above_one():
    logits = torch.tensor([0.5, 2.0, -3.0], requires_grad=True)
    loss = losses.hinge_margin_generator(logits)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.5 + 0 + 4) / 3)
    torch.testing.assert_close(logits.grad, torch.tensor([-1 / 3, 0.0, -1 / 3]))


def test_mse_regresses_the_teachers_sample_from_its_own_noise(build_peers, batch_of):
    stage, batch = build_peers("mse"), given(batch_of())
    outcome = stage.take_turn("student", batch)
    (student,) = stage.calls
    assert student.x_t is batch.noise and (student.t == 1).all()
    x0_hat = batch.noise - stage.roles["student"].velocity(batch.noise, student.t, batch.condition).detach()
    assert float(outcome.loss.detach()) == pytest.approx(float((x0_hat - batch.x0).square().mean()), rel=1e-5)
    torch.testing.assert_close(outcome.student_x0, x0_hat)


class TestDmd2:
    def test_the_student_descends_vsd_and_climbs_the_logit(self, build_peers, batch_of):
        stage, batch = build_peers("dmd2"), batch_of()
        x0_hat = leaf(stage, batch)
        w, shown = linear(stage, x0_hat.shape)
        stage.take_turn("student", batch)
        fake, teacher, unguided = stage.calls
        assert torch.equal(fake.x_t, teacher.x_t) and torch.equal(fake.t, unguided.t)
        assert teacher.condition is batch.condition and unguided.condition is batch.null
        t = expand_time(fake.t, fake.x_t)
        cond, uncond = (stage.roles["teacher"].velocity(fake.x_t, fake.t, c) for c in (batch.condition, batch.null))
        real = fake.x_t - t * (uncond + 2.0 * (cond - uncond))
        pull = stage.roles["fake_score"].x0(fake.x_t, fake.t, batch.condition) - real
        pull = pull / (x0_hat - real).abs().mean((1, 2, 3, 4), keepdim=True)
        logit = (x0_hat * w).flatten(1).sum(1)
        climb = torch.sigmoid(-logit).reshape(-1, 1, 1, 1, 1) * w / len(logit)
        expected = pull / x0_hat.numel() - 0.5 * climb
        torch.testing.assert_close(x0_hat.grad, expected.detach(), atol=1e-7, rtol=1e-3)
        assert shown[0] is x0_hat

    def test_the_critic_denoises_and_tells_apart(self, build_peers, batch_of):
        stage, batch = build_peers("dmd2"), batch_of()
        x0_hat = leaf(stage, batch)
        w, _ = linear(stage, x0_hat.shape)
        outcome = stage.take_turn("critic", batch)
        (fake,) = stage.calls
        t = expand_time(fake.t, fake.x_t)
        noise = (fake.x_t - (1 - t) * x0_hat.detach()) / t
        velocity = stage.roles["fake_score"].velocity(fake.x_t, fake.t, batch.condition)
        denoising = float((velocity - (noise - x0_hat)).square().mean().detach())
        assert float(outcome.scalars["flow_matching"]) == pytest.approx(denoising, rel=1e-3)
        again = w.detach().clone().requires_grad_()
        real, wrong = ((x * again).flatten(1).sum(1) for x in (batch.x0, x0_hat.detach()))
        by_hand = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(wrong)).log().mean())
        (0.25 * by_hand).backward()
        torch.testing.assert_close(w.grad, again.grad, atol=1e-6, rtol=1e-4)
        total = denoising + 0.25 * float(by_hand.detach())
        assert float(outcome.loss.detach()) == pytest.approx(total, rel=1e-3)

    def test_real_and_generated_are_judged_at_times_of_their_own(self, build_peers, batch_of):
        stage, batch = build_peers("dmd2"), batch_of(8)
        x0_hat = leaf(stage, batch).detach()
        stage.take_turn("critic", batch)
        _, real, fake = stage.calls
        assert real.stopped and fake.stopped and real.taps == (1, 2, 3)
        assert not torch.equal(real.t, fake.t)
        noise = [(c.x_t - (1 - expand_time(c.t, c.x_t)) * x) / expand_time(c.t, c.x_t) for c, x in
                 ((real, batch.x0), (fake, x0_hat))]  # fmt: skip
        assert all(abs(float(n.std()) - 1) < 0.06 for n in noise)
        assert abs(float(torch.corrcoef(torch.stack(noise).flatten(1))[0, 1])) < 0.06

    def test_the_whole_game_on_gaussians(self, build_peers, gaussian, affine):
        """Fake score, head and student learn against one another; the student ends at the teacher's distribution."""
        law = TimeLaw(low=0.1, high=0.9)
        settings = dataclasses.replace(
            build_peers("dmd2").method.settings,
            student_steps=150,
            critic_per_student=4,
            score_time=law,
            fake_time=law,
            student_gan_weight=0.05,
            critic_gan_weight=0.5,
        )
        head = nn.Linear(2, 1)
        nn.init.zeros_(head.weight)
        roles = {"teacher": gaussian(1.0, 0.5), "student": affine(-0.5, 1.2), "ema": affine(-0.5, 1.2)}
        method = Dmd2(settings, **roles, fake_score=gaussian(1.0, 0.5), head=head, taps=())
        moments = lambda x: torch.stack([x.flatten(1).mean(1), x.flatten(1).square().mean(1)], 1)  # noqa: E731
        method.logits = lambda x0, batch, which: head(moments(x0)).squeeze(1)
        rates = {"critic": 0.05, "student": 0.03}
        play(method, rates)
        samples = method.generate(Batch(torch.zeros(500, 1, 2, 4, 4), None, None, Draws(1, range(500)))).detach()
        assert float(samples.mean()) == pytest.approx(1.0, abs=0.08)
        assert float(samples.std()) == pytest.approx(0.5, rel=0.12)


def play(method, rates, size=24):
    nothing = Condition(torch.zeros(size, 1, 1))
    optimisers = {name: torch.optim.Adam(p.parameters.values(), rates[name]) for name, p in method.players.items()}
    for turn in range(method.turns):
        player = method.player_of(turn)
        draws = Draws(0, range(turn * size, (turn + 1) * size))
        batch = Batch(1.0 + 0.5 * draws.normal("data", (1, 2, 4, 4)), nothing, None, draws)
        for other in method.players.values():
            for p in other.parameters.values():
                p.requires_grad_(other.name == player)
        method.loss(player, batch).loss.backward()
        for group in optimisers[player].param_groups:
            group["lr"] = rates[player] * max(0.02, 1 - turn / method.turns)
        optimisers[player].step()
        optimisers[player].zero_grad()
        follow = method.players[player].ema
        if follow is not None:
            with torch.no_grad():
                for name, p in method.players[player].parameters.items():
                    follow.parameters[name].lerp_(p, 1 - follow.decay)


class Curve(nn.Module):
    """The exact consistency function of data N(mean, std^2) under the probability-flow ODE; f(x, 0) = x for any."""

    adapter = None

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(float(mean))), nn.Parameter(torch.tensor(float(std)))

    def x0(self, x_t, t, condition):
        t = expand_time(t, x_t)
        spread = ((1 - t) ** 2 * self.std**2 + t**2).sqrt()
        return self.mean + self.std * (x_t - (1 - t) * self.mean) / spread


class TestConsistency:
    def settings(self, build_peers, **changes):
        return dataclasses.replace(build_peers("lcm").method.settings, **changes)

    def test_the_true_consistency_function_is_where_the_loss_vanishes(self, build_peers, gaussian):
        """And as the square of the grid's step, that is, one Euler step of the flow lies between the two sides."""
        draws = Draws(0, range(400))
        batch = Batch(1.0 + 0.5 * draws.normal("data", (1, 2, 4, 4)), Condition(torch.zeros(400, 1, 1)), None, draws)
        found = {}
        for steps in (20, 40):
            settings = self.settings(build_peers, grid_steps=steps, grid_shift=1.0, distance="squared")
            roles = {"teacher": gaussian(1.0, 0.5), "student": Curve(1.0, 0.5), "ema": Curve(1.0, 0.5)}
            method = Pcm(settings, None, **roles)
            x_t, t, target = method.pair(batch)
            gap = (method.student.x0(x_t, t, None) - target).detach()
            found[steps] = float(gap.abs().mean())
            wrong = Pcm(settings, None, **(roles | {"student": Curve(0.5, 0.5)}))
            assert float(wrong.loss("student", batch).loss.detach()) > 100 * float(gap.square().mean())
        assert found[20] < 0.01 and 3 < found[20] / found[40] < 5

    def test_one_step_of_the_guided_teacher_from_t_to_the_next_time_on_the_grid(self, build_peers, batch_of):
        stage, batch = build_peers("lcm"), batch_of(8)
        consistency = dataclasses.replace(stage.method.settings, guidance_range=(3.0, 3.0))
        stage.method.settings = consistency
        stage.take_turn("student", batch)
        unguided, teacher, target, student = stage.calls
        assert unguided.condition is batch.null and teacher.condition is batch.condition
        grid = torch.tensor([3 * k / 4 / (1 + 2 * k / 4) for k in range(5)])
        place = (student.t[:, None] - grid).abs().argmin(1)
        torch.testing.assert_close(student.t, grid[place])
        torch.testing.assert_close(target.t, grid[place - 1])
        assert place.min() >= 1 and len(place.unique()) > 2
        noise = (student.x_t - (1 - expand_time(student.t, student.x_t)) * batch.x0) / expand_time(student.t, batch.x0)
        assert abs(float(noise.std()) - 1) < 0.06
        cond, uncond = (
            stage.roles["teacher"].velocity(student.x_t, student.t, c) for c in (batch.condition, batch.null)
        )
        velocity = uncond + 3.0 * (cond - uncond)
        moved = student.x_t + expand_time(target.t - student.t, student.x_t) * velocity
        torch.testing.assert_close(target.x_t, moved.detach(), atol=1e-5, rtol=1e-4)

    def test_guidance_is_drawn_from_its_range(self, build_peers, gaussian):
        teacher = gaussian(0.0, 1.0)
        asked = iter([0.0, 1.0] * 2)  # the null branch is asked first: its velocity is 0, the other's 1
        teacher.velocity = lambda x, t, c: torch.full_like(x, next(asked))
        settings = self.settings(build_peers, grid_steps=10, grid_shift=1.0, guidance_range=(2.0, 6.0))
        student = Curve(0.0, 1.0)
        student.x0 = lambda x, t, c: x
        method = Pcm(settings, None, teacher=teacher, student=student, ema=student)
        draws = Draws(0, range(400))
        x_t, _, x_s = method.pair(Batch(draws.normal("data", (1, 1, 1, 1)), None, None, draws))
        scale = (x_t - x_s).flatten() / 0.1
        assert 2.0 <= scale.min() < 2.2 and 5.8 < scale.max() <= 6.0 and abs(float(scale.mean()) - 4) < 0.2

    @pytest.mark.parametrize("target", ["ema", "student"])
    def test_the_target_leaves_no_graph(self, build_peers, batch_of, target):
        stage = build_peers("lcm")
        stage.method.settings = dataclasses.replace(stage.method.settings, target=target)
        stage.take_turn("student", batch_of())
        assert [(c.role, c.grad) for c in stage.calls[2:]] == [(target, False), ("student", True)]

    def test_learning_it_from_a_guided_teacher_of_gaussians(self, build_peers, gaussian):
        settings = self.settings(build_peers, student_steps=250, grid_steps=16, grid_shift=1.0, ema_decay=0.8)
        roles = {"teacher": gaussian(1.0, 0.5), "student": Curve(-0.5, 1.2), "ema": Curve(-0.5, 1.2)}
        method = Pcm(settings, None, **roles)
        play(method, {"student": 0.05}, size=16)
        assert float(method.ema.mean) == pytest.approx(1.0, abs=0.06)
        assert float(method.ema.std) == pytest.approx(0.5, rel=0.1)

    def test_the_adversary_sees_target_and_prediction_at_one_time_with_noise_of_their_own(self, build_peers, batch_of):
        stage, batch = build_peers("pcm"), batch_of(8)
        stage.take_turn("head", batch)
        _, _, target, student, real, fake = stage.calls
        y = stage.roles["student"].x0(target.x_t, target.t, batch.condition).detach()
        x0_hat = stage.roles["student"].x0(student.x_t, student.t, batch.condition).detach()
        assert torch.equal(real.t, fake.t) and float(real.t.max()) < 0.95 and float(real.t.min()) == 0
        some = real.t > 0
        t = expand_time(real.t[some], y)
        noise = [(c.x_t[some] - (1 - t) * x[some]) / t for c, x in ((real, y), (fake, x0_hat))]
        assert all(abs(float(n.std()) - 1) < 0.1 for n in noise)
        assert abs(float(torch.corrcoef(torch.stack(noise).flatten(1))[0, 1])) < 0.1

    def test_signs_of_the_adversary(self, build_peers, batch_of):
        stage, batch = build_peers("pcm"), batch_of()
        x0_hat, y = (x.detach().requires_grad_() for x in (batch.x0 + 0.1, batch.x0))
        stage.method.pair = lambda batch: (None, None, y)
        stage.method.student = type("Fixed", (), {"x0": lambda *_: x0_hat})()
        w, _ = linear(stage, x0_hat.shape, heads=2)
        outcome = stage.method.loss("student", batch)
        outcome.loss.backward()
        values = torch.einsum("bcthw,kcthw->bk", x0_hat, w).detach()
        error = x0_hat.detach() - y.detach()
        smooth = error / (error.square() + 1e-6).sqrt() / error.numel()
        active = (values < 1).float() / values.numel()
        climb = torch.einsum("bk,kcthw->bcthw", active, w.detach())
        torch.testing.assert_close(x0_hat.grad, smooth - 0.1 * climb, atol=1e-7, rtol=1e-4)
        assert y.grad is None
        w.grad = None
        stage.method.loss("head", batch).loss.backward()
        again = w.detach().clone().requires_grad_()
        real, fake = (torch.einsum("bcthw,kcthw->bk", x.detach(), again) for x in (y, x0_hat))
        ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()).backward()
        torch.testing.assert_close(w.grad, again.grad, atol=1e-6, rtol=1e-4)


class TestApt:
    def test_the_judge_sees_clean_clips_and_is_told_one_time(self, build_peers, batch_of):
        stage, batch = build_peers("apt"), batch_of(8)
        x0_hat = leaf(stage, batch).detach()
        stage.take_turn("head", batch)
        real, fake, moved = stage.calls
        assert torch.equal(real.x_t, batch.x0) and torch.equal(fake.x_t, x0_hat)
        assert torch.equal(real.t, fake.t) and torch.equal(real.t, moved.t) and len(real.t.unique()) == 8
        noise = moved.x_t - batch.x0
        assert abs(float(noise.std()) - 0.1) < 0.01 and abs(float(noise.mean())) < 0.01

    def test_signs_and_approximated_r1_against_their_closed_form(self, build_peers):
        count = 3000
        stage = build_peers("apt")
        draws = Draws(0, range(count))
        x0, x0_hat = draws.normal("real", (2, 3, 2, 2)), draws.normal("fake", (2, 3, 2, 2)).requires_grad_()
        stage.method.generate = lambda batch: x0_hat
        w, shown = linear(stage, x0.shape)
        outcome = stage.method.loss("head", Batch(x0, None, None, draws))
        expected = 0.1**2 * float(w.detach().square().sum())
        assert float(outcome.scalars["r1"]) == pytest.approx(expected, rel=4 * (2 / count) ** 0.5)
        outcome.loss.backward()
        again = w.detach().clone().requires_grad_()
        real, fake, moved = ((x.detach() * again).flatten(1).sum(1) for x in shown)
        by_hand = -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean())
        (by_hand + 10.0 * (real - moved).square().mean()).backward()
        torch.testing.assert_close(w.grad, again.grad, atol=1e-5, rtol=1e-4)
        x0_hat.grad = None
        stage.method.loss("student", Batch(x0, None, None, draws)).loss.backward()
        logit = (x0_hat * w).flatten(1).sum(1).detach().reshape(-1, 1, 1, 1, 1)
        torch.testing.assert_close(x0_hat.grad, -torch.sigmoid(-logit) * w.detach() / count, atol=1e-8, rtol=1e-4)

    def test_r1_switched_off_costs_no_forward(self, build_peers):
        stage = build_peers("apt", r1_weight=0.0)
        outcome = stage.take_turn("head")
        assert "r1" not in outcome.scalars and len(stage.calls) == 3


class TestLadd:
    def test_signs(self, build_peers, batch_of):
        stage, batch = build_peers("ladd"), batch_of()
        x0_hat = leaf(stage, batch)
        w, _ = linear(stage, x0_hat.shape, heads=3)
        stage.take_turn("student", batch)
        expected = -w.detach().sum(0, keepdim=True) / (3 * len(x0_hat))
        torch.testing.assert_close(x0_hat.grad, expected.expand_as(x0_hat), atol=1e-8, rtol=1e-4)
        w.grad = None
        stage.take_turn("head", batch)
        again = w.detach().clone().requires_grad_()
        real, fake = (torch.einsum("bcthw,kcthw->bk", x.detach(), again) for x in (batch.x0, x0_hat))
        ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()).backward()
        torch.testing.assert_close(w.grad, again.grad, atol=1e-6, rtol=1e-4)

    def test_every_tap_has_a_verdict_of_its_own(self, build_peers, batch_of):
        stage, batch = build_peers("ladd"), batch_of()
        logits = stage.method.logits(batch.x0, batch, "real")
        assert logits.shape == (2, 3) and len(stage.roles["head"].heads) == 3
        stage.calls.clear()
        with torch.no_grad():
            for p in stage.roles["head"].heads[1].parameters():
                p.zero_()
        again = stage.method.logits(batch.x0, batch, "real")
        assert torch.equal(again[:, [0, 2]], logits[:, [0, 2]]) and (again[:, 1] == 0).all()

    @pytest.mark.parametrize("share", [False, True])
    def test_real_and_generated_are_judged_at_one_time(self, build_peers, batch_of, share):
        stage, batch = build_peers("ladd", share_noise=share), batch_of(8)
        x0_hat = leaf(stage, batch).detach()
        stage.take_turn("head", batch)
        real, fake = stage.calls
        assert real.role == "teacher" and torch.equal(real.t, fake.t) and len(real.t.unique()) == 8
        t = expand_time(real.t, batch.x0)
        noise = [(c.x_t - (1 - t) * x) / t for c, x in ((real, batch.x0), (fake, x0_hat))]
        correlation = float(torch.corrcoef(torch.stack(noise).flatten(1))[0, 1])
        assert correlation > 0.99 if share else abs(correlation) < 0.06

    def test_the_student_starts_from_the_recipes_noise_levels(self, build_peers, batch_of):
        stage = build_peers("ladd", student_times=[1.0, 0.5], student_weights=[1.0, 3.0])
        batch = batch_of(4)
        stage.method.generate(batch)
        (student,) = stage.calls
        assert set(student.t.tolist()) <= {1.0, 0.5}
        t = expand_time(student.t, batch.x0)
        noise = (student.x_t - (1 - t) * batch.x0) / t
        assert abs(float(noise.std()) - 1) < 0.08
        seen = []
        stage.method.student = type("Listening", (), {"x0": lambda self, x, t, c: seen.append(t) or x})()
        draws = Draws(0, range(2000))
        stage.method.generate(Batch(torch.zeros(2000, 1, 1, 1, 1), None, None, draws))
        assert float((seen[0] == 1.0).float().mean()) == pytest.approx(0.25, abs=0.03)
