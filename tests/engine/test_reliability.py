"""A signal inside a checkpoint's writing, a full disk, a NaN on one rank: nothing is lost, nothing half done."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import differing, make_trainer, read_tensors, write_recipe

from vpae import recipe as recipes
from vpae.data.cache import prepare
from vpae.data.encoders import Encoders
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import start
from vpae.errors import UserError


def test_sigterm_inside_a_checkpoints_writing(micro_recipe, tmp_path, monkeypatch):
    """It comes when the tensors are on the disk and the state is not: the checkpoint is finished, no turn more is."""
    make_trainer(micro_recipe, "priming", tmp_path / "whole").train()
    micro_recipe["engine"]["checkpoint_every"] = 3
    trainer = make_trainer(micro_recipe, "priming", tmp_path / "run")
    complete, seen = checkpoints._complete, []

    def signalled(partial, final, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(final.name)
        complete(partial, final, *rest)

    monkeypatch.setattr(checkpoints, "_complete", signalled)
    assert not trainer.train() and trainer.stopped
    monkeypatch.undo()
    assert seen == ["step-00000003"]  # heard inside the next turn, which is dropped
    assert sorted(p.name for p in trainer.checkpoint_root.iterdir()) == seen
    again = make_trainer(micro_recipe, "priming", tmp_path / "run")
    assert again.resume() and again.turn == 3 and again.train()
    assert differing(read_tensors(tmp_path / "whole/priming"), read_tensors(tmp_path / "run/priming")) == []


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of memory."""
    with contextlib.ExitStack() as mounted:

        def mount(name: str, size: str) -> Path:
            folder = tmp_path / name
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no mount command here")
            if done.returncode:
                pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield mount


def _fill(folder: Path, leave: int) -> Path:
    """A file that leaves ``leave`` bytes of the disk."""
    free = os.statvfs(folder)
    rest = folder / "rest"
    rest.write_bytes(b"x" * max(0, free.f_bavail * free.f_bsize - leave))
    return rest


@pytest.mark.parametrize("leave", [4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 50_000, 200_000))])
def test_a_full_disk_while_a_checkpoint_is_written(micro_recipe, tmp_path, disk, leave):
    """The earlier checkpoint stays, no half of the new one; with room again the run goes on to the same weights."""
    make_trainer(micro_recipe, "priming", tmp_path / "whole").train()
    folder = disk("disk", "30m")
    trainer = make_trainer(micro_recipe, "priming", folder / "run")
    trainer.train(until=4)
    rest = _fill(folder, leave)
    with pytest.raises(UserError, match="could not be written.*earlier checkpoints are untouched: free some space"):
        trainer.save()
    assert [p.name for p in trainer.checkpoint_root.iterdir()] == ["step-00000004"]
    rest.unlink()
    again = make_trainer(micro_recipe, "priming", folder / "run")
    assert again.resume() and again.turn == 4 and again.train()
    assert differing(read_tensors(tmp_path / "whole/priming"), read_tensors(folder / "run/priming")) == []


@pytest.mark.parametrize("leave", [20_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 100_000))])
def test_a_full_disk_while_a_cache_is_built(micro_recipe, tmp_path, disk, leave):
    folder = disk("disk", "10m")
    data, encoders = recipes.from_plain(micro_recipe, "test").data, Encoders(micro_recipe["teacher"]["path"])
    whole = prepare(data, encoders, start())
    small = recipes.from_plain(micro_recipe | {"data": micro_recipe["data"] | {"cache": str(folder / "cache")}}, "test")
    rest = _fill(folder, leave)
    with pytest.raises(UserError, match="cannot (be written|write).*(No space left|free some space)"):
        prepare(small.data, encoders, start())
    assert not (folder / "cache" / "manifest.json").exists()
    rest.unlink()
    assert prepare(small.data, encoders, start()).fingerprint == whole.fingerprint
    assert not list((folder / "cache").glob("*.partial")) + list((folder / "cache").glob(".*"))


POISONED = """
import os, pathlib, torch
from vpae.__main__ import main
from vpae.engine.parallel import local
from vpae.engine.trainer import Trainer

step, turn = Trainer._step, int(os.environ["TURN"])

def poisoned(self, player, finite):
    if self.turn != turn:
        return step(self, player, finite)
    if self.processes.rank == 1:
        gradients = [local(p.grad) for p in player.parameters.values() if p.grad is not None]
        gradient = next(g for g in gradients if g.numel())
        gradient.view(-1)[0] = float("nan")
    before = {name: local(t).clone() for name, t in self.tensors().items()}
    try:
        return step(self, player, finite)
    finally:
        moved = [name for name, t in self.tensors().items() if not torch.equal(local(t), before[name])]
        steps = {float(s["step"]) for o in self.optimisers.values() for s in o.state.values()}
        mark = pathlib.Path(os.environ["MARK"] + os.environ["RANK"])
        mark.write_text(f"{player.name} of {len(before)}: {moved} {max(steps) <= turn}")

Trainer._step = poisoned
main()
"""


def _two_ranks(arguments: list[str], **environment: str) -> list[tuple[int, str]]:
    """Exit status and stderr of two ranks that run ``POISONED``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in "01":
        variables = os.environ | group | environment | {"RANK": rank, "LOCAL_RANK": rank}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen([sys.executable, "-c", POISONED, *arguments], text=True, env=variables, **pipes))
    try:
        said = [rank.communicate(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, err) for rank, (_, err) in zip(ranks, said, strict=True)]


@pytest.mark.parametrize(
    ("parallel", "turn", "player"),
    [("fsdp", 1, "fake_score"), pytest.param("replicate", 2, "student", marks=pytest.mark.slow)],
)
def test_a_nan_gradient_on_one_rank_stops_all_before_the_optimiser_moves(
    micro_recipe, tmp_path, parallel, turn, player
):
    """Only rank 1's part of one gradient is not a number; weights, moments and counts stay what they were on both."""
    micro_recipe["engine"]["parallel"] = parallel
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    arguments = ["distill", str(recipe), "--output", str(tmp_path / "run")]
    ended = _two_ranks(arguments, TURN=str(turn), MARK=str(tmp_path / "mark"))
    assert [status for status, _ in ended] == [2, 2], ended
    said = "".join(err for _, err in ended)
    assert said.count("is not finite on at least one rank; nothing was updated") == 1 and "Traceback" not in said
    for rank in "01":
        text = (tmp_path / f"mark{rank}").read_text()
        assert text.startswith(f"{player} of ") and text.endswith(": [] True"), text
    assert not list((tmp_path / "run").rglob("state.json"))
    turns = [json.loads(line)["turn"] for line in (tmp_path / "run/priming/log.jsonl").read_text().splitlines()]
    assert sorted(set(turns)) == list(range(turn))
