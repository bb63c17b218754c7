"""Manifests and shards of a cache: damaged, of any content, signed anew or not, finished or half built."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct

import pytest
import torch
from fuzzing import cases, damaged, explore, mutated, outcome
from hypothesis import strategies as st
from safetensors.torch import load_file

from vpae import recipe as recipes
from vpae.data import shards
from vpae.data.cache import expected, open_cache, prepare
from vpae.data.encoders import Encoders
from vpae.data.publish import cache_dataset
from vpae.data.shards import Build, sign
from vpae.data.sources import open_source
from vpae.draws import Draws
from vpae.engine.parallel import start
from vpae.errors import UserError


@pytest.fixture
def made(micro_recipe, tmp_path):
    """A finished cache of five clips, and what is wanted of it."""
    micro_recipe["data"] |= {"cache": str(tmp_path / "cache")}
    micro_recipe["data"]["source"]["count"] = 5
    data = recipes.from_plain(micro_recipe, "test").data
    encoders = Encoders(micro_recipe["teacher"]["path"])
    with contextlib.redirect_stdout(io.StringIO()):
        cache = prepare(data, encoders, start())
    return cache, expected(data, open_source(data.source), encoders), encoders, data


def _content(cache):
    """All that training sees of a cache."""
    return [cache.fetch([i], Draws(0, [0])) for i in range(len(cache))]


def _same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a.x0, b.x0)
        and torch.equal(a.condition.text, b.condition.text)
        and torch.equal(a.condition.image, b.condition.image)
        and torch.equal(a.condition.latent, b.condition.latent)
        and torch.equal(a.condition.mask, b.condition.mask)
        and torch.equal(a.null.text, b.null.text)
        for a, b in zip(one, two, strict=True)
    )


@cases(8, 1000)
def test_a_manifest_of_any_content(count, made, tmp_path):
    cache, wanted, _, _ = made
    file, content = cache.folder / "manifest.json", _content(cache)
    plain = json.loads(file.read_text())

    @explore(count, tmp_path, mutated(plain))
    def check(manifest):
        file.write_text(json.dumps(manifest), encoding="utf-8")
        opened = outcome(lambda: open_cache(cache.folder, wanted, start()))
        assert isinstance(opened, UserError) or _same(_content(opened), content), "wrong data"


@pytest.mark.parametrize("key", ["names", "captions"])
def test_a_clip_without_a_name_or_caption_is_no_clip(key, made):
    """Found by the cases below."""
    cache, wanted, _, _ = made
    file = cache.folder / "manifest.json"
    whole = file.read_text()
    manifest = json.loads(whole)
    manifest[key][0] = ""
    manifest["digest"] = sign(manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")
    try:
        with pytest.raises(UserError, match=key):
            open_cache(cache.folder, wanted, start())
    finally:
        file.write_text(whole)


@cases(8, 1000)
def test_a_manifest_of_any_content_signed_anew(count, made, tmp_path):
    """As somebody would who wants it read: what it holds is looked at before anything is taken from it."""
    cache, wanted, _, _ = made
    file = cache.folder / "manifest.json"
    plain = json.loads(file.read_text())

    @explore(count, tmp_path, mutated(plain))
    def check(manifest):
        if isinstance(manifest, dict):
            with contextlib.suppress(TypeError):  # keys of several kinds
                manifest["digest"] = sign(manifest)
        file.write_text(json.dumps(manifest), encoding="utf-8")
        opened = outcome(lambda: open_cache(cache.folder, wanted, start()))
        if not isinstance(opened, UserError):
            assert len(_content(opened)) == len(opened) == 5
            assert all(opened.name(i) and opened.caption(i) for i in range(5))
        outcome(lambda: cache_dataset(cache.folder))


@cases(8, 800)
def test_damage_to_any_file_is_found(count, made, tmp_path):
    cache, wanted, _, _ = made
    files = sorted(f for f in cache.folder.iterdir() if f.name != "lock")
    whole, content = {f: f.read_bytes() for f in files}, _content(cache)

    @explore(count, tmp_path, st.sampled_from(files).flatmap(lambda f: st.tuples(st.just(f), damaged(whole[f]))))
    def check(drawn):
        file, data = drawn
        file.unlink()  # an open cache may have it mapped
        file.write_bytes(data)
        opened = outcome(lambda: open_cache(cache.folder, wanted, start()))
        same = data == whole[file] or file.name == "manifest.json"
        assert isinstance(opened, UserError) or (same and _same(_content(opened), content)), "damage was not found"
        file.unlink()
        file.write_bytes(whole[file])


def _with_header(data: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def _header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


@cases(8, 800)
def test_a_half_built_cache_takes_up_whole_shards_alone(count, made, tmp_path, monkeypatch):
    """What is found in a shard's place is either made anew, or named, or holds a row of each kind for each clip."""
    cache, wanted, encoders, data = made
    first = cache.folder / "shard-00000.safetensors"
    whole, folder = first.read_bytes(), tmp_path / "half"
    right, clips = load_file(first), json.loads(_header(whole)["__metadata__"]["clips"])
    folder.mkdir()
    job = Build(folder, open_source(data.source), encoders, "", wanted, 8)
    file = job.file(0)
    headers = mutated(_header(whole)).map(lambda header: _with_header(whole, header))
    outcomes = mutated(clips).map(lambda c: _header(whole) | {"__metadata__": {"clips": json.dumps(c)}})
    outcomes = outcomes.map(lambda header: _with_header(whole, header))

    @explore(count, tmp_path, damaged(whole) | headers | outcomes)
    def check(data):
        file.write_bytes(data)
        taken = outcome(lambda: shards._is_whole(file))
        assert file.exists() == (taken is True)
        if taken is True:
            said = outcome(lambda: shards._describe(job, 0))
            if not isinstance(said, UserError):
                kept = [o for o in said["outcomes"] if "left_out" not in o]
                assert said["entry"]["clips"] == len(kept) and len(said["outcomes"]) == 5
                tensors = load_file(file)
                assert {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in right.items()}
        file.unlink(missing_ok=True)


@cases(3, 200)
def test_a_stamp_of_any_content(count, made, tmp_path):
    """What ``building.json`` says of another fingerprint clears the folder, what cannot be read too."""
    cache, wanted, encoders, data = made
    folder = tmp_path / "half"
    job = Build(folder, open_source(data.source), encoders, "", wanted, 8)
    stamp = {"fingerprint": wanted, "made_with": [{"vpae": "0"}]}

    @explore(count, tmp_path, mutated(stamp).map(json.dumps).map(str.encode) | damaged(json.dumps(stamp).encode()))
    def check(text):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(cache.folder / "shard-00000.safetensors", folder)
        (folder / "building.json").write_bytes(text)
        todo = outcome(lambda: shards._stamp(job))
        assert todo in ([], [0])
        now = json.loads((folder / "building.json").read_text())
        assert now["fingerprint"] == json.loads(json.dumps(wanted))
