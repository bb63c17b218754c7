"""The collapse alarm. One-step students fail by freezing on the first frame long before they look bad.

Consistency scores rise when a student copies its first frame, so motion is watched from the first steps, against the
real (or teacher-made) clips of the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpae.errors import UserError
from vpae.recipe import Watch as Limits


def motion_energy(latents: Tensor) -> Tensor:
    """Mean squared difference of neighbouring latent frames, ``[B]``."""
    return latents.diff(dim=2).square().flatten(1).mean(1)


def stillness_distance(latents: Tensor) -> Tensor:
    """Mean squared distance of each later latent frame to the first one that can move, ``[B]``.

    Latent frame 0 of the Wan VAE stands for one picture and the later ones for four each, so a still clip's later
    frames equal each other and not frame 0; with two latent frames there is only frame 0 to compare with.
    """
    anchor = 1 if latents.shape[2] > 2 else 0
    return (latents[:, :, anchor + 1 :] - latents[:, :, anchor : anchor + 1]).square().flatten(1).mean(1)


@torch.no_grad()
def vital_signs(student: Tensor, real: Tensor) -> dict[str, Tensor]:
    """How alive a batch of student latents ``[B, C, T, h, w]`` is beside the real one.

    None of it looks at a first frame that was given, so that all of it holds for text-to-video too.

    Returns:
        ``motion_ratio``: motion energy over the real clips' (1 is right, 0 is a still);
        ``frame0_likeness``: 1 minus the distance to the first moving frame over the real clips' (0 is right, 1 a copy);
        ``channel_drift``: largest shift of a channel's mean, in units of the real channel's standard deviation.
    """
    real, student = real.float(), student.float()
    eps = 1e-8
    drift = (student.mean((0, 2, 3, 4)) - real.mean((0, 2, 3, 4))).abs() / (real.std((0, 2, 3, 4)) + eps)
    return {
        "motion_ratio": motion_energy(student).mean() / (motion_energy(real).mean() + eps),
        "frame0_likeness": 1 - stillness_distance(student).mean() / (stillness_distance(real).mean() + eps),
        "channel_drift": drift.max(),
    }


class Collapse(UserError):
    """The watch stopped the run; the state it stopped in is checkpointed."""


@dataclass
class Watch:
    """Judges vital signs against the recipe's limits; speaks when a limit is broken ``patience`` times running."""

    limits: Limits
    broken: dict[str, int] = field(default_factory=dict)

    def look(self, step: int, signs: dict[str, float]) -> list[str]:
        """Take the signs of student step ``step``, by tag (``head/logit_fake``); returns the alarms raised now.

        Raises:
            Collapse: an alarm, where the recipe says ``action: stop``.
        """
        limits = self.limits
        if step < limits.after_steps:
            return []
        checks = [
            ("motion_ratio", lambda v: v < limits.min_motion_ratio, "motion is dying (a still picture scores 0)"),
            ("motion_ratio", lambda v: v > limits.max_motion_ratio, "motion is exploding (flicker)"),
            (
                "motion_ratio_to_reference",
                lambda v: not limits.min_motion_ratio <= v <= limits.max_motion_ratio,
                "sampled clips do not move as the teacher's (or real ones) do",
            ),
            (
                "frame0_likeness",
                lambda v: v > limits.max_frame0_likeness,
                "the clip stands still after its first frame",
            ),
            (
                "channel_drift",
                lambda v: v > limits.max_channel_drift,
                "colours drift (a latent channel's mean walks off)",
            ),
            ("logit_fake", lambda v: abs(v) > limits.max_logit, "the head is saturated"),
            ("logit_real", lambda v: abs(v) > limits.max_logit, "the head is saturated"),
        ]
        alarms = []
        for tag, value in signs.items():
            for sign, is_broken, meaning in checks:
                if tag.split("/")[-1] != sign:
                    continue
                key = f"{tag}: {meaning}"
                self.broken[key] = self.broken.get(key, 0) + 1 if is_broken(value) else 0
                count, stops = self.broken[key], limits.action == "stop"
                # a run that is resumed while it is still collapsed stops again; a warning is said once
                if count >= limits.patience if stops else count == limits.patience:
                    alarms.append(f"watch: step {step}, {tag} {value:.3g}: {meaning}")
        if alarms and limits.action == "stop":
            raise Collapse(
                f"{alarms[0]}; stopped because watch.action is stop; "
                "a lower learning rate needs another --output, watch.action=warn lets this run go on with --resume"
            )
        return alarms

    def state(self) -> dict[str, int]:
        return dict(self.broken)
