"""Moments sharded over two ranks, in every way of keeping them: the numbers of one rank, and one rank reads them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from vpae.draws import generator_of
from vpae.engine import checkpoint as checkpoints
from vpae.engine import optim
from vpae.engine.adam import stored
from vpae.engine.parallel import start
from vpae.methods.base import Player
from vpae.recipe import Optimiser

STATES = ["fp32", "bf16", "cpu"] + (["int8"] if importlib.util.find_spec("torchao") else [])
SHAPES = {"even": (40, 128), "odd": (41, 128), "one_row": (1, 4096), "ragged": (71, 60), "bias": (40,)}


def trained(state, place, steps=4):
    """A player of fixed weights and gradients after some steps; ``place`` puts a whole tensor where it belongs."""
    settings = Optimiser(1e-2, (0.9, 0.99), 1e-8, 0.1, 0, "constant", None)
    weights = {name: torch.randn(shape, generator=generator_of("w", name)) for name, shape in SHAPES.items()}
    player = Player("student", {n: torch.nn.Parameter(place(w)) for n, w in weights.items()}, settings, 10)
    optimiser = optim.build_optimiser(player, state)
    for step in range(steps):
        for name, parameter in player.parameters.items():
            parameter.grad = place(torch.randn(SHAPES[name], generator=generator_of("g", name, step)))
        optimiser.step()
    tensors = {f"student.{name}": p.detach() for name, p in player.parameters.items()}
    for name, p in player.parameters.items():
        tensors |= {f"{name}.{moment}": tensor for moment, tensor in stored(optimiser, p).items()}
    return tensors


_WORKER = """
import os, sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from test_optimiser_ranks import STATES, trained
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import start

processes = start()
for state in STATES:
    tensors = trained(state, lambda whole: distribute_tensor(whole, processes.mesh, [Shard(0)]))
    checkpoints.save(Path(sys.argv[1], state), 4, tensors, {}, processes, 1)
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def test_two_ranks_keep_the_moments_of_one(tmp_path):
    """Bit for bit: random rounding is by element, and blocks of 8-bit moments lie within rows."""
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests/engine"), *filter(None, [os.environ.get("PYTHONPATH")])]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*launcher, str(worker), str(tmp_path)], env=variables, capture_output=True, text=True)
    for state in STATES:
        found = checkpoints.find(tmp_path / state)
        assert found is not None, done.stderr[-3000:]
        mine = trained(state, lambda whole: whole)
        theirs = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
        checkpoints.load(found, theirs, start(), everything=True)
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == [], state
        start_weights = trained(state, lambda whole: whole, steps=0)
        assert not torch.equal(start_weights["student.odd"], mine["student.odd"])
