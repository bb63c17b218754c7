"""SIGTERM drops the turn at hand, saves and says how to go on; kill -9 loses nothing but time."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import differing, read_tensors, write_recipe

from vpae.engine.launch import default_ranks
from vpae.engine.tracking import read_log


def _start(recipe, folder, *more):
    command = [sys.executable, "-m", "vpae", "distill", str(recipe), "--output", str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def _long(plain):
    plain["priming"]["student_steps"], plain["equilibrium"]["student_steps"] = 12, 12
    plain["engine"] |= {"checkpoint_every": 5, "log_every": 5}
    return plain


def _wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_sigterm_saves_and_says_how_to_go_on(micro_recipe, tmp_path):
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    whole = _start(recipe, tmp_path / "whole")
    run = _start(recipe, tmp_path / "run")
    _wait_for(tmp_path / "run" / "priming" / "log.jsonl")
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err[-2000:]
    assert f"go on with: vpae distill {recipe} --output {tmp_path / 'run'} --resume" in out
    assert list((tmp_path / "run" / "priming" / "checkpoints").glob("step-*/state.json"))
    again = _start(recipe, tmp_path / "run", "--resume")
    assert again.wait(timeout=240) == 0 and whole.wait(timeout=240) == 0
    for phase in ("priming", "equilibrium"):
        assert differing(read_tensors(tmp_path / "whole" / phase), read_tensors(tmp_path / "run" / phase)) == []


def test_a_signal_to_the_launcher_reaches_its_ranks_and_nobody_sees_a_traceback(micro_recipe, tmp_path):
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    arguments = ["quickstart", "--recipe", str(recipe), "--output", str(tmp_path / "run"), "--ranks", "2"]
    command = [sys.executable, "-m", "vpae", *arguments]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "run" / "priming" / "log.jsonl")
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and "Traceback" not in err, err[-2000:]
    assert f"interrupted, everything is saved; go on with: vpae {' '.join(arguments)}" in out
    assert list((tmp_path / "run" / "priming" / "checkpoints").glob("step-*/state.json"))


LATE = """
import contextlib, os, pathlib, time
from vpae.__main__ import main
from vpae.engine import signals
from vpae.engine.trainer import Trainer

mark = pathlib.Path(os.environ["MARK"] + os.environ["RANK"])
train, noted = Trainer.train, signals.noted

def train_late(self):
    if os.environ["RANK"] == "1":
        mark.touch()
        time.sleep(60)
    return train(self)

@contextlib.contextmanager
def noted_with_a_mark():
    with noted() as here:
        mark.touch()
        yield here

Trainer.train, signals.noted = train_late, noted_with_a_mark
main()
"""


def test_a_signal_while_one_rank_trains_and_another_does_not_yet(micro_recipe, tmp_path):
    """Rank 1 is interrupted before it listens; rank 0 waits for it inside the loop and loses it."""
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    command = [sys.executable, "-c", LATE, "distill", str(recipe), "--output", str(tmp_path / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MARK": str(tmp_path / "mark")}
    ranks = []
    for rank in "01":
        environment = os.environ | together | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    try:
        for rank in "01":
            _wait_for(tmp_path / f"mark{rank}")
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, said, strict=True):
        assert rank.returncode == 0 and "Traceback" not in err, err[-2000:]
    assert "interrupted, the last checkpoint is whole; go on with" in said[0][0]


INSIDE = """
import os, signal
from vpae.__main__ import main
from vpae.engine.trainer import Trainer

train, fetched = Trainer.train, []

def train_and_stop(self):
    fetch = self.run.fetch

    def fetch_and_stop(indices, draws):
        fetched.append(indices)
        if os.environ["RANK"] == "1" and len(fetched) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(indices, draws)

    self.run.fetch = fetch_and_stop
    return train(self)

Trainer.train = train_and_stop
main()
"""


@pytest.mark.slow
def test_a_signal_to_one_rank_inside_a_turn_drops_it_on_all(micro_recipe, tmp_path, vpae):
    """Two ranks take four micro-batches each a turn; rank 1 hears of it in the second of the third turn."""
    micro_recipe["engine"] |= {"global_batch": 8, "micro_batch": 1, "log_every": 5}
    recipe, runs = write_recipe(micro_recipe, tmp_path / "r.yaml"), {}
    (tmp_path / "inside.py").write_text(INSIDE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "inside.py"), "distill", str(recipe), "--output", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0 and "everything is saved" in done.stdout, done.stderr[-2000:]
    (state,) = (tmp_path / "run" / "priming" / "checkpoints").glob("step-*/state.json")
    assert state.parent.name == "step-00000002"
    for name, more in (("run", ["--resume"]), ("whole", [])):
        runs[name] = vpae("distill", recipe, "--output", tmp_path / name, *more, ranks=2)
        assert runs[name].returncode == 0, runs[name].stderr[-2000:]
    assert "goes on from turn 2" in runs["run"].stdout
    for phase in ("priming", "equilibrium"):
        assert differing(read_tensors(tmp_path / "whole" / phase), read_tensors(tmp_path / "run" / phase)) == []


@pytest.mark.parametrize("command", ["distill", "quickstart"])
def test_the_launcher_passes_on_the_exit_status(micro_recipe, tmp_path, command):
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    named = [str(recipe)] if command == "distill" else ["--recipe", str(recipe)]
    options = ["--output", str(tmp_path), "--ranks", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "vpae", command, *named, *options], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2 and "is not empty and holds no vpae run" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(("gpus", "batch", "ranks"), [(8, 16, 8), (6, 16, 4), (3, 16, 2), (7, 13, 1), (3, 12, 3)])
def test_by_default_as_many_ranks_as_can_share_the_batch(monkeypatch, gpus, batch, ranks):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert default_ranks(batch) == ranks


def _kill_while_training(recipe, folder, longest, generator):
    """Start or go on, and kill at a random moment of the training; False if the run came to its end before."""
    log = [folder / phase / "log.jsonl" for phase in ("priming", "equilibrium")]
    before = [f.stat().st_mtime_ns if f.exists() else 0 for f in log]
    run = _start(recipe, folder, "--resume")
    while run.poll() is None and [f.stat().st_mtime_ns if f.exists() else 0 for f in log] == before:
        time.sleep(0.02)
    try:
        _, err = run.communicate(timeout=generator.uniform(0, longest))
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGKILL)
        run.communicate()
        return True
    assert run.returncode == 0, err[-2000:]
    return False


@pytest.mark.parametrize(
    ("kills", "beside"), [pytest.param(20, beside, marks=pytest.mark.slow) for beside in (False, True)]
)
def test_kill_at_random_moments_ends_in_the_same_weights(micro_recipe, tmp_path, kills, beside):
    """Each kill hits a process that trains; a run that ends before all have is compared, and another is begun."""
    micro_recipe["engine"]["async_checkpoints"] = beside
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    assert _start(recipe, tmp_path / "whole").wait(timeout=240) == 0
    whole = {phase: read_tensors(tmp_path / "whole" / phase) for phase in ("priming", "equilibrium")}
    logs = [read_log(tmp_path / "whole" / phase / "log.jsonl") for phase in whole]
    training = sum(log[-1]["seconds"] for log in logs)
    generator, hits, run = random.Random(kills), 0, 0
    while True:
        folder, survived = tmp_path / f"run{run}", 0
        # a third of the training at most, so that a run lives through several
        while hits < kills and _kill_while_training(recipe, folder, training / 3, generator):
            hits, survived = hits + 1, survived + 1
        if hits == kills:
            last = _start(recipe, folder, "--resume")
            _, err = last.communicate(timeout=600)
            assert last.returncode == 0, err[-2000:]
        for phase, tensors in whole.items():
            assert differing(tensors, read_tensors(folder / phase)) == [], f"after {survived} kills"
        if hits == kills:
            return
        run += 1
