"""The world is the yardstick of every score, so its laws are checked against textbook formulas, not against itself."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from vpae.data import bounce
from vpae.data.bounce import COLOURS, Ball, World, make_clip, read_caption, render, simulate

WORLD = World()
COUNT = 200
FINE = 600  # solver steps a frame at which a meeting is resolved to about 0.01 px; the world's own 60 give 0.1 px


@pytest.fixture(scope="module")
def clips():
    return [make_clip(WORLD, "test", i) for i in range(COUNT)]


def run(places, radii, velocities, gravity=False, **options):
    balls = tuple(Ball("red", "right", "fast", r, tuple(place)) for place, r in zip(places, radii, strict=True))
    return simulate(WORLD, balls, gravity, velocities=np.array(velocities, float), **options)


def near(actual, wanted, tolerance):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance)


def words(motions):
    return [(m.colour, m.direction, m.speed) for m in motions]


def cover(frame, colour, world=WORLD):
    """How much of each pixel a ball drawn alone hides, estimated from the pixels' colour."""
    change = np.array(COLOURS[colour]) - bounce.empty_frame(world)
    return ((frame - bounce.empty_frame(world)) * change).sum(-1) / (change**2).sum(-1)


def test_no_start_is_drawn_twice_within_or_across_splits():
    drawn = {split: [make_clip(World(num_frames=2), split, i) for i in range(COUNT)] for split in bounce.SPLITS}
    assert len({c.positions[0].tobytes() for made in drawn.values() for c in made}) == len(bounce.SPLITS) * COUNT
    for a, b in combinations(drawn.values(), 2):  # other places under the same words would still be a leak
        assert sum(x.caption == y.caption for x, y in zip(a, b, strict=True)) <= 2


def test_a_clip_does_not_depend_on_the_clips_made_before_it(clips):
    for i in (137, 3, 41, 0, 199, 3):
        make_clip(WORLD, "train", i + 1)
        again = make_clip(WORLD, "test", i)
        assert (again.name, again.caption) == (f"test-{i:06d}", clips[i].caption)
        for part in ("positions", "velocities", "radii", "frames"):
            assert np.array_equal(getattr(again, part), getattr(clips[i], part))


def test_another_process_makes_the_same_clips(clips):
    code = "from vpae.data.bounce import *\nfor i in 5, 4: print(make_clip(World(), 'test', i).positions.tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}  # a seed made with hash() would hold in one process only
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert made.stdout.splitlines() == [str(clips[i].positions.tolist()) for i in (5, 4)]


def test_an_unknown_split_or_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="unknown split 'val'; Bounce has train, validation, test"):
        make_clip(WORLD, "val", 0)
    with pytest.raises(ValueError, match="index starts at 0, got -1"):
        make_clip(WORLD, "test", -1)


def test_every_word_comes_up_and_each_law_in_its_share(clips):
    said = zip(*(said for c in clips for said in words(c.balls)), strict=True)
    assert [set(kind) for kind in said] == [set(COLOURS), set(bounce.DIRECTIONS), set(WORLD.speeds)]
    counts = np.bincount([len(c.balls) for c in clips], minlength=4)[1:] / COUNT
    near([*counts, np.mean([c.gravity for c in clips])], [*WORLD.ball_counts, 0.5], 0.11)  # three standard deviations


def test_reading_a_caption_inverts_writing_it(clips):
    text = "A red ball moves right fast. A blue ball moves up-left slowly. "
    balls = (Ball("red", "right", "fast", 5.0, (20.0, 20.0)), Ball("blue", "up-left", "slowly", 5.0, (40.0, 40.0)))
    assert bounce.write_caption(balls, False) == text + "No gravity."
    assert bounce.write_caption(balls, True) == text + "Gravity pulls down."
    other = World(num_frames=2, speeds={"dead": 0.0, "brisk": 2.5}, ball_counts=(0, 0, 0, 0, 0, 1.0))
    for clip in [*clips, *(make_clip(other, "train", i) for i in range(10))]:
        motions, gravity = read_caption(clip.caption)
        assert (words(motions), gravity) == (words(clip.balls), clip.gravity)


def test_what_is_no_caption_is_refused_and_quoted():
    wrong = ["A pink ball moves up fast", "A red ball moves sideways fast", "A red cube moves up fast"]
    wrong += ["A red ball moves up", "A red ball moves up very fast", "No gravity. A red ball moves up fast", "Hello"]
    wrong += ["A red ball moves up fast. A red ball moves down fast"]
    for text in [
        "",
        "No gravity.",
        "A red ball moves up fast.",
        "Gravity pulls up.",
        *(f"{start}. No gravity." for start in wrong),
    ]:
        with pytest.raises(ValueError, match="not a Bounce caption") as refusal:
            read_caption(text)
        assert repr(text) in str(refusal.value)
    with pytest.raises(ValueError, match="no speed is called 'quickly' in this world; it has slowly, steadily, fast"):
        bounce.initial_velocity(World(), bounce.Motion("red", "up", "quickly"))


def test_the_words_mean_what_they_say_on_a_screen_whose_y_points_down(clips):
    for clip in clips:
        for (_, way, speed), velocity in zip(words(clip.balls), clip.velocities[0], strict=True):
            signs = np.array([("right" in way) - ("left" in way), ("down" in way) - ("up" in way)])
            wanted = signs * {"slowly": 1, "steadily": 2, "fast": 3}[speed] / np.linalg.norm(signs)
            near(velocity, wanted, 1e-12)


def test_caption_and_frame_0_determine_the_future(clips):
    for clip in clips:
        motions, gravity = read_caption(clip.caption)
        assert len({m.colour for m in motions}) == len(motions)  # the colour is what ties a sentence to a ball
        columns, rows = np.floor(clip.positions[0]).astype(int).T
        assert [tuple(pixel) for pixel in clip.frames[0, rows, columns]] == [COLOURS[m.colour] for m in motions]
        start = zip(words(motions), clip.radii[0], clip.positions[0], strict=True)
        positions, velocities = simulate(WORLD, tuple(Ball(*w, r, tuple(p)) for w, r, p in start), gravity)
        near(positions, clip.positions, 1e-9)
        near(velocities, clip.velocities, 1e-9)


@pytest.mark.parametrize("start, velocity", [((20.3, 33.1), (3, 0)), ((14, 50), (-1.7, 2.3)), ((30, 9.5), (-0.6, -2))])
def test_walls_reflect_a_free_ball_as_a_mirror_does(start, velocity):
    positions, velocities = run([start], [6], [velocity], num_frames=33, substeps=FINE)
    low, room = 8, 48  # a centre lies between 2 + 6 and 62 - 6
    unfolded = np.array(start) - low + np.arange(33)[:, None] * velocity
    near(positions[:, 0], low + np.abs((unfolded + room) % (2 * room) - room), 0.012)
    near(np.abs(velocities[:, 0]), np.broadcast_to(np.abs(velocity), (33, 2)), 1e-9)


def test_gravity_bends_the_course_into_the_textbook_parabola():
    t = np.arange(13)
    positions, velocities = run([(15, 25)], [6], [(1.5, -1)], gravity=True, num_frames=13)
    near(positions[:, 0, 0], 15 + 1.5 * t, 1e-9)
    near(positions[:, 0, 1], 25 - t + 0.25 * t**2 / 2, 0.03)  # the solver is behind by g t / (2 substeps)
    near(velocities[:, 0, 1], 0.25 * t - 1, 1e-9)


@pytest.mark.parametrize("radii", [(6, 6), (5, 8), (8, 5)])
@pytest.mark.parametrize("v1, v2, second", [((2, 0), (-1, 0), (36.3, 30)), ((2, 0.5), (0, -1), (33.3, 36))])
def test_balls_meet_as_elastic_bodies_of_mass_r_squared(radii, v1, v2, second):
    first, second, v1, v2 = (np.array(a, float) for a in ((20, 30), second, v1, v2))
    apart, closing, (m1, m2) = first - second, v1 - v2, np.square(radii)
    a, b, c = closing @ closing, apart @ closing, apart @ apart - sum(radii) ** 2
    hit = (-b - np.sqrt(b * b - a * c)) / a
    normal = (apart + closing * hit) / sum(radii)
    push = 2 * m1 * m2 / (m1 + m2) * (closing @ normal) * normal
    w1, w2 = v1 - push / m1, v2 + push / m2
    before, after = np.minimum(np.arange(7), hit)[:, None], np.maximum(np.arange(7) - hit, 0)[:, None]
    wanted = np.stack([first + v1 * before + w1 * after, second + v2 * before + w2 * after], axis=1)
    for substeps, tolerance in ((60, 0.1), (FINE, 0.01)):
        positions, velocities = run([first, second], radii, [v1, v2], num_frames=7, substeps=substeps)
        near(positions, wanted, tolerance)
    near(velocities[-1], [w1, w2], 2e-3)


def test_energy_outlives_many_meetings():
    meetings = {True: 0, False: 0}
    for clip in (make_clip(World(num_frames=65, ball_counts=(0, 0, 1.0)), "test", i) for i in range(12)):
        kinetic = clip.radii**2 * (clip.velocities**2).sum(-1) / 2
        energy = kinetic - 0.25 * clip.gravity * clip.radii**2 * clip.positions[..., 1]
        energy /= kinetic.sum(1).max()
        # Walls and gravity keep each ball's own energy up to the solver's error: a jump is a meeting.
        meetings[clip.gravity] += int((np.abs(np.diff(energy, axis=0)).max(1) > 0.02).sum())
        assert np.ptp(energy.sum(1)) < (0.01 if clip.gravity else 1e-9), clip.name
    assert min(meetings.values()) >= 10


def test_balls_stay_in_the_box_and_out_of_each_other(clips):
    tolerance = 0.1  # px: the way of the fastest ball in one solver step
    for clip in clips:
        radii = clip.radii[..., None]
        assert (clip.positions - radii).min() > 2 - tolerance and (clip.positions + radii).max() < 62 + tolerance
        for i, j in combinations(range(len(clip.balls)), 2):
            gap = np.linalg.norm(clip.positions[:, i] - clip.positions[:, j], axis=-1) - clip.radii[0, [i, j]].sum()
            assert gap[0] > 2 and gap.min() > -tolerance, clip.name


def test_a_ball_hides_its_area_and_sits_where_it_is_to_a_fraction_of_a_pixel():
    rng, grid = np.random.default_rng(0), np.arange(64) + 0.5
    for colour, radius in zip(COLOURS, (5, 5.3, 6, 6.7, 7.4, 8), strict=True):
        places = rng.uniform(31, 33, (12, 1, 2))
        for frame, place in zip(render(WORLD, (colour,), places, np.full((12, 1), radius)), places[:, 0], strict=True):
            hidden = cover(frame, colour)
            assert hidden.sum() == pytest.approx(np.pi * radius**2, rel=0.01)
            near(np.array([hidden.sum(0) @ grid, hidden.sum(1) @ grid]) / hidden.sum(), place, 0.03)


def test_frames_keep_no_trace_of_one_another_and_radius_0_draws_nothing(clips):
    clip = max(clips, key=lambda c: np.abs(c.positions[-1] - c.positions[0]).max())
    alone = bounce.render_frame(WORLD, clip.colours, clip.positions[-1], clip.radii[-1])
    assert np.array_equal(clip.frames[-1], alone.round())
    nothing = bounce.render_frame(WORLD, clip.colours, clip.positions[-1], 0 * clip.radii[-1])
    assert np.array_equal(nothing, bounce.empty_frame(WORLD))


def test_size_and_length_are_parameters():
    clips = [make_clip(World(size=96, num_frames=9), "validation", i) for i in range(20)]
    for clip in clips:
        assert (clip.frames.shape, clip.frames.dtype) == ((9, 96, 96, 3), np.uint8)
        shapes = [part.shape for part in (clip.positions, clip.velocities, clip.radii[..., None])]
        assert shapes == [(9, len(clip.balls), width) for width in (2, 2, 1)]
        assert 7.5 <= clip.radii.min() and clip.radii.max() <= 12
        low, high = clip.positions - clip.radii[..., None], clip.positions + clip.radii[..., None]
        assert low.min() > 2.85 and high.max() < 93.15
    starts = np.concatenate([clip.positions[0] for clip in clips])
    assert starts.min() < 20 and starts.max() > 76  # the balls start all over the larger box


def test_a_larger_world_is_the_same_world_magnified():
    def course(size, gravity):
        scale, kinds = size / 64, (("red", "right", "fast", 6, 20, 30), ("blue", "up-left", "steadily", 8, 45, 40))
        balls = tuple(Ball(*said, r * scale, (x * scale, y * scale)) for *said, r, x, y in kinds)
        return np.stack(simulate(World(size=size), balls, gravity)) / scale

    for gravity in (False, True):
        near(course(192, gravity), course(64, gravity), 0.01)


@pytest.mark.parametrize("size", [64, 96])
def test_the_wall_that_is_drawn_is_the_wall_that_is_met(size):
    world, edge, radius = World(size=size), size // 32, size / 10
    way = 3.0 * world.scale  # of a fast ball in one frame: frame 1 shows the moment of touching
    start = (Ball("red", "right", "fast", radius, (size - edge - radius - way, size / 2 + 0.5)),)
    positions, _ = simulate(world, start, False, substeps=FINE)
    near(positions[2, 0], start[0].position, 0.02)  # turned there, neither before nor after
    frame = render(world, ("red",), positions[1:2], np.array([[radius]]))[0]
    wall = np.all(bounce.empty_frame(world)[size // 2] == bounce.WALL, axis=-1)
    assert wall[:edge].all() and wall[-edge:].all() and wall.sum() == 2 * edge
    hidden = cover(frame, "red", world)[size // 2]
    assert hidden[wall].max() < 0.02 and hidden[-edge - 1] > 0.95


def test_a_wall_that_ends_inside_a_pixel_covers_its_part_of_it():
    world = World(size=48)  # a wall of 1.5 px
    row = bounce.empty_frame(world)[24]
    near(row[0], bounce.WALL, 1e-9)
    near(row[1], (np.array(bounce.WALL, float) + np.array(bounce.BACKGROUND, float)) / 2, 1e-9)
    near(row[2], bounce.BACKGROUND, 1e-9)


def test_a_recipe_may_not_turn_gravity_upside_down():
    """The captions say that it pulls down; only the counterfactual clips flip it."""
    with pytest.raises(ValueError, match="gravity is -0.25; it has to be a number of px/frame"):
        World.from_dict({"gravity": -0.25})
    assert World.from_dict({"gravity": 0}).gravity == 0
