"""Pictures with a prompt each: the first frames from which the teacher makes clips to learn from."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vpae.data.listing import list_clips
from vpae.data.records import CROP, Record, answered, ends, first_fault
from vpae.data.videos import fit
from vpae.errors import UserError

PRECISIONS = ("fp32", "bf16")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # none that Pillow hands to another program


def open_picture(path: Path) -> np.ndarray:
    """A picture file as it is meant to be seen, uint8 ``[H, W, 3]``.

    Raises:
        UserError: no such file, or not a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                # phones note the turn beside the pixels
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"no picture at {path}") from None
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,  # Pillow's for a broken PNG
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from None


class PictureSource:
    """First frames and captions, with how the teacher is to go on from them.

    A record's frames are the picture alone; the clip's latents come straight from the teacher's sampler when a cache is
    built (see :mod:`vpae.data.generate`). Clip i is a function of ``seed`` and i, whatever the number of ranks.

    Args:
        path: a JSONL list of ``{"image": ..., "caption": ...}`` lines or a CSV of these columns, paths relative to its
            folder (``columns`` names other keys); or a folder that holds ``captions.jsonl`` or ``captions.csv``.
        size: height and width of the clips, px; pictures are scaled to fill it and cropped about the centre.
        num_frames: of the clips.
        steps: of the teacher's Euler sampler; guidance doubles its evaluations.
        guidance_scale: ``uncond + w (cond - uncond)``; 1 is no guidance.
        negative_prompt: of the unconditional branch.
        precision: bf16 halves the teacher's memory (its matrices are held in bf16) and is what 14B is sampled in.
        attention: kernel of the teacher, as in ``teacher.attention``.
        other_size: ``error`` refuses pictures of another size.
        bad: see :class:`~vpae.data.records.Source`.

    Raises:
        UserError: as :class:`~vpae.data.sources.VideoFolderSource`.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int],
        num_frames: int,
        steps: int,
        guidance_scale: float,
        negative_prompt: str,
        seed: int,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        attention: str = "native",
        other_size: Literal["crop", "error"] = "crop",
        bad: Literal["error", "skip"] = "error",
        columns: tuple[str, str] | None = None,
    ) -> None:
        self.shape = (num_frames, *size)
        self.steps, self.guidance_scale, self.negative_prompt = steps, float(guidance_scale), negative_prompt
        self.seed, self.precision, self.attention = seed, precision, attention
        self.other_size, self.bad = other_size, bad
        self.listing = list_clips(Path(path), "image", columns, repeats=True)
        self.folder = self.listing.folder
        if self.listing.kind not in ("jsonl", "csv"):
            raise UserError(f"{path}: holds no captions.jsonl; name a JSONL or CSV list of images and captions")
        faults = [clip.fault for clip in self.listing.clips if clip.fault]
        if faults and bad == "error":
            raise first_fault(faults)

    def __len__(self) -> int:
        return len(self.listing.clips)

    def name(self, item: int) -> str:
        return self.listing.clips[item].name

    def __getitem__(self, item: int) -> Record:
        clip = self.listing.clips[item]
        if clip.fault:
            raise UserError(clip.fault)
        answered(clip.file)
        picture, (height, width) = open_picture(clip.file), self.shape[1:]
        note = ""
        if picture.shape[:2] != (height, width):
            stored = f"{picture.shape[1]}x{picture.shape[0]}"
            if self.other_size == "error":
                raise UserError(f"{clip.file}: {stored}, {width}x{height} wanted; scale it, or say other_size: crop")
            note = f"{stored} scaled and cropped to {width}x{height}"
        return Record(clip.name, fit(picture, (height, width))[None], clip.caption, note)

    def fingerprint(self) -> dict[str, Any]:
        """All that the sampler is told besides the teacher, and a digest of names, captions and pictures."""
        digest = hashlib.sha256()
        for clip in self.listing.clips:
            digest.update(json.dumps([clip.name, clip.caption]).encode())
            if clip.file.is_file():
                digest.update(ends(clip.file))
        frames, height, width = self.shape
        return {
            "kind": "generate",
            "size": [height, width],
            "num_frames": frames,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "precision": self.precision,
            "attention": self.attention,
            "other_size": self.other_size,
            "crop": CROP,
            "count": len(self),
            "sha256": digest.hexdigest(),
        }
