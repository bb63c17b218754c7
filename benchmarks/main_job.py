"""The main job over several seeds: distil, export, compare; one JSON document, last line for machines.

    python benchmarks/main_job.py recipes/quickstart.yaml --seeds 0 1 2
    python benchmarks/main_job.py recipes/tiny_full.yaml --seeds 0 1 2

Each seed is a run of its own under outputs/benchmarks/ and goes on where it stopped when the command is given again;
one that is finished is taken as it is (remove its folder after a change of code or teacher).
Within a seed teacher and student are sampled in one process, on the same clips and noise, so their ratio is paired.
Writes benchmarks/results/main_job_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import commit, write_result

from vpae import recipe as recipes
from vpae.engine.tracking import read_log
from vpae.files import write_json
from vpae.runs import phases_of


def curves(folder: Path, recipe: recipes.Recipe) -> dict[str, dict[str, list[float]]]:
    """How each phase's curves went: ``{phase: {curve: [mean of its first tenth, mean of its last]}}``."""
    found: dict[str, dict[str, list[float]]] = {}
    for phase in phases_of(recipe):
        values: dict[str, list[float]] = {}
        for line in read_log(folder / phase / "log.jsonl"):
            for key, value in line.items():
                values.setdefault(key, []).append(value)
        ends = {key: (each, max(1, len(each) // 10)) for key, each in values.items() if key not in ("turn", "seconds")}
        found[phase] = {k: [float(np.mean(each[:n])), float(np.mean(each[-n:]))] for k, (each, n) in ends.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[])
    arguments = parser.parse_args()
    recipe = recipes.load(arguments.recipe, tuple(arguments.overrides))
    runs = {}
    for seed in arguments.seeds:
        folder = Path("outputs/benchmarks") / f"{recipe.name}-seed{seed}"
        own = (f"seed={seed}", *arguments.overrides)
        results = folder / "results.json"
        finished = json.loads(results.read_text()) if results.is_file() else {}
        if finished.get("recipe") == recipes.digest(recipes.load(arguments.recipe, own)):
            print(f"{results} is of this recipe and seed: taken as it is")
            runs[str(seed)] = finished
            continue
        command = [
            sys.executable,
            "-m",
            "vpae",
            "quickstart",
            "--recipe",
            str(arguments.recipe),
            "--output",
            str(folder),
        ]
        at = commit()
        if subprocess.run([*command, "--set", *own]).returncode or not results.is_file():
            sys.exit(f"seed {seed} did not finish; give the command again to go on with {folder}, or remove it")
        runs[str(seed)] = json.loads(results.read_text()) | {"commit": at}
        write_json(results, runs[str(seed)])
    summaries = [run["summary"] for run in runs.values()]
    count = len(summaries)

    def spread(values: list[float]) -> dict[str, float]:
        error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        return {"mean": float(np.mean(values)), "standard_error": error, "median": float(np.median(values))}

    document = {
        "benchmark": "main_job",
        "recipe": recipe.name,
        "recipe_digest": recipes.digest(recipe),
        "seeds": arguments.seeds,
        "summary": {key: spread([s[key] for s in summaries]) for key in summaries[0]},
        "rows": {
            row: {key: spread([run["rows"][row]["values"][key] for run in runs.values()]) for key in first["values"]}
            | {"frechet": spread([run["rows"][row]["frechet"] for run in runs.values()])}
            | {"seconds_per_clip": spread([run["rows"][row]["seconds_per_clip"] for run in runs.values()])}
            for row, first in next(iter(runs.values()))["rows"].items()
        },
        "curves": {s: curves(Path("outputs/benchmarks") / f"{recipe.name}-seed{s}", recipe) for s in arguments.seeds},
        "runs": runs,
    }
    target = write_result(f"main_job_{recipe.name}", document)
    for key, value in document["summary"].items():
        print(f"{key:<45}{value['mean']:10.2f} ± {value['standard_error']:.2f}")
    written = json.loads(target.read_text())  # as written: one seed has no standard error, and JSON no NaN
    print(json.dumps({k: written[k] for k in ("benchmark", "recipe", "seeds", "summary")}))


if __name__ == "__main__":
    main()
