"""Two ranks (gloo) against one, through the command line; judged by the files they leave."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import differing, read_tensors, write_recipe

PLAYERS = {"priming": ("student", "fake_score"), "equilibrium": ("student", "head")}


def _distil(vpae, plain, folder, *, ranks=1, resume=False):
    recipe = write_recipe(plain, folder.with_suffix(".yaml"))
    done = vpae("distill", recipe, "--output", folder, *(["--resume"] if resume else []), ranks=ranks)
    assert (folder / "recipe.yaml").is_file(), done.stderr[-2000:]
    return done


def _lines(log, end):
    return [line for line in log.read_text().splitlines() if json.loads(line)["turn"] < end]


def _ema(tensors):
    return {k: v for k, v in tensors.items() if k.startswith("ema.")}


@pytest.mark.parametrize(
    ("kind", "parallel", "judge"),
    [
        ("full", "fsdp", "trainable"),
        ("lora", "replicate", "unified"),
        pytest.param("full", "fsdp", "unified", marks=pytest.mark.slow),
        pytest.param("lora", "fsdp", "frozen", marks=pytest.mark.slow),
        pytest.param("full", "replicate", "unified", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_on_the_same_global_batch(vpae, micro_recipe, tmp_path, kind, parallel, judge):
    """Gradients (Adam's first moment at beta1 = 0) agree to a few thousandths of the largest, for every player.

    They are those of each player's last turn: fp32 round-off of the turns before it has passed through Adam, which
    at beta1 = 0 makes a whole step of a gradient near zero.
    """
    micro_recipe["student"]["kind"], micro_recipe["engine"]["parallel"] = kind, parallel
    micro_recipe["equilibrium"]["judge"] = judge
    micro_recipe["priming"]["student_steps"] = micro_recipe["equilibrium"]["student_steps"] = 1
    for ranks in (1, 2):
        _distil(vpae, micro_recipe, tmp_path / str(ranks), ranks=ranks)
    for phase in ("priming", "equilibrium"):
        one, two = (read_tensors(tmp_path / ranks / phase) for ranks in ("1", "2"))
        for player in PLAYERS[phase]:
            moments = [{k: v for k, v in t.items() if k.startswith(f"optimiser.{player}.")} for t in (one, two)]
            moments = [{k: v for k, v in m.items() if k.endswith("exp_avg")} for m in moments]
            scale = max(float(v.abs().max()) for v in moments[0].values())
            assert scale > 0 and differing(*moments, tolerance=2e-3 * scale) == []
        gap = torch.cat([(one[k] - two[k]).flatten() for k in _ema(one)])
        assert float(gap.abs().mean()) < 1e-6


def test_gradients_of_two_ranks_are_those_of_one_to_round_off(vpae, micro_recipe, tmp_path):
    """All players at the same weights (the learning rate moves nothing), so that Adam magnifies no round-off."""
    for phase in ("priming", "equilibrium"):
        micro_recipe[phase]["student_steps"] = 1
        for settings in micro_recipe[phase].values():
            if isinstance(settings, dict) and "learning_rate" in settings:
                settings |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    for ranks in (1, 2):
        _distil(vpae, micro_recipe, tmp_path / str(ranks), ranks=ranks)
    for phase in ("priming", "equilibrium"):
        one, two = (read_tensors(tmp_path / ranks / phase) for ranks in ("1", "2"))
        for player in PLAYERS[phase]:
            moments = [{k: v for k, v in t.items() if k.startswith(f"optimiser.{player}.")} for t in (one, two)]
            moments = [{k: v for k, v in m.items() if k.endswith("exp_avg")} for m in moments]
            scale = max(float(v.abs().max()) for v in moments[0].values())
            assert scale > 0 and differing(*moments, tolerance=1e-5 * scale) == [], (phase, player)


@pytest.mark.parametrize(("kind", "dtype"), [pytest.param("full", "fp32", marks=pytest.mark.slow), ("lora", "bf16")])
def test_shards_under_bf16_and_checkpointing_train_as_one_rank_does(vpae, micro_recipe, tmp_path, kind, dtype):
    micro_recipe["student"]["kind"], micro_recipe["teacher"]["dtype"] = kind, dtype
    micro_recipe["engine"] |= {"precision": "bf16", "checkpointing": True}
    micro_recipe["priming"]["student_steps"] = micro_recipe["equilibrium"]["student_steps"] = 1
    for ranks in (1, 2):
        done = _distil(vpae, micro_recipe, tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    for phase in ("priming", "equilibrium"):
        one, two = (_ema(read_tensors(tmp_path / ranks / phase)) for ranks in ("1", "2"))
        gap = torch.cat([(one[k] - two[k]).flatten() for k in one])
        moved = torch.cat([v.flatten() for v in one.values()])
        assert float(gap.abs().mean()) < 1e-4 * float(moved.abs().mean())


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("replicate", marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_ranks_goes_on_with_one(vpae, micro_recipe, tmp_path, parallel):
    short = copy.deepcopy(micro_recipe)
    short["engine"]["parallel"] = parallel
    short["equilibrium"] = None
    whole = _distil(vpae, short, tmp_path / "one")
    assert whole.returncode == 0, whole.stderr[-2000:]
    short["engine"]["checkpoint_every"] = 4
    _distil(vpae, short, tmp_path / "two", ranks=2)
    newest = sorted((tmp_path / "two" / "priming" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    state = json.loads((tmp_path / "two/priming/checkpoints/step-00000008/state.json").read_text())
    assert state["world_size"] == 2 and state["position"] == 32
    log = tmp_path / "two/priming/log.jsonl"
    before = _lines(log, 8)
    done = _distil(vpae, short, tmp_path / "two", resume=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert before and _lines(log, 8) == before  # with the seconds of each turn: none of them was taken again
    a, b = _ema(read_tensors(tmp_path / "one/priming")), _ema(read_tensors(tmp_path / "two/priming"))
    gap = torch.cat([(a[k] - b[k]).flatten() for k in a])
    assert float(gap.abs().mean()) < 1e-6


def test_one_bad_sample_stops_all_ranks(vpae, micro_recipe, tmp_path):
    """A world of two ranks of which one sees a NaN: both leave, the exit is not 0, no checkpoint is written."""
    from vpae import recipe as recipes
    from vpae.data.cache import prepare
    from vpae.data.encoders import Encoders
    from vpae.data.shards import sign
    from vpae.engine.parallel import start

    micro_recipe["data"]["cache"] = str(tmp_path / "poisoned")
    recipe = recipes.from_plain(micro_recipe, "test")
    cache = prepare(recipe.data, Encoders(recipe.teacher.path), start())
    shard = tmp_path / "poisoned" / cache.manifest["shards"][0]["file"]
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(shard, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(shard)
    tensors["x0"][0] = float("nan")
    save_file(tensors, shard, metadata=metadata)
    manifest = json.loads((tmp_path / "poisoned" / "manifest.json").read_text())
    from vpae.files import sha256

    manifest["shards"][0] |= {"sha256": sha256(shard), "bytes": shard.stat().st_size}
    manifest["digest"] = sign(manifest)
    (tmp_path / "poisoned" / "manifest.json").write_text(json.dumps(manifest))
    done = _distil(vpae, micro_recipe, tmp_path / "run", ranks=2)
    assert done.returncode != 0 and "not finite on at least one rank" in done.stderr
    assert not list((tmp_path / "run").rglob("state.json"))
