"""Clips made by the teacher: its sampler's latents go into the cache as they are, with no decoding and encoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vpae.backbone import Backbone
from vpae.conditioning import Condition
from vpae.data.encoders import Encoders, load_transformer
from vpae.data.pictures import TeacherSource
from vpae.draws import Draws, seed_of
from vpae.extras import check_attention_backend
from vpae.roles import Role
from vpae.sampling import euler_scheduler, sample_latents
from vpae.weights import matrices_in_bf16


class Teacher:
    """The transformer beside the encoders, whole on this rank's device, sampling as a source says.

    Raises:
        UserError: the folder holds no transformer (or a damaged one), or the attention kernel cannot serve here.
    """

    def __init__(self, source: TeacherSource, encoders: Encoders) -> None:
        exact = "data.source.precision: fp32" if source.precision == "fp32" else ""
        kernel = check_attention_backend(source.attention, fp32=exact)
        transformer = load_transformer(encoders.folder)
        transformer.requires_grad_(False)
        if source.precision == "bf16":
            matrices_in_bf16(transformer)
        transformer.set_attention_backend(kernel)
        self.role = Role("teacher", Backbone(transformer.to(encoders.device)))
        self.source, self.encoders = source, encoders
        self.null_text = encoders.texts([source.negative_prompt])

    def __call__(self, positions: list[int], condition: Condition) -> Tensor:
        """Normalised latents ``[B, C, T, h, w]`` of the clips at ``positions`` of the source."""
        source, device = self.source, self.encoders.device
        condition = condition.widened(self.null_text.shape[1])
        with torch.autocast(device.type, torch.bfloat16, enabled=source.precision == "bf16", cache_enabled=False):
            return sample_latents(
                self.role,
                condition,
                condition.null(self.null_text) if source.guidance_scale != 1.0 else None,
                Draws(seed_of(source.seed, "generate"), positions, device),
                steps=source.steps,
                shape=self.encoders.latent_shape(source.shape),
                sampler="euler",
                guidance_scale=source.guidance_scale,
                scheduler=self.encoders.pipeline.scheduler,
            ).float()


def teacher_fingerprint(encoders: Encoders) -> dict[str, Any]:
    """What decides the teacher's clips besides source and encoders: its weights, and the shift of its time grid."""
    from vpae.models import weights_fingerprint  # models reads caches, which are built from here

    return {
        "weights": weights_fingerprint(encoders.folder),
        "shift": float(euler_scheduler(encoders.pipeline.scheduler).config.shift),
    }
