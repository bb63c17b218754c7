from __future__ import annotations

import numpy as np
import pytest

from vpae.data.bounce import World, make_clip
from vpae.judge.detect import Blob
from vpae.judge.tracks import FIT_FRAMES, claim_tracks, contacts, flights, link, simulated_flights

WORLD = World()


def blob(x, y, colour="red", radius=6.0):
    return Blob(colour, (x, y), radius, np.pi * radius**2)


def test_link_follows_a_ball_through_a_gap_and_starts_a_second_track_for_a_ghost():
    frames = [[blob(10, 10)], [blob(12, 10), blob(50, 50)], [], [blob(48, 50), blob(16, 10)]]
    first, ghost = sorted(link(frames), key=lambda t: -int(t.present.sum()))
    assert first.present.tolist() == [True, True, False, True]
    assert np.allclose(first.positions[[0, 1, 3], 0], [10, 12, 16])
    assert ghost.present.tolist() == [False, True, False, True]
    assert np.allclose(ghost.positions[[1, 3], 0], [50, 48])


def test_contacts_flag_every_real_contact_and_little_else():
    hits, flagged, total = 0, 0, 0
    for index in range(150):
        clip = make_clip(WORLD, "test", index)
        walls, meetings = contacts(WORLD, clip.positions, clip.radii[0])
        possible = walls | meetings.any(-1)
        pull = np.array([0.0, WORLD.gravity * clip.gravity])
        turned = np.linalg.norm(np.diff(clip.velocities, axis=0) - pull, axis=-1) > 0.3
        assert not np.any(turned & ~possible), clip.name
        hits, flagged, total = hits + turned.sum(), flagged + possible.sum(), total + possible.size
    assert hits > 200
    assert flagged < 0.35 * total


def test_flights_measure_the_acceleration():
    for index in range(20):
        clip = make_clip(WORLD, "validation", index)
        pull = WORLD.gravity * clip.gravity
        fitted = [f for ball in simulated_flights(clip) for f in ball if f.information]
        for flight in fitted:
            assert flight.frames.stop - flight.frames.start >= FIT_FRAMES
            assert np.allclose(flight.acceleration, [0.0, pull], atol=1e-2)


def test_flights_end_at_contacts_and_at_missing_frames():
    positions = np.stack([np.arange(12.0), np.zeros(12)], -1)
    positions[8] = np.nan
    touching = np.zeros(11, bool)
    touching[2] = True
    assert [(f.frames.start, f.frames.stop) for f in flights(positions, touching)] == [(0, 3), (3, 8), (9, 12)]


def test_information_is_the_inverse_variance_of_the_fit():
    rng = np.random.default_rng(0)
    line = np.stack([np.arange(7.0), np.zeros(7)], -1)
    fits = [flights(line + rng.normal(0, 0.1, line.shape), np.zeros(6, bool))[0] for _ in range(3000)]
    spread = np.var([f.acceleration for f in fits])
    assert spread == pytest.approx(0.1**2 / fits[0].information, rel=0.1)


def test_unclaimed_track_stands_in_for_a_ball_of_another_colour():
    clip = next(c for c in (make_clip(WORLD, "test", i) for i in range(50)) if len(c.balls) == 2)
    other = next(c for c in ("red", "green", "blue") if c not in clip.colours)
    painted = (clip.colours[0], other)
    frames = [[blob(*p, colour=c) for p, c in zip(places, painted, strict=True)] for places in clip.positions]
    claimed = claim_tracks(link(frames), clip)
    assert [t.colour for t in claimed] == list(painted)
    assert np.allclose(claimed[1].positions, clip.positions[:, 1])
