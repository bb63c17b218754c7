"""Pictures with a prompt each, or prompts alone: from what the teacher makes clips to learn from."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vpae.data.listing import Listing, Named, list_clips, list_prompts
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


class TeacherSource:
    """Captions, with how the teacher is to make a clip of each.

    The clip's latents come straight from the teacher's sampler when a cache is built (see :mod:`vpae.data.generate`).
    Clip i is a function of ``seed`` and i, whatever the number of ranks.

    Args:
        listing: the captions.
        size: height and width of the clips, px.
        num_frames: of the clips.
        steps: of the teacher's Euler sampler; guidance doubles its evaluations.
        guidance_scale: ``uncond + w (cond - uncond)``; 1 is no guidance.
        negative_prompt: of the unconditional branch.
        precision: bf16 halves the teacher's memory (its matrices are held in bf16) and is what 14B is sampled in.
        attention: kernel of the teacher, as in ``teacher.attention``.
        bad: see :class:`~vpae.data.records.Source`.

    Attributes:
        has_pictures: whether a record's frames are the clip's first one.

    Raises:
        UserError: a caption cannot be used, and ``bad`` is ``error``.
    """

    has_pictures: bool

    def __init__(
        self,
        listing: Listing,
        size: tuple[int, int],
        num_frames: int,
        steps: int,
        guidance_scale: float,
        negative_prompt: str,
        seed: int,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        attention: str = "native",
        bad: Literal["error", "skip"] = "error",
    ) -> None:
        self.listing, self.folder, self.shape = listing, listing.folder, (num_frames, *size)
        self.steps, self.guidance_scale, self.negative_prompt = steps, float(guidance_scale), negative_prompt
        self.seed, self.precision, self.attention, self.bad = seed, precision, attention, bad
        faults = [clip.fault for clip in listing.clips if clip.fault]
        if faults and bad == "error":
            raise first_fault(faults)

    def __len__(self) -> int:
        return len(self.listing.clips)

    def name(self, item: int) -> str:
        return self.listing.clips[item].name

    def _good(self, item: int) -> Named:
        clip = self.listing.clips[item]
        if clip.fault:
            raise UserError(clip.fault)
        return clip

    def fingerprint(self) -> dict[str, Any]:
        """All that the sampler is told besides the teacher, and a digest of names, captions and pictures."""
        digest = hashlib.sha256()
        for clip in self.listing.clips:
            digest.update(json.dumps([clip.name, clip.caption]).encode())
            if clip.file is not None and clip.file.is_file():
                digest.update(ends(clip.file))
        frames, height, width = self.shape
        return {
            "size": [height, width],
            "num_frames": frames,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "precision": self.precision,
            "attention": self.attention,
            "count": len(self),
            "sha256": digest.hexdigest(),
        }


class PromptSource(TeacherSource):
    """Captions alone, for a teacher that makes clips from text; a record has no frames.

    Args:
        path: a ``.txt`` with a prompt a line, a JSONL list of ``{"caption": ...}`` lines, or a CSV with that column.
        settings: those of :class:`TeacherSource`.
    """

    has_pictures = False

    def __init__(self, path: str | Path, size: tuple[int, int], num_frames: int, **settings: Any) -> None:
        super().__init__(list_prompts(Path(path)), size, num_frames, **settings)

    def __getitem__(self, item: int) -> Record:
        clip, (_, height, width) = self._good(item), self.shape
        return Record(clip.name, np.zeros((0, height, width, 3), np.uint8), clip.caption)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "prompts", **super().fingerprint()}


class PictureSource(TeacherSource):
    """First frames and captions; a record's frames are the picture alone.

    Args:
        path: a JSONL list of ``{"image": ..., "caption": ...}`` lines or a CSV of these columns, paths relative to its
            folder (``columns`` names other keys); or a folder that holds ``captions.jsonl`` or ``captions.csv``.
        size: height and width of the clips, px; pictures are scaled to fill it and cropped about the centre.
        other_size: ``error`` refuses pictures of another size.
        settings: the others of :class:`TeacherSource`.

    Raises:
        UserError: as :class:`~vpae.data.sources.VideoFolderSource`.
    """

    has_pictures = True

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int],
        num_frames: int,
        *,
        other_size: Literal["crop", "error"] = "crop",
        columns: tuple[str, str] | None = None,
        **settings: Any,
    ) -> None:
        listing = list_clips(Path(path), "image", columns, repeats=True)
        if listing.kind not in ("jsonl", "csv"):
            raise UserError(f"{path}: holds no captions.jsonl; name a JSONL or CSV list of images and captions")
        self.other_size = other_size
        super().__init__(listing, size, num_frames, **settings)

    def __getitem__(self, item: int) -> Record:
        clip = self._good(item)
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
        return {"kind": "generate", "other_size": self.other_size, "crop": CROP, **super().fingerprint()}
