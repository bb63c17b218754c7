"""Clips made by the teacher: deterministic by (seed, place), straight from the sampler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vpae import recipe as recipes
from vpae.conditioning import Condition
from vpae.data import cache as caches
from vpae.data import shards
from vpae.data.cache import prepare
from vpae.data.encoders import Encoders
from vpae.data.generate import Teacher
from vpae.data.pictures import open_picture
from vpae.data.sources import open_source
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.loading import load_model
from vpae.sampling import sample_latents


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four lines over two pictures; the third one's picture is cut off."""
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise[:32, :32]).save(tmp_path / "pictures" / "a.png")
    Image.fromarray(noise).save(tmp_path / "pictures" / "b.png")
    whole = (tmp_path / "pictures" / "b.png").read_bytes()
    (tmp_path / "pictures" / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = [("a.png", "A red ball."), ("b.png", "A blue ball moves."), ("cut.png", "No."), ("a.png", "A green ball.")]
    text = "\n".join(json.dumps({"image": image, "caption": caption}) for image, caption in lines)
    (tmp_path / "pictures" / "prompts.jsonl").write_text(text)
    return tmp_path / "pictures"


@pytest.fixture
def data(micro_recipe, folder, tmp_path) -> recipes.Data:
    micro_recipe["data"]["cache"] = str(tmp_path / "cache")
    micro_recipe["data"]["source"] = {
        "kind": "generate",
        "path": str(folder / "prompts.jsonl"),
        "size": [32, 32],
        "num_frames": 5,
        "steps": 3,
        "guidance_scale": 2.0,
        "negative_prompt": "a gray ball , blurry and at rest",
        "seed": 7,
        "bad": "skip",
    }
    return recipes.from_plain(micro_recipe, "test").data


@pytest.fixture
def encoders(micro_pipeline) -> Encoders:
    return Encoders(micro_pipeline)


def test_latents_are_those_of_the_teachers_sampler(data, encoders, micro_pipeline, monkeypatch):
    monkeypatch.setattr(encoders, "latents", None)  # nothing is decoded and encoded again
    monkeypatch.setattr(encoders, "probe", lambda: {"x": torch.zeros(1)})
    cache = prepare(data, encoders, start())
    assert [cache.name(i) for i in range(len(cache))] == ["000000-a", "000001-b", "000003-a"]
    lines = [json.loads(line) for line in (cache.folder / "clips.jsonl").read_text().splitlines()]
    assert "48x40 scaled and cropped to 32x32" in lines[1]["how"] and "not a picture" in lines[2]["why"]
    batch = cache.fetch([0, 1, 2], Draws(0, [0, 1, 2]))
    null = encoders.texts(["a gray ball , blurry and at rest"])
    condition: Condition = batch.condition.widened(null.shape[1])
    expected = sample_latents(
        load_model(micro_pipeline).role,
        condition,
        condition.null(null),
        Draws(seed_of(7, "generate"), [0, 1, 3]),
        steps=3,
        sampler="euler",
        guidance_scale=2.0,
        scheduler=encoders.pipeline.scheduler,
    )
    assert torch.allclose(batch.x0, expected, atol=1e-5) and float(batch.x0.std()) > 0.3
    assert cache.manifest["fingerprint"]["teacher"]["shift"] == 3.0


def test_a_clip_belongs_to_seed_and_place_whoever_makes_it(data, encoders, monkeypatch):
    one = prepare(data, encoders, start())
    monkeypatch.setattr(caches, "clips_per_shard", lambda *_: 1)
    other = replace(data, cache=data.cache + "-single")
    single = prepare(other, encoders, start())
    for i in range(3):
        assert torch.allclose(one.read(i, "x0"), single.read(i, "x0"), atol=1e-5)
    third = replace(data, cache=data.cache + "-ranks")
    source = open_source(third.source)
    wanted = caches.expected(third, source, encoders)
    job = shards.Build(Path(third.cache), source, encoders, third.negative_prompt, wanted, 1)
    todo = shards._stamp(job)
    for rank in (1, 0):
        shards._encode_shards(job, todo, replace(start(), rank=rank, size=2))
    assert prepare(third, encoders, start()).fingerprint == single.fingerprint
    data.source["seed"] = 8
    with pytest.raises(UserError, match="source.seed is 7 in the cache and 8 in the recipe"):
        prepare(data, encoders, start())


def test_bf16_matrices_give_the_numbers_of_autocast_over_fp32(data, encoders, micro_pipeline):
    source = open_source(data.source | {"precision": "bf16", "guidance_scale": 1.0})
    record = source[0]
    condition = encoders.condition(list(record.frames), [record.caption], 5)
    teacher = Teacher(source, encoders)
    linear = [p.dtype for n, p in teacher.role.backbone.transformer.named_parameters() if "to_q.weight" in n]
    assert set(linear) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = sample_latents(
            load_model(micro_pipeline).role,
            condition.widened(teacher.null_text.shape[1]),
            None,
            Draws(seed_of(7, "generate"), [0]),
            steps=3,
            sampler="euler",
            scheduler=encoders.pipeline.scheduler,
        )
    assert torch.equal(teacher([0], condition), expected.float())
    assert not torch.equal(
        Teacher(open_source(data.source | {"guidance_scale": 1.0}), encoders)([0], condition), expected
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bad": "error"}, "cut.png is not a picture"),
        ({"guidance_scale": -1}, "guidance_scale is -1; it has to be a number from 0"),
        ({"precision": "fp8"}, "one of fp32, bf16"),
        ({"attention": "sage2"}, "sage2"),
        ({"num_frames": 6}, "clips of 6 frames"),
        ({"seed": None}, "seed is None"),
        ({"other_size": "error"}, "b.png: 48x40, 32x32 wanted"),
    ],
)
def test_mistakes_are_named(data, encoders, change, words):
    if change.get("other_size"):
        change["bad"] = "error"
    data.source.update(change)
    with pytest.raises(UserError, match=words):
        prepare(data, encoders, start())


def test_a_folder_of_videos_is_no_list_of_pictures(data, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="name a JSONL or CSV list of images and captions"):
        open_source(data.source | {"path": str(tmp_path / "videos")})


def test_a_picture_that_unpacks_to_a_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(UserError, match="a.png is not a picture that can be read: Image size"):
        open_picture(tmp_path / "a.png")


def test_the_teacher_must_be_there(data, encoders, micro_pipeline, tmp_path):
    import shutil

    other = shutil.copytree(micro_pipeline, tmp_path / "other")
    shutil.rmtree(other / "transformer")
    with pytest.raises(UserError, match="holds no transformer"):
        prepare(data, Encoders(other), start())
