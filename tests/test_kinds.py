"""Teachers that are told of no first frame (Wan2.1-T2V), or find it in its place (Wan2.2-TI2V): the whole path."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import MICRO_T2V
from diffusers import WanImageToVideoPipeline, WanPipeline
from helpers import read_tensors, write_recipe
from PIL import Image
from safetensors.torch import load_file

from vpae import commands
from vpae import recipe as recipes
from vpae.__main__ import build_parser
from vpae.backbone import Backbone
from vpae.data.cache import prepare
from vpae.data.encoders import Encoders, load_pipeline, load_transformer, pipeline_kind
from vpae.data.publish import cache_dataset
from vpae.distill import distill
from vpae.draws import Draws, seed_of
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.export import proof, reload
from vpae.finetune import _networks, assemble, finetune
from vpae.loading import load_model
from vpae.models import fresh_transformer
from vpae.roles import Role
from vpae.sampling import sample_latents

KINDS = ("t2v", "ti2v")
PROMPT, NEGATIVE = "A red ball moves left. Gravity pulls down.", "no balls"


@pytest.fixture
def pipeline_of(micro_t2v, micro_ti2v):
    return {"t2v": micro_t2v, "ti2v": micro_ti2v}.__getitem__


@pytest.fixture
def recipe_of(micro_recipe, pipeline_of, tmp_path):
    """``recipe_of(kind)``: both phases of two turns each, over a cache of its own."""

    def make(kind):
        plain = copy.deepcopy(micro_recipe)
        plain["teacher"]["path"] = str(pipeline_of(kind))
        plain["data"] |= {"cache": str(tmp_path / "cache"), "source": plain["data"]["source"] | {"count": 6}}
        plain["priming"] |= {"student_steps": 1, "fake_per_student": 1}
        plain["equilibrium"] |= {"student_steps": 1, "head_per_student": 1}
        return plain

    return make


def picture(seed=0):
    noise = torch.randn(32, 32, 3, generator=torch.Generator().manual_seed(seed))
    return (noise.sigmoid() * 255).to(torch.uint8).numpy()


def call(command, *line, **more):
    return getattr(commands, command)(build_parser().parse_args([command, *map(str, line)]), **more)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_both_phases_samples_and_exports(kind, recipe_of, pipeline_of, tmp_path, monkeypatch, capsys):
    recipe, run = write_recipe(recipe_of(kind), tmp_path / "recipe.yaml"), tmp_path / "run"
    assert call("cache", recipe, processes=start())
    assert call("cache", recipe, "--check", processes=start())
    stored = load_file(tmp_path / "cache" / "shard-00000.safetensors")
    assert stored.keys() == ({"x0", "text"} if kind == "t2v" else {"x0", "text", "latent"})
    assert cache_dataset(tmp_path / "cache")[0].keys() == {"name", "caption", *stored}
    assert distill(recipes.load(recipe), run, False, start())
    assert [checkpoints.find(run / phase / "checkpoints").turn for phase in ("priming", "equilibrium")] == [2, 2]
    ema, head = (
        {k: v for k, v in read_tensors(run / "equilibrium").items() if k.startswith(of)} for of in ("ema.", "head.")
    )
    teacher = load_transformer(pipeline_of(kind)).state_dict()
    assert any(not torch.equal(v, teacher[k.removeprefix("ema.")]) for k, v in ema.items())
    assert any("from_text" in k for k in head) and not any("from_image" in k for k in head)
    assert call("export", run, "--output", tmp_path / "student")  # in a fresh process
    monkeypatch.setattr(proof, "_answer_in_fresh_process", reload.main)
    assert call("export", run, "--format", "wan", "--output", tmp_path / "wan.safetensors")
    assert call("export", run, "--format", "lora", "--rank", 4, "--output", tmp_path / "lora.safetensors")
    record = json.loads((tmp_path / "student" / "proof.json").read_text())
    called = "WanPipeline(prompt" if kind == "t2v" else "WanImageToVideoPipeline(image, prompt"
    assert record["max_error"] < 1e-4 < record["rms"] and record["what"].startswith(called)
    assert f"from diffusers import {called.split('(')[0]}" in (tmp_path / "student" / "README.md").read_text()
    assert pipeline_kind(tmp_path / "student") == kind
    weights = dict(load_model(tmp_path / "student").role.named_parameters())
    assert all(torch.equal(v, weights[k.removeprefix("ema.")]) for k, v in ema.items())
    capsys.readouterr()
    if kind == "t2v":
        assert call("sample", tmp_path / "student", "--prompt", PROMPT, "--output", tmp_path / "clips")
        assert (tmp_path / "clips" / "000.mp4").is_file()
    Image.fromarray(picture()).save(tmp_path / "first.png")
    given = ("--image", tmp_path / "first.png", "--prompt", PROMPT, "--steps", 4, "--output", tmp_path / "clips")
    if kind == "t2v":
        with pytest.raises(UserError, match="makes clips from text alone; leave --image out"):
            call("sample", run, *given)
        with pytest.raises(UserError, match="no recipe says how large the clips of this model are; give --size"):
            call("sample", pipeline_of(kind), "--prompt", PROMPT, "--output", tmp_path / "clips")
        with pytest.raises(UserError, match="look at clips of it with: vpae sample MODEL --bounce N"):
            call("evaluate", run, "--clips", 2, processes=start())
        return
    assert call("sample", run, *given)
    assert (tmp_path / "clips" / "000-first.mp4").is_file()
    with pytest.raises(UserError, match="give one --prompt for each --image"):
        call("sample", run, "--prompt", PROMPT)
    assert call("evaluate", run, "--clips", 2, processes=start())
    assert "frame0_psnr" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 3.0)])
def test_samples_are_those_of_diffusers_own_pipeline(kind, pipeline_of, steps, guidance):
    """Captured from a real call: the first frame in its place, times a token, guidance, the grid, what comes out."""
    folder = pipeline_of(kind)
    encoders, frame = Encoders(folder), picture()
    condition = encoders.condition([frame], [PROMPT], 9)
    draws, shape = Draws(0, [3]), encoders.latent_shape((9, 32, 32))

    def captured(transformer):
        calls = []
        transformer.register_forward_pre_hook(lambda m, a, kw: calls.append(kw), with_kwargs=True)
        return calls

    pipeline = load_pipeline(folder, transformer=True)
    assert isinstance(pipeline, WanPipeline if kind == "t2v" else WanImageToVideoPipeline)
    theirs = captured(pipeline.transformer)
    sample = pipeline(
        **({} if kind == "t2v" else {"image": Image.fromarray(frame)}),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=draws.normal("sample noise", shape),
        output_type="latent",
    ).frames
    backbone = Backbone(load_transformer(folder))
    ours = captured(backbone.transformer)
    latents = sample_latents(
        Role("teacher", backbone),
        condition,
        condition.null(encoders.texts([NEGATIVE])),
        draws,
        steps=steps,
        shape=shape,
        sampler="euler",
        guidance_scale=guidance,
        scheduler=pipeline.scheduler,
    )
    with pytest.raises(ValueError, match="give its shape"):
        sample_latents(Role("teacher", backbone), condition, None, draws, steps=1)
    assert len(theirs) == len(ours) == steps * (1 if guidance == 1.0 else 2)
    for they, we in zip(theirs, ours, strict=True):
        for name in ("hidden_states", "timestep", "encoder_hidden_states"):
            torch.testing.assert_close(we[name], they[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert we["encoder_hidden_states_image"] is None
    assert ours[0]["timestep"].shape == ((1,) if kind == "t2v" else (1, 3 * 2 * 2))
    torch.testing.assert_close(latents, sample, atol=1e-5, rtol=1e-5)


def test_the_first_latent_frame_of_a_clip_is_that_of_its_first_frame_alone(pipeline_of):
    """The VAE is causal, so what is given at inference is what stands in the clips that are learnt from."""
    encoders = Encoders(pipeline_of("ti2v"))
    clip = np.stack([picture(seed) for seed in range(9)])
    latents, first = encoders.latents([clip]), encoders.first_frame([clip[0]], 9)
    assert first.shape == (1, 8, 1, 4, 4) and latents.shape == (1, 8, 3, 4, 4)
    torch.testing.assert_close(latents[:, :, :1], first, atol=1e-5, rtol=1e-5)
    other = encoders.first_frame([clip[1]], 9)
    assert float((other - first).abs().max()) > 0.05


def test_a_cache_of_one_conditioning_is_none_of_another(recipe_of, micro_t2v, tmp_path):
    """Though all encoders are the same."""
    data = recipes.from_plain(recipe_of("t2v"), "test").data
    prepare(data, Encoders(micro_t2v), start())
    twin = shutil.copytree(micro_t2v, tmp_path / "twin")
    index = json.loads((twin / "model_index.json").read_text())
    (twin / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": True}))
    assert pipeline_kind(twin) == "ti2v" and isinstance(load_pipeline(twin, transformer=True), WanImageToVideoPipeline)
    with pytest.raises(UserError, match="conditioning is 't2v' in the cache and 'ti2v' in the recipe"):
        prepare(data, Encoders(twin), start())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanVACEPipeline"}, "holds a WanVACEPipeline; vpae knows WanPipeline and WanImageToVideo"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has two transformers, one for each end"),
        (None, "model_index.json is damaged"),
    ],
)
def test_pipelines_that_are_not_known_are_told(change, message, micro_t2v, tmp_path):
    folder = shutil.copytree(micro_t2v, tmp_path / "folder")
    file = folder / "model_index.json"
    file.write_text("[1" if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_pipeline(folder, transformer=True)


def test_a_transformer_of_another_conditioning_is_told_before_anything_is_encoded(recipe_of, micro_ti2v, tmp_path):
    """As of a folder whose config says image_dim though nothing in it makes image tokens."""
    folder = shutil.copytree(micro_ti2v, tmp_path / "mixed")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_dim": 64, "added_kv_proj_dim": 24}))
    plain = recipe_of("ti2v")
    plain["teacher"]["path"] = str(folder)
    with pytest.raises(UserError, match="is a ti2v pipeline, whose transformer has no image_dim, but .* image_dim: 64"):
        distill(recipes.from_plain(plain, "test"), tmp_path / "run", False, start())
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_clips_made_from_prompts_alone(form, recipe_of, micro_t2v, micro_ti2v, tmp_path):
    prompts = ["A red ball moves left.", "A blue ball, at rest."]
    texts = {
        "txt": "\n".join([prompts[0], "", prompts[1]]),
        "jsonl": "\n".join(json.dumps({"caption": p}) for p in prompts),
        "csv": "caption\n" + "\n".join(f'"{p}"' for p in prompts),
    }
    (tmp_path / f"prompts.{form}").write_text(texts[form])
    plain = recipe_of("t2v")
    sampler = {"steps": 2, "guidance_scale": 2.0, "negative_prompt": NEGATIVE, "seed": 7}
    plain["data"]["source"] = {
        "kind": "prompts",
        "path": str(tmp_path / f"prompts.{form}"),
        "size": [32, 32],
        "num_frames": 5,
        **sampler,
    }
    data, encoders = recipes.from_plain(plain, "test").data, Encoders(micro_t2v)
    cache = prepare(data, encoders, start())
    assert [cache.caption(i) for i in range(len(cache))] == prompts
    batch, null = cache.fetch([0, 1], Draws(0, [0, 1])), encoders.texts([NEGATIVE])
    condition = batch.condition.widened(null.shape[1])
    expected = sample_latents(
        load_model(micro_t2v).role,
        condition,
        condition.null(null),
        Draws(seed_of(7, "generate"), [0, 1]),
        steps=2,
        shape=(16, 2, 4, 4),
        sampler="euler",
        guidance_scale=2.0,
        scheduler=encoders.pipeline.scheduler,
    )
    assert torch.allclose(batch.x0, expected, atol=1e-5) and float(batch.x0.std()) > 0.3
    with pytest.raises(UserError, match="makes clips from a first frame; use kind: generate"):
        prepare(data, Encoders(micro_ti2v), start())


def test_pictures_are_no_source_of_a_teacher_of_texts(recipe_of, micro_t2v, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "a.png", "caption": PROMPT}))
    plain = recipe_of("t2v")
    plain["data"]["source"] = {
        "kind": "generate",
        "path": str(tmp_path / "list.jsonl"),
        "size": [32, 32],
        "num_frames": 5,
        "steps": 2,
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "seed": 0,
    }
    with pytest.raises(UserError, match="makes clips from text alone; use kind: prompts"):
        prepare(recipes.from_plain(plain, "test").data, Encoders(micro_t2v), start())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "names no clip"),
        ('{"prompt": "a"}', "line 1: no caption; give 'caption' a text"),
        ('["a"]', 'line 1: not an object; write {"caption": ...}'),
    ],
)
def test_lists_of_prompts_with_mistakes(text, message, tmp_path):
    from vpae.data.sources import open_source

    (tmp_path / "list.jsonl").write_text(text)
    spec = {"path": str(tmp_path / "list.jsonl"), "size": [32, 32], "num_frames": 5, "steps": 1, "guidance_scale": 1.0}
    with pytest.raises(UserError) as caught:
        open_source({"kind": "prompts", "negative_prompt": "", "seed": 0, **spec})
    assert message in str(caught.value)


@pytest.fixture
def finetune_of(micro_recipe, tmp_path):
    """A flow-matching recipe, from a pipeline folder or (with a transformer) from scratch."""

    def make(path, transformer=None):
        law, optimiser = micro_recipe["priming"]["fake_time"], micro_recipe["priming"]["student_optimiser"]
        plain = {key: micro_recipe[key] for key in ("seed", "teacher", "data", "engine", "watch", "evaluate")}
        plain |= {"kind": "flow_matching", "name": "micro", "transformer": transformer, "scheduler_shift": 3.0}
        plain["training"] = {"steps": 2, "time": law, "text_dropout": 0.5, "ema_decay": 0.9, "optimiser": optimiser}
        plain["teacher"] = plain["teacher"] | {"path": str(path)}
        plain["data"] = plain["data"] | {"cache": str(tmp_path / "cache")}
        return recipes.from_plain(copy.deepcopy(plain), "test")

    return make


@pytest.mark.parametrize(("kind", "scratch"), [("t2v", True), ("t2v", False), ("ti2v", False)])
def test_flow_matching_trains_them_too(kind, scratch, finetune_of, pipeline_of, tmp_path):
    given = pipeline_of(kind)
    recipe = finetune_of(given / "vae" if scratch else given, MICRO_T2V if scratch else None)
    assert finetune(recipe, tmp_path / "run", False, start())
    made = tmp_path / "run" / "pipeline"
    assert pipeline_kind(made) == kind
    start_at = fresh_transformer(MICRO_T2V, 0) if scratch else load_transformer(given)
    before, after = start_at.state_dict(), load_transformer(made).state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    role = load_model(tmp_path / "run").role  # the checkpoint's EMA
    assert all(torch.equal(p, after[name]) for name, p in role.named_parameters())


@pytest.mark.parametrize("scratch", [True, False])
def test_flow_matching_starts_from_the_drawn_or_given_weights(scratch, finetune_of, micro_t2v):
    """Without a rank that reads, or keeps, a whole network."""
    recipe = finetune_of(micro_t2v, MICRO_T2V if scratch else None)
    cache = prepare(recipe.data, Encoders(micro_t2v), start())
    student, ema = _networks(recipe, cache, start())
    expected = (fresh_transformer(MICRO_T2V, 0) if scratch else load_transformer(micro_t2v)).state_dict()
    for role in (student, ema):
        weights = dict(role.named_parameters())
        assert weights.keys() == expected.keys() and all(torch.equal(p, expected[k]) for k, p in weights.items())


def test_flow_matching_goes_on_from_an_asset_by_its_name(finetune_of, tmp_path):
    made = assemble(finetune_of("tiny_wan"), tmp_path / "run", start())
    assert pipeline_kind(made) == "i2v" and (made / "transformer" / "config.json").is_file()
    with pytest.raises(UserError, match="'nowhere' is no folder, nor the name of a model that ships"):
        assemble(finetune_of("nowhere"), tmp_path / "other", start())
