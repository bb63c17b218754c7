"""Statistics, ceilings and counts of the benchmarks of speed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from measuring import (  # noqa: E402
    Clock,
    Row,
    ceilings,
    count_flops,
    interleaved,
    paired_ratio,
    peak_bytes,
    reset_peak,
    spread,
    transformer_flops,
)

from vpae.released import TRANSFORMERS  # noqa: E402
from vpae.weights import unborn_transformer  # noqa: E402

CPU = torch.device("cpu")


def test_spread_is_of_the_values_and_ratios_are_taken_round_by_round():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0, "q25": 2.0, "q75": 4.0, "min": 1.0, "max": 5.0, "repeats": 5
    }  # fmt: skip
    assert paired_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 3.0])["median"] == 2.0  # 40 / 10 is one round's, not the median's
    with pytest.raises(ValueError, match="argument 2"):
        paired_ratio([1.0], [1.0, 2.0])


def test_rows_take_turns_and_only_the_call_is_timed():
    order = []
    rows = [Row(name, lambda n=name: order.append(n), lambda: time.sleep(0.02)) for name in "ab"]
    seconds = interleaved(rows, 4, Clock(CPU), warmup=1)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    assert min(seconds["a"]) < 0.01


def test_the_ceiling_is_the_best_product_and_work_over_seconds():
    rows = {
        name: (Row(name, lambda: None), work) for name, work in (("matmul 1", 8.0), ("matmul 2", 30.0), ("copy", 6.0))
    }
    found = ceilings({"matmul 1": [2.0, 2.0], "matmul 2": [3.0, 5.0], "copy": [2.0, 3.0]}, rows)
    assert found["matmul"] == "matmul 2" and found["matmul_flops_per_s"]["median"] == 8.0
    assert found["copy_bytes_per_s"]["median"] == 2.5
    assert found["per_round"] == {"matmul": [10.0, 6.0], "copy": [3.0, 2.0]}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Wan2.1-I2V-14B-480P-Diffusers", {}),
        ("Wan2.1-T2V-1.3B-Diffusers", {}),
        ("Wan2.1-I2V-14B-480P-Diffusers", {"num_layers": 2}),
    ],
)
def test_flops_by_formula_are_those_that_torch_counts(name, changes):
    """At the shapes of 480p, on the meta device: nothing is computed."""
    transformer = unborn_transformer(TRANSFORMERS[name] | changes)
    config = transformer.config
    image = 257 if config.image_dim else 0

    @torch.no_grad()
    def forward():
        with torch.device("meta"):
            transformer(
                hidden_states=torch.empty(1, config.in_channels, 21, 60, 104),
                timestep=torch.empty(1),
                encoder_hidden_states=torch.empty(1, 512, config.text_dim),
                encoder_hidden_states_image=torch.empty(1, image, config.image_dim) if image else None,
            )

    assert count_flops(forward) == transformer_flops(config, 21 * 30 * 52, 512, image)


def test_flops_of_the_cpus_fused_attention_are_counted_too():
    q = torch.randn(1, 2, 80, 32)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 80 * 80 * 32


def test_peak_memory_is_forgotten_and_seen():
    reset_peak(CPU)
    before = peak_bytes(CPU)
    held = torch.ones(40_000_000)
    risen = peak_bytes(CPU) - before
    del held
    reset_peak(CPU)
    assert 150e6 < risen < 300e6 and peak_bytes(CPU) < before + 80e6
