"""The image-to-video condition of Wan, in one place for cache, both phases, sampler and export.

Wan2.1-I2V sees 36 input channels: 16 of x_t, 4 of the first-frame mask, 16 of the encoded first frame (followed by
grey frames); text and CLIP tokens enter by cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

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
        image: CLIP tokens ``[B, N, D_image]``, or None for a text-to-video model.
        latent: encoded first frame ``[B, 16, T, h, w]``, or None for a text-to-video model.
        mask: ``[B, 4, T, h, w]``, or None with ``latent``.
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

    def pack(self, x_t: Tensor) -> Tensor:
        """Join x_t ``[B, 16, T, h, w]`` with mask and first-frame latent to the network's input channels."""
        if self.latent is None:
            return x_t
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
