"""A Frechet distance between sets of clips in a feature space that is fixed and needs no weights file.

The features are the pooled responses of a bank of random 3D filters (three frames, five by five pixels, all
colours) drawn from a fixed seed, at full and at half resolution. Random filters are a sound choice where no
network trained on such pictures exists: the pooled, rectified random projections of space-time patches are
random features of the patch distribution (colour, edge profile and motion together), and nothing was fitted,
so nothing favours one way of being wrong. They see texture and motion, not whether a caption was obeyed.

Means over few clips bias the distance upwards: compare only numbers from equally many clips.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

FILTERS = 16  # a scale: few, so that some dozens of clips give covariances of full rank
SEED = 20240229  # of the filters; changing it changes every distance ever reported
GAIN = 10.0  # brings the distance between a ball world and its blurred copy to the order of 1
_TIME, _SPACE = 3, 5


@lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    """Unit filters without mean over the patch in each colour: ``[2, 3 * 5 * 5 * 3, K]``, one bank a scale."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    bank = rng.standard_normal((2, FILTERS, _TIME, _SPACE, _SPACE, 3))
    bank -= bank.mean(axis=(2, 3, 4), keepdims=True)  # flat, still background then answers 0 and cannot drown the balls
    bank /= np.sqrt(np.sum(bank**2, axis=(2, 3, 4, 5), keepdims=True))
    return bank.reshape(2, FILTERS, -1).swapaxes(1, 2).astype(np.float32)


def _halve(video: np.ndarray) -> np.ndarray:
    height, width = video.shape[1] // 2 * 2, video.shape[2] // 2 * 2
    video = video[:, :height, :width]
    return (video[:, ::2, ::2] + video[:, 1::2, ::2] + video[:, ::2, 1::2] + video[:, 1::2, 1::2]) / 4


def clip_features(frames: np.ndarray) -> np.ndarray:
    """Features of one clip: uint8 ``[F, H, W, 3]`` to float64 ``[2 * FILTERS]``.

    Each is the root mean square over all positions of one filter's rectified response.

    Raises:
        ValueError: the clip is smaller than the filters.
    """
    if frames.shape[0] < _TIME or min(frames.shape[1:3]) < 2 * _SPACE:
        raise ValueError(f"Frechet features need at least {_TIME} frames of {2 * _SPACE} px, got {list(frames.shape)}")
    video = frames.astype(np.float32) / 255
    features = []
    for bank in _filters():
        patches = np.lib.stride_tricks.sliding_window_view(video, (_TIME, _SPACE, _SPACE), axis=(0, 1, 2))[:, ::2, ::2]
        patches = patches.transpose(0, 1, 2, 4, 5, 6, 3).reshape(-1, bank.shape[0])
        response = np.maximum(patches @ bank, 0)
        features.append(np.sqrt(np.mean(np.square(response, dtype=np.float64), axis=0)))
        video = _halve(video)
    return GAIN * np.concatenate(features)


def frechet_distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of the normal distributions fitted to two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), in float64 with symmetric eigen-decompositions, which
    unlike a general matrix root stay real where a covariance is singular.

    Args:
        ours: ``[N, D]``, at least two rows.
        theirs: ``[M, D]``, at least two rows.

    Raises:
        ValueError: fewer than two rows, or different D.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if min(len(ours), len(theirs)) < 2 or ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"need two or more rows of equal width, got {ours.shape} and {theirs.shape}")
    first, second = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root)
    shift = np.sum((ours.mean(0) - theirs.mean(0)) ** 2)
    overlap = 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(max(shift + np.trace(first) + np.trace(second) - overlap, 0.0))
