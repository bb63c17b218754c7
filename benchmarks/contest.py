"""What quality.py, tuning.py, explore.py and ablation.py share: entries trained on one budget and set side by side.

A budget is wall-clock or clips seen, and every ``student_steps`` of an entry's recipe, with its ``head_warmup_turns``,
is scaled by one factor to meet it. What a step costs is measured before, all entries in turn in each of several rounds,
so that the number of steps is fixed and a run can be repeated; the seconds it then took stand beside it, and their
share of the budget. A clip is seen when a player's turn uses it. What a method makes once before it trains (clips by
the teacher) is data, outside the budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, commit, parts_before, write_result
from jobs import claimed, train

from vpae import recipe as recipes
from vpae.data.bounce import World
from vpae.engine.tracking import read_log
from vpae.errors import UserError
from vpae.files import write_json
from vpae.runs import environment, phases_of

_ROUNDS, _STEPS, _WARM = 2, 6, 2  # of the measurement of cost: rounds, student steps a phase, turns left out
RECIPES = Path(__file__).parent.parent / "recipes"
_FREE = {"seed", "learning_rate", "betas", "schedule", "warmup_steps", "ema_decay", "grid_steps"}  # of charge
_FREE |= {"low", "high", "mean"}  # of a law of times
_OFF = 10**6  # never, in a run of the sizes here

# Overrides that move a recipe into a world. In the closed one a single evaluation of the teacher comes to 94 % of its
# best: too little room to tell methods apart. In the open one captions are silent about three balls in five: 45 %.
_WORLDS = {
    "open": (
        "teacher.path=tiny_wan_open",
        "data.source.world.unsaid=0.6",
        "data.source.count=2048",
        "data.cache=outputs/cache/bounce-train-open",
    ),
    "closed": (
        "teacher.path=tiny_wan",
        "data.source.world.unsaid=0.0",
        "data.source.count=1024",
        "data.cache=outputs/cache/bounce-train-1024",
    ),
    "own": (),
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
        source = self.load().data.source
        if source["kind"] != "bounce":
            raise UserError(
                f"{self.recipe}: data.source.kind is {source['kind']}; only clips of bounce can be judged here"
            )
        return World.from_dict(source.get("world", {}))

    def steps(self) -> dict[str, int]:
        """The keys of all ``student_steps`` with their values, in the order of the phases."""
        return dict(_found("student_steps", recipes.to_plain(self.load())))

    def warm_up(self) -> dict[str, int]:
        """The key of ``head_warmup_turns`` with its value, where the head has turns before the student's first."""
        return {key: n for key, n in _found("head_warmup_turns", recipes.to_plain(self.load())) if n}


def _found(name: str, plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        if key == name:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _found(name, value, f"{prefix}{key}.")


def ours(arguments: argparse.Namespace) -> Path:
    """V-PAE's recipe: the one asked for, else the world's own."""
    return arguments.recipe or RECIPES / ("quickstart.yaml" if arguments.world == "closed" else "tiny_open.yaml")


def in_world(world: str, recipe: Path) -> tuple[str, ...]:
    """Overrides that move a recipe's teacher and data into one of the worlds; none into its own."""
    samples = recipes.to_plain(recipes.load(recipe)).get("method", {}).get("teacher_samples")
    if not samples or world == "own":
        return _WORLDS[world]
    return (*_WORLDS[world], f"method.teacher_samples.folder=outputs/cache/bounce-train-{world}-teacher")


def check_one_world(entries: Sequence[Entry]) -> None:
    """All are to be judged by the same measure.

    Raises:
        UserError: recipes differ in teacher or world.
    """
    places = {e.name: (e.load().teacher.path, e.world().fingerprint()) for e in entries}
    first = entries[0].name
    for name, place in places.items():
        if place != places[first]:
            raise UserError(
                f"{name} and {first} differ in teacher.path or data.source.world and cannot be compared; "
                "--world open or closed moves both"
            )


@dataclass
class Cost:
    """What one student step of each phase costs, all players' turns and its share of a warm-up counted.

    Attributes:
        seconds: of each phase.
        clips: that are seen, of each phase.
        key: of what was measured, and where (:func:`cost_key`).
    """

    seconds: list[float] = field(default_factory=list)
    clips: list[float] = field(default_factory=list)
    key: str = ""


def cost_digest(recipe: recipes.Recipe) -> str:
    """Of what a step's cost depends on: recipes that differ in rates and the like alone share one measurement."""

    def without(value: Any) -> Any:
        return {k: without(v) for k, v in value.items() if k not in _FREE} if isinstance(value, dict) else value

    return recipes.digest(without(recipes.to_plain(recipe)))


def cost_key(entry: Entry, ranks: int) -> str:
    """Of what a step costs: the recipe's part of it, ranks, threads and the machine's kind."""
    now = environment()
    return f"{cost_digest(entry.load())}-{ranks}x{now['threads']}-{now['device'].replace(' ', '_')}-{now['cores']}"


def measure_costs(
    entries: Sequence[Entry], root: Path, ranks: int, known: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Cost]:
    """Seconds and clips a student step of every entry; each round measured once and kept under ``root/costs``.

    One process measures while others on the same folder wait, so that all entries are measured under the same load.

    Args:
        known: costs of an earlier day by key. They are taken, since steps, and so jobs, follow from them.
    """
    keys, known = {e.name: cost_key(e, ranks) for e in entries}, known or {}
    once = {keys[e.name]: e for e in entries if keys[e.name] not in known}  # several of one key: the last for all
    files = {key: [root / "costs" / f"{key}-{r}.json" for r in range(_ROUNDS)] for key in once}
    with claimed(root / "costs.lock", wait=True):
        for r, (key, entry) in itertools.product(range(_ROUNDS), once.items()):
            _measure(entry, files[key][r], ranks)
    for key, kept in files.items():
        measured = [json.loads(file.read_text()) for file in kept]
        # the least of the rounds: what else the machine does only adds, and once made a round ten times as long
        least = [min(phase) for phase in zip(*(m["seconds"] for m in measured), strict=True)]
        known = {**known, key: measured[-1] | {"seconds": least}}
    return {name: Cost(known[key]["seconds"], known[key]["clips"], key) for name, key in keys.items()}


def _measure(entry: Entry, file: Path, ranks: int) -> None:
    """One round of an entry: a run of a few steps without its warm-up."""
    if file.is_file():
        return
    folder = file.with_suffix("")
    short = [f"{key}={_STEPS}" for key in entry.steps()] + [f"{key}=0" for key in entry.warm_up()]
    quiet = ["engine.log_every=1", f"engine.sample_every={_OFF}", f"engine.checkpoint_every={_OFF}"]
    shutil.rmtree(folder, ignore_errors=True)  # stopped: a few seconds' work
    train(entry, folder, ranks, (*short, *quiet, "engine.samples=1"))
    seconds, clips = zip(*(_phase_cost(folder / phase, entry) for phase in phases_of(entry.load())), strict=True)
    shutil.rmtree(folder, ignore_errors=True)
    about = {"of": entry.name, "date": date.today().isoformat(), "commit": commit()}
    write_json(file, about | {"seconds": seconds, "clips": clips})


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
    # a mean, since turns of one player differ (lazy R1)
    seconds = {player: statistics.fmean(times[min(_WARM, len(times) - 1) :]) for player, times in turns.items()}
    batch = entry.load().engine.global_batch
    return sum(seconds[player] * n for player, n in counts.items()), batch * sum(counts.values())


def on_budget(entry: Entry, cost: Cost, equal: str, budget: float) -> tuple[str, ...]:
    """Overrides that make an entry cost ``budget`` (seconds, or clips), its phases in their own proportions.

    An EMA's horizon is cut to a fifth of a phase that gets short: what is judged would else be the weights it starts
    from, and more so the more a method's step costs.
    """
    steps, each = entry.steps(), getattr(cost, equal)
    factor = budget / sum(n * c for n, c in zip(steps.values(), each, strict=True))
    found = {key: max(1, round(n * factor)) for key, n in (steps | entry.warm_up()).items()}
    decays = dict(_found("ema_decay", recipes.to_plain(entry.load())))
    for key in steps:
        decay, longest = key.replace("student_steps", "ema_decay"), math.floor(1e4 * max(0.0, 1 - 5 / found[key])) / 1e4
        if decays[decay] > longest:
            found[decay] = longest
    return tuple(f"{key}={n}" for key, n in found.items())


def whole_cost(entry: Entry, cost: Cost, equal: str) -> float:
    """What an entry costs as its recipe stands."""
    return sum(n * c for n, c in zip(entry.steps().values(), getattr(cost, equal), strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error over seeds."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "standard_error": error}


def summary(jobs: Sequence[dict[str, Any]], row: str, budget: float | None = None) -> dict[str, dict[str, float]]:
    """Mean and standard error over seeds of all that was measured of one way of sampling.

    Args:
        budget: seconds of training that were meant, for their share of them.

    Jobs that diverged are counted under ``diverged`` and are in no mean; where all did, nothing else is there.
    """
    jobs, lost = [job for job in jobs if "failed" not in job], [job for job in jobs if "failed" in job]
    found = {"diverged": {"mean": float(len(lost)), "standard_error": float("nan")}} if lost else {}
    if not jobs:
        return found
    first = jobs[0]["rows"][row]
    found |= {key: spread([job["rows"][row]["values"][key] for job in jobs]) for key in first["values"]}
    for key in ("frechet", "diversity", "seconds_per_clip"):
        found[key] = spread([job["rows"][row][key] for job in jobs])
    found["training_minutes"] = spread([job["seconds_training"] / 60 for job in jobs])
    if budget:
        found["percent_of_budget"] = spread([100 * job["seconds_training"] / budget for job in jobs])
    found["peak_gib"] = spread([job["peak_bytes"] / 2**30 for job in jobs])
    return found


def command_line(doc: str | None, root: str) -> argparse.ArgumentParser:
    """The options that every comparison has; ``root``: name of its folder of jobs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="V-PAE's; default: the world's own")
    parser.add_argument("--world", choices=tuple(_WORLDS), default="open", help="own: as the recipes say")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], help="for every recipe: teacher.path=... ")
    parser.add_argument("--clips", type=int, default=64, help="that are judged")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--root", type=Path, default=Path("outputs/benchmarks") / root)
    return parser


def carry_out(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """``run`` what was asked for; what is wrong with it is told in one line.

    SIGTERM is handed on to the job under way like Ctrl-C, which saves itself; the same command then goes on.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        sys.exit(130)


def stored(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Costs by key and jobs of earlier days, out of ``results/NAME.json``."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {"costs": {}, "jobs": []}


def store(name: str, costs: Mapping[str, Cost], jobs: Sequence[dict[str, Any]], root: Path, folder: Path = RESULTS):
    """Add to them. Nothing is taken out: a table may be asked for in parts, and by several processes at once."""
    with claimed(root / f"{name}.lock", wait=True):
        before = stored(name, folder)
        every = {(j["recipe"], j["split"], j["clips"]): j for j in (*before["jobs"], *jobs)}
        new = {c.key: {"of": n, "seconds": c.seconds, "clips": c.clips} for n, c in costs.items()}
        write_json(folder / f"{name}.json", {"costs": new | before["costs"], "jobs": list(every.values())})


def write_part(
    name: str, about: Mapping[str, Any], part: str, new: Mapping[str, Any], root: Path, folder: Path = RESULTS
) -> dict[str, Any]:
    """Add to a part of ``results/NAME.json``, keeping what is there on the same terms; the whole part."""
    with claimed(root / f"{name}.lock", wait=True):
        before = parts_before(name, about, part, folder)
        if not before and (folder / f"{name}.json").is_file():
            print(f"{name}.json held {part} of an earlier call on other terms; they make way", file=sys.stderr)
        write_result(name, {**about, part: {**before, **new}}, folder)
    return {**before, **new}


COLUMNS = ("sa", "tc", "fq", "mean", "dynamic_degree", "frechet", "trajectory_error", "diversity")


def print_table(title: str, rows: Mapping[str, Mapping[str, dict[str, float]]], columns: Sequence[str]) -> None:
    widths = {column: max(18, len(column) + 2) for column in columns}
    print(f"\n{title}\n{'':<28}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for name, values in rows.items():
        cells = ((values.get(column), width) for column, width in widths.items())
        texts = (
            ("" if c is None else f"{c['mean']:.3g}" if np.isnan(c["standard_error"] or np.nan)
             else f"{c['mean']:.3g} ± {c['standard_error']:.2g}", width)
            for c, width in cells
        )  # fmt: skip
        print(f"{name:<28}" + "".join(f"{text:>{width}}" for text, width in texts))
