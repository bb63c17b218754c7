"""Where a caption leaves futures open, any of them is right, and their mean is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vpae.data.bounce import DIRECTIONS, Motion, World, make_clip, read_caption, render, simulate
from vpae.judge.detect import detect_balls
from vpae.judge.futures import chosen_future
from vpae.judge.judge import judge_clip
from vpae.judge.tracks import captioned_tracks, link

SILENT = World(unsaid=1.0)
COUNT = 12


@pytest.fixture(scope="module")
def clips():
    return [make_clip(SILENT, "test", i) for i in range(COUNT)]


def other_words(clip, seed=0):
    """The same first frame, and for every ball other words than the simulator drew."""
    rng = np.random.default_rng([seed, clip.index])
    told = []
    for ball in clip.balls:
        ways = [w for w in DIRECTIONS if w != ball.direction]
        told.append(replace(ball, direction=str(rng.choice(ways)), speed=str(rng.choice(list(SILENT.speeds)))))
    return tuple(told)


def film(clip, balls):
    positions, _ = simulate(clip.world, balls, clip.gravity)
    return render(clip.world, clip.colours, positions, clip.radii)


def means(scores):
    return np.mean([(s.sa, s.tc, s.fq, s.dynamic_degree) for s in scores], axis=0)


def test_silence_changes_captions_and_nothing_else(clips):
    half = World(unsaid=0.5)
    kept = []
    for clip in clips:
        open_, told = make_clip(half, "test", clip.index), make_clip(World(), "test", clip.index)
        assert (clip.frames == told.frames).all() and (open_.positions == told.positions).all()
        assert read_caption(clip.caption)[0] == tuple(Motion(c, None, None) for c in clip.colours)
        motions, gravity = read_caption(open_.caption)
        assert gravity == told.gravity
        for motion, ball in zip(motions, told.balls, strict=True):
            said = ball.colour not in open_.unsaid
            assert (motion.direction, motion.speed) == ((ball.direction, ball.speed) if said else (None, None))
            kept.append(said)
    assert 0.2 < np.mean(kept) < 0.8
    assert "unsaid" not in World().fingerprint() and half.fingerprint()["unsaid"] == 0.5


def test_another_future_is_found_and_judged_as_well_as_the_simulators_own(clips):
    own = means([judge_clip(clip.frames, clip) for clip in clips])
    other = means([judge_clip(film(clip, other_words(clip)), clip) for clip in clips])
    assert own[:3].min() > 97 and other[:3].min() > 97
    assert abs(own[3] - 1) < 0.02 and abs(other[3] - 1) < 0.02
    told = [
        replace(clip, unsaid=frozenset()) for clip in clips
    ]  # where the caption does say it, the same clip is wrong
    assert means([judge_clip(film(clip, other_words(clip)), clip) for clip in told])[0] < 70


def test_the_future_that_is_read_is_the_one_that_is_shown(clips):
    right = []
    for clip in clips:
        balls = other_words(clip)
        tracks = captioned_tracks(link(detect_balls(film(clip, balls), clip.world)), clip)
        found = chosen_future(tracks, clip)
        assert not found.unsaid
        right += [(a.direction, a.speed) == (b.direction, b.speed) for a, b in zip(found.balls, balls, strict=True)]
    assert np.mean(right) > 0.95  # of what a wall turns at once, two may look alike


def test_only_the_unsaid_may_choose(clips):
    clip = next(c for c in clips if len(c.balls) > 1)
    half = replace(clip, unsaid=frozenset([clip.balls[1].colour]))
    balls = (clip.balls[0], other_words(clip)[1], *clip.balls[2:])
    assert judge_clip(film(half, balls), half).sa > 90
    wrong = (other_words(clip)[0], *clip.balls[1:])
    assert judge_clip(film(half, wrong), half).parts["sa/direction"] < 0.8
    told = replace(clip, unsaid=frozenset())
    assert chosen_future([None] * len(clip.balls), told) is told


def test_the_mean_of_all_futures_and_a_frozen_clip_are_none(clips):
    blurred, still = [], []
    for clip in clips:
        films = [film(clip, other_words(clip, seed)).astype(float) for seed in range(8)]
        blurred.append(judge_clip(np.mean(films, axis=0).round().astype(np.uint8), clip))
        still.append(judge_clip(np.repeat(clip.frames[:1], len(clip.frames), axis=0), clip))
    assert means(blurred)[:3].mean() < 50
    sa, tc, fq, moves = means(still)
    assert (sa + tc + fq) / 3 < 60 and tc < 20 and moves < 0.05
