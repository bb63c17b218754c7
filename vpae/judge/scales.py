"""From a measured quantity to a score between 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def ramp(value: np.ndarray | float, full: float, zero: float) -> np.ndarray:
    """1 up to ``full``, 0 from ``zero`` on and linear between; ``full`` may lie on either side of ``zero``.

    NaN, a quantity that could not be measured, scores 0.
    """
    score = np.clip((zero - np.asarray(value, float)) / (zero - full), 0.0, 1.0)
    return np.nan_to_num(score, nan=0.0)


def owed(found: list, promised: bool) -> float | None:
    """What to score where the generated clip may hold no evidence, such as a flight long enough to fit.

    Args:
        found: the evidence in the generated clip.
        promised: whether the simulator's clip holds any.

    Returns:
        None where there is evidence: judge it. 0 where only the simulator's clip has it, NaN where neither has.
    """
    if found:
        return None
    return 0.0 if promised else float("nan")


def weighted(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted mean of the parts that could be judged (not NaN); 1 where none could."""
    judged = [name for name in weights if np.isfinite(parts[name])]
    total = sum(weights[name] for name in judged)
    return sum(weights[name] * parts[name] for name in judged) / total if total else 1.0
