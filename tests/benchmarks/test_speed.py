"""The benchmarks of speed at their smallest: what their documents hold, and that a turn does no more than it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]


def _run(script: str, *arguments: object) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_latency_tells_stages_ceilings_ratios_and_rows(micro_pipeline, tmp_path):
    document, table = _run(
        "latency.py", "--model", micro_pipeline, "--size", 32, 32, "--frames", 5, "--repeats", 3, "--pairs", 2,
        "--teacher-steps", 6, "--teacher-timed", 3, "--output", tmp_path,
    )  # fmt: skip
    assert document == json.loads((tmp_path / "latency_tiny_cpu.json").read_text())
    teacher, one, four = document["models"].values()
    assert [m["nfe"] for m in (teacher, one, four)] == [12, 1, 4] and teacher["steps_timed"] == 3
    for model in (teacher, one, four):
        assert set(model["stages"]) == {"text", "image", "condition", "denoise", "decode"}
        whole = model["request_to_frames"]["median"]
        assert whole > model["dit_only"]["median"] > 0
        assert all(0 < share["median"] < 1.5 for share in model["share_of_matmul_ceiling"].values())
        assert model["flops"]["denoise"] == model["nfe"] * one["flops"]["denoise"]
    ratios = document["teacher_over_student"]
    assert ratios["student, 1 step"]["dit_only"]["median"] > ratios["student, 1 step"]["request_to_frames"]["median"]
    assert document["ceilings"]["matmul_flops_per_s"]["repeats"] == 3
    assert {"native, folded text", "native", "native_math"} <= set(document["rows"]["forward"])
    decode = document["rows"]["decode"]
    assert decode["fp32"]["error"]["max"] == 0 and 0 < decode["bf16"]["error"]["rms"] < 0.1
    assert any("flash" in name for name in document["left_out"])  # and why
    assert "request_to_frames" in table and "VAE decode" in table


def test_a_teacher_timed_for_a_part_of_its_steps_is_told_as_if_it_had_taken_all(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency

    request = latency.Request(SimpleNamespace(device="cpu"), steps=50, guided=True, timed_steps=2)
    request.marks = [[0.0, 1.0, 3.0, 6.0, 10.0, 15.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    found = request.seconds(SimpleNamespace(between=lambda a, b: b - a))
    assert request.nfe == 100
    assert found == {
        "text": [1, 1],
        "image": [2, 1],
        "condition": [3, 1],
        "denoise": [4 * 25, 1 * 25],
        "decode": [5, 1],
        "request": [1 + 2 + 3 + 100 + 5, 29],
    }
    whole = latency.Request(SimpleNamespace(device="cpu"), steps=50, guided=True)
    whole.marks = request.marks
    assert whole.seconds(SimpleNamespace(between=lambda a, b: b - a))["denoise"] == [4, 1]


def test_a_teacher_timed_for_a_part_of_its_steps_takes_no_more(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency

    asked = []
    role = SimpleNamespace(guided_velocity=lambda x, t, *_: asked.append(float(t)) or torch.zeros_like(x))
    pipeline = SimpleNamespace(scheduler=None)
    subject = SimpleNamespace(device=torch.device("cpu"), role=role, shape=SimpleNamespace(guidance=5.0))
    subject.encoders = SimpleNamespace(pipeline=pipeline)
    monkeypatch.setattr(latency, "euler_sigmas", lambda _, steps: torch.linspace(1, 0, steps + 1))
    condition = SimpleNamespace(latent=torch.zeros(1, 2, 1, 2, 2), null=lambda _: None)
    latency.Request(subject, steps=50, guided=True, timed_steps=2).denoise(condition, None)
    assert asked == pytest.approx([1.0, 0.98])


def test_a_turn_computes_no_more_than_a_bare_loop_over_diffusers(micro_recipe, tmp_path):
    """Counted, not timed: a forward too many, or a block past the last tap, would be seen in the FLOPs."""
    recipe = tmp_path / "micro.yaml"
    micro_recipe["equilibrium"]["r1"]["form"] = "separate"
    recipe.write_text(yaml.safe_dump(micro_recipe))
    options = ["--size", 32, 32, "--frames", 5, "--repeats", 1, "--pairs", 1, "--output", tmp_path]
    document, _ = _run("train_step.py", recipe, *options)
    assert document["failed"] == {} and len(document["rows"]) == 4
    assert all(row["peak_bytes"] > 0 and row["flops"] > 0 and row["planned_bytes"] > 0 for row in document["rows"])
    compared = {(row["phase"], row["player"]): row["flops"] for row in document["against_bare_loop"]}
    assert len(compared) == 4
    for flops in compared.values():
        assert flops["vpae"] == pytest.approx(flops["bare"], rel=1e-3)
