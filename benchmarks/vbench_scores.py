"""From VBench-I2V's dimensions to its scores, and to the SA, TC and FQ of V-PAE's tables.

V-PAE (arXiv 2508.21019) does not say how it groups dimensions. Its row of the undistilled Wan2.1-I2V-14B (92.90, 80.82,
70.44) is that model's published VBench-I2V row number for number: I2V score 92.90, quality score 80.82, imaging quality
70.44 (MUG-V, arXiv 2510.17519). Therefore

    SA = I2V score,   TC = quality score,   FQ = imaging quality.

Bounds and weights are VBench's own (scripts/constant.py of Vchitect/VBench); both scores of that row follow from its
dimensions to the last digit (tests/benchmarks/test_vbench.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from vpae.errors import UserError

# dimension: (score that becomes 0, score that becomes 1, weight)
I2V = {
    "camera_motion": (0.0, 1.0, 0.1),
    "i2v_subject": (0.1462, 1.0, 1.0),
    "i2v_background": (0.2615, 1.0, 1.0),
}
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "motion_smoothness": (0.7060, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
DIMENSIONS = tuple(I2V | QUALITY)


def _weighted(dimensions: Mapping[str, float], parts: Mapping[str, tuple[float, float, float]]) -> float:
    total = sum((dimensions[name] - low) / (high - low) * weight for name, (low, high, weight) in parts.items())
    return total / sum(weight for *_, weight in parts.values())


def scores(dimensions: Mapping[str, float]) -> dict[str, float]:
    """VBench-I2V's own scores and V-PAE's three, in percent; dynamic degree always beside them.

    Args:
        dimensions: raw score of every dimension of :data:`DIMENSIONS`, 0 to 1.

    Raises:
        UserError: one is missing, or outside 0 to 1.
    """
    if missing := [name for name in DIMENSIONS if name not in dimensions]:
        raise UserError(f"no result of {', '.join(missing)}: a score over fewer dimensions is not VBench's")
    for name in DIMENSIONS:
        if not 0 <= dimensions[name] <= 1:
            raise UserError(f"{name} is {dimensions[name]}, not from 0 to 1: these are not VBench's raw results")
    i2v, quality = _weighted(dimensions, I2V), _weighted(dimensions, QUALITY)
    three = {"SA": i2v, "TC": quality, "FQ": dimensions["imaging_quality"]}
    mean = {"mean": sum(three.values()) / 3, "dynamic_degree": dimensions["dynamic_degree"]}
    named = three | mean | {"i2v_score": i2v, "quality_score": quality, "total_score": (i2v + quality) / 2}
    return {name: 100 * value for name, value in named.items()}


def read_results(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Score of every dimension and the videos it is over, from VBench's ``*_eval_results.json`` files.

    Raises:
        UserError: there is none, one is damaged, or two of them disagree on a dimension.
    """
    found: dict[str, float] = {}
    counts: dict[str, int] = {}
    for file in sorted(folder.glob("*_eval_results.json")):
        try:
            for name, result in json.loads(file.read_text(encoding="utf-8")).items():
                score, videos = float(result[0]), result[-1]
                if found.setdefault(name, score) != score:
                    raise UserError(f"{file}: {name} is {score} here and {found[name]} in another file; remove one")
                counts[name] = len(videos)
        except (OSError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise UserError(f"{file} is no result of VBench: {type(error).__name__} {error}") from None
    if not found:
        raise UserError(f"{folder} holds no *_eval_results.json; run the evaluation first")
    return found, counts
