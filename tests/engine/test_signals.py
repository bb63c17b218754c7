"""SIGTERM saves and says how to go on; kill -9 loses nothing but time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers import differing, read_tensors, write_recipe


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


def test_sigterm_finishes_the_turn_saves_and_says_how_to_go_on(micro_recipe, tmp_path):
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


def test_the_launcher_passes_on_the_exit_status(tmp_path):
    command = [sys.executable, "-m", "vpae", "quickstart", "--recipe", str(tmp_path / "none.yaml"), "--ranks", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "no recipe at" in run.stderr and "Traceback" not in run.stderr


def _kill_until_done(recipe, folder, kills, longest, seed):
    generator = random.Random(seed)
    for _ in range(kills):
        run = _start(recipe, folder, "--resume")
        try:
            run.communicate(timeout=generator.uniform(0.2, longest))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
    last = _start(recipe, folder, "--resume")
    _, err = last.communicate(timeout=600)
    assert last.returncode == 0, err[-2000:]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments_ends_in_the_same_weights(micro_recipe, tmp_path, kills):
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    started = time.monotonic()
    assert _start(recipe, tmp_path / "whole").wait(timeout=240) == 0
    took = time.monotonic() - started
    _kill_until_done(recipe, tmp_path / "run", kills, took, seed=kills)
    for phase in ("priming", "equilibrium"):
        assert differing(read_tensors(tmp_path / "whole" / phase), read_tensors(tmp_path / "run" / phase)) == []
