from __future__ import annotations

import numpy as np
import pytest

from vpae.data.bounce import COLOURS, World, make_clip
from vpae.data.counterfactual import KINDS, STRIDE, VISIBLE, Pair, make_pair
from vpae.errors import UserError

WORLD = World()
PAIRS = 8


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Pair]]:
    return {kind: [make_pair(WORLD, "test", index, kind) for index in range(PAIRS)] for kind in KINDS}


def others(pair: Pair) -> list[int]:
    return [b for b in range(len(pair.plausible.balls)) if b != pair.ball]


def accelerations(velocities: np.ndarray, pair: Pair) -> np.ndarray:
    """What is left of the change of velocity from frame to frame once gravity is taken off."""
    pull = np.array([0.0, WORLD.gravity if pair.plausible.gravity else 0.0])
    return np.abs(np.diff(velocities, axis=0) - pull).max(axis=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_same_before_and_visibly_other_from_the_frame_on(pairs, kind):
    for index, pair in enumerate(pairs[kind]):
        real, fake, frame = pair.plausible, pair.impossible, pair.frame
        assert pair.kind == kind and 4 <= frame <= 12
        assert real.index % STRIDE == index
        assert np.array_equal(real.frames, make_clip(WORLD, "test", real.index).frames)
        assert np.array_equal(real.frames[:frame], fake.frames[:frame])
        assert np.array_equal(real.positions[:frame], fake.positions[:frame])
        assert np.array_equal(real.radii[:frame], fake.radii[:frame])
        contrast = np.abs(real.frames[frame:].astype(int) - fake.frames[frame:]).max(axis=(1, 2, 3))
        assert contrast.min() >= VISIBLE
        assert fake.frames.shape == real.frames.shape and fake.frames.dtype == np.uint8
        assert fake.caption == real.caption


@pytest.mark.parametrize("kind", KINDS)
def test_reproducible(pairs, kind):
    again = make_pair(WORLD, "test", 1, kind)
    assert np.array_equal(again.impossible.frames, pairs[kind][1].impossible.frames)
    assert (again.frame, again.ball, again.name) == (pairs[kind][1].frame, pairs[kind][1].ball, pairs[kind][1].name)
    assert make_pair(WORLD, "test", KINDS.index(kind)).kind == kind


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "vanish"])
def test_all_balls_stay_in_the_box(pairs, kind):
    for pair in pairs[kind]:
        fake = pair.impossible
        assert np.all(fake.positions - fake.radii[..., None] > WORLD.wall - 0.3)
        assert np.all(fake.positions + fake.radii[..., None] < WORLD.size - WORLD.wall + 0.3)


def test_vanish(pairs):
    for pair in pairs["vanish"]:
        radii = pair.impossible.radii
        assert np.all(radii[: pair.frame] > 0) and np.all(radii[pair.frame :, pair.ball] == 0)
        assert np.all(radii[:, others(pair)] > 0)
        colour = np.array(COLOURS[pair.plausible.colours[pair.ball]])
        seen = np.all(pair.impossible.frames == colour, axis=-1).any(axis=(1, 2))
        assert seen[: pair.frame].all() and not seen[pair.frame :].any()


def test_teleport(pairs):
    for pair in pairs["teleport"]:
        fake, frame = pair.impossible, pair.frame
        jumps = np.linalg.norm(np.diff(fake.positions, axis=0), axis=-1)
        assert jumps[frame - 1, pair.ball] > WORLD.size / 4 - 6
        jumps[frame - 1, pair.ball] = 0
        assert jumps.max() < 8  # at most what gravity adds to the fastest word
        assert np.array_equal(fake.velocities[frame], pair.plausible.velocities[frame])


def test_colour_change(pairs):
    for pair in pairs["colour_change"]:
        fake, frame, ball = pair.impossible, pair.frame, pair.ball
        new = fake.colours[frame, ball]
        assert new not in pair.plausible.colours and set(fake.colours[frame:, ball]) == {new}
        assert np.array_equal(fake.positions, pair.plausible.positions)
        assert np.all(fake.colours[:, others(pair)] == np.array(pair.plausible.colours)[others(pair)])
        assert np.all(fake.frames == np.array(COLOURS[new]), axis=-1).any(axis=(1, 2))[frame:].all()


def test_size_change(pairs):
    ratios = set()
    for pair in pairs["size_change"]:
        fake, frame, ball = pair.impossible, pair.frame, pair.ball
        ratio = fake.radii[frame:, ball] / pair.plausible.radii[frame:, ball]
        ratios.add(round(float(ratio[0]), 3))
        assert np.ptp(ratio) == 0
        assert np.array_equal(fake.positions[frame], pair.plausible.positions[frame])
    assert ratios == {0.6, 1.5}


def test_gravity_flip(pairs):
    free = 0
    for pair in pairs["gravity_flip"]:
        assert pair.ball is None and pair.plausible.gravity
        change = np.diff(pair.impossible.velocities[pair.frame - 1 :], axis=0)
        smooth = np.abs(change[..., 0]) < 1e-6  # no contact in this frame: gravity alone
        pulls = change[..., 1][smooth & (np.abs(change[..., 1]) < 0.5)]
        assert np.allclose(pulls, -WORLD.gravity, atol=1e-6)
        free += len(pulls)
    assert free > 20


def test_pass_through(pairs):
    for pair in pairs["pass_through"]:
        real, fake, frame, ball = pair.plausible, pair.impossible, pair.frame, pair.ball
        struck = accelerations(real.velocities, pair)[frame - 1]
        assert struck[ball] > 0.1 and struck[others(pair)].max() > 0.1  # in the plausible version both are deflected
        for version, deepest in ((real, 0.1), (fake, 1.0)):
            gap = np.linalg.norm(version.positions[:, others(pair)] - version.positions[:, [ball]], axis=-1)
            depth = 1 - gap / (version.radii[:, others(pair)] + version.radii[:, [ball]])
            assert (depth.max() >= 0.5) == (version is fake) and depth.max() <= deepest
        wall = WORLD.wall + 1e-3
        x = fake.positions[frame - 1 : frame + 1, ball]
        radius = fake.radii[frame, ball]
        if np.all(x - radius > wall + 4) and np.all(x + radius < WORLD.size - wall - 4):
            assert accelerations(fake.velocities, pair)[frame - 1, ball] < 1e-9  # it runs on undeflected


def test_other_splits_and_worlds():
    small = World(size=32, num_frames=9, ball_counts=(0.5, 0.5))
    for kind in KINDS:
        one, two = make_pair(small, "train", 3, kind), make_pair(small, "validation", 3, kind)
        assert one.impossible.frames.shape == (9, 32, 32, 3)
        assert not np.array_equal(one.impossible.frames, two.impossible.frames)


def test_what_a_world_does_not_allow_is_said():
    with pytest.raises(UserError, match="pass_through"):
        make_pair(World(size=16, num_frames=5, ball_counts=(1.0,)), "test", 0, "pass_through")
    with pytest.raises(UserError, match="gravity_flip"):
        make_pair(World(size=16, num_frames=5, gravity=0.0), "test", 0, "gravity_flip")
    with pytest.raises(ValueError, match="vanish"):
        make_pair(WORLD, "test", 0, "explode")
