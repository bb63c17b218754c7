"""Backbones sharded over two ranks, looked at from within; judged by the file that each rank leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_WORKER = """
import copy, os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny_transformer

from vpae.backbone import Backbone
from vpae.conditioning import Condition, first_frame_mask
from vpae.engine.parallel import local, reshard, shard_backbone, start

processes = start()
torch.manual_seed(0)
plain = Backbone(tiny_transformer().requires_grad_(False))
sharded = copy.deepcopy(plain)
shard_backbone(sharded, processes)
shards = list(sharded.transformer.parameters())  # as a player and an EMA hold them
latents = torch.randn(2, 1, 16, 2, 4, 4)
condition = Condition(torch.randn(1, 6, 16), torch.randn(1, 5, 16), latents[1], first_frame_mask(2, 4, 4)[None])
inputs = latents[0], torch.tensor([0.5]), condition
sharded(*inputs, (0,), True)
gaps = []
for _ in range(3):
    gaps.append(float((sharded(*inputs).velocity - plain(*inputs).velocity).abs().max()))
    reshard([sharded.transformer])
    for mine, theirs in zip(shards, plain.transformer.parameters(), strict=True):
        local(mine).mul_(1.1)
        theirs.mul_(1.1)
Path(sys.argv[1], f"rank-{processes.rank}").write_text(" ".join(map(str, gaps)))
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_blocks_past_an_early_exit_see_changed_weights(tmp_path):
    """Where the first forward of all stopped at a tap, the blocks after it are no children of the sharded root."""
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*launcher, str(worker), str(tmp_path)], env=variables, capture_output=True, text=True)
    for rank in range(2):
        left = tmp_path / f"rank-{rank}"
        assert left.is_file(), done.stderr[-2000:]
        gaps = [float(gap) for gap in left.read_text().split()]
        assert len(gaps) == 3 and max(gaps) < 1e-5, gaps
