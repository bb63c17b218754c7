"""Which of the futures that a caption leaves open a clip has chosen.

Where a caption does not say how a ball moves, every direction and speed that the world has words for is right, and the
clip is to be judged by the future it shows. That one is simulated and takes the place of the simulator's own, so that
all scores mean what they mean where everything is said. A picture of all futures at once is near none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np

from vpae.data.bounce import DIRECTIONS, Ball, Clip, simulate
from vpae.judge.tracks import Track

_FIRST = 4  # frames that give the first guess: few balls meet so early
_FRAMES = 9  # what the choice is read from: half a clip, after which small errors have added up
_SUBSTEPS = 20  # of the simulator in the search; contacts are off by less than the choices differ
_KEPT = 6  # of the best guesses of each ball, which are tried with those of the ball it meets
_ROUNDS = 2  # over the balls: whom they meet depends on each other


def chosen_future(tracks: Sequence[Track | None], clip: Clip) -> Clip:
    """The simulator's clip of the future that the tracks show; the clip itself where everything is said.

    The words for the balls whose motion is unsaid are those whose simulation is nearest to the tracks in the mean
    distance over the first frames: a first guess for each ball alone, then the best of its guesses together with those
    of every other. A ball without a track keeps its own.

    Args:
        tracks: for each captioned ball its track, see :func:`vpae.judge.tracks.captioned_tracks`.
    """
    free = [i for i, ball in enumerate(clip.balls) if ball.colour in clip.unsaid and tracks[i] is not None]
    if not free:
        return replace(clip, unsaid=frozenset()) if clip.unsaid else clip
    balls, told = list(clip.balls), {}
    for i in free:
        choices = [replace(balls[i], direction=d, speed=s) for d, s in product(DIRECTIONS, clip.world.speeds)]
        told[i] = sorted(choices, key=lambda ball, i=i: _distance((ball,), (tracks[i],), clip, _FIRST))[:_KEPT]
        balls[i] = told[i][0]
    for i, j in (list(combinations(free, 2)) or [(free[0], free[0])]) * _ROUNDS:
        tried = [_with(balls, {j: b, i: a}) for a in told[i] for b in (told[j] if i != j else [a])]
        balls = min(tried, key=lambda these: _distance(these, tracks, clip, _FRAMES))
    positions, velocities = simulate(clip.world, tuple(balls), clip.gravity)
    return replace(clip, balls=tuple(balls), positions=positions, velocities=velocities, unsaid=frozenset())


def _with(balls: Sequence[Ball], changed: dict[int, Ball]) -> list[Ball]:
    return [changed.get(i, ball) for i, ball in enumerate(balls)]


def _distance(balls: Sequence[Ball], tracks: Sequence[Track | None], clip: Clip, frames: int) -> float:
    """Mean distance, px, of what is seen of the balls in the first frames from their simulation."""
    frames = min(frames, clip.world.num_frames)
    positions, _ = simulate(clip.world, tuple(balls), clip.gravity, num_frames=frames, substeps=_SUBSTEPS)
    places = [(i, track.positions[:frames]) for i, track in enumerate(tracks) if track is not None]
    gaps = np.concatenate([np.linalg.norm(place - positions[:, i], axis=-1) for i, place in places])
    gaps = gaps[np.isfinite(gaps)]
    return float(gaps.mean()) if len(gaps) else 0.0
