"""Pixels and prompts to latents and tokens, and back: the frozen parts of a Wan pipeline.

Everything goes through diffusers' own pipeline object, so that what is cached for training is what the pipeline
computes at inference.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from vpae.conditioning import PATCH, TEXT_LENGTH, Condition, Kind, condition_of, pad_text
from vpae.errors import UserError
from vpae.files import feed

_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
PARTS: dict[Kind, tuple[str, ...]] = {  # folders of a pipeline besides its transformer
    "i2v": (*_PARTS, "image_encoder", "image_processor"),
    "t2v": _PARTS,
    "ti2v": _PARTS,
}
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


@contextlib.contextmanager
def quiet():
    """Silence the libraries' progress bars and advice while they load; errors still raise."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        yield


def pipeline_kind(folder: str | Path) -> Kind:
    """How a pipeline folder's transformer is conditioned, from its model_index.json.

    Both pipelines of diffusers read a folder that says ``expand_timesteps``; the one of images is taken: ``ti2v``.

    Raises:
        UserError: it is no folder of a Wan pipeline with one transformer.
    """
    folder = Path(folder)
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a diffusers pipeline folder (no model_index.json in it)")
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load the pipeline in {folder}: {file.name} is damaged ({error})") from None
    name = index.get("_class_name")
    if name not in _PIPELINES:
        raise UserError(f"{folder} holds a {name}; vpae knows {' and '.join(_PIPELINES)}")
    if any(index.get("transformer_2") or ()):
        raise UserError(f"{folder} has two transformers, one for each end of the path; vpae distils one that does both")
    if index.get("expand_timesteps"):
        return "ti2v"
    return "t2v" if name == "WanPipeline" else "i2v"


def load_pipeline(
    folder: str | Path, *, transformer: bool, without: Sequence[str] = ()
) -> WanImageToVideoPipeline | WanPipeline:
    """Load a diffusers folder, from safetensors only and without the network; parts ``without`` stay on the disk.

    Raises:
        UserError: no such folder, or a part is missing, damaged or of another class.
    """
    folder, kind = Path(folder), pipeline_kind(folder)
    for part in PARTS[kind] + (("transformer",) if transformer else ()):
        if not (folder / part).is_dir():
            raise UserError(f"{folder} is not a whole Wan {kind} pipeline: its folder {part}/ is missing")
    cls = WanPipeline if kind == "t2v" else WanImageToVideoPipeline
    options = dict.fromkeys(without) if transformer else dict.fromkeys(without) | {"transformer": None}
    try:
        with quiet():
            pipeline = cls.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **options
            )
    except Exception as error:  # diffusers raises many kinds; all mean that the folder cannot be used
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot load the pipeline in {folder}: {reason[0] if reason else type(error).__name__}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def transformer_config(folder: str | Path) -> dict[str, Any]:
    """The config of a pipeline folder's transformer, without its weights.

    Raises:
        UserError: it is missing or damaged.
    """
    file = Path(folder) / "transformer" / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no transformer/ (with a config.json)") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load the transformer in {folder}: {file.name} is damaged ({error})") from None


def vae_config(folder: str | Path) -> dict[str, Any]:
    """The config of the VAE in ``folder``, without its weights.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return dict(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the VAE's config.json in {folder}: {error}") from None


def latent_shape(vae: Mapping[str, Any], shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """``(C, T, h, w)`` of the latents of a clip of ``(frames, height, width)``; what a config lacks is Wan2.1's."""
    frames, height, width = shape
    stride, edge = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    return vae.get("z_dim", 16), 1 + (frames - 1) // stride, height // edge, width // edge


def load_transformer(folder: str | Path) -> WanTransformer3DModel:
    """The transformer of a pipeline folder, fp32, from safetensors.

    Raises:
        UserError: it is missing, damaged, or no Wan transformer.
    """
    transformer_config(folder)
    try:
        with quiet():
            return WanTransformer3DModel.from_pretrained(
                folder, subfolder="transformer", use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
            )
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot load the transformer in {folder}: {reason[0] if reason else type(error).__name__}"
        ) from error


def to_pixels(clips: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """Frames uint8 ``[F, H, W, 3]`` each to ``[B, 3, F, H, W]`` on [-1, 1], as the VAE takes them."""
    return torch.from_numpy(np.stack(clips)).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


class Encoders:
    """VAE, umT5 and (for ``i2v``) CLIP of a pipeline folder, frozen, in fp32.

    Args:
        folder: a diffusers pipeline folder.
        device: where they run.
        vae_only: leave umT5 and CLIP on the disk; latents can be made and decoded, nothing else.

    Attributes:
        kind: how the pipeline's transformer is conditioned.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", *, vae_only: bool = False) -> None:
        self.folder, self.kind = Path(folder), pipeline_kind(folder)
        self._token_encoders = [part for part in PARTS[self.kind] if part in ("text_encoder", "image_encoder")]
        without = self._token_encoders if vae_only else ()
        self.pipeline = load_pipeline(folder, transformer=False, without=without).to(device)
        self.device = torch.device(device)
        for part in (self.vae, *(getattr(self.pipeline, name) for name in self._token_encoders)):
            if part is not None:
                part.requires_grad_(False)

    @property
    def vae(self):
        return self.pipeline.vae

    def keep_vae(self) -> None:
        """Let go of the text and image encoders (umT5-XXL alone is 23 GB in fp32): a cache answers for them now."""
        for name in self._token_encoders:
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def has_pictures(self) -> bool:
        """Whether a clip goes on from a given first frame."""
        return self.kind != "t2v"

    @property
    def edge(self) -> int:
        """What edges of clips are multiples of, px: a token's."""
        return PATCH * self.vae.config.scale_factor_spatial

    @property
    def stride(self) -> int:
        """Pixel frames to a latent frame, but for the first one, which stands for one."""
        return self.vae.config.scale_factor_temporal

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """``(C, T, h, w)`` of the latents of a clip of ``(frames, height, width)``."""
        return latent_shape(self.vae.config, shape)

    def _moments(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        mean = torch.tensor(config.latents_mean, device=self.device).view(shape)
        return mean, torch.tensor(config.latents_std, device=self.device).view(shape)

    def _encode(self, pixels: Tensor) -> Tensor:
        mean, std = self._moments()
        return (self.vae.encode(pixels).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def latents(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Normalised latents ``[B, C, T, h, w]`` (posterior mode) of whole clips."""
        return self._encode(to_pixels(clips, self.device))

    @torch.no_grad()
    def first_frame(self, pictures: Sequence[np.ndarray], num_frames: int) -> Tensor:
        """The condition's latent: the picture through the VAE.

        For ``i2v`` with grey frames after it ``[B, C, T, h, w]``, for ``ti2v`` by itself ``[B, C, 1, h, w]``.
        """
        first = to_pixels([p[None] for p in pictures], self.device)
        if self.kind == "ti2v":
            return self._encode(first)
        grey = first.new_zeros(*first.shape[:2], num_frames - 1, *first.shape[3:])
        return self._encode(torch.cat([first, grey], dim=2))

    @torch.no_grad()
    def images(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """CLIP tokens ``[B, N, D]`` (the layer before the last, as Wan uses)."""
        return self.pipeline.encode_image([Image.fromarray(p) for p in pictures], self.device)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """umT5 tokens ``[B, L, D]``, zero after each prompt's end; L is the longest prompt unless given."""
        parts = []
        for start in range(0, len(prompts), 16):
            encoded, _ = self.pipeline.encode_prompt(
                list(prompts[start : start + 16]), do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
            )
            parts.append(encoded)
        text = torch.cat(parts)
        used = (text.abs().sum(-1) > 0).any(0).nonzero()
        longest = int(used.max()) + 1 if len(used) else 1
        return pad_text(text[:, :longest], length or longest)

    def parts(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], num_frames: int) -> dict[str, Tensor]:
        """What the condition of a batch is made of (see :func:`~vpae.conditioning.condition_of`), by name.

        Args:
            pictures: first frames uint8 ``[H, W, 3]``; not looked at for ``t2v``.
        """
        said = {"text": self.texts(prompts)}
        if self.has_pictures:
            said["latent"] = self.first_frame(pictures, num_frames)
        if self.kind == "i2v":
            said["image"] = self.images(pictures)
        return said

    def condition(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], num_frames: int) -> Condition:
        """The whole condition of a batch of first frames uint8 ``[H, W, 3]`` (unused for ``t2v``) and prompts."""
        return condition_of(self.kind, self.parts(pictures, prompts, num_frames), self.stride)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[np.ndarray]:
        """Normalised latents ``[B, C, T, h, w]`` to frames uint8 ``[F, H, W, 3]`` each."""
        mean, std = self._moments()
        pixels = self.vae.decode(latents.float() * std + mean).sample
        frames = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(frames.permute(0, 2, 3, 4, 1).cpu().numpy())

    def fingerprint(self) -> dict[str, str]:
        """For each part a hash over the weights and configs that decide what it says."""
        hashes = {}
        for part in PARTS[self.kind]:
            if part == "scheduler":
                continue
            digest = hashlib.sha256()
            for file in sorted((self.folder / part).rglob("*")):
                if file.suffix in (".json", ".safetensors", ".model"):
                    digest.update(str(file.relative_to(self.folder)).encode())
                    feed(digest, file)
            hashes[part] = digest.hexdigest()[:16]
        return hashes

    def probe(self) -> dict[str, Tensor]:
        """What the encoders say of a fixed small clip and prompt, fp32 on the CPU.

        The numbers tell whether the libraries still compute what they computed when a cache was built, which neither
        the weights' hashes nor the libraries' versions do.
        """
        ramp = torch.arange(5 * 64 * 64 * 3, dtype=torch.int64)
        clip = (ramp * ramp // 97 % 256).to(torch.uint8).reshape(5, 64, 64, 3).numpy()
        said = {"latent": self.latents([clip]), "text": self.texts(["A red ball & a <b>cyclist</b>, 2 km away."])}
        if self.kind == "i2v":
            said["image"] = self.images([clip[0]])
        return {name: tensor.float().cpu().contiguous() for name, tensor in said.items()}
