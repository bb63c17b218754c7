"""A first latent frame that is given in its place (Wan2.2-TI2V): nobody looks at another one, and no loss is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from vpae import losses
from vpae.conditioning import Condition
from vpae.draws import Draws
from vpae.flow import interpolate
from vpae.methods.base import Batch
from vpae.methods.flow_matching import FlowMatching
from vpae.recipe import FlowMatching as FlowSettings
from vpae.recipe import TimeLaw


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(first_frame=None):
    """Two clips of three latent frames; ``first_frame`` stands in frame 0 of x0 instead of what is given."""
    condition = Condition(normal(2, 6, 128, seed=1), latent=normal(2, 8, 1, 4, 4, seed=3))
    x0 = condition.hold(normal(2, 8, 3, 4, 4, seed=4))
    if first_frame is not None:
        x0[:, :, 0] = first_frame
    return Batch(x0, condition, condition.null(normal(1, 2, 128, seed=9)), Draws(7, range(40, 42)))


@pytest.fixture
def stage_of(build, micro_recipe, micro_ti2v):
    micro_recipe["teacher"]["path"] = str(micro_ti2v)
    return build


@pytest.fixture
def role(stage_of):
    return stage_of("priming").roles["student"]


def test_the_condition_holds_stills_and_times_what_is_given():
    condition, x = make_batch().condition, normal(2, 8, 3, 4, 4, seed=5)
    assert condition.given == 1
    held = condition.hold(x)
    assert torch.equal(held[:, :, :1], condition.latent) and torch.equal(held[:, :, 1:], x[:, :, 1:])
    assert torch.equal(condition.pack(x), held) and torch.equal(condition.free(x), x[:, :, 1:])
    still = condition.still(x)
    assert not still[:, :, 0].any() and torch.equal(still[:, :, 1:], x[:, :, 1:])
    times = condition.times(torch.tensor([0.25, 1.0]), (3, 2, 2))
    assert times.tolist() == [[0.0] * 4 + [0.25] * 8, [0.0] * 4 + [1.0] * 8]
    assert condition.null(normal(1, 2, 128)).given == 1 and condition.widened(9).given == 1


def test_other_models_are_given_nothing_in_its_place():
    x, t = normal(2, 8, 3, 4, 4), torch.tensor([0.25, 1.0])
    for condition in (
        Condition(normal(2, 6, 128)),
        Condition(normal(2, 6, 128), latent=x, mask=normal(2, 4, 3, 4, 4)),
    ):
        assert condition.given == 0 and condition.hold(x) is x and condition.still(x) is x
        assert torch.equal(condition.free(x), x) and condition.times(t, (3, 2, 2)) is t


def test_velocity_and_clean_prediction_of_the_given_frame(role):
    batch, t = make_batch(), torch.tensor([0.3, 1.0])
    x_t = normal(2, 8, 3, 4, 4, seed=6).requires_grad_()
    velocity = role.velocity(x_t, t, batch.condition)
    assert not velocity[:, :, 0].any() and velocity[:, :, 1:].abs().min() > 0
    for x0 in (
        role.x0(x_t, t, batch.condition),
        role.guided_x0(x_t, t, batch.condition, batch.null, 3.0),
    ):
        assert torch.equal(x0[:, :, :1], batch.condition.latent)
    x0 = role.x0(x_t, t, batch.condition)
    expected = x_t[:, :, 1:] - t.reshape(-1, 1, 1, 1, 1) * velocity[:, :, 1:]
    torch.testing.assert_close(x0[:, :, 1:], expected, atol=0, rtol=0)
    x0.square().sum().backward()
    assert not x_t.grad[:, :, 0].any() and x_t.grad[:, :, 1:].abs().min() > 0
    other = x_t.detach().clone()
    other[:, :, 0] = 99.0
    assert torch.equal(role.x0(other, t, batch.condition), x0)


def test_the_given_frame_is_looked_at(role):
    """It stands clean among the others, and they depend on it."""
    batch, x_t = make_batch(), normal(2, 8, 3, 4, 4, seed=6)
    another = Condition(batch.condition.text, latent=batch.condition.latent + 1)
    a, b = (role.velocity(x_t, torch.ones(2), c)[:, :, 1:] for c in (batch.condition, another))
    assert float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("phase", "player"),
    [("priming", "fake_score"), ("priming", "student"), ("equilibrium", "head"), ("equilibrium", "student")],
)
@pytest.mark.parametrize("student", ["full", "lora"])
def test_no_turn_learns_from_what_stands_there(stage_of, phase, player, student):
    """Clips whose frame 0 is another's make the same loss and the same gradients, in every network."""
    stage, results = stage_of(phase, student=student), []
    if phase == "equilibrium":
        stage.method.settings.r1.__dict__["on"] = "both"
    for first_frame in (None, 50.0):
        outcome = stage.take_turn(player, make_batch(first_frame))
        results.append((outcome, stage.gradients()))
        if outcome.student_x0 is not None:
            assert torch.equal(outcome.student_x0[:, :, :1], make_batch().condition.latent)
    (one, gradients), (other, others) = results
    torch.testing.assert_close(one.loss, other.loss, atol=0, rtol=0)
    mine = [g for g in gradients[player].values() if g is not None]
    assert mine and all(g.isfinite().all() for g in mine) and any(g.any() for g in mine)
    for name, of in gradients.items():
        for key, gradient in of.items():
            assert (gradient is None) == (others[name][key] is None)
            assert gradient is None or torch.equal(gradient, others[name][key]), (name, key)


def test_losses_are_means_over_the_frames_that_are_made(stage_of):
    stage, batch = stage_of("priming"), make_batch()
    fake = stage.take_turn("fake_score", batch)
    settings = stage.method.settings
    with torch.no_grad():
        x0_hat = stage.method.generate(batch)
        t = settings.fake_time.quantile(batch.draws.uniform("fake time"))
        noise = batch.draws.normal_like("fake noise", x0_hat)
        velocity = stage.roles["fake_score"].velocity(interpolate(x0_hat, noise, t), t, batch.condition)
        expected = (noise - x0_hat - velocity)[:, :, 1:].square().mean()
    torch.testing.assert_close(fake.loss, expected)
    outcome = stage.take_turn("student", batch)
    with torch.no_grad():
        t = settings.score_time.quantile(batch.draws.uniform("score time"))
        x_t = interpolate(x0_hat, batch.draws.normal_like("score noise", x0_hat), t)
        fake = stage.roles["fake_score"].x0(x_t, t, batch.condition)[:, :, 1:]
        real = stage.roles["teacher"].guided_x0(x_t, t, batch.condition, batch.null, settings.guidance_scale)[:, :, 1:]
        gradient = losses.vsd_gradient(x0_hat[:, :, 1:], real, fake, settings.normaliser, t)
    torch.testing.assert_close(outcome.loss, 0.5 * gradient.square().mean())


@pytest.mark.parametrize(
    ("name", "player", "scalar"),
    [("dmd2", "critic", "flow_matching"), ("dmd2", "student", "vsd"), ("lcm", "student", "consistency")]
    + [("mse", "student", "regression")],
)
def test_so_are_those_of_the_peers(build_peers, stage_of, name, player, scalar, monkeypatch):
    """Each of them is told of those frames alone, and frame 0 of the data changes none."""
    stage, batch, shown = build_peers(name), make_batch(), []
    if name == "mse":
        batch = replace(batch, noise=batch.draws.normal_like("a sample's noise", batch.x0))
    for loss in ("flow_matching", "vsd_gradient", "vsd", "pseudo_huber", "regression"):
        real = getattr(losses, loss)
        monkeypatch.setattr(losses, loss, lambda *a, real=real: shown.extend(a) or real(*a))
    values = []
    for x0 in (batch.x0, torch.cat([batch.x0[:, :, :1] + 50, batch.x0[:, :, 1:]], dim=2)):
        values.append(float(stage.take_turn(player, replace(batch, x0=x0)).scalars[scalar]))
    assert values[0] == values[1] > 0
    clips = [x for x in shown if isinstance(x, torch.Tensor) and x.dim() == 5]
    assert len(clips) >= 4 and {x.shape[2] for x in clips} == {2}


def test_conditional_sds_is_a_mean_over_the_frames_that_are_made(stage_of):
    stage, batch = stage_of("equilibrium"), make_batch()
    x0_hat = batch.condition.hold(normal(2, 8, 3, 4, 4, seed=8))
    settings = stage.method.settings.sds
    t = settings.time.quantile(batch.draws.uniform("sds time"))
    with torch.no_grad():
        x_t = interpolate(x0_hat, batch.draws.normal_like("sds noise", x0_hat), t)
        target = stage.roles["teacher"].guided_x0(x_t, t, batch.condition, batch.null, settings.guidance_scale)
    expected = F.mse_loss(x0_hat[:, :, 1:], target[:, :, 1:])
    torch.testing.assert_close(stage.method._conditional_sds(x0_hat, batch), expected)


def test_flow_matching_of_a_right_velocity_costs_nothing(role):
    """Frame 0, whose velocity is 0 whatever its noise, has no part in it."""

    class Right:
        def velocity(self, x_t, t, condition):
            noise = batch.draws.normal_like("noise", batch.x0)
            return condition.still(noise - batch.x0)

        def named_parameters(self):
            return []

    batch = make_batch()
    settings = FlowSettings(2, TimeLaw(low=0.1, high=0.9), 0.0, 0.9, None)
    method = FlowMatching(settings, student=Right(), ema=Right())
    assert float(method.loss("student", batch).loss) == 0
    method = FlowMatching(settings, student=role, ema=role)
    costs = [float(method.loss("student", make_batch(first_frame)).loss) for first_frame in (None, 50.0)]
    assert costs[0] > 0.1 and costs[0] == costs[1]
