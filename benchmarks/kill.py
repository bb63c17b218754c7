"""kill -9 at random moments: does a run end in the weights of an undisturbed one?

    python benchmarks/kill.py recipes/quickstart.yaml \\
        --set priming.student_steps=20 equilibrium.student_steps=40 engine.checkpoint_every=7

``checkpoint_every`` is small so that kills fall between checkpoints of both phases.

Runs the recipe once undisturbed, then once killed again and again at uniformly random moments and resumed, and compares
every tensor of the last checkpoints (weights, EMA, optimisers) bit for bit. Writes benchmarks/results/kill_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from vpae import recipe as recipes
from vpae.engine import checkpoint as checkpoints
from vpae.runs import environment, write_json

RESULTS = Path(__file__).parent / "results"
PHASES = ("priming", "equilibrium")


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", nargs="+", default=[])
    arguments = parser.parse_args()
    recipe = recipes.load(arguments.recipe, tuple(arguments.overrides))
    root = Path("outputs/kill") / recipe.name
    shutil.rmtree(root, ignore_errors=True)

    def command(folder: Path) -> list[str]:
        base = [sys.executable, "-m", "vpae", "distill", str(arguments.recipe), "--output", str(folder), "--resume"]
        return [*base, "--set", *arguments.overrides] if arguments.overrides else base

    started = time.monotonic()
    subprocess.run(command(root / "undisturbed"), check=True)
    took, generator, moments = time.monotonic() - started, random.Random(arguments.seed), []
    while len(moments) < arguments.kills:
        run = subprocess.Popen(command(root / "killed"))
        moment = generator.uniform(0, took)
        try:
            run.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            moments.append(round(moment, 2))
            print(f"kill {len(moments)} of {arguments.kills} after {moment:.1f} s", flush=True)
            continue
        shutil.rmtree(
            root / "killed"
        )  # it finished between kills: start over, so that every kill hits a running process
    subprocess.run(command(root / "killed"), check=True)
    names = differing(root / "undisturbed", root / "killed")
    document = {
        "benchmark": "kill",
        "recipe": recipe.name,
        "overrides": arguments.overrides,
        "date": date.today().isoformat(),
        "seconds_undisturbed": round(took, 1),
        "kills_that_hit_a_running_process": len(moments),
        "moments": moments,
        "differing_tensors": names,
        "environment": environment(),
    }
    write_json(RESULTS / f"kill_{recipe.name}.json", document)
    print(f"{len(moments)} kills hit; {len(names)} tensors differ")
    print(json.dumps({k: document[k] for k in ("benchmark", "recipe", "kills_that_hit_a_running_process")}))
    sys.exit(1 if names else 0)


if __name__ == "__main__":
    main()
