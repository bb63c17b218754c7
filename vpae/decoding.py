"""Wan's VAE decoder over several ranks: each decodes a band of the picture, together they give the whole video exactly.

After one step of denoising the decoder is what one waits for. Its 3x3 convolutions need one row or column of their
neighbours', its one attention (middle block) needs the whole picture at latent size, and all else is pointwise. So
bands are not decoded with a wide overlap and cut, which is inexact wherever the overlap is shorter than the receptive
field (twelve latent pixels): before each convolution ranks hand each other the one line at their border, for the frame
at hand and for the cached frames before it alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from vpae.engine.parallel import Processes


def bands(length: int, ranks: int) -> list[int]:
    """Lengths of the ranks' bands: as equal as can be, the longer ones first.

    Raises:
        ValueError: there are more ranks than lines.
    """
    if ranks > length:
        raise ValueError(f"{length} lines of latents cannot be split over {ranks} ranks")
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


class _Neighbours:
    """What ranks with neighbouring bands tell each other; ``axis`` is -1 for columns and -2 for rows."""

    def __init__(self, processes: Processes, axis: int, lengths: list[int]) -> None:
        self.rank, self.size, self.axis, self.lengths = processes.rank, processes.size, axis, lengths

    def widened(self, x: Tensor) -> Tensor:
        """``x`` with one line of each neighbour about it; zeros at the border of the picture, as a convolution pads."""
        first, last = (x.narrow(self.axis, where, 1).contiguous() for where in (0, -1))
        before, after = torch.zeros_like(first), torch.zeros_like(last)
        operations = []
        for there, mine, theirs in ((self.rank - 1, first, before), (self.rank + 1, last, after)):
            if 0 <= there < self.size:
                operations.append(dist.P2POp(dist.isend, mine, there))
                operations.append(dist.P2POp(dist.irecv, theirs, there))
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        return torch.cat([before, x, after], self.axis)

    def whole(self, x: Tensor) -> Tensor:
        """The bands of all ranks joined, at whichever resolution ``x`` has."""
        scale = x.shape[self.axis] // self.lengths[self.rank]
        sizes = [scale * length for length in self.lengths]
        room = [0, max(sizes) - sizes[self.rank]]
        padded = F.pad(x, room if self.axis == -1 else [0, 0, *room]).contiguous()  # collectives want equal shapes
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part.narrow(self.axis, 0, size) for part, size in zip(parts, sizes, strict=True)], self.axis)

    def band(self, x: Tensor) -> Tensor:
        """This rank's part of a whole."""
        scale = x.shape[self.axis] // sum(self.lengths)
        start = scale * sum(self.lengths[: self.rank])
        return x.narrow(self.axis, start, scale * self.lengths[self.rank])

    def widen_input(self, module: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        if not rest or rest[0] is None:
            return self.widened(x), *rest
        cached = rest[0].shape[2]  # the frames that a causal convolution puts before x
        both = self.widened(torch.cat([rest[0], x], 2))
        return both[:, :, cached:], both[:, :, :cached]

    def trim_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.narrow(self.axis, 1, output.shape[self.axis] - 2)

    def gather_input(self, module: nn.Module, args: tuple) -> tuple:
        return self.whole(args[0]), *args[1:]

    def cut_output(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.band(output)


@contextlib.contextmanager
def _joined(decoder: nn.Module, neighbours: _Neighbours) -> Iterator[None]:
    hooks = []
    for module in decoder.modules():
        if isinstance(module, WanAttentionBlock):
            pair = neighbours.gather_input, neighbours.cut_output
        elif isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size[neighbours.axis] == 3:
            pair = neighbours.widen_input, neighbours.trim_output
        else:
            continue
        hooks += [module.register_forward_pre_hook(pair[0]), module.register_forward_hook(pair[1])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def decode_in_bands(vae: AutoencoderKLWan, latents: Tensor, processes: Processes) -> Tensor:
    """``vae.decode(latents).sample`` by all ranks together, each of which holds the same latents and the whole VAE.

    Equal to the decode of one process up to the rounding of its convolutions. The picture is cut along its longer side;
    the number of lines need not be a multiple of the ranks.

    Args:
        latents: as the VAE takes them (not normalised), ``[B, 16, T, h, w]``.

    Returns:
        pixels on [-1, 1], ``[B, 3, F, H, W]``, on every rank.

    Raises:
        ValueError: more ranks than lines, or the VAE's tiling is on (tiles are another cut of the same picture).
    """
    if processes.size == 1:
        return vae.decode(latents).sample
    if vae.use_tiling:
        raise ValueError("a VAE with tiling enabled cannot be decoded in bands; call disable_tiling() first")
    axis = -1 if latents.shape[-1] >= latents.shape[-2] else -2
    neighbours = _Neighbours(processes, axis, bands(latents.shape[axis], processes.size))
    with _joined(vae.decoder, neighbours):
        mine = vae.decode(neighbours.band(latents).contiguous()).sample
    return neighbours.whole(mine)
