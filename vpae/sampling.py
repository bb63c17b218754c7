"""Latents from a role: the teacher's Euler sampler with guidance, the student's one-step and re-noising rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from vpae.conditioning import Condition
from vpae.draws import Draws
from vpae.errors import UserError
from vpae.flow import FOUR_STEP_TIMES, euler_sample, renoise_sample
from vpae.roles import Role

RENOISE_TIMES = {1: (1.0,), 4: FOUR_STEP_TIMES}


def euler_scheduler(scheduler: SchedulerMixin) -> FlowMatchEulerDiscreteScheduler:
    """The flow-matching Euler scheduler of the same shift.

    Wan2.1's released folders carry UniPC, which calls its shift ``flow_shift`` and starts just below sigma = 1; a
    one-step student needs the grid [1, 0] exactly.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    return FlowMatchEulerDiscreteScheduler(shift=float(scheduler.config.get("flow_shift") or 1.0))


def euler_sigmas(scheduler: SchedulerMixin, steps: int) -> list[float]:
    """The ``steps + 1`` sigmas that diffusers' own Euler scheduler would use."""
    twin = euler_scheduler(scheduler)
    twin.set_timesteps(steps)
    return [float(s) for s in twin.sigmas]


def even_sigmas(scheduler: SchedulerMixin, steps: int) -> list[float]:
    """Wan's own ``steps + 1`` sigmas: N equal parts of [0, 1] under the scheduler's shift.

    Those of :func:`euler_sigmas` end in sigma = 0.001 before the shift, so that the last of N evaluations moves hardly
    anything: at two steps sigma = (1, 0.009, 0) at shift 3, where these are (1, 0.75, 0).
    """
    shift = float(euler_scheduler(scheduler).config.shift)
    even = (1 - i / steps for i in range(steps + 1))
    return [shift * s / (1 + (shift - 1) * s) for s in even]


@torch.no_grad()
def sample_latents(
    role: Role,
    condition: Condition,
    null: Condition | None,
    draws: Draws,
    *,
    steps: int,
    shape: Sequence[int] | None = None,
    sampler: str | None = None,
    guidance_scale: float = 1.0,
    scheduler: SchedulerMixin | None = None,
) -> Tensor:
    """Sample normalised latents ``[B, C, T, h, w]``.

    Args:
        role: whose weights.
        null: the unconditional branch; needed for a guidance scale other than 1.
        draws: the noise of these samples.
        steps: evaluations of the conditional network; guidance doubles the NFE.
        shape: ``(C, T, h, w)`` of a sample; None takes the condition's, which only ``i2v`` has.
        sampler: ``renoise`` (the student's rule; 1 or 4 steps), ``euler`` (on diffusers' grid) or ``euler_even`` (on
            Wan's, which spends few steps better); by default renoise where it exists and no guidance is asked for,
            else euler.
        scheduler: whose shift the Euler grid has.

    Raises:
        UserError: renoise with a number of steps it has no times for.
        ValueError: neither ``shape`` nor the condition says how large a sample is.
    """
    sampler = sampler or ("renoise" if steps in RENOISE_TIMES and guidance_scale == 1.0 else "euler")
    if shape is None and condition.mask is None:
        raise ValueError("this condition does not tell how long a sample is: give its shape")
    shape = tuple(condition.latent.shape[1:] if shape is None else shape)
    noise = draws.normal("sample noise", shape)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return role.guided_velocity(x, t, condition, null, guidance_scale)

    if sampler == "renoise":
        if steps not in RENOISE_TIMES:
            known = " or ".join(map(str, RENOISE_TIMES))
            raise UserError(f"the student samples in {known} steps, not {steps}; use --sampler euler for other numbers")
        times = RENOISE_TIMES[steps]
        x0 = renoise_sample(velocity, noise, times, lambda i: draws.normal(f"renoise {i}", shape))
    else:
        sigmas = even_sigmas if sampler == "euler_even" else euler_sigmas
        x0 = euler_sample(velocity, noise, sigmas(scheduler, steps))
    return condition.hold(x0)
