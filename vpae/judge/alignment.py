"""Semantic alignment (SA): does the clip show what the caption and frame 0 promise?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vpae.data.bounce import Clip, initial_velocity, read_caption
from vpae.judge.detect import Blob
from vpae.judge.scales import owed, ramp, weighted
from vpae.judge.tracks import Flight, Track, count_agreement, detected_flights, simulated_flights

WEIGHTS = {"direction": 0.35, "speed": 0.15, "law": 0.20, "kept": 0.30}  # direction is most of what a caption says
AIM_FRAMES = 8  # frames of the first flight that tell direction and speed: half a clip, before small errors add up
AIM_FULL = 10.0  # degrees: 1 px aside over the 6 px that a slow ball flies meanwhile
AIM_ZERO = 45.0  # degrees: the neighbouring direction word is the right one
MOVES = (0.4, 0.1)  # share of the simulator's spread in space from which a ball moves, and below which it stands
PACE_FULL = 0.20  # of the gap to the nearest other speed word: 1 px short over a first flight
PACE_ZERO = 0.80  # of that gap: clearly nearer to the other word, and still a slope beyond the middle
LAW_FULL = 0.25  # of gravity: what a good model's jitter leaves of uncertainty in a flight of half a clip
LAW_ZERO = 0.75  # of gravity: clearly nearer to the other law
RADIUS_FULL = 0.06  # relative change of a radius that a codec's blur may cause
RADIUS_ZERO = 0.30  # relative: half the area is gone
MISSING = 0.25  # of the picture's edge: what a missing ball costs the trajectory error, half a random guess's error


def trajectory_error(tracks: Sequence[Track | None], clip: Clip) -> float:
    """Mean over balls and frames of the distance, px, between detected and simulated centre.

    A ball that is missing in a frame counts with a quarter of the picture's edge (:data:`MISSING`).
    """
    errors = np.full(clip.positions.shape[:2], MISSING * clip.world.size)
    for i, track in enumerate(tracks):
        if track is not None:
            errors[track.present, i] = np.linalg.norm(track.positions - clip.positions[:, i], axis=-1)[track.present]
    return float(errors.mean())


def _first_velocity(track: Track, run: slice, gravity: np.ndarray) -> np.ndarray | None:
    """Least-squares velocity at the run's start, ``[2]``, given the acceleration; None below two sightings."""
    seen = np.flatnonzero(track.present[run])
    if len(seen) < 2:
        return None
    fallen = track.positions[run][seen] - 0.5 * gravity * seen[:, None] ** 2
    centred = seen - seen.mean()
    return centred @ fallen / (centred @ centred)


def _spread(positions: np.ndarray) -> float:
    """Root mean squared distance, px, of a run's sightings from their middle: about 0 if the ball stands still."""
    seen = positions[np.isfinite(positions).all(-1)]
    return float(np.sqrt(np.mean(np.sum((seen - seen.mean(0)) ** 2, axis=-1))))


def _aim(clip: Clip, tracks: Sequence[Track | None], gravity: np.ndarray) -> tuple[float, float]:
    """Scores of direction and speed; NaN if the simulator's clip has no flight to judge them on."""
    motions, _ = read_caption(clip.caption)
    speeds = sorted(clip.world.speeds.values())
    gap = min((b - a for a, b in pairwise(speeds)), default=speeds[0]) * clip.world.scale
    directions, paces = [], []
    for i, (motion, runs) in enumerate(zip(motions, simulated_flights(clip), strict=True)):
        # a ball that starts against an obstacle shows its captioned motion in no interval: ask its first long flight
        first = next((f.frames for f in runs if f.frames.start == 0 or f.frames.stop - f.frames.start >= 3), None)
        if first is None:
            continue
        wanted = initial_velocity(clip.world, motion) if first.start == 0 else clip.velocities[first.start, i]
        run = slice(first.start, min(first.stop, first.start + AIM_FRAMES))
        found = None if tracks[i] is None else _first_velocity(tracks[i], run, gravity)
        if found is None:
            directions.append(0.0)
            paces.append(0.0)
            continue
        moves = ramp(_spread(tracks[i].positions[run]) / _spread(clip.positions[run, i]), *MOVES)
        speed, asked = np.linalg.norm(found), np.linalg.norm(wanted)
        cosine = found @ wanted / max(speed * asked, 1e-12)
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        directions.append(float(ramp(angle, AIM_FULL, AIM_ZERO) * moves))
        paces.append(float(ramp(abs(speed - asked) / gap, PACE_FULL, PACE_ZERO) * moves))
    if not directions:
        return float("nan"), float("nan")
    return float(np.mean(directions)), float(np.mean(paces))


def _law(clip: Clip, runs: Sequence[Sequence[Flight]], gravity: float) -> float:
    """Agreement of the pooled vertical acceleration of all flights with the captioned law."""
    unit = abs(clip.world.gravity) * clip.world.scale
    if not unit:  # a world in which both laws are the same
        return float("nan")
    found = [f for ball in runs for f in ball if f.information]
    missing = owed(found, any(f.information for ball in simulated_flights(clip) for f in ball))
    if missing is not None:
        return missing
    pull = np.average([f.acceleration[1] for f in found], weights=[f.information for f in found])
    return float(ramp(abs(pull - gravity) / unit, LAW_FULL, LAW_ZERO))


def _kept(tracks: Sequence[Track | None], clip: Clip) -> float:
    kept = np.zeros(clip.radii.shape)
    for i, track in enumerate(tracks):
        if track is not None:
            kept[:, i] = ramp(np.abs(track.radii / clip.radii[0, i] - 1), RADIUS_FULL, RADIUS_ZERO)
    return float(kept.mean())


def semantic_alignment(
    blobs: Sequence[Sequence[Blob]], tracks: Sequence[Track | None], clip: Clip
) -> tuple[float, dict[str, float]]:
    """Score what the caption says, and that the subject of frame 0 is kept.

    - ``count``: colours and number of balls, each frame's blobs against the caption.
    - ``direction`` and ``speed``: of the velocity fitted, with the captioned acceleration, to the frames before
      the first contact that the simulator predicts. A ball that stands still in them has no direction and no
      speed, whatever the captioned acceleration makes of the fit: 0 for both.
    - ``law``: the vertical acceleration pooled over all contact-free flights of the generated clip, against
      gravity or none as captioned.
    - ``kept``: each captioned ball keeps, in every frame, its colour and the radius of frame 0.

    SA is ``count`` times the weighted mean of the others (:data:`WEIGHTS`): without the balls there is nothing
    to align. What neither clip can show (no flight long enough) is left out; what only the simulator's clip can
    show scores 0.

    Args:
        blobs: the detected balls of each frame.
        tracks: for each captioned ball its track, see :func:`vpae.judge.tracks.captioned_tracks`.
        clip: the simulator's clip with the caption.

    Returns:
        SA in 0..100, and the sub-scores in 0..1 (NaN where left out).
    """
    motions, pulled = read_caption(clip.caption)
    gravity = clip.world.gravity * clip.world.scale * pulled
    direction, speed = _aim(clip, tracks, np.array([0.0, gravity]))
    parts = {
        "count": count_agreement(blobs, [m.colour for m in motions]),
        "direction": direction,
        "speed": speed,
        "law": _law(clip, detected_flights(tracks, clip), gravity),
        "kept": _kept(tracks, clip),
    }
    return 100 * parts["count"] * weighted(parts, WEIGHTS), parts
