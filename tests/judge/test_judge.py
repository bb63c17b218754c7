"""Each distortion must fall on the axis it belongs to, and only what is right may score well."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vpae.data.bounce import (
    COLOURS,
    DIRECTIONS,
    Ball,
    Clip,
    World,
    initial_velocity,
    make_clip,
    render,
    simulate,
)
from vpae.errors import UserError
from vpae.judge.judge import MEASURES, judge_clip, judge_set, summarise

WORLD = World()
COUNT = 48


@pytest.fixture(scope="module")
def clips():
    return [make_clip(WORLD, "test", i) for i in range(COUNT)]


def rng_of(clip):
    return np.random.default_rng(clip.index)


def pixels(frames):
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def blur(sigma, noise=0.0):
    def change(clip):
        soft = ndimage.gaussian_filter(clip.frames.astype(float), (0, sigma, sigma, 0))
        return pixels(soft + rng_of(clip).normal(0, noise, soft.shape))

    return change


def jpeg(clip):
    frames = []
    for frame in clip.frames:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "JPEG", quality=75)
        frames.append(np.array(Image.open(stream)))
    return np.stack(frames)


def frozen(clip):
    return np.repeat(clip.frames[:1], len(clip.frames), axis=0)


def shuffled(clip):
    return clip.frames[rng_of(clip).permutation(len(clip.frames))]


def noise(clip):
    return rng_of(clip).integers(0, 256, clip.frames.shape).astype(np.uint8)


def motion(clip, velocities=None, gravity=None, jitter=0.0):
    """The clip with another course of events from the same first frame."""
    gravity = clip.gravity if gravity is None else gravity
    positions, _ = simulate(WORLD, clip.balls, gravity, velocities=velocities, substeps=20)
    positions[1:] += rng_of(clip).normal(0, jitter, positions[1:].shape)
    return render(WORLD, clip.colours, positions, clip.radii)


def scaled(factor):
    return lambda clip: motion(clip, factor * np.array([initial_velocity(WORLD, b) for b in clip.balls]))


def posterior_mean(clip, samples=16):
    """What a regression shows: the mean of the futures that frame 0 allows."""
    rng, total = rng_of(clip), 0.0
    for _ in range(samples):
        ways = np.array([DIRECTIONS[d] for d in rng.choice(list(DIRECTIONS), len(clip.balls))])
        speeds = rng.choice(list(WORLD.speeds.values()), (len(clip.balls), 1))
        total = total + motion(clip, ways * speeds, bool(rng.random() < 0.5)).astype(float)
    return pixels(total / samples)


def imperfect(clip):
    """A good generative model: about 1 px off its course at 31 dB."""
    rng = rng_of(clip)
    started = np.array([initial_velocity(WORLD, b) for b in clip.balls])
    frames = motion(clip, started * rng.normal(1, 0.06, (len(started), 1)), jitter=0.1).astype(float)
    soft = ndimage.gaussian_filter(frames, (0, 0.6, 0.6, 0))
    return pixels(soft + rng.normal(0, 4, soft.shape))


def scores(clips, change):
    return summarise([judge_clip(change(clip), clip) for clip in clips], float("nan")).values


def test_real_clips_score_high_one_by_one(clips):
    for clip in clips:
        judged = judge_clip(clip.frames, clip)
        assert min(judged.sa, judged.tc, judged.fq) >= 97, (clip.name, judged)
        assert judged.dynamic_degree == pytest.approx(1)
        assert judged.trajectory_error < 0.05
        assert judged.frame0_psnr > 58


@pytest.mark.parametrize("change", [blur(0.5, noise=4.0), jpeg, imperfect], ids=["vae", "jpeg", "imperfect"])
def test_good_clips_still_score_well(clips, change):
    judged = scores(clips, change)
    assert min(judged["sa"], judged["tc"], judged["fq"]) >= 90, judged
    assert 0.9 < judged["dynamic_degree"] < 1.1
    assert judged["trajectory_error"] < 1.5


def test_frozen_first_frame_cannot_score_well(clips):
    judged = scores(clips, frozen)
    assert judged["sa"] < 50
    assert judged["tc"] < 5
    assert judged["mean"] < 60
    assert judged["dynamic_degree"] < 0.01
    noisy = scores(clips, lambda c: pixels(frozen(c) + rng_of(c).normal(0, 4, c.frames.shape)))
    assert noisy["mean"] < 60
    assert noisy["dynamic_degree"] < 0.05


def test_a_frozen_ball_has_no_direction_whatever_the_law(clips):
    for clip in clips:
        parts = judge_clip(frozen(clip), clip).parts
        assert parts["sa/direction"] == parts["sa/speed"] == 0
        assert parts["sa/law"] == (0 if clip.gravity else 1)
        assert parts["tc/energy"] == 0


def test_temporal_shuffle_falls_on_tc_and_not_on_fq(clips):
    judged = scores(clips, shuffled)
    assert judged["tc"] < 20
    assert judged["fq"] > 99


def test_blur_falls_on_fq_and_by_degrees(clips):
    judged = [scores(clips[:16], blur(sigma)) for sigma in (0.5, 1.0, 1.5, 2.0)]
    quality = [j["fq"] for j in judged]
    assert quality[0] > 90 > 80 > quality[1] > quality[2] + 10 > quality[3] + 20
    assert quality[3] < 50
    assert judged[3]["sa"] > 95 and judged[3]["tc"] > 95


def test_noise_and_haze_of_the_background_fall_on_fq(clips):
    assert scores(clips[:8], blur(0.01, noise=16.0))["fq"] < 80
    assert scores(clips[:8], lambda c: pixels(c.frames + 16.0))["fq"] < 80


def test_posterior_mean_falls_on_fq_and_sa(clips):
    judged = scores(clips, posterior_mean)
    assert judged["fq"] < 40
    assert judged["sa"] < 40
    assert judged["tc"] < 40
    assert judged["dynamic_degree"] < 0.7


def test_noise_scores_nothing(clips):
    judged = scores(clips[:12], noise)
    assert max(judged["sa"], judged["tc"], judged["fq"]) < 15
    assert judged["dynamic_degree"] < 0.2  # noise is not motion
    assert judged["trajectory_error"] == WORLD.size / 4


def turned(clip):
    names = list(DIRECTIONS)
    shift = rng_of(clip).integers(1, 8, len(clip.balls))
    ways = [names[(names.index(b.direction) + int(k)) % 8] for b, k in zip(clip.balls, shift, strict=True)]
    return replace(clip, balls=tuple(replace(b, direction=w) for b, w in zip(clip.balls, ways, strict=True)))


def repainted(clip):
    names = list(COLOURS)
    return replace(clip, balls=tuple(replace(b, colour=names[(names.index(b.colour) + 1) % 6]) for b in clip.balls))


def unlawful(clip):
    return replace(clip, gravity=not clip.gravity)


def faster(clip):
    other = {"slowly": "steadily", "steadily": "fast", "fast": "steadily"}
    return replace(clip, balls=tuple(replace(b, speed=other[b.speed]) for b in clip.balls))


@pytest.mark.parametrize(
    ("recaption", "most", "part"),
    [
        (turned, 75, "sa/direction"),
        (unlawful, 75, "sa/law"),
        (repainted, 15, "sa/count"),
        (faster, 92, "sa/speed"),
    ],
)
def test_wrong_caption_falls_on_sa(clips, recaption, most, part):
    """The real frames under a caption that says something else."""
    judged = judge_set([c.frames for c in clips], [recaption(c) for c in clips])
    assert judged.values["sa"] < most
    assert judged.parts[part] < 0.25
    assert judged.values["fq"] > 80 if recaption is repainted else judged.values["fq"] > 99


def test_each_axis_has_a_slope(clips):
    """Slower and slower balls lose more and more, none of it on FQ."""
    judged = [scores(clips[:24], scaled(k)) for k in (0.9, 0.75, 0.6, 0.3)]
    for axis in ("sa", "tc", "mean"):
        values = [j[axis] for j in judged]
        assert all(a > b + 1 for a, b in zip(values, values[1:], strict=False)), (axis, values)
    assert judged[0]["mean"] > 90
    assert judged[3]["mean"] < 70


def staged(*balls):
    """A clip without gravity of these balls: ``(colour, direction, x, y)``, radius 6, 2 px/frame."""
    balls = tuple(Ball(c, d, "steadily", 6.0, (x, y)) for c, d, x, y in balls)
    positions, velocities = simulate(WORLD, balls, False)
    radii = np.full(positions.shape[:2], 6.0)
    return Clip(WORLD, "test", 0, balls, False, positions, velocities, radii)


LATER = np.arange(WORLD.num_frames) >= 8


def event(clip, **changes):
    return judge_clip(replace(clip, **changes).frames, clip)


def test_impossible_events_fall_in_a_single_clip():
    clip = staged(("red", "right", 14.0, 20.0))  # crosses the picture and touches nothing
    assert event(clip).tc > 99

    vanished = event(clip, radii=np.where(LATER[:, None], 0, clip.radii))
    assert vanished.parts["tc/permanence"] == 0
    assert vanished.parts["sa/kept"] == pytest.approx(8 / 17, abs=0.01)

    blinked = event(clip, radii=np.where(np.arange(WORLD.num_frames)[:, None] == 8, 0, clip.radii))
    assert blinked.parts["tc/steps"] == 1  # it came back where it should
    assert blinked.parts["tc/permanence"] == pytest.approx(1 - 2 / 17)

    teleported = event(clip, positions=clip.positions + 20.0 * LATER[:, None, None] * [0, 1])
    assert teleported.parts["tc/steps"] == pytest.approx(0.75, abs=0.01)

    reversed_ = event(
        clip, positions=np.where(LATER[:, None, None], 2 * clip.positions[8] - clip.positions, clip.positions)
    )
    assert reversed_.parts["tc/law"] == 0
    assert reversed_.parts["tc/energy"] == 1  # as fast as before: nothing but the law objects

    shaken = event(clip, positions=clip.positions + np.where(np.arange(17) % 2, 0.5, -0.5)[:, None, None])
    assert shaken.parts["tc/smoothness"] == 0
    assert shaken.parts["tc/law"] == 1  # on the whole a straight line

    stopped = event(clip, positions=np.where(LATER[:, None, None], clip.positions[8], clip.positions))
    assert stopped.parts["tc/energy"] < 0.7

    grown = event(clip, radii=np.where(LATER[:, None], 1.4 * clip.radii, clip.radii))
    assert grown.parts["sa/kept"] == pytest.approx(8 / 17, abs=0.01)

    for judged in (vanished, teleported, reversed_, stopped, shaken):
        assert judged.tc < 75
    assert grown.sa < 90


def test_balls_may_not_pass_through_each_other():
    clip = staged(("red", "right", 14.0, 30.0), ("blue", "left", 50.0, 30.0))
    assert event(clip).tc > 99
    ways = np.arange(WORLD.num_frames)[:, None] * [2.0, -2.0]
    through = np.stack([[14.0, 50.0] + ways, np.full(ways.shape, 30.0)], axis=-1)
    assert event(clip, positions=through).parts["tc/steps"] < 0.5


def test_a_ghost_falls_on_count_and_permanence():
    clip = staged(("red", "right", 14.0, 20.0))
    twin = np.concatenate([clip.positions, clip.positions + [0.0, 25.0]], axis=1)
    radii = np.stack([clip.radii[:, 0], np.where(LATER, 6.0, 0.0)], axis=1)
    judged = judge_clip(render(WORLD, ("red", "red"), twin, radii), clip)
    assert judged.parts["sa/count"] == pytest.approx((8 + 9 / 2) / 17, abs=0.01)
    assert judged.parts["tc/permanence"] < 0.5


def test_a_missing_ball_costs_a_quarter_of_the_picture(clips):
    clip = next(c for c in clips if len(c.balls) == 2)
    frames = render(WORLD, clip.colours[1:], clip.positions[:, 1:], clip.radii[:, 1:])
    judged = judge_clip(frames, clip)
    assert judged.trajectory_error == pytest.approx(WORLD.size / 4 / 2, abs=0.05)
    assert judged.sa < 50


def test_set_scores_are_means_with_standard_errors(clips):
    few = clips[:6]
    videos = [c.frames if i % 2 else frozen(c) for i, c in enumerate(few)]
    judged = judge_set(videos, few)
    table = [judge_clip(v, c) for v, c in zip(videos, few, strict=True)]
    for name in MEASURES:
        column = np.array([getattr(s, name) for s in table])
        assert judged.values[name] == pytest.approx(column.mean())
        assert judged.errors[name] == pytest.approx(column.std(ddof=1) / np.sqrt(6))
    assert judged.mean == pytest.approx(np.mean([judged.values[k] for k in ("sa", "tc", "fq")]))
    assert judged.frechet > 0
    assert judge_set([c.frames for c in few], few).frechet < 1e-9
    assert np.isnan(judge_set(videos[:1], few[:1]).frechet)


def test_bad_input_is_the_users_to_mend(clips):
    clip = clips[0]
    with pytest.raises(UserError, match="uint8 frames"):
        judge_clip(clip.frames.astype(np.float32), clip)
    with pytest.raises(UserError, match=r"got uint8 \[16, 64, 64, 3\]"):
        judge_clip(clip.frames[:16], clip)
    with pytest.raises(UserError, match="one video for each clip"):
        judge_set([clip.frames], clips[:2])
    with pytest.raises(UserError, match="one video for each clip"):
        judge_set([], [])
