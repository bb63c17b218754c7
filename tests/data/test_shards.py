"""Building: odd clips by name, ranks that share the work, kills at any moment."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers import write_recipe

from vpae import recipe as recipes
from vpae.data import cache as caches
from vpae.data import shards
from vpae.data.cache import expected, prepare
from vpae.data.encoders import Encoders
from vpae.data.sources import open_source
from vpae.data.videos import write_video
from vpae.engine.parallel import start
from vpae.errors import UserError


def moving(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height + count, width + count, 3), dtype=np.uint8)
    return np.stack([noise[i : i + height, i : i + width] for i in range(count)])


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """Nineteen clips of which seven cannot be used, for 5 frames of 32x32 at 16 fps."""
    folder = tmp_path_factory.mktemp("odd")
    for number in range(10):
        write_video(folder / f"good-{number}.mp4", moving(5, seed=number), 16, lossless=True)
    write_video(folder / "short.mp4", moving(4), 16, lossless=True)
    write_video(folder / "slow.mp4", moving(3), 8, lossless=True)
    write_video(folder / "wide.mp4", moving(7, 32, 48), 16, lossless=True)
    (folder / "empty.mp4").write_bytes(b"")
    whole = (folder / "good-0.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    hole = bytearray(whole)
    hole[len(hole) // 2 : len(hole) // 2 + 2000] = bytes(2000)
    (folder / "hole.mp4").write_bytes(hole)
    (folder / "text.mp4").write_text("hello " * 100)
    with av.open(str(folder / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    write_video(folder / "wordless.mp4", moving(5), 16, lossless=True)
    for video in folder.glob("*.mp4"):
        video.with_suffix(".txt").write_text(" " if video.stem == "wordless" else f"A clip called {video.stem}.")
    (folder / "lost.txt").write_text("A caption alone.")
    return folder


BAD = {
    "empty": "the file is empty (0 bytes)",
    "truncated": "cut off",
    "hole": "damaged",
    "text": "not a video file",
    "sound": "no video stream",
    "wordless": "wordless.txt: is empty",
    "lost.txt": "a caption without a video",
}
ADJUSTED = {
    "short": "last frame repeated 1 more time",
    "slow": "8 fps read at 16 fps, nearest frame; cut after frame 5",
    "wide": "48x32 scaled and cropped to 32x32; cut after frame 5",
}


@pytest.fixture
def data(micro_recipe, odd_folder, tmp_path) -> recipes.Data:
    micro_recipe["data"]["cache"] = str(tmp_path / "cache")
    micro_recipe["data"]["source"] = {
        "kind": "videos",
        "path": str(odd_folder),
        "size": [32, 32],
        "num_frames": 5,
        "fps": 16,
        "short": "repeat_last",
        "bad": "skip",
    }
    return recipes.from_plain(micro_recipe, "test").data


@pytest.fixture
def encoders(micro_pipeline) -> Encoders:
    return Encoders(micro_pipeline)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def report(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]


def test_each_odd_clip_is_reported_and_the_rest_goes_on(data, encoders, capsys):
    cache = prepare(data, encoders, start())
    lines = {line["clip"]: line for line in report(cache.folder)}
    assert len(lines) == 20 and len(cache) == 13
    assert {n for n, line in lines.items() if line["outcome"] == "left out"} == set(BAD)
    assert {n: line["how"] for n, line in lines.items() if line["outcome"] == "adjusted"} == ADJUSTED
    said = capsys.readouterr().out
    assert "10 as they are, 3 adjusted, 7 left out" in said
    for name, why in BAD.items():
        assert why in lines[name]["why"] and f"left out: {name}: {lines[name]['why']}" in said
    for name, how in ADJUSTED.items():
        assert f"adjusted: {name}: {how}" in said
    kept = [n for n in lines if n not in BAD]
    assert [cache.name(i) for i in range(13)] == kept
    for i, name in enumerate(kept):
        assert cache.caption(i) == f"A clip called {name}."
    source = open_source(data.source)
    for i in (0, 5, 12):
        record = next(source[k] for k in range(20) if source.name(k) == kept[i])
        assert torch.allclose(cache.read(i, "x0"), encoders.latents([record.frames])[0], atol=1e-5)


def test_with_bad_error_the_first_bad_clip_ends_it(data, encoders):
    data.source["bad"] = "error"
    with pytest.raises(
        UserError, match=r"wordless.txt: is empty.*\(and 1 more\); or leave such clips out with bad: skip"
    ):
        prepare(data, encoders, start())
    data.source["bad"] = "skip"
    folder = prepare(data, encoders, start()).folder
    lines = "".join(json.dumps({"file": f"{n}.mp4", "caption": "A."}) + "\n" for n in ("good-1", "truncated", "good-2"))
    (Path(data.source["path"]) / "three.jsonl").write_text(lines)
    data.source.update(path=data.source["path"] + "/three.jsonl", bad="error")
    data = replace(data, cache=data.cache + "-three")
    with pytest.raises(UserError, match="truncated.mp4: cut off .*; or leave such clips out with bad: skip"):
        prepare(data, encoders, start())
    data.source["bad"] = "skip"
    cache = prepare(data, encoders, start())
    assert [cache.name(i) for i in range(len(cache))] == ["good-1", "good-2"] and cache.folder != folder
    data.source["bad"] = "error"
    with pytest.raises(UserError, match="leaves out 1 clips .* bad: error; say bad: skip"):
        prepare(data, encoders, start())


def test_nothing_left_is_an_error(data, encoders, tmp_path):
    (tmp_path / "bad").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bad" / f"{name}.mp4").write_bytes(b"")
        (tmp_path / "bad" / f"{name}.txt").write_text("A.")
    data.source["path"] = str(tmp_path / "bad")
    with pytest.raises(UserError, match="no clip is left of 2; .*clips.jsonl says why"):
        prepare(data, encoders, start())
    assert [line["outcome"] for line in report(Path(data.cache))] == ["left out"] * 2
    assert not (Path(data.cache) / "manifest.json").exists()


def test_a_clip_whose_latents_break_is_left_out_and_its_neighbours_stay(data, encoders, monkeypatch):
    latents = encoders.latents

    def broken(clips):
        out = latents(clips)
        out[1, 3, 0, 0, 0] = float("inf")
        return out

    whole = prepare(data, encoders, start())
    monkeypatch.setattr(encoders, "latents", lambda clips: broken(clips) if len(clips) > 1 else latents(clips))
    data = replace(data, cache=data.cache + "-broken")
    cache = prepare(data, encoders, start())
    left = [line["clip"] for line in report(cache.folder) if "x0 holds NaN or infinity" in line.get("why", "")]
    assert left == ["good-1", "good-8"] and len(cache) == len(whole) - 2
    names = [whole.name(i) for i in range(len(whole))]
    for i in range(len(cache)):
        assert torch.equal(cache.read(i, "x0"), whole.read(names.index(cache.name(i)), "x0"))
        assert torch.equal(cache.read(i, "text"), whole.read(names.index(cache.name(i)), "text"))


def one_by_one(monkeypatch, clips: int) -> None:
    monkeypatch.setattr(caches, "clips_per_shard", lambda *_: clips)


@pytest.mark.parametrize("ranks", [2, 3])
def test_files_do_not_depend_on_ranks_nor_on_where_one_died(data, encoders, monkeypatch, ranks):
    """The ranks of a group one after the other, in any order, dying at any shard, in groups of changing size."""
    one_by_one(monkeypatch, 2)
    whole = prepare(data, encoders, start())
    data = replace(data, cache=data.cache + "-ranks")
    source, folder = open_source(data.source), Path(data.cache)
    job = shards.Build(folder, source, encoders, data.negative_prompt, expected(data, source, encoders), 2)
    generator = random.Random(ranks)
    write, left = shards._write_shard, [0]

    def dies(*arguments):
        left[0] -= 1
        if left[0] < 0:
            (folder / "shard-00003.partial").write_bytes(b"half a sha")
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(shards, "_write_shard", dies)
    for size in (ranks, 1, ranks):
        todo = shards._stamp(job)
        assert not list(folder.glob("*.partial")) and not (folder / "stop").exists()
        for rank in generator.sample(range(size), size):
            left[0] = generator.randrange(3)
            (folder / "stop").unlink(missing_ok=True)
            try:
                shards._encode_shards(job, todo, replace(start(), rank=rank, size=size))
            except KeyboardInterrupt:
                assert (folder / "stop").exists()
    monkeypatch.setattr(shards, "_write_shard", write)
    built = prepare(data, encoders, start())
    assert built.fingerprint == whole.fingerprint and contents(built.folder) == contents(whole.folder)


def test_a_rank_stops_when_another_has_failed(data, encoders, monkeypatch):
    one_by_one(monkeypatch, 1)
    source, folder = open_source(data.source), Path(data.cache)
    job = shards.Build(folder, source, encoders, "", expected(data, source, encoders), 1)
    todo, write, written = shards._stamp(job), shards._write_shard, []

    def fails_elsewhere(job, shard, *rest):
        written.append(shard)
        (folder / "stop").touch()
        write(job, shard, *rest)

    monkeypatch.setattr(shards, "_write_shard", fails_elsewhere)
    shards._encode_shards(job, todo, replace(start(), rank=1, size=2))
    assert written == [1]


def test_a_shard_without_its_end_is_made_again_and_older_leavings_go(data, encoders, monkeypatch):
    one_by_one(monkeypatch, 4)
    whole = prepare(data, encoders, start())
    before = contents(whole.folder)
    stamp = {"fingerprint": whole.manifest["fingerprint"], "made_with": whole.manifest["made_with"]}
    (whole.folder / "manifest.json").unlink()
    (whole.folder / "building.json").write_text(json.dumps(stamp))
    cut = whole.folder / "shard-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    (whole.folder / ".manifest.json.123.tmp").write_text("{")
    encoded, real = [], shards._encode_shard
    monkeypatch.setattr(shards, "_encode_shard", lambda job, at, *rest: encoded.append(at) or real(job, at, *rest))
    assert prepare(data, encoders, start()).fingerprint == whole.fingerprint
    assert encoded == [range(4, 8)] and contents(whole.folder) == before


def test_shards_of_other_data_are_never_taken_up(data, encoders, monkeypatch):
    one_by_one(monkeypatch, 4)
    write = shards._finish
    monkeypatch.setattr(shards, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(data, encoders, start())
    monkeypatch.setattr(shards, "_finish", write)
    data.source["short"] = "error"
    cache = prepare(data, encoders, start())
    assert len(cache) == 12 and "4 frames at 16 fps, 5 wanted" in (cache.folder / "clips.jsonl").read_text()


@pytest.mark.parametrize(
    ("shape", "count", "clips"),
    [
        ((17, 64, 64), 7, 8),
        ((17, 64, 64), 1024, 16),
        ((17, 64, 64), 100_000, 256),
        ((49, 256, 256), 100_000, 16),
        ((81, 480, 832), 8, 1),
        ((81, 480, 832), 100_000, 1),
        ((81, 720, 1280), 100_000, 1),
    ],
)
def test_clips_of_a_shard_follow_from_their_size_and_number(encoders, shape, count, clips):
    assert shards.clips_per_shard(shape, count, encoders) == clips


def test_what_was_made_with_several_versions_says_so(data, encoders, monkeypatch):
    source = open_source(data.source)
    job = shards.Build(Path(data.cache), source, encoders, "", expected(data, source, encoders), 256)
    job.folder.mkdir()
    now = shards.versions(encoders.device)
    for torch_version in ("1", "2", "2", "1"):
        monkeypatch.setattr(shards, "versions", lambda device, v=torch_version: now | {"torch": v})
        shards._stamp(job)
    cache = prepare(data, encoders, start())
    assert [v["torch"] for v in cache.manifest["made_with"]] == ["1", "2"]


@pytest.mark.slow
def test_two_ranks_killed_at_random_moments(vpae, micro_recipe, data, tmp_path):
    """Real processes and kill -9 of both ranks while they encode."""
    source, folder = {**data.source}, tmp_path / "cache"
    source["num_frames"], source["size"] = 33, [160, 160]  # three shards, some seconds in all
    micro_recipe["data"] |= {"source": source, "cache": str(tmp_path / "one")}
    done = vpae("cache", write_recipe(micro_recipe, tmp_path / "one.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    micro_recipe["data"]["cache"] = str(folder)
    recipe = write_recipe(micro_recipe, tmp_path / "two.yaml")
    generator, stamp = random.Random(0), folder / "building.json"
    for wait in (0.0, generator.uniform(0, 0.8), generator.uniform(0, 0.8)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        since, ranks = time.time_ns(), []
        for rank in ("0", "1"):
            variables = os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            # not torchrun's: its agent gives each rank a session of its own, which outlives the agent
            ranks.append(subprocess.Popen([sys.executable, "-m", "vpae", "cache", str(recipe)], env=variables))
        while ranks[0].poll() is None and not (stamp.exists() and stamp.stat().st_mtime_ns > since):
            time.sleep(0.02)
        time.sleep(wait)
        assert all(rank.poll() is None for rank in ranks)
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.wait()
        assert not (folder / "manifest.json").exists()
    done = vpae("cache", recipe, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(folder) == contents(tmp_path / "one")
    assert "on 2 ranks" in done.stdout and "clips/s" in done.stdout
