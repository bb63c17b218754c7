"""Frame quality (FQ), dynamic degree and likeness of frame 0: what the pixels say before any law is asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from vpae.data.bounce import World, empty_frame, render_frame
from vpae.judge.detect import Blob
from vpae.judge.scales import ramp

FOREGROUND = 24.0  # levels (L2) off the empty box from which a pixel counts as drawn: 6 sigma of a 32 dB codec's noise
HALO = 2  # px around the drawn region that belong to it: where a soft edge spills
DRAWN_FULL = 26.0  # dB on the drawn region: what is left there of a codec's 32 dB, most of whose error is at edges
DRAWN_ZERO = 12.0  # dB: the drawn region is off by a quarter of the range, no ball there is a disc of its colour
FRAME_FULL = 32.0  # dB on the whole frame: a good codec's; noise and haze of the background are seen here
FRAME_ZERO = 18.0  # dB: the same 14 dB of slope as the drawn region has
RING = 1.5  # px either side of a ball's contour over which its edge is measured; anti-aliasing is 1 px at any size
SHARP_FULL = 0.80  # share of the ideal edge's gradient: a codec's half-pixel softness keeps more than this
SHARP_ZERO = 0.15  # below it the edge is spread over 6 px, the radius of a ball
MOTION_BLUR = 1.5  # px at size 64: low-pass before differencing, takes white noise down fivefold and keeps ball edges
MOTION_FLOOR = 12.0  # levels (L2) a low-passed pixel may flicker without counting as motion
FLICKER = 3.0  # medians of the frame difference that count as flicker: balls cover less than half of the picture
PSNR_FLOOR = 1 / 12  # levels^2, the error of rounding to uint8: identical frames are given 58.9 dB, not infinity


def psnr(error: np.ndarray | float) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of a mean squared error in levels^2."""
    return 10 * np.log10(255.0**2 / np.maximum(error, PSNR_FLOOR))


def frame0_psnr(frames: np.ndarray, real: np.ndarray) -> float:
    """PSNR in dB of frame 0 against the given first frame; identical frames give 58.9 dB."""
    return float(psnr(np.mean((frames[0].astype(float) - real[0]) ** 2)))


def _rerender(world: World, blobs: Sequence[Blob], canvas: np.ndarray) -> np.ndarray:
    blobs = sorted(blobs, key=lambda b: b.mass)
    places = np.array([b.position for b in blobs]).reshape(-1, 2)
    radii = np.array([b.radius for b in blobs])
    return render_frame(world, tuple(b.colour for b in blobs), places, radii, canvas=canvas)


def _gradient(frame: np.ndarray) -> np.ndarray:
    return np.stack(np.gradient(frame, axis=(0, 1)), axis=-1)


def _edge_sharpness(frame: np.ndarray, ideal: np.ndarray, blobs: Sequence[Blob], owed: int) -> float:
    """Slope of the frame's gradient on the ideal gradient over each ball's ring; the balls' mean.

    Projecting on the ideal gradient counts what runs across the edge and not noise or texture along it.
    """
    if not blobs:
        return 0.0
    grid = np.arange(frame.shape[0]) + 0.5
    ours, theirs = _gradient(frame), _gradient(ideal)
    slopes = []
    for blob in blobs:
        distance = np.hypot(grid[None, :] - blob.position[0], grid[:, None] - blob.position[1])
        ring = np.abs(distance - blob.radius) <= RING
        edge = float(np.sum(theirs[ring] ** 2))
        # a ball lying wholly under another one has no edge of its own to be sharp
        slopes.append(float(np.sum(ours[ring] * theirs[ring])) / edge if edge else 0.0)
    # a slope above 1 is over-sharpening, as wrong as the same amount of softness
    return float(np.sum(np.maximum(1 - np.abs(1 - np.array(slopes)), 0))) / max(len(blobs), owed)


def frame_quality(
    frames: np.ndarray, blobs: Sequence[Sequence[Blob]], world: World, balls: int
) -> tuple[float, dict[str, float]]:
    """How far each frame is from being a clean picture of the balls detected in it.

    ``fidelity`` compares a frame with the re-rendering of its blobs by PSNR, once over the drawn region (what
    the re-rendering or the frame draws over the empty box, and a halo), so that neither a blurry ball can hide
    in the large right background, nor a smear that is no longer detected as a ball; and once over the frame,
    for the background's own noise; the worse counts. ``sharpness`` is the gradient
    across each ball's edge ring against the re-rendering's; a ball that the caption names and that is too
    faint to be detected has no edge and scores 0 there. A frame's quality is the geometric mean of the two, so
    that neither can be bought with the other; FQ is the mean over the frames.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        blobs: what :func:`vpae.judge.detect.detect_balls` found in each frame.
        balls: how many balls the caption names.

    Returns:
        FQ in 0..100, and the sub-scores ``fidelity`` and ``sharpness`` in 0..1.
    """
    canvas = empty_frame(world)
    fidelity, sharpness = np.empty(len(frames)), np.empty(len(frames))
    for t, (frame, seen) in enumerate(zip(frames.astype(float), blobs, strict=True)):
        ideal = _rerender(world, seen, canvas)
        error = np.mean((frame - ideal) ** 2, axis=-1)
        drawn = np.maximum(np.abs(ideal - canvas).max(-1), np.linalg.norm(frame - canvas, axis=-1)) > FOREGROUND
        drawn = ndimage.binary_dilation(drawn, iterations=HALO) if drawn.any() else ~drawn
        inside, overall = psnr(error[drawn].mean()), psnr(error.mean())
        fidelity[t] = min(ramp(inside, DRAWN_FULL, DRAWN_ZERO), ramp(overall, FRAME_FULL, FRAME_ZERO))
        sharpness[t] = ramp(_edge_sharpness(frame, ideal, seen, balls), SHARP_FULL, SHARP_ZERO)
    quality = 100 * float(np.mean(np.sqrt(fidelity * sharpness)))
    return quality, {"fidelity": float(fidelity.mean()), "sharpness": float(sharpness.mean())}


def _motion(frames: np.ndarray, world: World) -> float:
    smooth = ndimage.gaussian_filter(frames.astype(np.float32), (0, *[MOTION_BLUR * world.scale] * 2, 0), truncate=2.0)
    change = np.linalg.norm(np.diff(smooth, axis=0), axis=-1)
    flicker = np.median(change, axis=(1, 2), keepdims=True)
    return float(np.mean(np.where(change > np.maximum(MOTION_FLOOR, FLICKER * flicker), change, 0)))


def dynamic_degree(frames: np.ndarray, real: np.ndarray, world: World) -> float:
    """How much moves, relative to the simulator's clip: 1 for as much, 0 for a frozen clip.

    The mean change from frame to frame of the low-passed pixels, counting none that may be noise: below a
    fixed floor, or below three times the frame pair's median change where that is more (balls cover less than
    half of a picture, so the median is the background's flicker); divided by the same of the real clip.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        real: the simulator's frames, same shape.

    Returns:
        a ratio, not bounded above; NaN if nothing moves in the real clip.
    """
    still = _motion(real, world)
    return _motion(frames, world) / still if still else float("nan")
