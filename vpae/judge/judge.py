"""The judge of Bounce clips: SA, TC and FQ on scales of 0 to 100, from pixels and the simulator alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vpae.data.bounce import Clip
from vpae.errors import UserError
from vpae.judge.alignment import semantic_alignment, trajectory_error
from vpae.judge.coherence import temporal_coherence
from vpae.judge.detect import detect_balls
from vpae.judge.frechet import clip_features, frechet_distance
from vpae.judge.futures import chosen_future
from vpae.judge.quality import dynamic_degree, frame0_psnr, frame_quality
from vpae.judge.tracks import captioned_tracks, link

MEASURES = ("sa", "tc", "fq", "mean", "dynamic_degree", "frame0_psnr", "trajectory_error")


@dataclass(frozen=True)
class ClipScores:
    """What the judge says of one clip.

    Attributes:
        sa: semantic alignment, 0..100.
        tc: temporal coherence, 0..100.
        fq: frame quality, 0..100.
        dynamic_degree: motion relative to the simulator's clip; 1 for as much, 0 for frozen.
        frame0_psnr: dB against the given first frame.
        trajectory_error: px between detected and simulated centres.
        parts: the sub-scores behind the axes, 0..1, named ``sa/direction`` and so on; NaN where left out.
    """

    sa: float
    tc: float
    fq: float
    dynamic_degree: float
    frame0_psnr: float
    trajectory_error: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of the three axes."""
        return (self.sa + self.tc + self.fq) / 3


@dataclass(frozen=True)
class SetScores:
    """What the judge says of a set of clips.

    Attributes:
        count: number of clips.
        values: mean over the clips of each of :data:`MEASURES`.
        errors: standard error of each mean; NaN for a single clip.
        parts: mean of each sub-score over the clips in which it could be judged.
        frechet: Frechet distance to the simulator's clips, see :mod:`vpae.judge.frechet`; NaN below two clips.
        clip_means: each clip's mean of SA, TC and FQ, in order: two models on the same clips are compared in pairs.
    """

    count: int
    values: dict[str, float]
    errors: dict[str, float]
    parts: dict[str, float]
    frechet: float
    clip_means: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of SA, TC and FQ."""
        return self.values["mean"]


def judge_clip(frames: np.ndarray, clip: Clip) -> ClipScores:
    """Judge a generated clip against the simulator's clip of the same first frame and caption.

    Where the caption leaves futures open, that is the clip of the one it shows (:mod:`vpae.judge.futures`).

    Args:
        frames: uint8 ``[F, H, W, 3]``, the generated clip.
        clip: caption, states and real frames.

    Raises:
        UserError: the frames are not uint8 or not of the clip's shape.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.shape != clip.frames.shape:
        raise UserError(
            f"clip {clip.name}: the judge needs uint8 frames {list(clip.frames.shape)}, got {frames.dtype} "
            f"{list(frames.shape)}; write the video at the world's size and length"
        )
    blobs = detect_balls(frames, clip.world)
    tracks = link(blobs)
    captioned = captioned_tracks(tracks, clip)
    clip = chosen_future(captioned, clip)
    sa, sa_parts = semantic_alignment(blobs, captioned, clip)
    tc, tc_parts = temporal_coherence(blobs, tracks, clip)
    fq, fq_parts = frame_quality(frames, blobs, clip.world, len(clip.balls))
    axes = {"sa": sa_parts, "tc": tc_parts, "fq": fq_parts}
    return ClipScores(
        sa=sa,
        tc=tc,
        fq=fq,
        dynamic_degree=dynamic_degree(frames, clip.frames, clip.world),
        frame0_psnr=frame0_psnr(frames, clip.frames),
        trajectory_error=trajectory_error(captioned, clip),
        parts={f"{axis}/{name}": value for axis, parts in axes.items() for name, value in parts.items()},
    )


def summarise(scores: Sequence[ClipScores], frechet: float) -> SetScores:
    """Mean and standard error of clips that have been judged one by one."""
    table = np.array([[getattr(s, name) for name in MEASURES] for s in scores], float)
    spread = table.std(0, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.full(len(MEASURES), np.nan)
    parts = {}
    for name in scores[0].parts:
        judged = [s.parts[name] for s in scores if np.isfinite(s.parts[name])]
        parts[name] = float(np.mean(judged)) if judged else float("nan")
    return SetScores(
        count=len(scores),
        values=dict(zip(MEASURES, table.mean(0).tolist(), strict=True)),
        errors=dict(zip(MEASURES, spread.tolist(), strict=True)),
        parts=parts,
        frechet=frechet,
        clip_means=tuple(table[:, MEASURES.index("mean")].tolist()),
    )


def judge_set(generated: Sequence[np.ndarray], clips: Sequence[Clip]) -> SetScores:
    """Judge generated clips, each against its own simulated clip, and the set against the set.

    Args:
        generated: for each clip its uint8 frames ``[F, H, W, 3]``.
        clips: the simulator's clips in the same order.

    Raises:
        UserError: the lists are empty or of different length, or a clip is of the wrong shape.
    """
    if not clips or len(generated) != len(clips):
        raise UserError(f"the judge needs one video for each clip, got {len(generated)} videos for {len(clips)} clips")
    scores = [judge_clip(frames, clip) for frames, clip in zip(generated, clips, strict=True)]
    if len(clips) < 2:
        return summarise(scores, float("nan"))
    ours = np.stack([clip_features(frames) for frames in generated])
    theirs = np.stack([clip_features(clip.frames) for clip in clips])
    return summarise(scores, frechet_distance(ours, theirs))
