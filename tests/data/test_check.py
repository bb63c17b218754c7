"""What `vpae cache --check` sees in a finished cache, and a cache as a Hugging Face dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_recipe
from PIL import Image

from vpae import recipe as recipes
from vpae.data.cache import find, prepare
from vpae.data.cards import Card, _clipped, _font, card_sheet
from vpae.data.check import check, near_pairs, told
from vpae.data.encoders import Encoders
from vpae.data.publish import cache_dataset
from vpae.data.videos import write_video
from vpae.engine.parallel import start
from vpae.engine.watch import motion_energy
from vpae.errors import UserError
from vpae.models import find_model


def moving(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(noise).resize((100, 100), Image.Resampling.BICUBIC))
    return np.stack([wide[2 * i : 2 * i + 32, i : i + 32] for i in range(33)])


@pytest.fixture
def data(micro_recipe, tmp_path) -> recipes.Data:
    """Eleven clips: a copy, a near copy, one that stands still, one that is empty, one that is short."""
    folder = tmp_path / "clips"
    clips = {f"clip-{i}": moving(i) for i in range(6)}
    clips["copy"] = clips["clip-0"]
    clips["nearly"] = np.clip(clips["clip-1"].astype(int) + 1, 0, 255).astype(np.uint8)
    clips["still"] = np.repeat(moving(9)[:1], 33, 0)
    clips["short"] = moving(10)[:32]
    for name, frames in clips.items():
        write_video(folder / f"{name}.mp4", frames, 16, lossless=True)
        (folder / f"{name}.txt").write_text(f"A ball called {name}" + " and a ball" * (name == "clip-5"))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "empty.txt").write_text("Empty.")
    micro_recipe["data"]["cache"] = str(tmp_path / "cache")
    micro_recipe["data"]["source"] = {
        "kind": "videos",
        "path": str(folder),
        "size": [32, 32],
        "num_frames": 33,
        "fps": 16,
        "short": "repeat_last",
        "bad": "skip",
    }
    return recipes.from_plain(micro_recipe, "test").data


def test_statistics_and_sheet_of_a_cache(data):
    tiny = find_model("tiny_wan")  # a VAE that has learnt something: a random one sees hardly any motion
    cache = prepare(data, Encoders(tiny), start())
    eyes = Encoders(tiny, vae_only=True)
    assert eyes.pipeline.text_encoder is None
    found = find(data, eyes, start())
    assert found.fingerprint == cache.fingerprint
    statistics = check(found, eyes, start())
    assert json.loads((cache.folder / "check.json").read_text()) == statistics
    assert statistics["clips"] == {"in_the_cache": 10, "as_it_is": 9, "adjusted": 1, "left_out": 1}
    assert [line["clip"] for line in statistics["left_out"]] == ["empty"]
    assert statistics["duplicates"]["exact"] == {"groups": 1, "clips": [["clip-0", "copy"]]}
    assert [pair[:2] for pair in statistics["duplicates"]["near"]["clips"]] == [["clip-1", "nearly"]]
    assert statistics["motion_energy"]["nearly_still"]["clips"] == ["still"]
    motion = motion_energy(torch.stack([cache.read(i, "x0") for i in range(10)]))
    assert statistics["motion_energy"]["max"] == pytest.approx(float(motion.max()), rel=1e-3)
    assert sum(statistics["motion_energy"]["histogram"]["counts"]) == 10
    assert (statistics["captions"]["words"]["min"], statistics["captions"]["words"]["max"]) == (4, 7)
    assert statistics["captions"]["different"] == 10
    assert statistics["captions"]["tokens"]["max"] == 8  # seven words and the end of the text
    x0 = torch.stack([cache.read(i, "x0") for i in range(10)])
    assert statistics["latents"]["std"] == pytest.approx(float(x0.std(correction=0)), abs=1e-3)
    said = told(statistics, cache.folder)
    assert "left out   empty: empty.mp4: the file is empty" in said and "the same   clip-0, copy" in said
    sheet = np.asarray(Image.open(cache.folder / "check.png").convert("RGB"))
    frame = np.asarray(Image.fromarray(eyes.decode(cache.read(0, "x0")[None])[0][0]).resize((192, 192), 0))
    places = np.argwhere((sheet[:, :, :] == frame[0, 0]).all(-1))
    assert any(np.array_equal(sheet[y : y + 192, x : x + 192], frame) for y, x in places), "decoded frame 0 is shown"
    prepare(data, Encoders(tiny), start())  # what the check wrote disturbs nothing


def test_check_wants_a_finished_and_whole_cache(data, micro_pipeline):
    encoders = Encoders(micro_pipeline)
    with pytest.raises(UserError, match="holds no finished cache; build it with vpae cache"):
        find(data, encoders, start())
    cache = prepare(data, encoders, start())
    shard = cache.folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="shard-00000.safetensors is missing or damaged"):
        find(data, encoders, start())


@pytest.mark.parametrize("count", [3, 40])
def test_near_duplicates_are_told_from_unrelated_clips(count):
    generator = torch.Generator().manual_seed(0)
    shared = 3 * torch.randn(1, 4 * 12, generator=generator) if count > 8 else 0
    clips = torch.randn(count, 4 * 12, generator=generator)
    clips[2] = clips[0] + 0.1 * torch.randn(48, generator=generator)
    ((distance, i, j),) = near_pairs(clips + shared, 4)
    assert (i, j) == (0, 2) and 0 < distance < 0.05
    assert near_pairs(torch.zeros(1, 48), 4) == []


def test_cards_hold_any_text(tmp_path):
    picture = np.full((8, 8, 3), 200, np.uint8)
    cards = [
        Card("n" * 300, [(0, picture)], "word " * 300, "motion 1", "x" * 500, 1.0),
        Card("", [(0, picture), (3, picture)], "", "", "", 0.0),
        Card("c", [(0, picture)], "Ünïcode 雨\nsecond line", "f", "", 0.5),
    ]
    histogram = ("motion", {"counts": [0, 3, 0], "edges": [0.0, 1.0, 2.0, 3.0]})
    sheet = card_sheet("title", ["a line " * 60, "b"], cards, tmp_path / "s.png", histogram)
    assert np.array_equal(sheet, np.asarray(Image.open(tmp_path / "s.png"))) and sheet.shape[1] > 600
    assert card_sheet("title", ["a"], cards[:1], tmp_path / "s.png", histogram).shape[1] < sheet.shape[1]
    clipped = _clipped("many words " * 50, 14, 200, 3).split("\n")
    assert len(clipped) == 3 and clipped[-1].endswith(" ...")
    assert all(_font(14).getlength(line) <= 200 for line in clipped)
    with pytest.raises(ValueError, match="needs a card"):
        card_sheet("title", [], [], tmp_path / "s.png", histogram)


def test_a_cache_is_a_dataset(data, micro_pipeline, tmp_path):
    cache = prepare(data, Encoders(micro_pipeline), start())
    rows = cache_dataset(cache.folder)
    assert len(rows) == 10 and sorted(rows[0]) == ["caption", "image", "latent", "name", "text", "x0"]
    for i in (9, 0):
        row = rows[i]
        assert (row["name"], row["caption"]) == (cache.name(i), cache.caption(i))
        for field in ("x0", "latent", "image"):
            assert torch.equal(row[field], cache.read(i, field))
        text = cache.read(i, "text")
        assert torch.equal(row["text"], text[: len(row["text"])]) and text[len(row["text"]) :].abs().sum() == 0
    assert [len(t) for t in rows.select([5, 0])[:]["text"]] == [8, 5]
    with pytest.raises(UserError, match="holds no finished cache"):
        cache_dataset(Path(tmp_path))


def test_the_command_builds_around_bad_clips_and_checks(vpae, micro_recipe, data, tmp_path):
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    done = vpae("cache", recipe, "--check")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "no finished cache" in done.stderr
    done = vpae("cache", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left out: empty: empty.mp4: the file is empty" in done.stdout and "clips/s" in done.stdout
    done = vpae("cache", recipe, "--check")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "every checksum is right" in done.stdout and "1 left out" in done.stdout
    assert (tmp_path / "cache" / "check.png").is_file() and (tmp_path / "cache" / "check.json").is_file()
