"""What a single file says of itself: strings in its safetensors header, for people and for tools that read headers."""

from __future__ import annotations

from pathlib import Path

from vpae import __version__
from vpae import recipe as recipes
from vpae.loading import Model
from vpae.models import weights_fingerprint
from vpae.recipe import Distillation


def header(model: Model, *, layout: str, dtype: str, shift: float, rank: int | None = None) -> dict[str, str]:
    """Settings to sample with, and where the weights come from.

    Args:
        layout: ``wan`` or ``lora``.
        dtype: a key of :data:`vpae.export.precision.PRECISIONS`.
        shift: of the flow-matching scheduler (one step has the same grid, [1, 0], under any).
        rank: of a LoRA.
    """
    num_frames, height, width = model.shape
    recipe = model.recipe
    base = recipe.teacher.path if isinstance(recipe, Distillation) else model.pipeline
    fields = {
        "format": "pt",  # transformers and diffusers ask for it
        "layout": layout,
        "dtype": dtype,
        "steps": "1",
        "terminal_time": "1.0",
        "shift": f"{shift:g}",
        "guidance": "none",
        "height": str(height),
        "width": str(width),
        "num_frames": str(num_frames),
        "base_model": Path(base).name,  # a path of the training machine would help nobody
        "base_weights": weights_fingerprint(model.pipeline),
        "recipe": "unknown" if recipe is None else recipes.digest(recipe),
        "vpae_version": __version__,
    }
    return fields if rank is None else fields | {"rank": str(rank)}
