"""Ranks that share a clip's tokens, looked at from within; judged by the file that each rank leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
@pytest.mark.parametrize("degree", [1, 2])
def test_four_ranks_share_clips_in_pairs(tmp_path, degree):
    """Sharded over all, replicated, and sharded over machines of two ranks (``LOCAL_WORLD_SIZE`` as they would see it)."""
    found = _gaps(tmp_path, ranks=4, degree=degree, parallel="fsdp,hsdp,replicate", cases="all", VPAE_TEST_MACHINE="2")
    assert len(found) == 4 * (3 * 8 + (degree > 1))
    _near(found)
