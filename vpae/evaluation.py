"""Sample a model on Bounce clips and judge the pixels against the simulator."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vpae.conditioning import Condition
from vpae.data.bounce import Clip, World, make_clip
from vpae.data.encoders import Encoders
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import Processes, alone
from vpae.errors import UserError
from vpae.judge.judge import SetScores, judge_set
from vpae.roles import Role
from vpae.sampling import sample_latents


@dataclass(frozen=True)
class Sampled:
    """A model's videos for a list of clips.

    Attributes:
        frames: uint8 ``[F, H, W, 3]`` each.
        scores: the judge's word on them.
        seconds_per_clip: spent in the denoiser alone (encoding and decoding left out), at the batch size used.
        nfe: network evaluations a clip, guidance counted twice.
    """

    frames: list[np.ndarray]
    scores: SetScores
    seconds_per_clip: float
    nfe: int

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "nfe": self.nfe,
            "clips": self.scores.count,
            "seconds_per_clip": round(self.seconds_per_clip, 5),
            "frechet": round(self.scores.frechet, 4),
            "values": {k: round(v, 4) for k, v in self.scores.values.items()},
            "standard_errors": {k: round(v, 4) for k, v in self.scores.errors.items()},
            "parts": {k: round(v, 4) for k, v in self.scores.parts.items()},
        }


def clips_of(world: World, split: str, count: int) -> list[Clip]:
    """The first ``count`` clips of a split."""
    return [make_clip(world, split, i) for i in range(count)]


@dataclass(frozen=True)
class Conditions:
    """What a rank's batches are sampled from, encoded.

    Attributes:
        null_text: ``[1, L, D]``, of guidance's unconditional half.
        batches: by the place of a batch's first clip.
    """

    null_text: Tensor
    batches: dict[int, Condition]


def _mine(clips: Sequence[Clip], batch: int, processes: Processes) -> range:
    """Places of the first clips of this rank's batches."""
    return range(processes.rank * batch, len(clips), processes.size * batch)


@torch.no_grad()
def encode_clips(
    encoders: Encoders, clips: Sequence[Clip], batch: int, negative_prompt: str, processes: Processes
) -> Conditions:
    """The conditions of this rank's part of the clips; after it the encoders but the VAE can go.

    Raises:
        UserError: the model takes no first frame, by which alone a clip can be judged.
    """
    if not encoders.has_pictures:
        raise UserError(
            f"the judge compares a clip with the simulator's of the same first frame, and {encoders.folder} makes "
            "clips from text alone, which says neither where balls start nor how large they are; look at clips of it "
            "with: vpae sample MODEL --bounce N"
        )
    null_text, batches = encoders.texts([negative_prompt]), {}
    for start in _mine(clips, batch, processes):
        part = clips[start : start + batch]
        condition = encoders.condition([c.frames[0] for c in part], [c.caption for c in part], part[0].world.num_frames)
        batches[start] = condition.widened(null_text.shape[1])
    return Conditions(null_text, batches)


def _wait(device: torch.device) -> None:
    """Let the device finish what it was given, before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample_clips(
    role: Role,
    encoders: Encoders,
    clips: Sequence[Clip],
    *,
    steps: int,
    seed: int,
    batch: int,
    sampler: str | None = None,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    conditions: Conditions | None = None,
    label: str = "sampling",
    processes: Processes | None = None,
) -> Sampled:
    """Sample one video a clip from its first frame and caption, and judge them.

    The noise belongs to (seed, clip's place in the list): the same for every model, batch size and number of ranks.
    Every rank of ``processes`` samples a part with its own whole network, and all return the same.

    Args:
        conditions: this rank's of :func:`encode_clips`; None: they are encoded now, with ``negative_prompt``.

    Raises:
        UserError: the model takes no first frame, by which alone a clip can be judged.
    """
    processes = processes or alone()
    encoded = conditions or processes.together(lambda: encode_clips(encoders, clips, batch, negative_prompt, processes))
    options = {"steps": steps, "sampler": sampler, "guidance_scale": guidance_scale}
    bar = tqdm(_mine(clips, batch, processes), desc=label, unit="batch", leave=False, disable=not processes.is_main)
    part = processes.together(lambda: _sample(role, encoders, clips, bar, seed, batch, encoded, options))
    parts = processes.gather(part)
    videos = [video for _, video in sorted(item for part, _ in parts for item in part.items())]
    seconds = sum(spent for _, spent in parts)
    nfe = steps * (1 if guidance_scale == 1.0 else 2)
    judged = processes.together(lambda: judge_set(videos, list(clips)), main_only=True)
    return Sampled(videos, processes.gather(judged)[0], seconds / len(clips), nfe)


def _sample(
    role: Role,
    encoders: Encoders,
    clips: Sequence[Clip],
    starts: Iterable[int],
    seed: int,
    batch: int,
    encoded: Conditions,
    options: dict[str, Any],
) -> tuple[dict[int, np.ndarray], float]:
    """The batches that begin at ``starts``: frames by the clip's place, and the seconds spent in the denoiser."""
    frames: dict[int, np.ndarray] = {}
    seconds, device = 0.0, encoders.device
    for count, start in enumerate(starts):
        part = clips[start : start + batch]
        condition = encoded.batches[start]
        shape = encoders.latent_shape(part[0].frames.shape[:3])
        draws = Draws(seed_of(seed, "evaluation"), range(start, start + len(part)), device)
        null = condition.null(encoded.null_text) if options["guidance_scale"] != 1.0 else None
        if count == 0:  # the first forward allocates and chooses kernels: it is not timed
            noise = draws.normal("warm-up", shape)
            role.velocity(noise, noise.new_ones(len(part)), condition)
        _wait(device)
        started = time.perf_counter()
        scheduler = encoders.pipeline.scheduler
        latents = sample_latents(role, condition, null, draws, shape=shape, scheduler=scheduler, **options)
        _wait(device)
        seconds += time.perf_counter() - started
        frames |= enumerate(encoders.decode(latents), start)
    return frames, seconds
