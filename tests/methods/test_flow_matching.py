from __future__ import annotations

import dataclasses

import pytest
import torch

from vpae.conditioning import Condition
from vpae.draws import Draws
from vpae.flow import TimeLaw
from vpae.methods.base import Batch
from vpae.methods.flow_matching import FlowMatching
from vpae.recipe import FlowMatching as Settings
from vpae.recipe import Optimiser

ADAM = Optimiser(1e-3, (0.9, 0.99), 1e-8, 0.0, 0, "constant", None)
SETTINGS = Settings(steps=10, time=TimeLaw(), text_dropout=0.25, ema_decay=0.9, optimiser=ADAM)


@pytest.fixture
def stage(build):
    """Student and EMA of their own weights, put to the making of a teacher."""
    stage = build("priming")
    stage.method = FlowMatching(SETTINGS, student=stage.roles["student"], ema=stage.roles["ema"])
    return stage


def test_gradient_table(stage):
    stage.take_turn("student")
    for role, gradients in stage.gradients().items():
        missing = {name for name, g in gradients.items() if g is None}
        assert missing == (set() if role == "student" else set(gradients)), role
    assert [(c.role, c.grad) for c in stage.calls] == [("student", True)]


def test_loss_is_the_squared_error_of_the_velocity(stage, batch_of):
    batch = batch_of()
    outcome = stage.take_turn("student", batch)
    (call,) = stage.calls
    t = call.t.reshape(-1, 1, 1, 1, 1)
    noise = (call.x_t - (1 - t) * batch.x0) / t
    assert 0.8 < noise.std() < 1.2
    velocity = stage.roles["student"].velocity(call.x_t, call.t, call.condition).detach()
    assert float(outcome.loss.detach()) == pytest.approx(float((noise - batch.x0 - velocity).square().mean()), rel=1e-3)


def test_the_prompt_is_dropped_now_and_then_and_the_picture_never(stage, batch_of):
    batch = batch_of(400)
    seen = []

    class Student:
        def velocity(self, x_t, t, condition):
            seen.append(condition)
            return x_t.requires_grad_()

    stage.method.student = Student()
    stage.method.loss("student", batch)
    (condition,) = seen
    dropped = (condition.text == batch.null.text).flatten(1).all(1)
    kept = (condition.text == batch.condition.text).flatten(1).all(1)
    assert (dropped ^ kept).all() and 0.17 < dropped.float().mean() < 0.33
    assert condition.image is batch.condition.image and condition.latent is batch.condition.latent
    assert len(set(batch.draws.log)) == len(batch.draws.log) == 3


def test_turns_and_follower(stage):
    player = stage.method.players["student"]
    assert stage.method.turns == player.steps == 10 and stage.method.player_of(3) == "student"
    assert player.ema.decay == 0.9 and player.ema.parameters.keys() == player.parameters.keys()
    assert stage.method.ema is stage.roles["ema"]


def test_a_gaussian_model_learns_mean_and_spread_of_its_data(gaussian):
    class Model(gaussian):
        def velocity(self, x_t, t, condition):
            return super().velocity(x_t, t.clamp_min(1e-3), condition)

    model = Model(-1.0, 2.0)
    method = FlowMatching(dataclasses.replace(SETTINGS, text_dropout=0.0), student=model, ema=Model(-1.0, 2.0))
    optimiser = torch.optim.Adam(model.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, 300)
    for turn in range(300):
        draws = Draws(0, range(16 * turn, 16 * turn + 16))
        x0 = 1.0 + 0.5 * draws.normal("data", (1, 2, 4, 4))
        condition = Condition(torch.zeros(16, 1, 1))  # which the model does not read
        optimiser.zero_grad()
        method.loss("student", Batch(x0, condition, condition, draws)).loss.backward()
        optimiser.step()
        schedule.step()
    assert float(model.mean.detach()) == pytest.approx(1.0, abs=0.03)
    assert float(model.std.detach()) == pytest.approx(0.5, rel=0.08)
