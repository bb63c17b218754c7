"""What is stored in which numbers, and what that may cost."""

from __future__ import annotations

import math

import pytest
import torch

from vpae.errors import UserError
from vpae.export.precision import PRECISIONS, ROUND_OFF, stored
from vpae.export.proof import Reading, _judge_fidelity, _judge_reading
from vpae.export.single import export_wan
from vpae.loading import load_model
from vpae.models import find_model

WEIGHTS = {
    "patch_embedding.weight": torch.ones(2, 1, 1, 1, 1),
    "proj_out.weight": torch.ones(2, 2),
    "blocks.0.attn1.to_q.weight": torch.ones(2, 2),
    "blocks.0.attn1.to_q.bias": torch.ones(2),
    "blocks.0.scale_shift_table": torch.ones(1, 6, 2),
}


def test_fp8_is_for_the_matrices_of_the_blocks_alone():
    kept = {name: w.dtype for name, w in stored(WEIGHTS, PRECISIONS["fp8"]).items()}
    assert kept.pop("blocks.0.attn1.to_q.weight") == torch.float8_e4m3fn
    assert set(kept.values()) == {torch.bfloat16}


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 7e4), ("fp8", 500.0)])
def test_a_number_that_does_not_fit_is_named(dtype, value):
    with pytest.raises(UserError, match=r"blocks.0.attn1.to_q.weight holds .*cannot hold; choose another --dtype"):
        stored(WEIGHTS | {"blocks.0.attn1.to_q.weight": torch.full((2, 2), value)}, PRECISIONS[dtype])


def _reading(max_error: float = 0.0, distance: float = 0.0, motion: float = 1.0) -> Reading:
    return Reading("a reader", max_error, distance, motion, "bfloat16")


@pytest.mark.parametrize("error", [2e-3, math.nan])
def test_a_reading_that_differs_is_refused(error):
    with pytest.raises(UserError, match="a reader does not reproduce the student"):
        _judge_reading(_reading(error))
    _judge_reading(_reading(1e-5))


@pytest.mark.parametrize("motion", [0.0, 0.94, 1.06, math.nan])
def test_an_export_that_moves_otherwise_is_refused(motion):
    with pytest.raises(UserError, match=r"times as much as the student .*another --dtype"):
        _judge_fidelity(_reading(motion=motion), PRECISIONS["bf16"], False)
    with pytest.raises(UserError, match=r"times as much as the student .*a higher --rank"):
        _judge_fidelity(_reading(motion=motion), PRECISIONS["fp32"], True)


@pytest.mark.parametrize("distance", [0.06, math.nan])
def test_an_export_that_strays_is_refused(distance):
    with pytest.raises(UserError, match="strays from the student"):
        _judge_fidelity(_reading(distance=distance), PRECISIONS["bf16"], False)
    _judge_fidelity(_reading(distance=0.06), PRECISIONS["fp8"], False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_the_embedded_teacher_keeps_to_what_is_allowed(dtype, tmp_path, at_once):
    (reading,) = export_wan(load_model(find_model("tiny_wan")), tmp_path / "teacher.safetensors", dtype).readings
    print(dtype, reading)
    assert 0 < reading.distance < PRECISIONS[dtype].tolerance and reading.max_error < ROUND_OFF / 5
