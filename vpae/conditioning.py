"""What Wan is told besides x_t and t, in one place for cache, both phases, sampler and export.

- ``i2v`` (Wan2.1-I2V) sees 36 input channels: 16 of x_t, 4 of the first-frame mask, 16 of the encoded first frame
  (followed by grey frames); text and CLIP tokens enter by cross-attention.
- ``t2v`` (Wan2.1-T2V) sees x_t and text.
- ``ti2v`` (Wan2.2-TI2V) sees text, and x_t in which latent frame 0 *is* the encoded first frame: it stays clean, and
  its tokens have t = 0. Whatever stands in frame 0 of x_t is never looked at, its velocity is 0, and so a clean
  prediction has it as given, at every t, without a gradient. Losses are means over the other frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["i2v", "t2v", "ti2v"]

TEXT_LENGTH = 512  # tokens Wan's transformer is made for; shorter prompts are padded with zero rows after encoding
PATCH = 2  # latent pixels along an edge of one of the transformer's tokens


def first_frame_mask(latent_frames: int, height: int, width: int, stride: int = 4) -> Tensor:
    """The mask channels of "frame 0 is given": ones in latent frame 0, zeros elsewhere.

    Returns:
        ``[stride, T, h, w]``; channel k of latent frame j stands for pixel frame ``stride * j - (stride - 1) + k``, and
        all channels of latent frame 0 stand for pixel frame 0.
    """
    mask = torch.zeros(stride, latent_frames, height, width)
    mask[:, 0] = 1.0
    return mask


@dataclass(frozen=True)
class Condition:
    """What the transformer is told besides x_t and t.

    Attributes:
        text: ``[B, L, D_text]``, L <= 512, zero rows after the prompt's end.
        image: CLIP tokens ``[B, N, D_image]``, for ``i2v`` alone.
        latent: the encoded first frame: with grey frames after it ``[B, C, T, h, w]`` for ``i2v``, by itself
            ``[B, C, 1, h, w]`` for ``ti2v``, None for ``t2v``.
        mask: ``[B, 4, T, h, w]``, for ``i2v`` alone.
    """

    text: Tensor
    image: Tensor | None = None
    latent: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def _map(self, function) -> Condition:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Condition(**{name: None if x is None else function(x) for name, x in parts.items()})

    def __getitem__(self, rows: slice) -> Condition:
        return self._map(lambda x: x[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        return self._map(lambda x: x.to(device=device, dtype=dtype))

    @property
    def text_mask(self) -> Tensor:
        """True where a text row is a token and not padding, ``[B, L]``."""
        return self.text.abs().sum(-1) > 0

    @property
    def given(self) -> int:
        """Latent frames of a clip that are given in their own place, not made: the first one for ``ti2v``."""
        return 1 if self.latent is not None and self.mask is None else 0

    def hold(self, x: Tensor) -> Tensor:
        """``x [B, C, T, h, w]`` with what is given in its place, from where no gradient flows; else x itself."""
        if not self.given:
            return x
        return torch.cat([self.latent.to(x.dtype), x[:, :, self.given :]], dim=2)

    def free(self, x: Tensor) -> Tensor:
        """The frames of ``x [B, C, T, h, w]`` that are made, which losses are means over."""
        return x[:, :, self.given :] if self.given else x

    def still(self, velocity: Tensor) -> Tensor:
        """A velocity ``[B, C, T, h, w]`` under which what is given stays as it is."""
        if not self.given:
            return velocity
        return torch.cat([torch.zeros_like(velocity[:, :, : self.given]), self.free(velocity)], dim=2)

    def times(self, t: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """What the network is told of t ``[B]``: t, or for ``ti2v`` a time per token ``[B, L]``, 0 where it is given.

        Args:
            grid: latent tokens as (frames, height, width), the order of L.
        """
        if not self.given:
            return t
        per_token = t[:, None, None].repeat(1, grid[0], grid[1] * grid[2])
        per_token[:, : self.given] = 0
        return per_token.flatten(1)

    def pack(self, x_t: Tensor) -> Tensor:
        """The network's input channels: x_t ``[B, C, T, h, w]`` joined with mask and latent, or holding the latent."""
        if self.mask is None:
            return self.hold(x_t)
        return torch.cat([x_t, self.mask.to(x_t.dtype), self.latent.to(x_t.dtype)], dim=1)

    def null(self, null_text: Tensor) -> Condition:
        """The unconditional branch of guidance: the empty (or negative) prompt, the same first frame.

        Args:
            null_text: ``[1, L', D_text]``, encoded.
        """
        return replace(self, text=_fit(null_text, self.text.shape[1]).to(self.text).expand(len(self), -1, -1))

    def widened(self, rows: int) -> Condition:
        """The same condition with room for at least ``rows`` text rows."""
        return replace(self, text=_fit(self.text, max(rows, self.text.shape[1])))

    def drop(self, null_text: Tensor, where: Tensor) -> Condition:
        """Replace the text of the samples where ``where`` ``[B]`` is true by the unconditional one."""
        return replace(self, text=torch.where(where.reshape(-1, 1, 1), self.null(null_text).text, self.text))


def condition_of(kind: Kind, parts: Mapping[str, Tensor], stride: int) -> Condition:
    """The condition from what encoders say and caches hold of each clip.

    Args:
        parts: ``text``; for ``i2v`` also ``image`` and ``latent``, for ``ti2v`` also ``latent``, batched.
        stride: pixel frames to a latent frame.
    """
    text, image, latent = parts["text"], parts.get("image"), parts.get("latent")
    if kind != "i2v":
        return Condition(text, None, latent if kind == "ti2v" else None)
    mask = first_frame_mask(*latent.shape[2:], stride=stride).to(latent)
    return Condition(text, image, latent, mask.expand(len(latent), -1, -1, -1, -1))


def _fit(text: Tensor, length: int) -> Tensor:
    """Cut or zero-pad encoded text ``[B, L', D]`` to ``[B, length, D]``; only padding may be cut."""
    if text.shape[1] > length:
        if text[:, length:].abs().sum() > 0:
            raise ValueError(f"a text of {text.shape[1]} tokens does not fit the condition's {length} rows")
        return text[:, :length]
    return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))


def pad_text(text: Tensor, length: int = TEXT_LENGTH) -> Tensor:
    """Zero-pad encoded text ``[B, L, D]`` to ``[B, length, D]``."""
    return _fit(text, length)
