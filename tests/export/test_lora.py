"""Low-rank pairs are the nearest there are, and entries are read as they were meant."""

from __future__ import annotations

import pytest
import torch

from vpae.export import lora
from vpae.export.keys import to_original


def _matrix(out: int, into: int, decay: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out)
    return torch.randn(out, into, generator=generator) @ torch.diag(decay ** torch.arange(into).float())


@pytest.mark.parametrize("exact_below", [1025, 0])
def test_no_product_of_that_rank_is_nearer(exact_below, monkeypatch):
    """The smallest error of any rank-R product is what the other singular values hold (Eckart and Young)."""
    monkeypatch.setattr(lora, "_EXACT_BELOW", exact_below)
    matrix, state = _matrix(120, 96, 0.95), torch.random.get_rng_state()
    down, up = lora.low_rank(matrix, 16, "name")
    best = torch.linalg.svdvals(matrix)[16:].square().sum().sqrt()
    assert float((matrix - up @ down).norm() / best) == pytest.approx(1.0, abs=2e-3)
    assert float(down.norm() / up.norm()) == pytest.approx(1.0, rel=1e-3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(down, lora.low_rank(matrix, 16, "name")[0])


def test_a_layer_smaller_than_the_rank_is_filled_with_zeros():
    matrix = _matrix(6, 20, 1.0)
    down, up = lora.low_rank(matrix, 8)
    assert down.shape == (8, 20) and up.shape == (6, 8)
    assert torch.allclose(up @ down, matrix, atol=1e-5) and not down[6:].any() and not up[:, 6:].any()


def _pair_of_models() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    teacher = {
        "patch_embedding.weight": torch.zeros(4, 2, 1, 2, 2),
        "blocks.0.attn1.to_q.weight": torch.zeros(6, 4),
        "blocks.0.attn1.to_q.bias": torch.zeros(6),
        "blocks.0.attn1.norm_q.weight": torch.zeros(6),
        "blocks.0.scale_shift_table": torch.zeros(1, 6, 4),
    }
    generator = torch.Generator().manual_seed(0)
    student = {name: torch.randn(weight.shape, generator=generator) for name, weight in teacher.items()}
    return student, teacher


def test_at_full_rank_nothing_is_left_out():
    student, teacher = _pair_of_models()
    entries, truncation = lora.difference_entries(student, teacher, 4, torch.float32, torch.device("cpu"))
    again = lora.applied(teacher, entries)
    assert all(torch.allclose(again[name], w, atol=1e-6) for name, w in student.items())
    assert truncation.total < 1e-6 and list(truncation.layers) == ["blocks.0.self_attn.q"]
    assert lora.passed_over(entries) == [
        "diffusion_model.blocks.0.modulation.diff",
        "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "diffusion_model.patch_embedding.diff",
    ]


def test_the_error_told_is_the_error_made():
    student, teacher = _pair_of_models()
    entries, truncation = lora.difference_entries(student, teacher, 2, torch.bfloat16, torch.device("cpu"))
    name = "blocks.0.attn1.to_q.weight"
    error = float((lora.applied(teacher, entries)[name] - student[name]).norm() / student[name].norm())
    assert truncation.layers[to_original("blocks.0.attn1.to_q")] == pytest.approx(error, rel=1e-3)
    assert truncation.total == pytest.approx(error, rel=1e-3)


def test_an_entry_for_no_weight_is_refused():
    _, teacher = _pair_of_models()
    with pytest.raises(ValueError, match="belongs to no weight"):
        lora.applied(teacher, {"diffusion_model.blocks.1.modulation.diff": torch.zeros(1, 6, 4)})
    with pytest.raises(ValueError, match="no entry of a Wan LoRA"):
        lora.applied(teacher, {"blocks.0.modulation.diff": torch.zeros(1, 6, 4)})
