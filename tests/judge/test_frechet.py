from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from vpae.data.bounce import World, make_clip
from vpae.judge.frechet import clip_features, frechet_distance

WORLD = World()
COUNT = 48


def features(split, change=lambda f: f, start=0):
    clips = (make_clip(WORLD, split, i) for i in range(start, start + COUNT))
    return np.stack([clip_features(change(c.frames)) for c in clips])


def blur(sigma):
    return lambda f: ndimage.gaussian_filter(f.astype(float), (0, sigma, sigma, 0)).round().astype(np.uint8)


@pytest.fixture(scope="module")
def real():
    return features("test")


def test_closed_form_of_two_normal_distributions():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    one, other = np.array([1.0, 2.0, 0.5, 0.0]), np.array([2.0, 0.3, 0.5, 1.0])  # a deviation of 0: singular
    white = rng.standard_normal((400, 4))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False)).T)  # exactly unit covariance
    shift = np.array([0.5, -1.0, 0.0, 2.0])
    expected = shift @ shift + np.sum((one - other) ** 2)
    distance = frechet_distance(white * one @ basis.T, (white * other + shift) @ basis.T)
    assert distance == pytest.approx(expected, rel=1e-6)


def test_zero_against_itself_and_symmetric(real):
    other = features("test", blur(1.0))
    assert frechet_distance(real, real) < 1e-9
    assert frechet_distance(real, other) == pytest.approx(frechet_distance(other, real), rel=1e-6)


def test_grows_with_blur_from_well_below_to_far_above_the_distance_of_other_seeds(real):
    seeds = frechet_distance(real, features("validation"))
    blurred = [frechet_distance(real, features("test", blur(s))) for s in (0.3, 0.6, 1.0, 1.5, 2.0, 3.0)]
    assert all(a < b for a, b in zip(blurred, blurred[1:], strict=False))
    assert seeds < 0.15
    assert blurred[0] < seeds < blurred[2] / 4
    assert blurred[4] > 10 * seeds


def test_sees_motion(real):
    frozen = features("test", lambda f: np.repeat(f[:1], len(f), axis=0))
    shuffled = features("test", lambda f: f[np.random.default_rng(0).permutation(len(f))])
    seeds = frechet_distance(real, features("validation"))
    assert frechet_distance(real, frozen) > 2 * seeds
    assert frechet_distance(real, shuffled) > 4 * seeds


def test_is_deterministic(real):
    assert np.array_equal(real[:4], np.stack([clip_features(make_clip(WORLD, "test", i).frames) for i in range(4)]))


def test_rejects_too_little():
    with pytest.raises(ValueError, match="at least"):
        clip_features(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="two or more rows"):
        frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
