"""What a run's batches and networks look like, from the recipe and whatever of it is on disk already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpae.conditioning import TEXT_LENGTH, Condition, Kind
from vpae.data.bounce import World
from vpae.data.encoders import pipeline_kind, transformer_config
from vpae.draws import Draws
from vpae.errors import UserError
from vpae.methods.base import Batch
from vpae.models import find_model
from vpae.recipe import Distill
from vpae.released import TRANSFORMERS

_FOLDED_ROWS = 64  # of text, where padding is folded and no cache says how many: Bounce's longest captions have fewer
_CLIP_TOKENS = 257  # of ViT-H/14 at 224 px, as Wan's
_FRAMES, _PIXELS = 4, {16: 8, 48: 16}  # strides of the VAEs of Wan2.1 and Wan2.2, by channels
# parameters of what encodes clips, in fp32: umT5-XXL's encoder, CLIP ViT-H/14, and the VAEs of Wan2.1 and Wan2.2
_TEXT_ENCODER, _IMAGE_ENCODER, _VAE = 5_680_910_336, 632_076_800, {16: 126_892_531, 48: 704_688_668}


@dataclass(frozen=True)
class Shapes:
    """Of one run.

    Attributes:
        config: of the transformer.
        kind: how it is conditioned.
        latent: ``(C, T, h, w)`` of a clip.
        text_rows: of a condition.
        image_tokens: of a condition.
        encoders: bytes of the VAE and the text and image encoders in fp32, as many of them as the kind has.
        vae: of them, the VAE's, which stays on the device for samples.
    """

    config: dict[str, Any]
    kind: Kind
    latent: tuple[int, int, int, int]
    text_rows: int
    image_tokens: int
    encoders: float
    vae: float

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
        if self.kind == "ti2v":
            latent = zeros(self.latent[0], 1, *self.latent[2:])
        elif self.kind == "i2v":
            if config.get("image_dim"):
                image = zeros(self.image_tokens, config["image_dim"])
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
    kind = _kind(folder, config)
    return Shapes(config, kind, latent, int(rows), tokens, *_encoders(folder, kind, config["out_channels"]))


def _teacher(path: str) -> tuple[Path | None, dict[str, Any]]:
    try:
        folder = find_model(path)
    except UserError:
        if Path(path).name not in TRANSFORMERS:
            raise
        return None, dict(TRANSFORMERS[Path(path).name])
    return folder, transformer_config(folder)


def _kind(folder: Path | None, config: dict[str, Any]) -> Kind:
    """As the pipeline says; of a model that is not there yet, as its channels tell the released ones apart."""
    if folder is not None and (folder / "model_index.json").is_file():
        return pipeline_kind(folder)
    if config["in_channels"] > config["out_channels"]:
        return "i2v"
    return "ti2v" if config["out_channels"] == 48 else "t2v"


def _encoders(folder: Path | None, kind: Kind, channels: int) -> tuple[float, float]:
    """Bytes in fp32 of all that encodes clips, and of the VAE; files are taken to be in fp32, as released ones mostly
    are."""
    if folder is None:
        sizes = [_VAE.get(channels, 0), _TEXT_ENCODER, _IMAGE_ENCODER if kind == "i2v" else 0]
        return 4.0 * sum(sizes), 4.0 * sizes[0]
    parts = ("vae", "text_encoder", *(("image_encoder",) if kind == "i2v" else ()))
    found = [sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) for part in parts]
    return float(sum(found)), float(found[0])


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
