"""The losses, as pure functions over tensors (torch alone: no network, recipe or rank reaches this file).

Latents are ``[B, C, T, H, W]``, logits ``[B]``. Every loss is a mean over the batch, so that averaging gradients over
equal micro-batches or ranks gives the gradient of the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vpae.flow import velocity_target


def per_sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch, ``[B]``."""
    return x.flatten(1).mean(1)


def flow_matching(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """``|| (noise - x0) - v ||^2`` per element: the fake score's loss in V-PAE phase I, the teacher's in training."""
    return F.mse_loss(velocity.float(), velocity_target(x0, noise).float())


def vsd_gradient(
    x0_hat: Tensor, x0_real: Tensor, x0_fake: Tensor, normaliser: str = "dmd", t: Tensor | None = None
) -> Tensor:
    """Gradient of KL(student || teacher) with respect to the student's sample, up to a positive weight.

    V-PAE phase I descends ``-(s_real - s_fake)``; with ``s = -(x_t - (1 - t) x0) / t^2`` that is
    ``(1 - t) / t^2 (x0_fake - x0_real)``.

    Args:
        x0_hat: the student's sample (only its value is used).
        x0_real: the guided teacher's clean prediction at x_t.
        x0_fake: the fake score's clean prediction at the same x_t.
        normaliser: ``dmd`` divides by the per-sample ``mean |x0_hat - x0_real|`` (DMD, arXiv 2311.18828, which V-PAE
            does not mention); ``score`` keeps the factor ``(1 - t) / t^2``; ``none`` keeps the plain difference.
        t: times ``[B]``, needed by ``score``.
    """
    gradient = (x0_fake - x0_real).detach().float()
    rows = (-1, *([1] * (gradient.ndim - 1)))
    if normaliser == "dmd":
        scale = per_sample_mean((x0_hat - x0_real).detach().float().abs())
        return gradient / scale.clamp_min(1e-6).reshape(rows)
    if normaliser == "score":
        return gradient * ((1 - t) / t.square()).float().reshape(rows)
    if normaliser == "none":
        return gradient
    raise ValueError(f"normaliser of the VSD gradient is dmd, score or none, not {normaliser!r}")


def vsd(x0_hat: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x0_hat`` is ``gradient`` over the number of elements."""
    x0_hat = x0_hat.float()
    return 0.5 * F.mse_loss(x0_hat, (x0_hat - gradient).detach())


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """``E[max(0, 1 - D(x))] + E[max(0, 1 + D(x0_hat))]`` (V-PAE, L_UAE-D)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """``-E[D(x0_hat)]`` (V-PAE, L_UAE-G)."""
    return -fake.mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """``-log sigmoid D(x) - log(1 - sigmoid D(x0_hat))``: the logistic alternative (APT, arXiv 2501.08316)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def softplus_generator(fake: Tensor) -> Tensor:
    """``-log sigmoid D(x0_hat)``, non-saturating."""
    return F.softplus(-fake).mean()


def hinge_margin_generator(fake: Tensor) -> Tensor:
    """``E[max(0, 1 - D(x0_hat))]``: a hinge on the generator's side too (PCM, arXiv 2405.18407, its code)."""
    return F.relu(1 - fake).mean()


ADVERSARIAL = {
    "hinge": (hinge_discriminator, hinge_generator),
    "softplus": (softplus_discriminator, softplus_generator),
}


def pseudo_huber(x: Tensor, target: Tensor, c: float) -> Tensor:
    """``mean(sqrt((x - target)^2 + c^2) - c)`` (LCM, PCM): squared for differences below c, absolute above.

    Args:
        target: detached here.
    """
    error = x.float() - target.detach().float()
    return ((error.square() + c**2).sqrt() - c).mean()


def regression(x: Tensor, target: Tensor) -> Tensor:
    """``|| x - sg target ||^2`` per element."""
    return F.mse_loss(x.float(), target.detach().float())


def spatial_perturbation(noise: Tensor, sigma: float) -> Tensor:
    """Noise that is constant in time: sigma times the first frame of ``noise [B, C, T, H, W]``, ``[B, C, 1, H, W]``."""
    return sigma * noise[:, :, :1]


def temporal_perturbation(noise: Tensor, sigma: float) -> Tensor:
    """Noise that is constant over space and varies per frame: ``[B, C, T, 1, 1]``."""
    return sigma * noise[:, :, :, :1, :1]


def difference_perturbation(noise: Tensor, sigma: float) -> Tensor:
    """Noise of std sigma on every difference of neighbouring frames, none on frame 0: ``[B, C, T, H, W]``."""
    steps = noise.clone()
    steps[:, :, 0] = 0
    return sigma * steps.cumsum(2)


def finite_difference_r1(clean: Tensor, perturbed: Tensor) -> Tensor:
    """``E |D(x) - D(x + n)|^2`` (APT's approximated R1); V-PAE's ST-R1 is the sum over a spatial and a temporal ``n``.

    For a linear head ``D(x) = <w, x>`` its expectation is ``sigma_s^2 sum_chw (sum_t w)^2`` for the spatial term and
    ``sigma_t^2 sum_ct (sum_hw w)^2`` for the temporal one; ``sigma_t^2 sum_chw sum_(k>0) (sum_(t>=k) w)^2`` where the
    temporal one is on differences of frames.

    Under bf16 the spatial term at sigma 0.01 is mostly rounding: seven times too large, its gradient at a cosine of
    0.36 to 0.59 with the fp32 one; the temporal term at sigma 0.1 keeps 0.98
    (``benchmarks/results/numerics_cpu.json``).
    """
    return (clean - perturbed).square().mean()


def conditional_sds(x0_hat: Tensor, x0_teacher: Tensor, first_frame_weight: float = 1.0) -> Tensor:
    """``|| x0_hat - sg f_real(sg x_t', t') ||^2`` per element (V-PAE, L_C-SDS).

    Args:
        x0_hat: the student's sample; the gradient reaches it here and nowhere else.
        x0_teacher: the frozen teacher's clean prediction from the re-noised sample.
        first_frame_weight: weight of the first latent frame relative to the others (the paper does not weight).
    """
    error = (x0_hat.float() - x0_teacher.detach().float()).square()
    if first_frame_weight != 1.0:
        weight = torch.ones(error.shape[2], device=error.device)
        weight[0] = first_frame_weight
        error = error * (weight / weight.mean()).reshape(1, 1, -1, 1, 1)
    return error.mean()
