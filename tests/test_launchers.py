"""The launch scripts, as a stranger starts them, on two CPU ranks; short scripts stand in for Slurm's commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import differing, rank_processes, read_tensors, write_recipe

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
PHASES = ("priming", "equilibrium")
CALM = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "RANKS": "1"}

# it passes signals on to its task, as srun does
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "$task"' TERM
SLURM_NODEID=0 "$@" & task=$!
wait "$task"; status=$?
while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$*" >>"$REQUEUED"; fi
"""


def _run(script: str, *arguments: object, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess:
    command = [str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | CALM | variables)


@contextmanager
def _started(script: str, *arguments: object, **variables: str):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [str(LAUNCH / script), *map(str, arguments)]
    run = subprocess.Popen(command, env=os.environ | CALM | variables, **pipes)
    try:
        yield run
    finally:
        if run.poll() is None:  # the test failed: its ranks must not stay behind
            run.terminate()
            run.communicate(timeout=60)


def _free_ports() -> int:
    """The first of two free ports in a row."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _wait_for(path: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.fixture
def recipe(micro_recipe, tmp_path):
    micro_recipe["priming"]["student_steps"] = 8
    micro_recipe["engine"] |= {"checkpoint_every": 5}
    return write_recipe(micro_recipe, tmp_path / "r.yaml")


@pytest.fixture
def slurm(tmp_path):
    """Variables of a job on one machine, with srun and scontrol on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return job | {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": path, "REQUEUED": str(tmp_path / "requeued")}


def test_one_machine_says_what_it_would_run(tmp_path):
    options = ["--dry-run", "--set", "seed=1", "equilibrium.taps=[1, 2]", "--resume"]
    shipped = "recipes/wan21_i2v_14b_480p.yaml"
    done = _run("train_8gpu.sh", ROOT / shipped, tmp_path / "run", *options, GPU_MEMORY="80", RANKS="8")
    assert done.returncode == 0, done.stderr
    steps = [line.split(" -m vpae ")[1] for line in done.stdout.splitlines()]
    with_sets = rf"{ROOT / shipped} --set seed=1 equilibrium.taps=\[1\,\ 2\]"
    assert steps == [
        f"preflight {with_sets} --output {tmp_path / 'run'} --ranks 8",
        f"plan {with_sets} --gpus 8 --gpu-memory 80",
        f"cache {with_sets} --ranks 8",
        f"distill {ROOT / shipped} --output {tmp_path / 'run'} --ranks 8 --max-restarts 3 --resume "
        r"--set seed=1 equilibrium.taps=\[1\,\ 2\] --resume",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shipped", "more", "planned"),
    [
        ("quickstart.yaml", [], True),
        ("quickstart.yaml", ["--no-plan-check"], False),
        ("peers/dmd2.yaml", [], False),
    ],
)
def test_only_what_can_be_planned_is(tmp_path, shipped, more, planned):
    recipe = ROOT / "recipes" / shipped
    done = _run("train_8gpu.sh", recipe, tmp_path / "run", "--dry-run", *more, GPU_MEMORY="80")
    assert done.returncode == 0, done.stderr
    steps = [line.split(" -m vpae ")[1].split()[0] for line in done.stdout.splitlines()]
    assert steps == ["preflight", *["plan"] * planned, "cache", "distill"]
    assert ("--no-plan-check" in done.stdout.splitlines()[-1]) == bool(more)


@pytest.mark.slow
def test_a_run_that_is_planned_before(micro_recipe, tmp_path):
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    done = _run("train_8gpu.sh", recipe, tmp_path / "run", "--set", f"data.cache={tmp_path / 'cache'}", GPU_MEMORY="80")
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = done.stdout.split("-m vpae cache")
    assert "-m vpae plan" in before and "fits" in before and "-m vpae distill" in after
    assert list((tmp_path / "run" / "equilibrium" / "checkpoints").glob("step-*/state.json"))


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "words"),
    [
        ("train_8gpu.sh", ["one"], {}, "give RECIPE and OUTPUT"),
        ("train_8gpu.sh", ["no.yaml", "out"], {}, "no recipe at no.yaml"),
        ("train_8gpu.sh", ["setup.cfg", "out"], {"PYTHON": "/no/python"}, "./launch/install.sh"),
        ("train_multinode.sh", ["setup.cfg", "out"], {}, "NNODES must say"),
        ("train_multinode.sh", ["setup.cfg", "out"], {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK must be 0 .. 1"),
        ("train_multinode.sh", ["setup.cfg", "out"], {"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR must name"),
        ("slurm.sbatch", ["one"], {"SLURM_SUBMIT_DIR": str(ROOT)}, "give RECIPE and OUTPUT"),
        ("slurm.sbatch", ["a", "b"], {"SLURM_SUBMIT_DIR": "/"}, "submit it from the checkout"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, script, arguments, variables, words):
    monkeypatch.chdir(ROOT)
    done = _run(script, *arguments, **variables)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_each_task_of_an_array_has_its_own_run(recipe, slurm, tmp_path):
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    done = _run("slurm.sbatch", recipe, tmp_path / "run", "--dry-run", **slurm, **task)
    assert done.returncode == 0, done.stderr
    assert f"distill {recipe} --output {tmp_path / 'run'}-3 --resume --set seed=3" in done.stdout
    assert "hsdp" not in done.stdout and not Path(slurm["REQUEUED"]).exists()


@pytest.mark.slow
def test_one_machine_from_recipe_to_student_and_again(recipe, tmp_path):
    """Stopped while it trains, the script saves and ends; the same command goes on to its end."""
    command = ("train_8gpu.sh", recipe, tmp_path / "run", "--set", f"data.cache={tmp_path / 'cache'}")
    with _started(*command, RANKS="2") as run:
        _wait_for(tmp_path / "run" / "priming" / "log.jsonl")
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "preflight: ready" in out and "cache " in out, out[-3000:]
    assert "nothing to resume" in out and "stopped by a signal; the same command goes on" in out
    again = _run(*command, RANKS="2")
    assert again.returncode == 0 and "goes on from turn" in again.stdout, again.stdout[-2000:] + again.stderr[-2000:]
    assert list((tmp_path / "run" / "equilibrium" / "checkpoints").glob("step-*/state.json"))


@pytest.mark.slow
def test_accelerate_starts_ranks_too(recipe, tmp_path):
    """It asks for GPUs by name only: its agent is torchrun's, and the ranks see for themselves what they compute on."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(_free_ports()), "-m", "vpae"]
    command = [sys.executable, *launcher, "distill", str(recipe), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | CALM)
    assert done.returncode == 0, done.stderr[-3000:]
    state = next((tmp_path / "run" / "priming" / "checkpoints").glob("step-*/state.json"))
    assert json.loads(state.read_text())["world_size"] == 2


@pytest.mark.slow
def test_two_machines_are_one_run(recipe, tmp_path):
    """Two agents of a rank each; one rank is killed on the way, and the agents of both start theirs again."""
    for name in ("whole", "run"):
        command = ("train_multinode.sh", recipe, tmp_path / name)
        here = {"NNODES": "2", "MASTER_ADDR": "localhost", "LOCAL_ADDR": "localhost", "MASTER_PORT": str(_free_ports())}
        with (
            _started(*command, **here, NODE_RANK="0", MAX_RESTARTS="2") as first,
            _started(*command, **here, NODE_RANK="1", MAX_RESTARTS="2") as second,
        ):
            if name == "run":
                _wait_for(tmp_path / "run" / "priming" / "checkpoints" / "step-00000005" / "state.json")
                os.kill(rank_processes(tmp_path / "run")[1], signal.SIGKILL)
            said = "".join(node.communicate(timeout=600)[0] for node in (first, second))
        assert (first.returncode, second.returncode) == (0, 0), said[-4000:]
        assert "2 on 1 machine" in said and ("goes on from turn" in said) == (name == "run")
    for phase in PHASES:
        assert differing(read_tensors(tmp_path / "whole" / phase), read_tensors(tmp_path / "run" / phase)) == []


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_ends_as_an_undisturbed_one(recipe, slurm, tmp_path):
    command = ("slurm.sbatch", recipe, tmp_path / "run")
    with _started(*command, **slurm) as job:
        _wait_for(tmp_path / "run" / "priming" / "log.jsonl")
        job.send_signal(signal.SIGTERM)
        out, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and "interrupted, everything is saved" in out, out[-3000:]
    assert Path(slurm["REQUEUED"]).read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    again = _run(*command, **slurm, SLURM_RESTART_COUNT="1")
    assert again.returncode == 0 and "goes on from turn" in again.stdout, again.stdout[-2000:] + again.stderr[-2000:]
    assert len(Path(slurm["REQUEUED"]).read_text().splitlines()) == 1
    assert _run(*command[:2], tmp_path / "whole", **slurm).returncode == 0
    for phase in PHASES:
        assert differing(read_tensors(tmp_path / "whole" / phase), read_tensors(tmp_path / "run" / phase)) == []
