"""The cache: what is encoded, resumed, fingerprinted."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vpae import recipe as recipes
from vpae.data.bounce import World, make_clip
from vpae.data.cache import open_cache, prepare
from vpae.data.encoders import Encoders
from vpae.data.sources import Record
from vpae.draws import Draws
from vpae.engine.parallel import start
from vpae.errors import UserError


@pytest.fixture
def data(micro_recipe, tmp_path):
    micro_recipe["data"]["cache"] = str(tmp_path / "cache")
    micro_recipe["data"]["source"]["count"] = 5
    return recipes.from_plain(micro_recipe, "test")


def test_a_batch_is_what_the_encoders_say_of_the_clips(data):
    encoders = Encoders(data.teacher.path)
    cache = prepare(data.data, encoders, start())
    clips = [make_clip(World(size=32, num_frames=5), "train", i) for i in (3, 1)]
    batch = cache.fetch([3, 1], Draws(0, [0, 1]))
    expected = encoders.condition([c.frames[0] for c in clips], [c.caption for c in clips], 5)
    assert torch.allclose(batch.x0, encoders.latents([c.frames for c in clips]), atol=1e-5)
    assert torch.allclose(batch.condition.latent, expected.latent, atol=1e-5)
    assert torch.allclose(batch.condition.image, expected.image, atol=1e-5)
    rows = expected.text.shape[1]
    assert torch.allclose(batch.condition.text[:, :rows], expected.text, atol=1e-5)
    assert batch.condition.text[:, rows:].abs().sum() == 0
    assert torch.equal(batch.condition.mask, expected.mask)
    assert torch.allclose(batch.null.text[0, :1], encoders.texts([""])[0, :1], atol=1e-5)
    assert batch.null.text[:, 1:].abs().sum() == 0 and torch.equal(batch.null.latent, batch.condition.latent)


def test_building_again_takes_up_finished_shards(data, monkeypatch):
    from vpae.data import cache as module

    monkeypatch.setattr(module, "_SHARD", 2)
    encoders = Encoders(data.teacher.path)
    encode, calls = module._encode, []

    def dies(source, indices, *rest):
        calls.append(indices.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(source, indices, *rest)

    monkeypatch.setattr(module, "_encode", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(data.data, encoders, start())
    cache = prepare(data.data, encoders, start())
    assert calls == [0, 2, 2, 4] and len(cache) == 5
    assert [cache.caption(i) for i in range(5)] == [
        make_clip(World(size=32, num_frames=5), "train", i).caption for i in range(5)
    ]


def test_each_field_of_the_fingerprint_is_checked(data):
    encoders = Encoders(data.teacher.path)
    cache = prepare(data.data, encoders, start())
    wanted = cache.manifest["fingerprint"]
    for field, value, named in (
        ("negative_prompt", "blurry", "negative_prompt is '' in the cache and 'blurry'"),
        ("source", wanted["source"] | {"count": 6}, "source.count is 5 in the cache and 6"),
        ("dtype", "bfloat16", "dtype is"),
    ):
        with pytest.raises(UserError, match=named):
            open_cache(cache.folder, wanted | {field: value}, start())


def test_nan_and_missing_captions_are_named(data, monkeypatch):
    from vpae.data import cache as module

    class Bad:
        def __init__(self, record):
            self.record = record

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return self.record

        def fingerprint(self):
            return {"kind": "bad"}

    encoders = Encoders(data.teacher.path)
    frames = make_clip(World(size=32, num_frames=5), "train", 0).frames
    monkeypatch.setattr(module, "open_source", lambda spec: Bad(Record("clip-7", frames, "  ")))
    with pytest.raises(UserError, match="clip-7 has an empty caption"):
        prepare(data.data, encoders, start())
    monkeypatch.setattr(module, "open_source", lambda spec: Bad(Record("clip-7", frames, "A ball.")))
    monkeypatch.setattr(encoders, "latents", lambda clips: torch.full((1, 16, 2, 4, 4), np.nan))
    with pytest.raises(UserError, match="clip-7: its x0 holds NaN"):
        prepare(data.data, encoders, start())


def test_the_manifest_lists_every_shard_with_its_hash(data):
    cache = prepare(data.data, Encoders(data.teacher.path), start())
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert manifest["count"] == 5 and len(manifest["shards"]) == 1 and len(manifest["shards"][0]["sha256"]) == 64


@pytest.mark.parametrize(
    ("world", "what"), [({"num_frames": 6}, "6 frames of 32x32"), ({"size": 40}, "5 frames of 40x40")]
)
def test_clips_of_a_shape_the_model_does_not_take_are_refused_before_any_is_encoded(data, world, what):
    data.data.source["world"] = {"size": 32, "num_frames": 5} | world
    with pytest.raises(UserError, match=rf"data.source gives clips of {what}; .* 4k \+ 1 .* multiples of 16"):
        prepare(data.data, Encoders(data.teacher.path), start())
    assert not list(Path(data.data.cache).glob("shard-*"))


def test_a_file_system_without_locks_is_no_reason_to_stop(data, monkeypatch, capsys):
    from vpae.data import cache as module

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    assert len(prepare(data.data, Encoders(data.teacher.path), start())) == 5
    assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(data):
    """A mistyped data.cache must not cost anybody their shards."""
    folder = Path(data.data.cache)
    folder.mkdir()
    (folder / "shard-000000.tar").write_text("somebody's")
    with pytest.raises(UserError, match="holds shard-000000.tar and no cache of ours"):
        prepare(data.data, Encoders(data.teacher.path), start())
    assert [file.name for file in folder.iterdir()] == ["shard-000000.tar"]
