"""A rank is lost and the launcher starts all again: same weights, no word from the user; mistakes are not repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import differing, rank_processes, read_tensors, write_recipe

from vpae.engine import restarts
from vpae.engine.tracking import read_log

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PHASES = ("priming", "equilibrium")


def _start(*command: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def _lines(log: Path) -> int:
    return len(read_log(log)) if log.exists() else 0


def _wait(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.02)


def _long(plain: dict) -> dict:
    plain["priming"]["student_steps"], plain["equilibrium"]["student_steps"] = 8, 2
    plain["engine"] |= {"checkpoint_every": 5}
    return plain


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "ours"])
def test_a_killed_rank_costs_nothing_but_time(micro_recipe, tmp_path, launcher):
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    command = ["-m", "vpae", "distill", recipe, "--output"]
    whole = _start(*TORCHRUN, *command, tmp_path / "whole", "--resume")
    out, err = whole.communicate(timeout=240)
    assert whole.returncode == 0, err[-2000:]
    assert f"nothing to resume in {tmp_path / 'whole'} yet: the run begins from the start" in out
    if launcher == "torchrun":
        run = _start(*TORCHRUN, "--max-restarts", 2, *command, tmp_path / "run")
    else:
        run = _start(sys.executable, *command, tmp_path / "run", "--ranks", 2, "--max-restarts", 2)
    log = tmp_path / "run" / "priming" / "log.jsonl"
    _wait(lambda: _lines(log) >= 8)
    os.kill(rank_processes(tmp_path / "run")[1], signal.SIGKILL)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err[-3000:]
    assert "priming: goes on from turn" in out
    assert launcher == "torchrun" or "rank 1 was ended by SIGKILL" in err and "restart 1 of 2" in err
    for phase in PHASES:
        assert differing(read_tensors(tmp_path / "whole" / phase), read_tensors(tmp_path / "run" / phase)) == []
        turns = [line["turn"] for line in read_log(tmp_path / "run" / phase / "log.jsonl")]
        assert turns == [line["turn"] for line in read_log(tmp_path / "whole" / phase / "log.jsonl")]


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "ours"])
def test_a_mistake_is_told_and_not_tried_again(micro_recipe, tmp_path, launcher):
    """A folder that held a run before may not be gone on with because torchrun starts the ranks a second time."""
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    held = tmp_path / "run" / "priming" / "checkpoints" / "step-00000001"
    held.mkdir(parents=True)
    (held / "state.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.read_text())
    command = ["-m", "vpae", "distill", recipe, "--output", tmp_path / "run"]
    start, told = {
        "torchrun": ([*TORCHRUN, "--max-restarts", 3, *command], 2),  # when it was found, and by the last attempt
        "ours": ([sys.executable, *command, "--ranks", 2, "--max-restarts", 3], 1),
    }[launcher]
    run = _start(*start)
    out, err = run.communicate(timeout=240)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert run.returncode != 0 and len(lines) == told, err[-2000:]
    assert all("already holds this run; go on with --resume" in line for line in lines)
    assert "Traceback" not in err or told == 2  # torchrun's own, of its last attempt
    assert [p.name for p in held.parents[1].rglob("*") if p.is_file()] == ["state.json"]


@pytest.mark.slow
def test_ranks_save_and_leave_when_their_agent_is_killed(micro_recipe, tmp_path):
    recipe = write_recipe(_long(micro_recipe), tmp_path / "r.yaml")
    agent = _start(*TORCHRUN, "-m", "vpae", "distill", recipe, "--output", tmp_path / "run")
    _wait(lambda: _lines(tmp_path / "run" / "priming" / "log.jsonl") >= 2)
    ranks = rank_processes(tmp_path / "run")
    assert sorted(ranks) == [0, 1]
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    _wait(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in ranks.values()), 20)
    out = agent.stdout.read()
    assert "interrupted, everything is saved" in out
    assert list((tmp_path / "run" / "priming" / "checkpoints").glob("step-*/state.json"))


def test_notes_are_kept_where_the_launcher_keeps_them(tmp_path, monkeypatch):
    monkeypatch.delenv(restarts.FOLDER, raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    restarts.note_claim()
    assert restarts.folder() is None and not restarts.claimed() and restarts.mistake() is None
    for file in ("", "/dev/null", str(tmp_path / "errors" / "rank0" / "error.json")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        assert restarts.folder() is None
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "1" / "error.json"))
    assert restarts.folder() == tmp_path and restarts.mistake() is None
    restarts.note_mistake("data.cache is gone")
    restarts.note_claim()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "0" / "error.json"))
    restarts.note_mistake("")
    assert restarts.mistake() == "data.cache is gone" and restarts.claimed()
    monkeypatch.setenv(restarts.FOLDER, str(tmp_path / "other"))
    assert restarts.mistake() is None and not restarts.claimed()
    restarts.note_saved()  # a folder that cannot be written is no reason to fail
    assert not restarts.saved()
