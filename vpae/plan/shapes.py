"""What a run's batches and networks look like, from the recipe and whatever of it is on disk already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpae.conditioning import TEXT_LENGTH, Condition
from vpae.data.bounce import World
from vpae.data.encoders import transformer_config
from vpae.draws import Draws
from vpae.errors import UserError
from vpae.methods.base import Batch
from vpae.models import find_model
from vpae.recipe import Distill
from vpae.released import TRANSFORMERS

GIB = 2**30
_FOLDED_ROWS = 64  # of text, where padding is folded and no cache says how many: Bounce's longest captions have fewer
_CLIP_TOKENS = 257  # of ViT-H/14 at 224 px, as Wan's
_FRAMES, _PIXELS = 4, {16: 8, 48: 16}  # strides of the VAEs of Wan2.1 and Wan2.2, by channels
# parameters of umT5-XXL's encoder, CLIP ViT-H/14 and the VAE, which encode clips in fp32
_RELEASED_ENCODERS = 5_680_910_336 + 632_076_800 + 126_892_531


@dataclass(frozen=True)
class Shapes:
    """Of one run.

    Attributes:
        config: of the transformer.
        latent: ``(C, T, h, w)`` of a clip.
        text_rows: of a condition.
        image_tokens: of a condition.
        encoders: bytes of the text and image encoders and the VAE in fp32.
    """

    config: dict[str, Any]
    latent: tuple[int, int, int, int]
    text_rows: int
    image_tokens: int
    encoders: float

    @property
    def tokens(self) -> int:
        """Of a clip, in the transformer."""
        patch = self.config["patch_size"]
        return (self.latent[1] // patch[0]) * (self.latent[2] // patch[1]) * (self.latent[3] // patch[2])

    def batch(self, draws: Draws) -> Batch:
        """A micro-batch of these shapes, all zero."""
        count, config = len(draws.positions), self.config

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(count, *shape)

        image = latent = mask = None
        if config.get("image_dim"):
            image = zeros(self.image_tokens, config["image_dim"])
        if config["in_channels"] > config["out_channels"]:
            latent = zeros(*self.latent)
            mask = zeros(config["in_channels"] - 2 * self.latent[0], *self.latent[1:])
        x0, text = zeros(*self.latent), zeros(self.text_rows, config["text_dim"])
        null = Condition(torch.zeros_like(text), image, latent, mask)
        return Batch(x0, Condition(text, image, latent, mask), null, draws)


def shapes_of(recipe: Distill) -> Shapes:
    """The shapes of a recipe's run; the teacher's folder need not be there if it is a released model.

    Raises:
        UserError: the teacher is unknown, or the source does not say how large its clips are.
    """
    folder, config = _teacher(recipe.teacher.path)
    frames, height, width = _clip(recipe.data.source)
    vae = _read(folder, "vae")
    pixels = _PIXELS.get(config["out_channels"], 8)
    stride_t, stride = vae.get("scale_factor_temporal", _FRAMES), vae.get("scale_factor_spatial", pixels)
    latent = (config["out_channels"], (frames - 1) // stride_t + 1, height // stride, width // stride)
    eye = _read(folder, "image_encoder")
    tokens = (eye["image_size"] // eye["patch_size"]) ** 2 + 1 if eye else _CLIP_TOKENS
    rows = TEXT_LENGTH
    if recipe.teacher.fold_text_padding:
        rows = _read(Path(recipe.data.cache), "manifest.json").get("text_rows", _FOLDED_ROWS)
    return Shapes(config, latent, int(rows), tokens, _encoders(folder))


def _teacher(path: str) -> tuple[Path | None, dict[str, Any]]:
    try:
        folder = find_model(path)
    except UserError:
        if Path(path).name not in TRANSFORMERS:
            raise
        return None, dict(TRANSFORMERS[Path(path).name])
    return folder, transformer_config(folder)


def _encoders(folder: Path | None) -> float:
    """Bytes in fp32 of what encodes clips; files are taken to be in fp32, which released ones are at least in part."""
    if folder is None:
        return 4.0 * _RELEASED_ENCODERS
    parts = ("text_encoder", "image_encoder", "vae")
    return float(sum(file.stat().st_size for part in parts for file in (folder / part).glob("*.safetensors")))


def _clip(source: dict[str, Any]) -> tuple[int, int, int]:
    """Frames, height and width, px, of a source that may not be on disk yet."""
    if source.get("kind") == "bounce":
        world = World.from_dict(source.get("world", {}))
        return world.num_frames, world.size, world.size
    try:
        (height, width), frames = source["size"], source["num_frames"]
        return int(frames), int(height), int(width)
    except (KeyError, TypeError, ValueError):
        raise UserError("data.source does not say the size and num_frames of its clips") from None


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    """A config that may be there: of a part of a pipeline, or a file."""
    if folder is None:
        return {}
    file = folder / name if name.endswith(".json") else folder / name / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
