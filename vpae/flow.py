"""Rectified-flow algebra: paths, read-outs, laws of time, samplers.

Convention (V-PAE, arXiv 2508.21019; Wan2.1): t = 0 is clean, t = 1 is pure noise,
``x_t = (1 - t) x0 + t noise`` and the network predicts the velocity ``noise - x0``.
Times are ``[B]`` and broadcast over latents ``[B, C, T, H, W]``. Imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOUR_STEP_TIMES = (1.0, 0.9375, 5 / 6, 0.625)  # uniform {1, .75, .5, .25} under shift 5


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Reshape times ``[B]`` so that they broadcast over ``like`` ``[B, ...]``."""
    return t.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point of the straight path at time t: ``(1 - t) x0 + t noise``."""
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the straight path, ``dx_t / dt``."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Read-out of the clean prediction, ``f(x_t, t) = x_t - t v`` (V-PAE's one-step generator at t = 1)."""
    return x_t - expand_time(t, x_t) * velocity


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, ``uncond + w (cond - uncond)``: w = 1 is the conditional prediction."""
    return unconditional + guidance_scale * (conditional - unconditional)


def shift_time(u: Tensor | float, shift: float) -> Tensor | float:
    """Warp times towards noise: ``s u / (1 + (s - 1) u)``; shift 1 is the identity."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(t: Tensor | float, shift: float) -> Tensor | float:
    """Inverse of :func:`shift_time`."""
    return t / (shift - (shift - 1) * t)


@dataclass(frozen=True)
class TimeLaw:
    """A law for t on ``[low, high]``, given by its quantile function.

    Attributes:
        kind: ``uniform``, or ``logit_normal`` with ``mean`` and ``std`` in logit space.
        low: smallest time drawn.
        high: largest time drawn.
        shift: warp applied to the base law; the result is conditioned on [low, high], so no mass piles up at the ends.
        mean: location of the logit-normal law.
        std: scale of the logit-normal law.
    """

    kind: str = "uniform"
    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(f"kind of a time law is uniform or logit_normal, not {self.kind!r}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"a time law needs 0 <= low <= high <= 1, not low {self.low} and high {self.high}")
        if self.shift <= 0 or self.std <= 0:
            raise ValueError(f"shift and std of a time law are positive, not {self.shift} and {self.std}")

    def _base_cdf(self, u: float) -> float:
        if self.kind == "uniform":
            return u
        if u <= 0 or u >= 1:
            return float(u >= 1)
        z = (math.log(u / (1 - u)) - self.mean) / self.std
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def quantile(self, q: Tensor) -> Tensor:
        """Map uniform draws ``[B]`` in [0, 1) to times ``[B]``."""
        lo = self._base_cdf(float(unshift_time(self.low, self.shift)))
        hi = self._base_cdf(float(unshift_time(self.high, self.shift)))
        q = (lo + (hi - lo) * q.double()).clamp(0, 1)
        if self.kind == "logit_normal":
            q = torch.sigmoid(self.mean + self.std * torch.special.ndtri(q))
        return shift_time(q, self.shift).clamp(self.low, self.high).to(torch.float32)


def euler_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate the flow from noise along decreasing ``sigmas`` (the last one 0).

    Args:
        velocity: ``(x_t, t [B]) -> velocity``; guidance, if any, is inside.
        noise: ``[B, C, T, H, W]``.
        sigmas: N + 1 times for N evaluations, starting at 1.
    """
    x = noise
    for here, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (after - here) * velocity(x, x.new_full((len(x),), here))
    return x


def renoise_sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    times: Sequence[float] = (1.0,),
    draw: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Sample with a one-step student: read out x0, re-noise it to the next time, read out again.

    With ``times = (1,)`` this is the 1-NFE generator ``f(noise, 1)``; with :data:`FOUR_STEP_TIMES` the same weights
    make a 4-NFE sample (V-PAE does not state its multi-step rule; this is the consistency-style loop).

    Args:
        velocity: ``(x_t, t [B]) -> velocity``.
        noise: ``[B, C, T, H, W]``.
        times: decreasing, starting at 1.
        draw: ``i -> fresh noise`` for the i-th re-noising (i from 1); needed when there is more than one time.
    """
    x = noise
    for i, now in enumerate(times):
        t = x.new_full((len(x),), now)
        if i:
            x = interpolate(x, draw(i), t)
        x = x0_from_velocity(x, velocity(x, t), t)
    return x
