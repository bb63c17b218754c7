"""Grids of the teacher's sampler, whatever scheduler its folder carries."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from vpae.flow import euler_sample
from vpae.sampling import euler_scheduler, euler_sigmas, even_sigmas


def _unipc(shift):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_unipc_keeps_its_shift(shift):
    expected = FlowMatchEulerDiscreteScheduler(shift=shift)
    expected.set_timesteps(8)
    assert euler_sigmas(_unipc(shift), 8) == pytest.approx(expected.sigmas.tolist())


def test_one_step_is_exactly_from_one_to_zero():
    for scheduler in (_unipc(5.0), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        assert euler_sigmas(scheduler, 1) == [1.0, 0.0]
        assert isinstance(euler_scheduler(scheduler), FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_the_even_grid_is_that_of_wans_own_scheduler(steps):
    """UniPC's starts just below 1 and has its parts of [0.001, 1]; before the shift, which trebles the difference."""
    scheduler = _unipc(3.0)
    scheduler.set_timesteps(steps)
    assert even_sigmas(scheduler, steps) == pytest.approx(scheduler.sigmas.tolist(), abs=3e-3)


def test_few_steps_on_the_even_grid_come_nearer_to_the_solution():
    """dx/dt = x has the solution x(0) = x(1) / e; the last of diffusers' two steps is a hundredth long."""
    scheduler, noise = FlowMatchEulerDiscreteScheduler(shift=3.0), torch.ones(1, 1, 1, 1, 1)
    grids = [sigmas(scheduler, 2) for sigmas in (even_sigmas, euler_sigmas)]
    even, euler = (float(euler_sample(lambda x, t: x, noise, sigmas)) for sigmas in grids)
    assert even == pytest.approx(0.75 * 0.25) and abs(even - math.exp(-1)) < abs(euler - math.exp(-1)) / 1.5


def test_a_teacher_folder_with_unipc_exports_a_student_with_euler(micro_pipeline, tmp_path):
    from vpae.export.diffusers import export_student
    from vpae.loading import load_model

    folder = shutil.copytree(micro_pipeline, tmp_path / "wan")
    shutil.rmtree(folder / "scheduler")
    _unipc(5.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "UniPCMultistepScheduler"]})
    )
    torch.set_num_threads(1)
    proof = export_student(load_model(folder), tmp_path / "student")
    config = json.loads((tmp_path / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert proof.max_error < 1e-4
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler" and config["shift"] == 5.0


@pytest.mark.parametrize(
    ("given", "said"), [([], "blurry"), (["--negative-prompt", "dark"], "dark"), (["--negative-prompt", ""], "")]
)
def test_guidance_leads_away_from_what_the_model_was_trained_to(micro_pipeline, tmp_path, monkeypatch, given, said):
    from vpae import commands
    from vpae.__main__ import build_parser
    from vpae.data.encoders import Encoders
    from vpae.loading import Model

    texts, prompts = Encoders.texts, []
    monkeypatch.setattr(Model, "negative_prompt", "blurry")
    monkeypatch.setattr(Encoders, "texts", lambda self, new, *rest: prompts.append(new) or texts(self, new, *rest))
    line = ["sample", str(micro_pipeline), "--bounce", "1", "--num-frames", "5", "--output", str(tmp_path), *given]
    assert commands.sample(build_parser().parse_args(line))
    assert prompts[0] == [said]
