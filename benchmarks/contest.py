"""What quality.py, tuning.py and ablation.py share: entries trained on one budget, job by job, and judged alike.

A budget is wall-clock or clips seen, and every ``student_steps`` of an entry's recipe, with its ``head_warmup_turns``,
is scaled by one factor to meet it. What a step costs is measured before, all entries in turn in each of several rounds,
so that the number of steps is fixed and a run can be repeated; the seconds it then took are reported beside it. A clip
is seen when a player's turn uses it. What a method makes once before it trains (clips by the teacher) is data, and its
cost is listed apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import commit

from vpae import recipe as recipes
from vpae.data.bounce import Clip, World
from vpae.data.encoders import Encoders
from vpae.engine.tracking import read_log
from vpae.errors import UserError
from vpae.evaluation import clips_of, sample_clips
from vpae.files import write_json
from vpae.loading import load_model
from vpae.quickstart import seconds_training
from vpae.roles import Role
from vpae.runs import RECIPE, environment, phases_of

_ROUNDS, _STEPS, _WARM = 3, 6, 2  # of the measurement of cost: rounds, student steps a phase, turns left out
RECIPES = Path(__file__).parent.parent / "recipes"
_FREE = ("seed", "learning_rate", "betas", "schedule", "warmup_steps", "ema_decay", "low", "high", "mean")  # of charge
_OFF = 10**6  # never, in a run of the sizes here

# Overrides of every recipe. In the closed world one evaluation of the teacher comes to 94 % of its best: too little
# room to tell methods apart. In the open one captions are silent about three balls in five: less than half.
_WORLDS = {
    "closed": (),
    "open": (
        "teacher.path=tiny_wan_open",
        "data.source.world.unsaid=0.6",
        "data.source.count=2048",
        "data.cache=outputs/cache/bounce-train-open",
    ),
}


@dataclass(frozen=True)
class Entry:
    """A row of the table: a recipe with overrides."""

    name: str
    recipe: Path
    overrides: tuple[str, ...] = ()

    def load(self, *more: str) -> recipes.Recipe:
        return recipes.load(self.recipe, (*self.overrides, *more))

    def world(self) -> World:
        """That its clips are of: what it is judged on."""
        return World.from_dict(self.load().data.source["world"])

    def steps(self) -> dict[str, int]:
        """The keys of all ``student_steps`` with their values, in the order of the phases."""
        return dict(_found("student_steps", recipes.to_plain(self.load())))

    def warm_up(self) -> dict[str, int]:
        """The key of ``head_warmup_turns`` with its value, where the head has turns before the student's first."""
        return {key: n for key, n in _found("head_warmup_turns", recipes.to_plain(self.load())) if n}


def _found(name: str, plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in plain.items():
        if key == name:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _found(name, value, f"{prefix}{key}.")


def in_world(world: str, recipe: Path) -> tuple[str, ...]:
    """Overrides that move a recipe's teacher and data into one of the worlds."""
    plain = recipes.to_plain(recipes.load(recipe))
    samples = plain.get("method", {}).get("teacher_samples")
    if not _WORLDS[world] or not samples:
        return _WORLDS[world]
    return (*_WORLDS[world], f"method.teacher_samples.folder={samples['folder']}-{world}")


@dataclass
class Cost:
    """What one student step of each phase costs, all players' turns and its share of a warm-up counted.

    Attributes:
        seconds: of each phase.
        clips: that are seen, of each phase.
    """

    seconds: list[float] = field(default_factory=list)
    clips: list[float] = field(default_factory=list)


def train(entry: Entry, folder: Path, ranks: int, overrides: Sequence[str]) -> int:
    """Run (or go on with) an entry; returns its peak resident memory in bytes, of the largest rank.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", "vpae", "distill", str(entry.recipe), "--output", str(folder), "--resume"]
    command += ["--ranks", str(ranks), "--set", *entry.overrides, *overrides]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{entry.name} in {folder} failed with status {process.returncode}; see above")
    return used.ru_maxrss * 1024


def cost_digest(recipe: recipes.Recipe) -> str:
    """Of what a step's cost depends on: recipes that differ in rates and the like alone share one measurement."""

    def without(value: Any) -> Any:
        return {k: without(v) for k, v in value.items() if k not in _FREE} if isinstance(value, dict) else value

    return recipes.digest(without(recipes.to_plain(recipe)))


def measure_costs(entries: Sequence[Entry], root: Path, ranks: int) -> dict[str, Cost]:
    """Seconds and clips a student step of every entry; measured once and kept in ``root/costs.json``."""
    file = root / "costs.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    digests = {e.name: f"{cost_digest(e.load())}-{ranks}" for e in entries}
    new = list({digests[e.name]: e for e in entries if digests[e.name] not in kept}.values())
    seconds: dict[str, list[list[float]]] = {e.name: [] for e in new}
    clips: dict[str, list[float]] = {}
    for r, entry in itertools.product(range(_ROUNDS), new):
        folder = root / "costs" / f"{entry.name}-{r}"
        short = [f"{key}={_STEPS}" for key in entry.steps()] + [f"{key}=0" for key in entry.warm_up()]
        quiet = ["engine.log_every=1", f"engine.sample_every={_OFF}", f"engine.checkpoint_every={_OFF}"]
        shutil.rmtree(folder, ignore_errors=True)  # of another recipe, or stopped: a few seconds' work
        train(entry, folder, ranks, (*short, *quiet, "engine.samples=1"))
        rows = [_phase_cost(folder / phase, entry) for phase in phases_of(entry.load())]
        seconds[entry.name].append([s for s, _ in rows])
        clips[entry.name] = [c for _, c in rows]
    for entry in new:
        medians = [statistics.median(phase) for phase in zip(*seconds[entry.name], strict=True)]
        kept[digests[entry.name]] = {"of": entry.name, "seconds": medians, "clips": clips[entry.name]}
    write_json(file, kept)
    return {name: Cost(kept[digest]["seconds"], kept[digest]["clips"]) for name, digest in digests.items()}


def _phase_cost(phase: Path, entry: Entry) -> tuple[float, float]:
    """Seconds and clips of one student step of a finished short run that left the warm-up out."""
    turns: dict[str, list[float]] = {}
    for line in read_log(phase / "log.jsonl"):
        for key, value in line.items():
            if key.endswith("/seconds"):
                turns.setdefault(key.removesuffix("/seconds"), []).append(value)
    counts = {player: len(times) / len(turns["student"]) for player, times in turns.items()}
    for key, warm in entry.warm_up().items():
        if key.split(".")[0] == phase.name:
            counts["head"] += warm / entry.steps()[f"{phase.name}.student_steps"]
    # a mean, since turns of one player differ (lazy R1); rounds are joined by their median
    seconds = {player: statistics.fmean(times[min(_WARM, len(times) - 1) :]) for player, times in turns.items()}
    batch = entry.load().engine.global_batch
    return sum(seconds[player] * n for player, n in counts.items()), batch * sum(counts.values())


def on_budget(entry: Entry, cost: Cost, equal: str, budget: float) -> tuple[str, ...]:
    """Overrides that make an entry cost ``budget`` (seconds, or clips), its phases in their own proportions."""
    steps, each = entry.steps(), getattr(cost, equal)
    factor = budget / sum(n * c for n, c in zip(steps.values(), each, strict=True))
    return tuple(f"{key}={max(1, round(n * factor))}" for key, n in (steps | entry.warm_up()).items())


def whole_cost(entry: Entry, cost: Cost, equal: str) -> float:
    """What an entry costs as its recipe stands."""
    return sum(n * c for n, c in zip(entry.steps().values(), getattr(cost, equal), strict=True))


def diversity(role: Role, encoders: Encoders, clips: Sequence[Clip], draws: int, **options: Any) -> float:
    """Mean distance between samples of one condition under different noise: RMS over pixels, in levels of 255."""
    videos = [sample_clips(role, encoders, clips, seed=1000 + d, **options).frames for d in range(draws)]
    gaps = [
        np.sqrt(np.mean((a[i].astype(float) - b[i]) ** 2))
        for a, b in itertools.combinations(videos, 2)
        for i in range(len(clips))
    ]
    return float(np.mean(gaps))


def judge(folder: Path, world: World, split: str, clips: int, plans: Mapping[str, Mapping[str, Any]]):
    """Scores of a run or a teacher under each plan of sampling, with the first eight videos of the first plan."""
    model = load_model(folder)
    encoders = Encoders(model.pipeline, model.role.backbone.transformer.device)
    wanted, rows, shown = clips_of(world, split, clips), {}, None
    for name, options in plans.items():
        options = {"batch": 16, "negative_prompt": model.negative_prompt, "label": name} | dict(options)
        sampled = sample_clips(model.role, encoders, wanted, seed=0, **options)
        shown = shown or sampled.frames[:8]
        spread = diversity(model.role, encoders, wanted[:16], 4, **options)
        rows[name] = sampled.plain() | {"diversity": round(spread, 4)}
    return rows, shown


def job_digest(recipe: recipes.Recipe) -> str:
    """Of all that a job's result depends on: its recipe, and that of the run it goes on from."""
    start = getattr(recipe, "priming_run", None)
    before = f"-{recipes.digest(recipes.load_stored(Path(start) / RECIPE))}" if start else ""
    return recipes.digest(recipe) + before


def set_aside(folder: Path, digest: str) -> None:
    """Note beside a folder which job it is for; one of another job is renamed, since training may have taken long."""
    note = folder.with_name(f"{folder.name}.digest")
    if folder.is_dir() and note.is_file() and (found := note.read_text()) != digest:
        aside = folder.with_name(f"{folder.name}-of-{found}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{folder} was of another recipe: now {aside}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest)


def run_jobs(
    entries: Sequence[Entry],
    seeds: Sequence[int],
    root: Path,
    settings: Mapping[str, tuple[str, ...]],
    *,
    ranks: int,
    split: str,
    clips: int,
) -> dict[str, list[dict[str, Any]]]:
    """Train and judge every entry under every seed; what is finished is taken as it is.

    Args:
        settings: overrides of each entry besides the seed.
    """
    done: dict[str, list[dict[str, Any]]] = {e.name: [] for e in entries}
    for seed, entry in itertools.product(seeds, entries):
        folder = root / f"{entry.name}-seed{seed}"
        own = (*settings[entry.name], f"seed={seed}")
        digest, file = job_digest(entry.load(*own)), folder / f"{split}-{clips}.json"
        if not file.is_file() or json.loads(file.read_text())["recipe"] != digest:
            print(f"== {entry.name}, seed {seed}: {' '.join(own)}", flush=True)
            set_aside(folder, digest)
            began = time.monotonic()
            memory = train(entry, folder, ranks, own)
            rows, shown = judge(folder, entry.world(), split, clips, {"1 NFE": {"steps": 1}, "4 NFE": {"steps": 4}})
            np.savez_compressed(folder / f"{split}-shown.npz", *shown)
            record = {"recipe": digest, "overrides": list(own), "seed": seed, "commit": commit(), "rows": rows}
            recipe = entry.load(*own)
            record |= {"seconds_training": seconds_training(folder, recipe), "peak_bytes": memory}
            record |= {"seconds_of_job": time.monotonic() - began, "environment": environment() | {"ranks": ranks}}
            write_json(file, record)
        done[entry.name].append(json.loads(file.read_text()))
    return done


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "standard_error": error}


def summary(jobs: Sequence[dict[str, Any]], row: str) -> dict[str, dict[str, float]]:
    """Mean and standard error over seeds of all that was measured of one way of sampling."""
    first = jobs[0]["rows"][row]
    found = {key: spread([job["rows"][row]["values"][key] for job in jobs]) for key in first["values"]}
    for key in ("frechet", "diversity", "seconds_per_clip"):
        found[key] = spread([job["rows"][row][key] for job in jobs])
    found["training_minutes"] = spread([job["seconds_training"] / 60 for job in jobs])
    found["peak_gib"] = spread([job["peak_bytes"] / 2**30 for job in jobs])
    return found


def command_line(doc: str | None, root: str) -> argparse.ArgumentParser:
    """The options that every comparison has; ``root``: name of its folder of jobs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "quickstart.yaml", help="V-PAE's")
    parser.add_argument("--world", choices=tuple(_WORLDS), default="open", help="closed: that of the recipes")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], help="for every recipe: teacher.path=... ")
    parser.add_argument("--clips", type=int, default=64, help="that are judged")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/benchmarks") / root)
    return parser


def carry_out(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """``run`` what was asked for; what is wrong with it is told in one line."""
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


COLUMNS = ("sa", "tc", "fq", "mean", "dynamic_degree", "frechet", "trajectory_error", "diversity")


def print_table(title: str, rows: Mapping[str, Mapping[str, dict[str, float]]], columns: Sequence[str]) -> None:
    print(f"\n{title}\n{'':<28}" + "".join(f"{name:>18}" for name in columns))
    for name, values in rows.items():
        cells = (values.get(column) for column in columns)
        texts = (
            "" if c is None else f"{c['mean']:.3g}" if np.isnan(c["standard_error"] or np.nan)
            else f"{c['mean']:.3g} ± {c['standard_error']:.2g}"
            for c in cells
        )  # fmt: skip
        print(f"{name:<28}" + "".join(f"{text:>18}" for text in texts))
