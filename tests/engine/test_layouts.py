"""Whole runs whose ranks share clips, or shards of one machine, against one rank; judged by the files they leave."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from helpers import differing, read_tensors, write_recipe

PLAYERS = {"priming": ("student", "fake_score"), "equilibrium": ("student", "head")}


def _distil(vpae, plain, folder, *, ranks=1, resume=False):
    recipe = write_recipe(plain, folder.with_suffix(".yaml"))
    done = vpae("distill", recipe, "--output", folder, *(["--resume"] if resume else []), ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]


def _on_two_machines(plain, folder):
    """Two launchers of two ranks each, as on two machines."""
    recipe = write_recipe(plain, folder.with_suffix(".yaml"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    job = ["-m", "vpae", "distill", str(recipe), "--output", str(folder)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    machines = [subprocess.Popen([*launcher, "--node-rank", str(i), *job], **options) for i in range(2)]
    try:
        for machine in machines:
            _, said = machine.communicate(timeout=600)
            assert machine.returncode == 0, said[-2000:]
    finally:
        for machine in machines:
            machine.kill()


def _still(plain):
    """A turn of each player at the same weights: the learning rate moves nothing, Adam magnifies no round-off."""
    for phase in PLAYERS:
        plain[phase]["student_steps"] = 1
        for settings in plain[phase].values():
            if isinstance(settings, dict) and "learning_rate" in settings:
                settings |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    return plain


def _same_gradients(one, many):
    """Adam's first moment at beta1 = 0 is the gradient: to round-off of the largest, for every player."""
    for phase, players in PLAYERS.items():
        tensors = [read_tensors(folder / phase) for folder in (one, many)]
        for player in players:
            moments = [{k: v for k, v in t.items() if k.startswith(f"optimiser.{player}.")} for t in tensors]
            moments = [{k: v for k, v in m.items() if k.endswith("exp_avg")} for m in moments]
            scale = max(float(v.abs().max()) for v in moments[0].values())
            assert scale > 0 and differing(*moments, tolerance=5e-5 * scale) == [], (phase, player)
        logs = [[json.loads(line) for line in (f / phase / "log.jsonl").read_text().splitlines()] for f in (one, many)]
        for a, b in zip(*logs, strict=True):
            assert a.keys() == b.keys()
            for key in a:  # losses, norms and vital signs
                if "seconds" not in key and isinstance(a[key], float):
                    assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (phase, a["turn"], key)


def _bytes_of_tensors(run):
    """Of phase II's checkpoint, without the headers of its files."""
    newest = sorted((run / "equilibrium/checkpoints").iterdir())[-1]
    files = [file.read_bytes() for file in newest.glob("*.safetensors")]
    return sum(len(file) - 8 - int.from_bytes(file[:8], "little") for file in files)


def _equal_to_one_rank(vpae, plain, tmp_path, *, ranks, **engine):
    many = copy.deepcopy(_still(plain))
    many["engine"] |= engine
    _distil(vpae, plain, tmp_path / "one")
    _distil(vpae, many, tmp_path / "many", ranks=ranks)
    _same_gradients(tmp_path / "one", tmp_path / "many")


def test_two_ranks_on_the_same_clips_train_as_one(vpae, micro_recipe, tmp_path):
    micro_recipe["engine"]["checkpointing"] = True
    _equal_to_one_rank(vpae, micro_recipe, tmp_path, ranks=2, sequence_parallel=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "judge", "parallel", "checkpointing"),
    [
        ("lora", "unified", "fsdp", True),
        ("lora", "frozen", "replicate", False),
        ("full", "trainable", "fsdp", False),
        ("full", "trainable", "replicate", True),
    ],
)
def test_every_student_and_judge_trains_so(vpae, micro_recipe, tmp_path, kind, judge, parallel, checkpointing):
    micro_recipe["student"]["kind"], micro_recipe["equilibrium"]["judge"] = kind, judge
    micro_recipe["engine"]["checkpointing"] = checkpointing
    _equal_to_one_rank(vpae, micro_recipe, tmp_path, ranks=2, sequence_parallel=2, parallel=parallel)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_four_ranks_in_pairs_train_as_one(vpae, micro_recipe, tmp_path, kind):
    micro_recipe["student"]["kind"] = kind
    _equal_to_one_rank(vpae, micro_recipe, tmp_path, ranks=4, sequence_parallel=2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "degree"), [("full", 1), ("lora", 2)])
def test_two_machines_train_as_one_rank_and_it_goes_on_from_theirs(vpae, micro_recipe, tmp_path, kind, degree):
    """Each machine holds all shards, and a checkpoint holds each of them once."""
    micro_recipe["student"]["kind"] = kind
    micro_recipe["engine"]["micro_batch"] = 1  # vital signs are ratios of what is seen at once
    many = copy.deepcopy(_still(micro_recipe))
    many["engine"] |= {"parallel": "hsdp", "sequence_parallel": degree}
    _distil(vpae, micro_recipe, tmp_path / "one")
    _on_two_machines(many, tmp_path / "many")
    _same_gradients(tmp_path / "one", tmp_path / "many")
    assert _bytes_of_tensors(tmp_path / "many") == _bytes_of_tensors(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((4, 2), (2, 1))])
def test_a_checkpoint_goes_on_in_another_layout(vpae, micro_recipe, tmp_path, before, after):
    """``(ranks, sequence_parallel)`` of the first turns and of the rest: the same EMA as a run on one rank."""
    micro_recipe["equilibrium"] = None
    _distil(vpae, micro_recipe, tmp_path / "one")
    micro_recipe["engine"] |= {"checkpoint_every": 4, "keep_checkpoints": 9}
    for ranks, degree in (before, after):
        micro_recipe["engine"]["sequence_parallel"] = degree
        _distil(vpae, micro_recipe, tmp_path / "two", ranks=ranks, resume=ranks == after[0] and degree == after[1])
        for folder in (tmp_path / "two/priming/checkpoints").iterdir():
            if (ranks, degree) == before and folder.name > "step-00000004":
                shutil.rmtree(folder)
    a, b = (
        {k: v for k, v in read_tensors(tmp_path / run / "priming").items() if k[:4] == "ema."} for run in ("one", "two")
    )
    gap = torch.cat([(a[k] - b[k]).flatten() for k in a])
    assert float(gap.abs().mean()) < 1e-6


@pytest.mark.slow
def test_flow_matching_of_two_ranks_on_the_same_clips(vpae, micro_recipe, tmp_path):
    micro = micro_recipe
    optimiser = micro["priming"]["student_optimiser"] | {"learning_rate": 1e-12, "weight_decay": 0.0}
    training = {"steps": 2, "time": micro["priming"]["fake_time"], "text_dropout": 0.5, "ema_decay": 0.9}
    plain = {key: micro[key] for key in ("seed", "teacher", "data", "engine", "watch", "evaluate")}
    plain |= {"kind": "flow_matching", "name": "micro_teacher", "transformer": None, "scheduler_shift": 3.0}
    plain["training"] = training | {"optimiser": optimiser}
    found = []
    for ranks in (1, 2):
        plain["engine"]["sequence_parallel"] = ranks
        recipe = write_recipe(plain, tmp_path / f"{ranks}.yaml")
        done = vpae("finetune", recipe, "--output", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append({k: v for k, v in read_tensors(tmp_path / str(ranks)).items() if k.endswith("exp_avg")})
    scale = max(float(v.abs().max()) for v in found[0].values())
    assert scale > 0 and differing(*found, tolerance=1e-5 * scale) == []
