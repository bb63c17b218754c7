from __future__ import annotations

import math

import pytest
import torch

from vpae import losses
from vpae.flow import expand_time, interpolate

TEACHER_MEAN, TEACHER_STD = 1.0, 0.5


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def posterior_mean(x_t, t, mean, std):
    """E[x0 | x_t] for x0 ~ N(mean, std^2)."""
    t = expand_time(t, x_t)
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


class TestVsdOnGaussians:
    """A student N(mean, std^2) against a teacher N(1, 0.5^2), both scores known exactly."""

    def distil(self, normaliser, steps=600, sign=1):
        mean = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
        log_std = torch.tensor(math.log(1.2), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([mean, log_std], lr=0.03)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            z, eps = torch.randn(2, 32, 2, 2, 4, 4, generator=generator, dtype=torch.float64)
            t = 0.05 + 0.9 * torch.rand(32, generator=generator, dtype=torch.float64)
            x0_hat = mean + log_std.exp() * z
            x_t = interpolate(x0_hat.detach(), eps, t)
            real = posterior_mean(x_t, t, TEACHER_MEAN, TEACHER_STD)
            fake = posterior_mean(x_t, t, mean.detach(), log_std.exp().detach())
            gradient = losses.vsd_gradient(x0_hat, real, fake, normaliser, t)
            optimiser.zero_grad()
            losses.vsd(x0_hat, sign * gradient).backward()
            optimiser.step()
            schedule.step()
        return float(mean.detach()), float(log_std.detach().exp())

    @pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
    def test_finds_the_teachers_mean_and_spread(self, normaliser):
        mean, std = self.distil(normaliser)
        assert mean == pytest.approx(TEACHER_MEAN, abs=0.02)
        assert std == pytest.approx(TEACHER_STD, rel=0.04)

    @pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
    def test_walks_away_under_the_other_sign(self, normaliser):
        mean, std = self.distil(normaliser, steps=100, sign=-1)
        assert mean < -1 and std > 1.3


class TestVsd:
    x0_hat, real, fake = normal(3, 2, 2, 2, 2), normal(3, 2, 2, 2, 2, seed=1), normal(3, 2, 2, 2, 2, seed=2)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)

    def test_score_normaliser_is_the_difference_of_the_scores(self):
        x_t = normal(3, 2, 2, 2, 2, seed=3).requires_grad_()
        t = expand_time(self.t, x_t)

        def score(mean, std):
            density = torch.distributions.Normal((1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2).sqrt())
            return torch.autograd.grad(density.log_prob(x_t).sum(), x_t)[0]

        real, fake = (posterior_mean(x_t, self.t, mean, std) for mean, std in ((1.0, 0.5), (-0.5, 1.2)))
        gradient = losses.vsd_gradient(self.x0_hat, real, fake, "score", self.t)
        expected = -(score(1.0, 0.5) - score(-0.5, 1.2))
        torch.testing.assert_close(gradient, expected.float(), atol=1e-4, rtol=1e-4)

    def test_dmd_normaliser_is_the_samples_own_distance_to_the_teacher(self):
        gradient = losses.vsd_gradient(self.x0_hat, self.real, self.fake, "dmd")
        for i in range(3):
            distance = (self.x0_hat[i] - self.real[i]).abs().mean()
            torch.testing.assert_close(gradient[i], ((self.fake[i] - self.real[i]) / distance).float())

    def test_dmd_normaliser_survives_a_student_that_equals_the_teacher(self):
        assert losses.vsd_gradient(self.real, self.real, self.fake, "dmd").isfinite().all()

    def test_no_normaliser_leaves_the_difference(self):
        torch.testing.assert_close(
            losses.vsd_gradient(self.x0_hat, self.real, self.fake, "none"), (self.fake - self.real).float()
        )

    def test_unknown_normaliser_is_refused(self):
        with pytest.raises(ValueError, match="dmd, score or none"):
            losses.vsd_gradient(self.x0_hat, self.real, self.fake, "dmb")

    @pytest.mark.parametrize("normaliser", ["dmd", "score", "none"])
    def test_gradient_reaches_the_sample_alone_and_is_the_given_one(self, normaliser):
        x0_hat, real, fake = (x.clone().requires_grad_() for x in (self.x0_hat, self.real, self.fake))
        gradient = losses.vsd_gradient(x0_hat, real, fake, normaliser, self.t)
        assert not gradient.requires_grad
        losses.vsd(x0_hat, gradient).backward()
        torch.testing.assert_close(x0_hat.grad, gradient.double() / gradient.numel(), atol=1e-7, rtol=1e-4)
        assert real.grad is None and fake.grad is None

    def test_value_is_half_the_mean_square_of_the_gradient(self):
        gradient = self.fake - self.real
        assert float(losses.vsd(self.x0_hat, gradient)) == pytest.approx(float(0.5 * gradient.square().mean()))


class TestAdversarial:
    def test_hinge_values(self):
        real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
        assert float(losses.hinge_discriminator(real, fake)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3)
        assert float(losses.hinge_generator(fake)) == pytest.approx(2.5 / 3)

    def test_hinge_discriminator_saturates_beyond_the_margin(self):
        real = torch.tensor([1.5, 0.9, -4.0], requires_grad=True)
        fake = torch.tensor([-1.5, -0.9, 4.0], requires_grad=True)
        losses.hinge_discriminator(real, fake).backward()
        assert real.grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3])
        assert fake.grad.tolist() == pytest.approx([0, 1 / 3, 1 / 3])
        assert real.grad[0] == 0 and fake.grad[0] == 0

    def test_hinge_generator_never_saturates(self):
        fake = torch.tensor([-50.0, 0.0, 50.0], requires_grad=True)
        losses.hinge_generator(fake).backward()
        assert fake.grad.tolist() == pytest.approx([-1 / 3] * 3)

    def test_softplus_is_the_logistic_loss(self):
        real, fake = normal(5, seed=1), normal(5, seed=2)
        discriminator = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
        torch.testing.assert_close(losses.softplus_discriminator(real, fake), discriminator)
        torch.testing.assert_close(losses.softplus_generator(fake), -fake.sigmoid().log().mean())

    def test_softplus_generator_pushes_a_rejected_sample_and_leaves_an_accepted_one(self):
        fake = torch.tensor([-30.0, 30.0], requires_grad=True)
        losses.softplus_generator(fake).backward()
        assert fake.grad.tolist() == pytest.approx([-0.5, 0])

    @pytest.mark.parametrize("kind", ["hinge", "softplus"])
    def test_both_sides_pull_the_logits_apart_and_the_generator_wants_them_high(self, kind):
        discriminator, generator = losses.ADVERSARIAL[kind]
        real, fake, mine = (torch.zeros(2, requires_grad=True) for _ in range(3))
        (discriminator(real, fake) + generator(mine)).backward()
        assert (real.grad < 0).all() and (fake.grad > 0).all() and (mine.grad < 0).all()


class TestStR1:
    sigma_s, sigma_t, count = 0.3, 0.7, 4000
    w = normal(3, 4, 2, 3, seed=5)  # of the linear head D(x) = <w, x>; C, T, H, W

    def head(self, x):
        return (x * self.w).flatten(1).sum(1)

    def spatial(self):
        return losses.spatial_perturbation(normal(self.count, *self.w.shape, seed=1), self.sigma_s)

    def temporal(self):
        return losses.temporal_perturbation(normal(self.count, *self.w.shape, seed=2), self.sigma_t)

    def test_spatial_noise_is_constant_in_time_and_temporal_noise_in_space(self):
        spatial, temporal = (n.expand(self.count, *self.w.shape) for n in (self.spatial(), self.temporal()))
        assert (spatial == spatial[:, :, :1]).all() and (temporal == temporal[:, :, :, :1, :1]).all()
        assert spatial.std((0, 2)).mean() == pytest.approx(self.sigma_s, rel=0.01)
        assert temporal.std((0, 3, 4)).mean() == pytest.approx(self.sigma_t, rel=0.01)
        for noise, free in ((spatial[:, :, 0], 3 * 2 * 3), (temporal[..., 0, 0], 3 * 4)):
            correlation = torch.corrcoef(noise.flatten(1).T)  # every free number is its own draw
            assert len(correlation) == free and (correlation - torch.eye(free)).abs().max() < 0.08

    def test_closed_form_for_a_linear_head(self):
        x = normal(self.count, *self.w.shape)
        spatial = self.sigma_s**2 * self.w.sum(1).square().sum()
        temporal = self.sigma_t**2 * self.w.sum((2, 3)).square().sum()
        cases = [
            (self.spatial(), spatial),
            (self.temporal(), temporal),
            (self.spatial() + self.temporal(), spatial + temporal),  # independent: the joint form has the same mean
        ]
        for noise, expected in cases:
            r1 = losses.finite_difference_r1(self.head(x), self.head(x + noise))
            # <w, n> is normal, so its square has a standard deviation of sqrt(2) times its mean
            assert r1 == pytest.approx(float(expected), rel=4 * math.sqrt(2 / self.count))

    def test_gradient_reaches_both_sides_of_the_difference(self):
        clean, perturbed = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 3.0], requires_grad=True)
        losses.finite_difference_r1(clean, perturbed).backward()
        assert clean.grad.tolist() == pytest.approx([0.5, -1.0]) and perturbed.grad.tolist() == pytest.approx(
            [-0.5, 1.0]
        )


class TestConditionalSds:
    x0_hat, target = normal(2, 3, 4, 2, 2), normal(2, 3, 4, 2, 2, seed=1)

    def test_gradient_reaches_the_sample_alone_and_is_analytic(self):
        x0_hat, target = self.x0_hat.clone().requires_grad_(), self.target.clone().requires_grad_()
        losses.conditional_sds(x0_hat, target).backward()
        torch.testing.assert_close(x0_hat.grad, 2 * (x0_hat - target).detach() / x0_hat.numel(), atol=1e-7, rtol=1e-5)
        assert target.grad is None

    def test_weight_of_the_first_frame_is_relative(self):
        x0_hat = self.x0_hat.clone().requires_grad_()
        losses.conditional_sds(x0_hat, self.target, first_frame_weight=3.0).backward()
        plain = 2 * (self.x0_hat - self.target) / self.x0_hat.numel()
        weight = torch.tensor([3.0, 1, 1, 1]) / 1.5  # mean 1: lambda keeps its meaning
        torch.testing.assert_close(x0_hat.grad, plain * weight.reshape(1, 1, -1, 1, 1), atol=1e-7, rtol=1e-5)


def test_flow_matching_target_is_noise_minus_clean():
    x0, noise = normal(2, 3, 2, 2, 2), normal(2, 3, 2, 2, 2, seed=1)
    assert losses.flow_matching(noise - x0, x0, noise) == 0
    velocity = normal(2, 3, 2, 2, 2, seed=2).requires_grad_()
    losses.flow_matching(velocity, x0, noise).backward()
    expected = 2 * (velocity.detach() - (noise - x0)) / x0.numel()
    torch.testing.assert_close(velocity.grad, expected, atol=1e-7, rtol=1e-5)


def test_every_loss_averages_over_micro_batches_to_that_of_the_batch():
    a, b, c = (normal(6, 3, 4, 2, 2, seed=s) for s in (0, 1, 2))
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    logits = [x.flatten(1).mean(1) for x in (a, b)]
    functions = [
        lambda i: losses.flow_matching(a[i], b[i], c[i]),
        lambda i: losses.vsd(a[i], losses.vsd_gradient(a[i], b[i], c[i], "dmd")),
        lambda i: losses.vsd(a[i], losses.vsd_gradient(a[i], b[i], c[i], "score", t[i])),
        lambda i: losses.conditional_sds(a[i], b[i], 3.0),
        lambda i: losses.finite_difference_r1(logits[0][i], logits[1][i]),
        lambda i: losses.hinge_discriminator(logits[0][i], logits[1][i]) + losses.hinge_generator(logits[1][i]),
        lambda i: losses.softplus_discriminator(logits[0][i], logits[1][i]) + losses.softplus_generator(logits[1][i]),
    ]
    for function in functions:
        parts = torch.stack([function(slice(k, k + 2)) for k in (0, 2, 4)]).mean()
        torch.testing.assert_close(parts, function(slice(0, 6)))


def test_losses_are_taken_in_fp32_whatever_the_networks_speak():
    x = normal(2, 3, 2, 2, 2).bfloat16()
    for loss in (
        losses.flow_matching(x, x, x),
        losses.vsd(x, losses.vsd_gradient(x, x + 1, x)),
        losses.conditional_sds(x, x + 1),
    ):
        assert loss.dtype == torch.float32
