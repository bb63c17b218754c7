from __future__ import annotations

import dataclasses

import pytest
import torch

from vpae.conditioning import Condition
from vpae.draws import Draws
from vpae.flow import TimeLaw
from vpae.methods.base import Batch
from vpae.methods.priming import Priming

BOTH = pytest.mark.parametrize("student", ["full", "lora"])


def interpolate(x0, noise, t):
    t = t.reshape(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * noise


@BOTH
@pytest.mark.parametrize("player", ["fake_score", "student"])
def test_gradient_table(build, player, student):
    stage = build("priming", student)
    stage.take_turn(player)
    for role, gradients in stage.gradients().items():
        missing = {name for name, g in gradients.items() if g is None}
        dead = {name for name, g in gradients.items() if g is not None and g.abs().max() == 0}
        assert missing == (set() if role == player else set(gradients)), role
        assert dead == set(), role


@BOTH
def test_first_turns_of_a_run_move_their_players(build, student):
    stage = build("priming", student, asleep=True)
    for player in ("fake_score", "student"):
        stage.take_turn(player)
        gradients = stage.gradients()
        assert any(g.abs().max() > 0 for g in gradients.pop(player).values())
        assert all(g is None for role in gradients.values() for g in role.values())


@BOTH
def test_who_is_asked_in_a_turn_and_who_leaves_a_graph(build, student):
    stage = build("priming", student)
    stage.take_turn("fake_score")
    assert [(c.role, c.grad) for c in stage.calls] == [("student", False), ("fake_score", True)]
    stage.take_turn("student")
    assert [(c.role, c.grad) for c in stage.calls] == [
        ("student", True),
        ("fake_score", False),
        ("teacher", False),
        ("teacher", False),
    ]


@BOTH
def test_whose_weights_a_turn_depends_on(build, student):
    stage = build("priming", student)
    for player in ("fake_score", "student"):
        for role in stage.roles:
            before = stage.take_turn(player).loss.detach()
            stage.shake(role, 0.02)
            moved = not torch.equal(stage.take_turn(player).loss.detach(), before)
            assert moved == (role != "ema"), (player, role)  # the fake score stands on the teacher's weights


def test_fake_turn_is_flow_matching_on_the_students_samples(build, batch_of):
    stage, batch = build("priming"), batch_of()
    outcome = stage.take_turn("fake_score", batch)
    student, fake = stage.calls
    x0_hat = stage.roles["student"].x0(student.x_t, student.t, batch.condition).detach()
    noise = (fake.x_t - interpolate(x0_hat, 0, fake.t)) / fake.t.reshape(-1, 1, 1, 1, 1)
    assert 0.8 < noise.std() < 1.2
    velocity = stage.roles["fake_score"].velocity(fake.x_t, fake.t, batch.condition).detach()
    assert float(outcome.loss.detach()) == pytest.approx(float((noise - x0_hat - velocity).square().mean()), rel=1e-4)
    assert outcome.student_x0 is None


@pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
def test_student_turn_gives_the_sample_exactly_the_vsd_gradient(build, batch_of, normaliser):
    """The gradient reaches the student through x0hat alone, and there it is the formula over the number of elements."""
    stage, batch = build("priming", normaliser=normaliser), batch_of()
    x0_hat = stage.method.generate(batch).detach().requires_grad_()
    stage.method.generate = lambda batch: x0_hat
    stage.take_turn("student", batch)
    fake, teacher, unguided = stage.calls
    assert torch.equal(fake.x_t, teacher.x_t) and torch.equal(fake.x_t, unguided.x_t)
    assert torch.equal(fake.t, teacher.t) and torch.equal(fake.t, unguided.t) and not fake.x_t.requires_grad
    assert fake.condition is batch.condition and teacher.condition is batch.condition
    assert unguided.condition is batch.null
    x_t, t, column = fake.x_t, fake.t, fake.t.reshape(-1, 1, 1, 1, 1)
    cond, uncond = (stage.roles["teacher"].velocity(x_t, t, c) for c in (batch.condition, batch.null))
    real = x_t - column * (uncond + 2.0 * (cond - uncond))
    expected = stage.roles["fake_score"].x0(x_t, t, batch.condition) - real
    if normaliser == "dmd":
        expected = expected / (x0_hat - real).abs().mean((1, 2, 3, 4), keepdim=True)
    if normaliser == "score":
        expected = expected * (1 - column) / column**2
    torch.testing.assert_close(x0_hat.grad, expected.detach() / x0_hat.numel(), atol=1e-7, rtol=1e-3)


def test_student_reads_a_noised_real_clip_and_draws_are_independent(build, batch_of):
    stage, batch = build("priming"), batch_of(8)
    stage.take_turn("student", batch)
    student, fake = stage.calls[:2]
    assert ((student.t >= 0.9) & (student.t <= 1)).all() and len(student.t.unique()) == 8
    eps = (student.x_t - interpolate(batch.x0, 0, student.t)) / student.t.reshape(-1, 1, 1, 1, 1)
    x0_hat = stage.roles["student"].x0(student.x_t, student.t, batch.condition).detach()
    again = (fake.x_t - interpolate(x0_hat, 0, fake.t)) / fake.t.reshape(-1, 1, 1, 1, 1)
    table = torch.corrcoef(torch.stack([eps, again, batch.x0]).flatten(1)) - torch.eye(3)
    assert 0.95 < eps.std() < 1.05 and 0.95 < again.std() < 1.05 and table.abs().max() < 0.06
    assert not torch.equal(student.t, fake.t)
    assert len(batch.draws.log) == len(set(batch.draws.log)) == 4


def test_the_two_players_draw_their_own_times_and_noise_for_x_t(build, batch_of):
    stage, seen = build("priming"), {}
    for player in ("fake_score", "student"):
        stage.take_turn(player, batch_of())
        seen[player] = stage.calls[1]
    assert not torch.equal(seen["fake_score"].t, seen["student"].t)


@BOTH
@pytest.mark.parametrize("player", ["fake_score", "student"])
def test_micro_batches_add_up_to_the_batch(build, batch_of, player, student):
    stage = build("priming", student)
    stage.take_turn(player, batch_of(4))
    whole = stage.gradients()[player]
    for first in (40, 42):
        stage.take_turn(player, batch_of(2, first))
    for name, gradient in stage.gradients()[player].items():
        torch.testing.assert_close(gradient / 2, whole[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_order_of_turns(build, ratio):
    method = build("priming", fake_per_student=ratio, student_steps=3).method
    order = [method.player_of(turn) for turn in range(method.turns)]
    assert order == (["fake_score"] * ratio + ["student"]) * 3
    assert {name: player.steps for name, player in method.players.items()} == {"fake_score": 3 * ratio, "student": 3}


def test_players_and_their_followers(build):
    stage = build("priming")
    student, fake = stage.method.players["student"], stage.method.players["fake_score"]
    assert fake.ema is None and student.ema.name == "ema" and student.ema.decay == 0.9
    assert student.ema.parameters.keys() == student.parameters.keys()
    mine, follower = stage.parameters("student"), stage.parameters("ema")
    assert all(student.parameters[k] is mine[k] and student.ema.parameters[k] is follower[k] for k in mine)
    assert stage.method.ema is stage.roles["ema"]


def test_scalars_are_what_they_say(build, batch_of):
    stage, batch = build("priming"), batch_of()
    outcome = stage.take_turn("student", batch)
    student, fake, *_ = stage.calls
    x0_hat = stage.roles["student"].x0(student.x_t, student.t, batch.condition).detach()
    torch.testing.assert_close(outcome.student_x0, x0_hat)
    teacher = stage.roles["teacher"].guided_x0(fake.x_t, fake.t, batch.condition, batch.null, 2.0)
    assert float(outcome.scalars["teacher_distance"]) == pytest.approx(float((x0_hat - teacher).abs().mean()), rel=1e-4)
    values = [outcome.student_x0, *outcome.scalars.values()]
    assert not any(v.requires_grad for v in values) and outcome.loss.requires_grad


@pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
def test_the_whole_game_on_gaussians(build, gaussian, affine, normaliser):
    """Fake score and student learn against each other; the student ends at the teacher's mean and spread."""
    law = TimeLaw(low=0.1, high=0.9)
    settings = dataclasses.replace(
        build("priming").method.settings,
        student_steps=250,
        fake_per_student=3,
        normaliser=normaliser,
        score_time=law,
        fake_time=law,
    )
    teacher, student, fake, ema = gaussian(1.0, 0.5), affine(-0.5, 1.2), gaussian(1.0, 0.5), affine(-0.5, 1.2)
    method = Priming(settings, teacher=teacher, student=student, fake_score=fake, ema=ema)
    rates = {"fake_score": 0.05, "student": 0.02}
    optimisers = {name: torch.optim.Adam(p.parameters.values(), rates[name]) for name, p in method.players.items()}
    size, nothing = 24, Condition(torch.zeros(24, 1, 1))
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
    draws = Draws(1, range(1000))
    samples = method.generate(Batch(1.0 + 0.5 * draws.normal("data", (1, 2, 4, 4)), nothing, None, draws)).detach()
    assert float(samples.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(samples.std()) == pytest.approx(0.5, rel=0.08)
    assert float(fake.std.detach()) == pytest.approx(0.5, rel=0.08)
    assert (float(teacher.mean.detach()), float(teacher.std.detach())) == pytest.approx((1.0, 0.5))
