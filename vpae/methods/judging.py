"""How a discriminator reads x_t, in every method that has one: a role's tapped blocks, then a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpae.conditioning import Condition
from vpae.roles import Role


def read_logits(
    judge: Role, head: nn.Module, taps: tuple[int, ...], x_t: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """``D(x_t)``: ``[B]``, or ``[B, taps]`` of independent heads; no block past the last tap is computed."""
    prediction = judge(x_t, t, condition, taps, stop_at_last_tap=True)
    # the hinge's margin and R1's small differences drown in bf16's 8 bits, so the head computes in fp32
    with torch.autocast(x_t.device.type, enabled=False):
        return head(prediction.features, prediction.grid, condition.image, condition.text, condition.text_mask)


def scalars(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What a discriminator's turn logs of its logits."""
    real, fake = real.detach(), fake.detach()
    return {
        "logit_real": real.mean(),
        "logit_fake": fake.mean(),
        "accuracy": 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean()),
    }
