"""The curves of the report: what is read from a log, and where it is drawn."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from vpae.report.curves import MOST_POINTS, PANELS, curve_path, draw_panel, read_curve, smooth, turn_axis, value_axis

# A student's turn in every three; two of its values are not finite.
LOG = [{"turn": t, "student/vsd": 0.5 - 0.001 * t} if t % 3 == 0 else {"turn": t, "other": 1.0} for t in range(60)]
LOG[9]["student/vsd"], LOG[21]["student/vsd"] = math.nan, math.inf


def test_curves_skip_what_is_not_finite():
    curve = read_curve(LOG, "student/vsd", "student")
    assert len(curve.turns) == 20  # the other player's turns are no gaps
    assert np.isnan(curve.values[[3, 7]]).all() and np.isfinite(np.delete(curve.values, [3, 7])).all()
    path = curve_path(curve, curve.values, turn_axis([curve]), value_axis([curve], ()))
    assert path.count("M") == 3 and path.count("M") + path.count("L") == 18 and "nan" not in path
    assert "h0" not in path
    lone = read_curve([{"turn": t, "x": v} for t, v in enumerate([math.nan, 1.0, math.nan])], "x", "x")
    assert curve_path(lone, lone.values, turn_axis([lone]), value_axis([lone], ())).endswith("h0")
    assert read_curve([{"turn": 0, "x": math.nan}], "x", "x") is None and read_curve(LOG, "absent", "x") is None


def test_curves_lie_where_the_axes_say():
    records = [{"turn": t, "student/c_sds": v} for t, v in ((0, 2.0), (50, 4.0), (100, 3.0))]
    curve = read_curve(records, "student/c_sds", "student")
    across, up = turn_axis([curve]), value_axis([curve], ())
    points = re.findall(r"[ML]([\d.]+) ([\d.]+)", curve_path(curve, curve.values, across, up))
    assert [float(x) for x, _ in points] == pytest.approx(
        [across.start, (across.start + across.end) / 2, across.end], abs=0.1
    )
    heights = [float(y) for _, y in points]
    assert heights[0] > heights[2] > heights[1]
    assert (heights[0] - heights[2]) == pytest.approx(heights[2] - heights[1], abs=0.11)
    assert all(up.low <= tick <= up.high for tick in up.ticks) and len(up.ticks) >= 3


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [-3.0], [1e-9, 1.0], [5e5, 5.1e5], [1e-20, 1e20], [-1.0, 1.0], [0.02, 3.0]]
)
def test_axes_hold_any_values(values):
    curve = read_curve([{"turn": 7 * i, "x": v} for i, v in enumerate(values)], "x", "x")
    axis = value_axis([curve], ())
    assert np.all(np.isfinite(axis(curve.values))) and axis.low < axis.high
    slack = 1e-9 * (abs(axis.low) + abs(axis.high))
    assert 1 < len(axis.ticks) <= 8
    assert axis.low - slack <= min(axis.ticks) and max(axis.ticks) <= axis.high + slack
    assert axis.logarithmic == (min(values) > 0 and max(values) > 100 * min(values))
    drawn = draw_panel(PANELS[0], [{"turn": 0, "student/vsd": v} for v in values], "p")
    ElementTree.fromstring(drawn)  # well formed


def test_long_logs_are_thinned_and_smoothed():
    rng = np.random.default_rng(0)
    records = [{"turn": t, "x": float(v)} for t, v in enumerate(rng.normal(3, 1, 10 * MOST_POINTS + 1))]
    curve = read_curve(records, "x", "x")
    assert MOST_POINTS * 0.8 < len(curve.values) <= MOST_POINTS and curve.values.mean() == pytest.approx(3, abs=0.1)
    line = smooth(curve.values)
    assert line.std() < 0.5 * curve.values.std() and line.mean() == pytest.approx(3, abs=0.1)
    ramp = np.arange(100.0)
    assert smooth(ramp)[10:-10] == pytest.approx(ramp[10:-10])  # centred: no lag
    ramp[50] = np.nan
    assert np.isnan(smooth(ramp)).nonzero()[0].tolist() == [50]
