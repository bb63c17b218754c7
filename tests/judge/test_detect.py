from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import ndimage

from vpae.data.bounce import COLOURS, World, empty_frame, make_clip, render
from vpae.judge.detect import detect_balls

WORLD = World()


def draw(colours, positions, radii, world=WORLD):
    return render(world, tuple(colours), np.array([positions], float), np.array([radii], float))


def soften(frames, sigma=0.5, noise=4.0, seed=0):
    soft = ndimage.gaussian_filter(frames.astype(float), (0, sigma, sigma, 0))
    soft += np.random.default_rng(seed).normal(0, noise, soft.shape)
    return np.clip(soft.round(), 0, 255).astype(np.uint8)


def compare(clips, change):
    """Position and radius errors of every ball of every frame; all must be found and nothing else."""
    places, radii = [], []
    for clip in clips:
        for t, blobs in enumerate(detect_balls(change(clip.frames), clip.world)):
            assert sorted(b.colour for b in blobs) == sorted(clip.colours), f"{clip.name} frame {t}"
            for blob in blobs:
                i = clip.colours.index(blob.colour)
                places.append(np.linalg.norm(np.array(blob.position) - clip.positions[t, i]))
                radii.append(blob.radius - clip.radii[t, i])
    return np.array(places), np.array(radii)


@pytest.fixture(scope="module")
def clips():
    return [make_clip(WORLD, "test", i) for i in range(40)]


@pytest.mark.parametrize(
    ("change", "median", "largest"),
    [(lambda f: f, 0.01, 0.05), (soften, 0.02, 0.1), (lambda f: soften(f, 1.0, 8.0), 0.05, 0.3)],
    ids=["clean", "mild", "rough"],
)
def test_finds_every_ball_with_subpixel_precision(clips, change, median, largest):
    places, radii = compare(clips, change)
    assert np.median(places) < median
    assert places.max() < largest
    assert abs(np.median(radii)) < 0.05


@pytest.mark.parametrize("size", [32, 96])
def test_other_sizes(size):
    world = World(size=size)
    places, _ = compare([make_clip(world, "validation", i) for i in range(10)], lambda f: f)
    assert places.max() < 0.1


def test_touching_balls_of_any_two_colours():
    for k, (one, other) in enumerate(combinations(COLOURS, 2)):
        angle = 0.4 * k
        centre, towards = np.array([31.3, 32.6]), np.array([np.cos(angle), np.sin(angle)])
        positions = [centre, centre + 12.5 * towards]
        blobs = {b.colour: b for b in detect_balls(soften(draw([one, other], positions, [5.5, 7.0])), WORLD)[0]}
        assert set(blobs) == {one, other}
        for colour, position, radius in zip((one, other), positions, (5.5, 7.0), strict=True):
            assert np.linalg.norm(np.array(blobs[colour].position) - position) < 0.1
            assert abs(blobs[colour].radius - radius) < 0.1


def test_ball_against_the_walls():
    edge = WORLD.wall + 6.2
    for colour in COLOURS:
        (blob,) = detect_balls(draw([colour], [(edge, WORLD.size - edge)], [6.2]), WORLD)[0]
        assert np.allclose(blob.position, (edge, WORLD.size - edge), atol=0.05)
        assert abs(blob.radius - 6.2) < 0.05


@pytest.mark.parametrize("gap", [1.0, 2.0, 20.0])
def test_ghost_of_the_same_colour_is_a_second_blob(gap):
    positions = [(18.2, 30.4), (18.2 + 12.0 + gap, 30.4)]
    blobs = detect_balls(draw(["green", "green"], positions, [6.0, 6.0]), WORLD)[0]
    assert [b.colour for b in blobs] == ["green", "green"]
    found = sorted(b.position for b in blobs)
    assert np.allclose(found, positions, atol=0.05)


def test_nothing_where_nothing_is():
    empty = empty_frame(WORLD)[None].round().astype(np.uint8)
    noise = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    speck = empty.copy()
    speck[0, 30:34, 30:34] = COLOURS["red"]
    grey = np.full_like(empty, 128)
    for frames in (empty, soften(empty, noise=8.0), noise, speck, grey):
        assert not any(detect_balls(frames, WORLD))


def test_speck_rule_is_a_quarter_of_the_smallest_ball():
    small, large = draw(["blue"], [(30.0, 30.0)], [2.2]), draw(["blue"], [(30.0, 30.0)], [2.8])
    assert not any(detect_balls(small, WORLD))  # area 15 px^2, a quarter of the smallest ball is 19.6
    assert len(detect_balls(large, WORLD)[0]) == 1


def test_faint_ball_is_none_and_dim_ball_is_light():
    empty, full = empty_frame(WORLD), draw(["yellow"], [(30.0, 30.0)], [7.0])[0].astype(float)
    masses = []
    for strength in (0.4, 0.7, 1.0):
        mixed = (empty + strength * (full - empty)).round().astype(np.uint8)
        masses.append([b.mass for b in detect_balls(mixed[None], WORLD)[0]])
    assert masses[0] == []
    assert masses[1][0] == pytest.approx(0.7 * masses[2][0], rel=0.02)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 32, 32, 3), np.uint8)],
)
def test_rejects_other_pictures(frames):
    with pytest.raises(ValueError, match="uint8"):
        detect_balls(frames, WORLD)
