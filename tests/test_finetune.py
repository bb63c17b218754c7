"""Making a teacher: the VAE and the transformer, from scratch, at micro size, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MICRO_TRANSFORMER, MICRO_VAE
from diffusers import AutoencoderKLWan
from helpers import differing, read_tensors, write_recipe

from vpae import recipe as recipes
from vpae.engine.parallel import start
from vpae.engine.trainer import Trainer
from vpae.errors import UserError
from vpae.finetune import finetune


def _vae_recipe(micro_recipe):
    optimiser = micro_recipe["priming"]["student_optimiser"] | {"schedule": "cosine"}
    source = micro_recipe["data"]["source"]
    stages = [{"steps": 2, "frames": 1, "batch": 2}, {"steps": 2, "frames": 5, "batch": 1}]
    training = {
        "trained": "all",
        "stages": stages,
        "absolute_weight": 0.1,
        "kl_weight": 1e-4,
        "ema_decay": 0.9,
        "optimiser": optimiser,
    }
    return {
        "kind": "vae",
        "name": "micro_vae",
        "seed": 0,
        "init": None,
        "vae": MICRO_VAE,
        "source": source,
        "training": training,
        "engine": micro_recipe["engine"] | {"global_batch": 2, "micro_batch": 2, "checkpoint_every": 3},
        "evaluate_clips": 2,
    }


def _teacher_recipe(micro_recipe, vae, cache):
    law = micro_recipe["priming"]["fake_time"]
    optimiser = micro_recipe["priming"]["student_optimiser"]
    training = {"steps": 4, "time": law, "text_dropout": 0.5, "ema_decay": 0.9, "optimiser": optimiser}
    return {
        "kind": "flow_matching",
        "name": "micro_teacher",
        "seed": 0,
        "teacher": micro_recipe["teacher"] | {"path": str(vae)},
        "transformer": MICRO_TRANSFORMER,
        "scheduler_shift": 3.0,
        "data": micro_recipe["data"] | {"cache": str(cache)},
        "training": training,
        "engine": micro_recipe["engine"] | {"checkpoint_every": 2},
        "watch": micro_recipe["watch"],
        "evaluate": micro_recipe["evaluate"],
    }


def test_vae_then_teacher_then_a_pipeline_that_samples(vpae, micro_recipe, tmp_path):
    recipe = write_recipe(_vae_recipe(micro_recipe), tmp_path / "vae.yaml")
    done = vpae("finetune", recipe, "--output", tmp_path / "vae")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "vae" / "evaluation.json").read_text())
    config = json.loads((tmp_path / "vae" / "vae" / "config.json").read_text())
    assert report["clips"] == 2 and len(config["latents_mean"]) == 16 and all(s > 0 for s in config["latents_std"])
    recipe = write_recipe(_teacher_recipe(micro_recipe, tmp_path / "vae" / "vae", tmp_path / "c"), tmp_path / "t.yaml")
    done = vpae("finetune", recipe, "--output", tmp_path / "teacher")
    assert done.returncode == 0, done.stderr[-2000:]
    for model in (tmp_path / "teacher" / "pipeline", tmp_path / "teacher"):
        done = vpae("evaluate", model, "--clips", 2, "--steps", 2, "--guidance-scale", 2.0, "--sampler", "euler")
        assert done.returncode == 0, done.stderr[-2000:]
    assert sum(f.suffix == ".safetensors" for f in (tmp_path / "teacher" / "pipeline").rglob("*")) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": "nowhere"}, "init 'nowhere' is not a VAE of the recipe's architecture"),
        ({"engine": {"compile": True}}, "engine.compile: true is for transformers"),
        ({"engine": {"checkpointing": True}}, "engine.checkpointing: true is for transformers"),
        ({"training": {"stages": [{"steps": 1, "frames": 4, "batch": 1}]}}, "needs 4k . 1 frames"),
    ],
)
def test_a_vae_recipe_that_cannot_be_trained_is_refused(micro_recipe, tmp_path, change, words):
    plain = _vae_recipe(micro_recipe)
    for key, value in change.items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=words):
        finetune(recipes.from_plain(plain, "test"), tmp_path / "run", False, start())


def test_a_distillation_is_sent_to_its_own_command(micro_recipe, micro_peer, tmp_path):
    for plain in (micro_recipe, micro_peer("dmd2")):
        with pytest.raises(UserError, match=rf"of kind {plain['kind']}; run it with: vpae distill$"):
            finetune(recipes.from_plain(plain, "test"), tmp_path, False, start())


def test_vae_training_resumes_exactly_inside_its_curriculum(micro_recipe, tmp_path):
    recipe = recipes.from_plain(_vae_recipe(micro_recipe), "test")
    assert finetune(recipe, tmp_path / "whole", False, start())
    train, stop = Trainer.train, {"until": 1}
    Trainer.train = lambda self, until=None: train(self, until=stop["until"])
    try:
        assert not finetune(recipe, tmp_path / "parts", False, start())
        stop["until"] = 3
        assert not finetune(recipe, tmp_path / "parts", True, start())
    finally:
        Trainer.train = train
    assert finetune(recipe, tmp_path / "parts", True, start())
    assert differing(read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "parts")) == []


def test_micro_batches_of_the_vae_add_up_to_its_stages_batch(micro_recipe, tmp_path):
    plain, results = _vae_recipe(micro_recipe), []
    plain["training"]["stages"] = [{"steps": 2, "frames": 5, "batch": 4}]
    plain["training"]["optimiser"] |= {"betas": [0.0, 0.99]}
    for micro in (1, 4):
        plain["engine"] |= {"global_batch": 4, "micro_batch": micro}
        recipe = recipes.from_plain(plain, "test")
        assert finetune(recipe, tmp_path / str(micro), False, start())
        results.append(read_tensors(tmp_path / str(micro)))
    moments = [{k: v for k, v in r.items() if k.endswith("exp_avg")} for r in results]
    scale = max(float(v.abs().max()) for v in moments[0].values())
    assert scale > 0 and differing(*moments, tolerance=1e-2 * scale) == []


def test_going_on_from_a_pipeline_takes_the_recipes_shift_and_leaves_the_given_folder(micro_recipe, tmp_path):
    from vpae.finetune import assemble

    given = micro_recipe["teacher"]["path"]
    plain = _teacher_recipe(micro_recipe, given, tmp_path / "c") | {"transformer": None, "scheduler_shift": 7.0}
    (tmp_path / "run" / "pipeline.partial").mkdir(parents=True)  # of a copy that was killed
    made = assemble(recipes.from_plain(plain, "test"), tmp_path / "run", start())
    shifts = [json.loads((Path(f) / "scheduler" / "scheduler_config.json").read_text())["shift"] for f in (given, made)]
    assert shifts[0] != 7.0 and shifts[1] == 7.0 and not (tmp_path / "run" / "pipeline.partial").exists()


def test_training_the_decoder_alone_leaves_the_latents_as_they_are(micro_recipe, tmp_path):
    """A teacher was trained on those latents: encoder and their mean and std must not move."""
    plain = _vae_recipe(micro_recipe)
    assert finetune(recipes.from_plain(plain, "test"), tmp_path / "all", False, start())
    plain["training"]["trained"] = "decoder"
    with pytest.raises(UserError, match="trained is decoder, so init must name the VAE"):
        recipes.from_plain(plain, "test")
    plain |= {"init": str(tmp_path / "all" / "vae"), "source": plain["source"] | {"start": 50}}
    assert finetune(recipes.from_plain(plain, "test"), tmp_path / "decoder", False, start())
    before, after = (AutoencoderKLWan.from_pretrained(tmp_path / name / "vae") for name in ("all", "decoder"))
    changed = set(differing(before.state_dict(), after.state_dict()))
    kept = {name for name in before.state_dict() if name.startswith(("encoder.", "quant_conv."))}
    assert kept and not changed & kept
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    assert before.config.latents_mean == after.config.latents_mean
    assert before.config.latents_std == after.config.latents_std
