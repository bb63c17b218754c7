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
    from vpae.data import cache, shards

    monkeypatch.setattr(cache, "clips_per_shard", lambda *_: 2)
    encoders = Encoders(data.teacher.path)
    encode, calls = shards._encode_shard, []

    def dies(job, positions, *rest):
        calls.append(positions.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(job, positions, *rest)

    monkeypatch.setattr(shards, "_encode_shard", dies)
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
        bad, folder, shape = "error", None, (5, 32, 32)

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
    from vpae.data import locking

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
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


def test_every_file_of_a_cache_is_checked(data):
    encoders = Encoders(data.teacher.path)
    cache = prepare(data.data, encoders, start())
    names = ["shard-00000.safetensors", "null_text.safetensors", "probe.safetensors", "clips.jsonl"]
    for name in names:
        file = cache.folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(UserError, match=f"{name} is missing or damaged"):
            prepare(data.data, encoders, start())
        file.unlink()
        with pytest.raises(UserError, match=f"{name} is missing or damaged"):
            prepare(data.data, encoders, start())
        file.write_bytes(whole)
    assert prepare(data.data, encoders, start()).fingerprint == cache.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"file": "../../secret", "clips": 5, "bytes": 1, "sha256": ""}]},
        {"shards": None},
        {"count": 6},
        {"captions": []},
        {"fingerprint": []},
    ],
)
def test_a_manifest_that_was_tampered_with_is_damaged(data, change):
    encoders = Encoders(data.teacher.path)
    cache = prepare(data.data, encoders, start())
    (cache.folder / "manifest.json").write_text(json.dumps(cache.manifest | change))
    with pytest.raises(UserError, match="manifest.json is damaged"):
        prepare(data.data, encoders, start())


def test_libraries_that_compute_something_else_are_found_by_their_numbers(data, monkeypatch):
    encoders = Encoders(data.teacher.path)
    cache = prepare(data.data, encoders, start())
    probe = encoders.probe
    monkeypatch.setattr(encoders, "probe", lambda: {k: v * 1.001 for k, v in probe().items()})
    assert len(prepare(data.data, encoders, start())) == 5
    made = json.loads((cache.folder / "manifest.json").read_text())
    made["made_with"][-1]["diffusers"] = "0.1"
    (cache.folder / "manifest.json").write_text(json.dumps(made))
    assert len(prepare(data.data, encoders, start())) == 5, "a version by itself refuses nothing"
    for name in ("latent", "image", "text"):
        monkeypatch.setattr(encoders, "probe", lambda name=name: probe() | {name: probe()[name].roll(1, -1)})
        with pytest.raises(UserError, match=rf"give another {name} .*diffusers 0\.1 then"):
            prepare(data.data, encoders, start())


def test_reading_keeps_few_files_open_and_every_sample_in_its_place(data, monkeypatch):
    from vpae.data import cache as module

    encoders = Encoders(data.teacher.path)
    whole = prepare(data.data, encoders, start())
    monkeypatch.setattr(module, "clips_per_shard", lambda *_: 2)
    monkeypatch.setattr(module, "_OPEN_SHARDS", 1)
    data.data.source["count"] = 5
    object.__setattr__(data.data, "cache", data.data.cache + "-2")
    parts = prepare(data.data, encoders, start())
    assert len(parts.manifest["shards"]) == 3
    for i in (4, 0, 3, 1, 2):
        # sixteen-digit agreement is not asked of other batch sizes
        assert torch.allclose(parts.read(i, "x0"), whole.read(i, "x0"), atol=1e-5)
        assert parts.caption(i) == whole.caption(i) and parts.name(i) == whole.name(i)
        assert len(parts._open) == 1
    for index in (5, -1):
        with pytest.raises(IndexError):
            parts.read(index, "x0")


def test_what_a_kill_leaves_of_safetensors_own_file_is_cleared_and_not_taken_for_somebody_elses(data):
    """save_file writes by way of ``.tmpXXXXXX`` beside its target."""
    folder = Path(data.data.cache)
    folder.mkdir()
    (folder / ".tmpW0yd4i").write_bytes(b"half")
    made = prepare(data.data, Encoders(data.teacher.path), start())
    assert len(made) == 5 and not list(folder.glob(".*"))
