"""From blobs to trajectories, and what a trajectory says of the law of motion: contacts, free flights, fits.

Everything is measured on the trajectories it is given, be they detected in a generated clip or simulated.
Units are px and frames, y points down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import maximum_filter1d
from scipy.optimize import linear_sum_assignment

from vpae.data.bounce import Clip, World
from vpae.judge.detect import Blob

CONTACT_MARGIN = 0.75  # px at size 64 of path a contact may be missed by: position error of a good model's two frames
FIT_FRAMES = 5  # shortest flight whose acceleration is fitted: with 4 frames the fit's error equals the jitter itself


@dataclass(frozen=True)
class Track:
    """One ball through the clip; a row is NaN in the frames where the ball is missing.

    Attributes:
        colour: palette name.
        positions: float64 ``[F, 2]``, px.
        radii: float64 ``[F]``, px.
    """

    colour: str
    positions: np.ndarray
    radii: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """bool ``[F]``."""
        return np.isfinite(self.radii)

    @property
    def radius(self) -> float:
        """The ball's usual radius, px."""
        return float(np.nanmedian(self.radii))


@dataclass(frozen=True)
class Flight:
    """A contact-free run of one ball.

    Attributes:
        frames: the frames it covers.
        acceleration: ``[2]`` of the least-squares parabola, px/frame^2; NaN if shorter than :data:`FIT_FRAMES`.
        information: inverse variance of the acceleration for unit position noise, the weight it deserves.
    """

    frames: slice
    acceleration: np.ndarray
    information: float


def link(blobs: Sequence[Sequence[Blob]]) -> list[Track]:
    """Join the blobs of one colour into tracks, each blob to the track that was last seen nearest to it.

    A colour has as many tracks as it has blobs in its fullest frame: a blob that is missing for a while and
    comes back anywhere is the same ball, since a colour names a ball in this world.
    """
    tracks: list[Track] = []
    for colour in sorted({b.colour for frame in blobs for b in frame}):
        started: list[tuple[np.ndarray, np.ndarray]] = []
        last: list[np.ndarray] = []
        for t, frame in enumerate(blobs):
            seen = [b for b in frame if b.colour == colour]
            if not seen:
                continue
            places = np.array([b.position for b in seen])
            left = set(range(len(seen)))
            if last:
                cost = np.linalg.norm(np.array(last)[:, None] - places[None], axis=-1)
                for track, blob in zip(*linear_sum_assignment(cost), strict=True):
                    started[track][0][t], started[track][1][t] = places[blob], seen[blob].radius
                    last[track] = places[blob]
                    left.discard(int(blob))
            for blob in sorted(left):
                positions, radii = np.full((len(blobs), 2), np.nan), np.full(len(blobs), np.nan)
                positions[t], radii[t] = places[blob], seen[blob].radius
                started.append((positions, radii))
                last.append(places[blob])
        tracks += [Track(colour, p, r) for p, r in started]
    return tracks


def _nearby_speed(speed: np.ndarray) -> np.ndarray:
    """For each interval the largest speed within two intervals of it: ``[F-1, ...]``, missing ones left out.

    An interval with a contact in it shows too short a step, so its neighbours say how fast the ball came; two
    on either side, because the very next may hold another contact.
    """
    speed = np.nan_to_num(speed, nan=0.0)
    return maximum_filter1d(speed, size=5, axis=0, mode="nearest")


def contacts(world: World, positions: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals between frames in which a contact is possible, judged by the trajectories themselves.

    In the frame interval of a contact a ball uses up its gap to the obstacle before and after it, so the two
    gaps sum to the path of one interval. A contact is possible where the sum is no larger than the steps of the
    intervals nearby plus :data:`CONTACT_MARGIN`.

    Args:
        positions: ``[F, N, 2]``; NaN where a ball is missing, which gives no contact.
        radii: ``[N]``, px.

    Returns:
        bool ``[F-1, N]``, contact with a wall, and bool ``[F-1, N, N]``, contact of two balls.
    """
    lo, hi = world.wall * world.scale, world.size - world.wall * world.scale
    margin = CONTACT_MARGIN * world.scale
    reach = np.asarray(radii)[:, None]
    gaps = np.stack([positions - reach - lo, hi - positions - reach], axis=-1)  # [F, N, axis, side]
    path = np.maximum(gaps[:-1], 0) + np.maximum(gaps[1:], 0)
    step = np.diff(positions, axis=0)
    with np.errstate(invalid="ignore"):
        at_wall = (path <= _nearby_speed(np.abs(step))[..., None] + margin).any((2, 3))
        apart = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1) - (reach + reach.T)
        closing = _nearby_speed(np.linalg.norm(step[:, :, None] - step[:, None], axis=-1))
        speed = _nearby_speed(np.linalg.norm(step, axis=-1))
        # a wall met in the same interval may turn a ball towards the other: then only the speeds themselves bind
        turned = at_wall[:, :, None] | at_wall[:, None]
        closing = np.where(turned, speed[:, :, None] + speed[:, None], closing)
        path = np.maximum(apart[:-1], 0) + np.maximum(apart[1:], 0)
        meeting = path <= closing + margin
    meeting[:, np.arange(len(radii)), np.arange(len(radii))] = False
    return at_wall, meeting


def flights(positions: np.ndarray, touching: np.ndarray) -> list[Flight]:
    """Split one ball's trajectory into its contact-free runs of at least two frames.

    Args:
        positions: ``[F, 2]``, NaN where missing; a missing frame ends a run.
        touching: bool ``[F-1]``, the intervals with a contact.
    """
    present = np.isfinite(positions).all(-1)
    free = np.concatenate([[False], present[:-1] & present[1:] & ~touching, [False]])
    starts, stops = np.flatnonzero(free[1:] & ~free[:-1]), np.flatnonzero(free[:-1] & ~free[1:])
    return [_fit(positions, slice(int(a), int(b) + 1)) for a, b in zip(starts, stops, strict=True)]


def _fit(positions: np.ndarray, frames: slice) -> Flight:
    length = frames.stop - frames.start
    if length < FIT_FRAMES:
        return Flight(frames, np.full(2, np.nan), 0.0)
    t = np.arange(length) - (length - 1) / 2
    curve = t**2 - np.mean(t**2)  # orthogonal to constant and slope, so the parabola's coefficient is a projection
    information = float(curve @ curve)
    return Flight(frames, 2 * (curve @ positions[frames]) / information, information / 4)


def count_agreement(blobs: Sequence[Sequence[Blob]], colours: Sequence[str]) -> float:
    """Balls in common over balls in either (Jaccard, with multiplicity) of each frame with ``colours``; mean."""
    promised = Counter(colours)
    seen = [Counter(b.colour for b in frame) for frame in blobs]
    return float(np.mean([(s & promised).total() / max((s | promised).total(), 1) for s in seen]))


def captioned_tracks(tracks: Sequence[Track], clip: Clip) -> list[Track | None]:
    """The track of each captioned ball, by colour; of several the longest, then the one that starts nearest."""
    chosen: list[Track | None] = []
    for ball in clip.balls:
        same = [t for t in tracks if t.colour == ball.colour]
        chosen.append(max(same, key=lambda t: (int(t.present.sum()), -_start_distance(t, ball.position)), default=None))
    return chosen


def _start_distance(track: Track, position: tuple[float, float]) -> float:
    return float(np.linalg.norm(track.positions[np.argmax(track.present)] - position))


def claim_tracks(tracks: Sequence[Track], clip: Clip) -> list[Track | None]:
    """The track of each captioned ball, by colour, else the unclaimed track that starts nearest to the ball.

    Coherence is about motion: a ball that is consistently of another colour is the same ball, wrongly painted.
    """
    claimed = captioned_tracks(tracks, clip)
    free = [t for t in tracks if all(t is not c for c in claimed)]
    empty = [i for i, t in enumerate(claimed) if t is None]
    if free and empty:
        starts = np.array([t.positions[np.argmax(t.present)] for t in free])
        wanted = np.array([clip.balls[i].position for i in empty])
        rows, columns = linear_sum_assignment(np.linalg.norm(wanted[:, None] - starts[None], axis=-1))
        for row, column in zip(rows, columns, strict=True):
            claimed[empty[row]] = free[column]
    return claimed


def simulated_flights(clip: Clip) -> list[list[Flight]]:
    """Contact-free runs of each ball in the simulator's own trajectories."""
    walls, meetings = contacts(clip.world, clip.positions, clip.radii[0])
    touching = walls | meetings.any(-1)
    return [flights(clip.positions[:, i], touching[:, i]) for i in range(len(clip.balls))]


def detected_flights(tracks: Sequence[Track | None], clip: Clip) -> list[list[Flight]]:
    """Contact-free runs of each track, judged by the detected trajectories; none for a missing track."""
    places = np.full(clip.positions.shape, np.nan)
    radii = clip.radii[0].copy()
    for i, track in enumerate(tracks):
        if track is not None:
            places[:, i], radii[i] = track.positions, track.radius
    walls, meetings = contacts(clip.world, places, radii)
    touching = walls | meetings.any(-1)
    return [flights(places[:, i], touching[:, i]) for i in range(len(tracks))]
