"""kill -9 at random moments: does a run end in the weights of an undisturbed one?

    python benchmarks/kill.py recipes/quickstart.yaml --ranks 2 \\
        --set priming.student_steps=12 equilibrium.student_steps=24 engine.checkpoint_every=7

``checkpoint_every`` is small so that kills fall between checkpoints of both phases.

Runs the recipe once undisturbed, then kills and resumes it at random moments of the training (uniform over a third of
its length after it has begun, so that one run lives through several kills; what happens before that is
covered by every fourth kill, which comes at any moment after the start). A run that comes to its end is compared,
every tensor of its last checkpoints (weights, EMA, optimisers) bit for bit, and another is begun until all kills have
hit. Writes benchmarks/results/kill_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from common import write_result
from torch.distributed.checkpoint import HuggingFaceStorageReader

from vpae import recipe as recipes
from vpae.engine import checkpoint as checkpoints
from vpae.engine.tracking import read_log
from vpae.runs import PHASES


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint under ``folder``."""
    found = checkpoints.find(folder / "checkpoints")
    stored = HuggingFaceStorageReader(str(found.folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(tuple(meta.size)) for name, meta in stored.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(found.folder)), no_dist=True)
    return tensors


def differing(undisturbed: Path, killed: Path) -> list[str]:
    """Names of the tensors that are not bit for bit the same."""
    names = []
    for phase in PHASES:
        if (undisturbed / phase).is_dir():
            one, two = read(undisturbed / phase), read(killed / phase)
            names += [f"{phase}: {n}" for n in one if n not in two or not torch.equal(one[n], two[n])]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1, help="all of them are killed at once, as when a machine dies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[])
    arguments = parser.parse_args()
    recipe = recipes.load(arguments.recipe, tuple(arguments.overrides))
    root = Path("outputs/kill") / recipe.name
    shutil.rmtree(root, ignore_errors=True)

    def start(folder: Path) -> list[subprocess.Popen]:
        base = [sys.executable, "-m", "vpae", "distill", str(arguments.recipe), "--output", str(folder), "--resume"]
        command = [*base, "--set", *arguments.overrides] if arguments.overrides else base
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": arguments.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group["OMP_NUM_THREADS"] = max(1, len(os.sched_getaffinity(0)) // arguments.ranks)
        ranks = [group | {"RANK": r, "LOCAL_RANK": r} for r in range(arguments.ranks)]
        return [subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in rank.items()}) for rank in ranks]

    def finish(run: list[subprocess.Popen]) -> None:
        """Wait for all ranks; one that fails would leave the others waiting for it."""
        while any(rank.poll() is None for rank in run) and not any(rank.returncode for rank in run):
            time.sleep(0.05)
        for rank in run:
            rank.kill()
        if any(rank.wait() for rank in run):
            sys.exit(f"a run failed with status {[rank.returncode for rank in run]}")

    def progress(folder: Path) -> list[int]:
        logs = [folder / phase / "log.jsonl" for phase in PHASES]
        return [log.stat().st_mtime_ns if log.exists() else 0 for log in logs]

    def killed(folder: Path, anywhere: bool) -> dict | None:
        """Start or go on, kill at a random moment and say when; None if the run came to its end before."""
        before, started = progress(folder), time.monotonic()
        run = start(folder)
        while not anywhere and run[0].poll() is None and progress(folder) == before:
            time.sleep(0.05)
        ready = time.monotonic() - started
        try:
            run[0].wait(timeout=generator.uniform(0, training / 3))
            finish(run)
            return None
        except subprocess.TimeoutExpired:
            for rank in run:
                rank.kill()
            for rank in run:
                rank.wait()
        after = time.monotonic() - started
        return {"seconds_after_start": round(after, 2), "seconds_of_training": round(after - ready, 2)} | (
            {"anywhere": True} if anywhere else {}
        )

    started = time.monotonic()
    finish(start(root / "undisturbed"))
    took = time.monotonic() - started
    training = sum(read_log(root / "undisturbed" / phase / "log.jsonl")[-1]["seconds"] for phase in PHASES)
    generator, runs, hits = random.Random(arguments.seed), [], 0
    while hits < arguments.kills:
        folder, kills = root / f"killed{len(runs)}", []
        while hits < arguments.kills:
            kill = killed(folder, anywhere=hits % 4 == 3)
            if kill is None:
                break
            kills, hits = [*kills, kill], hits + 1
            print(f"kill {hits} of {arguments.kills}: {kill}", flush=True)
        finish(start(folder))  # to its end; nothing to do where it has come to it
        runs.append({"kills": kills, "differing_tensors": differing(root / "undisturbed", folder)})
        print(f"run {len(runs)}: {len(kills)} kills, {len(runs[-1]['differing_tensors'])} tensors differ", flush=True)
    names = [name for run in runs for name in run["differing_tensors"]]
    document = {
        "benchmark": "kill",
        "recipe": recipe.name,
        "overrides": arguments.overrides,
        "ranks": arguments.ranks,
        "seed": arguments.seed,
        "seconds_undisturbed": round(took, 1),
        "kills_that_hit_a_running_process": hits,
        "tensors_compared": sum(len(read(root / "undisturbed" / phase)) for phase in PHASES),
        "runs": runs,
        "differing_tensors": names,
    }
    write_result(f"kill_{recipe.name}" + ("" if arguments.ranks == 1 else f"_{arguments.ranks}_ranks"), document)
    print(f"{hits} kills hit, in {len(runs)} runs; {len(names)} tensors differ")
    print(json.dumps({k: document[k] for k in ("benchmark", "recipe", "kills_that_hit_a_running_process")}))
    sys.exit(1 if names else 0)


if __name__ == "__main__":
    main()
