"""Ranks that share a clip's tokens, looked at from within; judged by the file that each rank leaves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_trainer

from vpae import recipe as recipes
from vpae.distill import preflight_distill
from vpae.draws import Draws
from vpae.engine.layout import placed
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.sequence import SequenceGroup, check_split


def _gaps(folder: Path, *, ranks: int, degree: int, parallel: str, cases: str, **environment: str) -> dict:
    worker, root = Path(__file__).with_name("split_worker.py"), Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(worker), str(folder), str(degree), parallel, cases]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)} | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    left = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    assert all(file.is_file() for file in left), done.stderr[-2000:]
    found = [json.loads(file.read_text()) for file in left]
    return {f"rank {rank}, {case}": gaps for rank, cases in enumerate(found) for case, gaps in cases.items()}


def _near(found: dict) -> None:
    for case, gaps in found.items():
        assert gaps and max(gaps.values()) < 1e-5, (case, gaps)


def test_two_ranks_on_one_clip_are_one(tmp_path):
    """Loss, sample, gradients of student, trained judge, head and input: to round-off of the largest of their kind."""
    found = _gaps(tmp_path, ranks=2, degree=2, parallel="fsdp,replicate", cases="few")
    assert len(found) == 10 and set(found["rank 0, fsdp lora fold"]) >= {"student", "judge", "head", "x_t", "loss"}
    _near(found)


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "parallel"), [(1, "hsdp"), (2, "fsdp,hsdp,replicate")])
def test_four_ranks_share_clips_in_pairs(tmp_path, degree, parallel):
    """Sharded over all, replicated, and sharded over machines of two ranks (as ``LOCAL_WORLD_SIZE`` would tell)."""
    found = _gaps(tmp_path, ranks=4, degree=degree, parallel=parallel, cases="few", VPAE_TEST_MACHINE="2")
    assert len(found) == 4 * (2 * len(parallel.split(",")) + (degree > 1))
    _near(found)


def _process(rank: int, size: int, degree: int) -> Processes:
    sequence = SequenceGroup(None, rank % degree, degree) if degree > 1 else None
    return Processes(rank, size, torch.device("cpu"), None, sequence)


def test_ranks_that_share_a_clip_see_the_same_samples_and_draws(micro_recipe, tmp_path):
    trainer = make_trainer(micro_recipe, "priming", tmp_path)

    def seen(rank: int, size: int, degree: int) -> list[tuple[list[int], torch.Tensor]]:
        trainer.processes = _process(rank, size, degree)  # one that never speaks with the others
        micro = trainer._micro_batches()
        return [(m, Draws(trainer.run.seed, m).normal("student noise", (3,))) for m in micro]

    assert [m for m, _ in seen(0, 2, 2)] == [[0, 1], [2, 3]]
    assert [m for m, _ in seen(3, 4, 2)] == [[2, 3]]
    for mine, theirs in ((0, 1), (2, 3)):
        for (a, noise_a), (b, noise_b) in zip(seen(mine, 4, 2), seen(theirs, 4, 2), strict=True):
            assert a == b and torch.equal(noise_a, noise_b)
    assert not torch.equal(seen(0, 4, 2)[0][1], seen(2, 4, 2)[0][1])


def test_a_batch_is_split_over_groups():
    assert [_process(0, 8, degree).share(8) for degree in (1, 2, 8)] == [1, 2, 8]
    with pytest.raises(UserError, match="8 ranks of which 4 share each clip .*: make it a multiple of 2"):
        _process(0, 8, 4).share(3)


def test_what_cannot_be_split_is_named_with_what_can():
    for tokens in (32_760, 75_600):  # 480p and 720p of the 14B model
        for degree in (1, 2, 4, 8):
            check_split(degree, heads=40, tokens=tokens)
    with pytest.raises(UserError, match="sequence_parallel 4 .* 8 tokens and .* 2 heads evenly; choose one of 1, 2$"):
        check_split(4, heads=2, tokens=8)
    with pytest.raises(UserError, match="choose one of 1, 5$"):
        check_split(2, heads=40, tokens=15)


def _refusal(recipe: dict, match: str, processes: Processes, **engine: object) -> None:
    plain = copy.deepcopy(recipe)
    plain["engine"] |= engine
    with pytest.raises(UserError, match=match):
        built = recipes.from_plain(plain, "test")
        preflight_distill(built, placed(processes, built.engine))


def test_layouts_that_cannot_be_are_refused_before_anything_is_read(micro_recipe, monkeypatch):
    alone = _process(0, 1, 1)
    _refusal(
        micro_recipe, "sequence_parallel 2 needs a multiple of 2 ranks, and here is one", alone, sequence_parallel=2
    )
    three = _process(0, 3, 1)
    _refusal(micro_recipe, "a multiple of 2 ranks, and here are 3", three, sequence_parallel=2)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value] * self.size)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    _refusal(micro_recipe, "LOCAL_WORLD_SIZE", _process(0, 4, 1), parallel="hsdp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    machine = "its 2 ranks cannot be split into groups of engine.sequence_parallel 4"
    _refusal(micro_recipe, machine, _process(0, 4, 1), parallel="hsdp", sequence_parallel=4)
    monkeypatch.setattr(Processes, "gather", lambda self, value: [3, 3, 3, 1])
    _refusal(micro_recipe, "as many ranks on one machine as on another", _process(3, 4, 1), parallel="hsdp")


def test_tokens_are_counted_before_a_clip_is_encoded(micro_recipe):
    recipe = recipes.from_plain(micro_recipe, "test")  # 5 frames of 32 x 32 px: 2 x 2 x 2 tokens, 2 heads
    preflight_distill(recipe, _process(0, 2, 2))
    with pytest.raises(UserError, match="a clip's 8 tokens and the transformer's 2 heads"):
        preflight_distill(recipe, _process(0, 4, 4))


def test_a_vae_has_no_tokens_to_split():
    recipe = Path(__file__).parents[2] / "recipes" / "tiny_vae.yaml"
    with pytest.raises(UserError, match="sequence_parallel splits a transformer's tokens: set it to 1 for a VAE"):
        recipes.load(recipe, ("engine.sequence_parallel=2",))
