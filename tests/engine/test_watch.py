"""The collapse alarm."""

from __future__ import annotations

import pytest
import torch

from vpae.draws import generator_of
from vpae.engine.watch import Watch, vital_signs
from vpae.errors import UserError
from vpae.recipe import Watch as Limits


def _clip():
    return torch.randn(4, 16, 5, 4, 4, generator=generator_of("watch")).cumsum(2)


def _limits(**changes):
    values = dict(action="warn", after_steps=10, patience=2, min_motion_ratio=0.5, max_motion_ratio=2.0)
    values |= dict(max_frame0_likeness=0.6, max_channel_drift=1.0, max_logit=20.0)
    return Limits(**(values | changes))


def test_signs_of_the_real_clip_itself_are_neutral():
    signs = vital_signs(_clip(), _clip())
    assert float(signs["motion_ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(signs["frame0_likeness"]) == pytest.approx(0, abs=1e-5)
    assert float(signs["channel_drift"]) == 0


def test_a_still_clip_a_drift_and_flicker_each_show():
    real = _clip()
    still = vital_signs(real[:, :, 1:2].expand_as(real), real)
    assert float(still["motion_ratio"]) == 0 and float(still["frame0_likeness"]) == pytest.approx(1)
    shifted = real.clone()
    shifted[:, 3] += 5 * real[:, 3].std()
    assert float(vital_signs(shifted, real)["channel_drift"]) > 4
    assert float(vital_signs(3 * real, real)["motion_ratio"]) == pytest.approx(9, rel=1e-4)


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_signs_are_finite_for_any_length(frames):
    clip = _clip()[:, :, :frames]
    assert all(torch.isfinite(v) for v in vital_signs(clip, clip).values())


def test_the_alarm_waits_for_patience_and_the_first_steps():
    watch = Watch(_limits())
    dying = {"motion_ratio": 0.1}
    assert watch.look(5, dying) == []
    assert watch.look(10, dying) == []
    assert "motion is dying" in watch.look(11, dying)[0]
    assert watch.look(12, dying) == []
    assert watch.look(13, {"motion_ratio": 1.0}) == [] and watch.look(14, dying) == []
    assert watch.look(15, dying)


def test_stop_stops():
    watch = Watch(_limits(action="stop", patience=1))
    with pytest.raises(UserError, match=r"step 20, logit_real 30: the head is saturated; stopped"):
        watch.look(20, {"logit_real": 30.0})


def test_a_run_resumed_in_collapse_stops_again_and_one_that_recovered_goes_on():
    first = Watch(_limits(action="stop"))
    first.look(20, {"motion_ratio": 0.1})
    with pytest.raises(UserError):
        first.look(21, {"motion_ratio": 0.1})
    for ratio, stops in ((0.1, True), (1.0, False)):
        resumed = Watch(_limits(action="stop"), first.state())
        if stops:
            with pytest.raises(UserError, match="step 22"):
                resumed.look(22, {"motion_ratio": ratio})
        else:
            assert resumed.look(22, {"motion_ratio": ratio}) == []


def test_head_and_student_are_watched_apart_and_samples_too():
    """The student's calm logit must not reset the count of the head's saturated one."""
    watch = Watch(_limits())
    for step in range(watch.limits.patience):
        alarms = watch.look(1000 + step, {"head/logit_fake": 1e6})
        alarms += watch.look(1000 + step, {"student/logit_fake": 0.0})
    assert len(alarms) == 1 and "head/logit_fake" in alarms[0]
    still = [watch.look(2000 + i, {"samples/motion_ratio_to_reference": 0.01}) for i in range(watch.limits.patience)]
    assert not any(still[:-1]) and "do not move" in still[-1][0]
