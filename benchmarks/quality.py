"""One-step quality on Bounce: V-PAE, its phases alone and every peer, on equal wall-clock and on equal clips seen.

    python benchmarks/quality.py --seeds 0 1 2 3 4                 # validation split: for choosing settings
    python benchmarks/quality.py --seeds 0 1 2 3 4 --final         # test split, once
    python benchmarks/quality.py --done                            # with a run's options: tables of what is done so far
    python benchmarks/quality.py --lines --world open              # the teacher alone

Each (table, method, seed) is a job of its own under outputs/benchmarks/quality/, trained with checkpoints: give the
same command again after a stop, however long later, or several times at once (with ``--ranks 1`` once a core, or once a
GPU with CUDA_VISIBLE_DEVICES), and its processes share the jobs. Jobs that were done on another day, on this kind of
machine, are taken from the result's ``_jobs``. The budget is what V-PAE's recipe costs (``--minutes``,
``--clips-seen`` for others). Reference lines are the teacher at 100, 8, 4, 2 and 1 NFE. Means and bars stand once more
for the validation clips from ``--chosen-on`` on: those before are what settings were chosen on. ``--final`` is allowed
once for a set of recipes and settings; asked for again it wants ``--because``, and every look is recorded before it.
Writes benchmarks/results/quality_WORLD_SPLIT.json, its jobs beside it as ..._jobs.json and, for each table, a figure
(.svg) and a contact sheet (.png: the same eight conditions for every method) as ..._seconds or ..._clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_result
from contest import (
    COLUMNS,
    RECIPES,
    Entry,
    carry_out,
    check_one_world,
    command_line,
    cost_key,
    in_world,
    measure_costs,
    on_budget,
    ours,
    print_table,
    spread,
    store,
    stored,
    summary,
    whole_cost,
)
from jobs import claimed, judge, result_file, run_jobs
from quality_figure import write_figure

from vpae.data.bounce import Clip
from vpae.data.look import contact_sheet
from vpae.errors import UserError
from vpae.evaluation import clips_of
from vpae.files import write_json
from vpae.models import find_model, weights_fingerprint
from vpae.recipe import digest
from vpae.runs import environment

TEACHER = {  # few steps on Wan's own grid: the last evaluation on diffusers' moves nothing
    "teacher 100 NFE": {"steps": 50, "guidance_scale": 2.0, "sampler": "euler"},
    "teacher 8 NFE": {"steps": 8, "sampler": "euler_even"},
    "teacher 4 NFE": {"steps": 4, "sampler": "euler_even"},
    "teacher 2 NFE": {"steps": 2, "sampler": "euler_even"},
    "teacher 1 NFE": {"steps": 1, "sampler": "euler"},
    "teacher 8 NFE, guided": {"steps": 4, "guidance_scale": 2.0, "sampler": "euler_even"},
    "teacher 2 NFE, guided": {"steps": 1, "guidance_scale": 2.0, "sampler": "euler"},
}

_STEPS = ("1 NFE", "4 NFE")  # of a student


def entries(arguments: argparse.Namespace) -> list[Entry]:
    """V-PAE, its phases alone, and the peers' recipes of a folder, in the world and with the overrides asked for."""
    recipe, overrides = ours(arguments), arguments.overrides
    own = (*in_world(arguments.world, recipe), *overrides)
    peers = sorted(arguments.peers.glob("*.yaml"))
    return [
        Entry("vpae", recipe, own),
        Entry("priming", recipe, (*own, "equilibrium=null")),
        Entry("equilibrium", recipe, (*own, "priming=null")),
        *(Entry(path.stem, path, (*in_world(arguments.world, path), *overrides)) for path in peers),
    ]


def pick(every: list[Entry], chosen: list[str] | None) -> list[Entry]:
    """The entries named, or all.

    Raises:
        UserError: there is none of a name.
    """
    names = [e.name for e in every]
    if unknown := sorted(set(chosen or ()) - set(names)):
        raise UserError(f"no method {unknown[0]!r}; there are {', '.join(names)}")
    return [e for e in every if chosen is None or e.name in chosen]


def reference(root: Path, entry: Entry, split: str, clips: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The teacher's rows; sampled once."""
    file, shown = root / f"teacher-{split}-{clips}.json", root / f"teacher-{split}-shown.npz"
    teacher = entry.load().teacher.path
    weights = weights_fingerprint(find_model(teacher))
    asked = {"teacher": weights, "world": entry.world().fingerprint(), "plans": TEACHER}
    with claimed(root / "teacher.lock", wait=True):
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if any(kept.get(key) != value for key, value in asked.items()):
            rows, videos = judge(Path(teacher), entry.world(), split, clips, TEACHER)
            np.savez_compressed(shown, *videos)
            write_json(file, asked | {"rows": rows})
        return json.loads(file.read_text())["rows"], list(np.load(shown).values())


def _as_summary(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One measurement in the shape of several: its standard error is over clips, where there is one."""
    values = {k: {"mean": v, "standard_error": row["standard_errors"].get(k, np.nan)} for k, v in row["values"].items()}
    return values | {key: spread([row[key]]) for key in ("frechet", "diversity", "seconds_per_clip")}


def _sheet(path: Path, shown: dict[str, Path], teacher: list[np.ndarray], real: list[Clip]) -> None:
    """The same eight conditions for every method; ``shown``: the videos of a job of each.

    Jobs of an earlier day have no videos here: then a sheet that is there stays.
    """
    missing = [name for name, file in shown.items() if not file.is_file()]
    if missing and path.is_file():
        print(f"{path} stays as it is: no videos here of {', '.join(missing)}, whose scores are of an earlier day")
        return
    videos = {"real": [c.frames for c in real], "teacher 100 NFE": teacher}
    videos |= {name: list(np.load(file).values()) for name, file in shown.items() if file.is_file()}
    contact_sheet([(f"{name} {i}", v[i]) for i in range(len(teacher)) for name, v in videos.items()], path)


def guard(file: Path, asked: dict[str, Any], because: str | None) -> list[dict[str, Any]]:
    """The test split is looked at once for a set of recipes and settings; every look is recorded before it is taken.

    Args:
        file: of all looks.
        asked: recipes' digests and all settings that decide the table.

    Raises:
        UserError: it has been looked at for something else, and no reason is given.
    """
    looks = json.loads(file.read_text()) if file.is_file() else []
    if looks and asked != looks[-1]["asked"] and not because:
        raise UserError(
            f"the test split has been looked at for other recipes or settings ({file}); say --because why it is "
            "used again"
        )
    if not looks or asked != looks[-1]["asked"]:
        looks = [*looks, {"asked": asked, "because": because or "first"}]
        write_json(file, looks)
    return looks


def write_lines(arguments: argparse.Namespace, entry: Entry, split: str) -> None:
    """The teacher's rows alone, into ``results/quality_lines_WORLD.json``."""
    rows, _ = reference(arguments.root, entry, split, arguments.clips)
    print_table(f"{arguments.world} world, {split} split", {n: _as_summary(row) for n, row in rows.items()}, COLUMNS)
    best = rows["teacher 100 NFE"]["values"]["mean"]
    percent = {name: round(_percent(row["values"]["mean"], best), 2) for name, row in rows.items()}
    about = {"benchmark": "quality_lines", "world": arguments.world, "split": split, "clips": arguments.clips}
    write_result(f"quality_lines_{arguments.world}", about | {"percent_of_100_nfe": percent, "teacher": rows})
    print(json.dumps(about | {"percent_of_100_nfe": percent}))


def main() -> None:
    parser = command_line(__doc__, "quality")
    parser.add_argument("--peers", type=Path, default=RECIPES / "peers", help="folder of the others' recipes")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--equal", nargs="+", choices=("seconds", "clips"), default=["seconds", "clips"])
    parser.add_argument("--minutes", type=float, help="of training; default: what V-PAE's recipe takes")
    parser.add_argument("--clips-seen", type=float, help="default: what V-PAE's recipe sees")
    parser.add_argument("--final", action="store_true", help="judge on the test split")
    parser.add_argument("--done", action="store_true", help="tables of the jobs that are done so far; train none")
    parser.add_argument("--lines", action="store_true", help="judge the teacher alone: how far its lines lie apart")
    parser.add_argument(
        "--chosen-on", type=int, default=128, help="how many of the first validation clips settings were chosen on"
    )
    parser.add_argument("--because", help="why the test split is looked at again")
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.final and arguments.done:
        raise UserError("--final and --done exclude each other: the test split is looked at once, and as a whole")
    if arguments.chosen_on < 0:
        raise UserError(f"--chosen-on is {arguments.chosen_on}; write how many clips settings were chosen on, or 0")
    split = "test" if arguments.final else "validation"
    every = entries(arguments)
    vpae, chosen = every[0], pick(every, arguments.methods)
    if arguments.lines:
        write_lines(arguments, vpae, split)
        return
    name = f"quality_{arguments.world}_{split}"
    shape = {key: getattr(arguments, key) for key in ("seeds", "equal", "minutes", "clips_seen", "clips", "ranks")}
    asked = shape | {"recipes": {e.name: digest(e.load()) for e in chosen}}
    looks = guard(RESULTS / f"{name}_looks.json", asked, arguments.because) if arguments.final else []
    check_one_world([vpae, *chosen])
    before = stored(f"{name}_jobs")
    measured = [vpae, *(e for e in chosen if e.name != "vpae")]
    if arguments.done and (new := [e.name for e in measured if cost_key(e, arguments.ranks) not in before["costs"]]):
        raise UserError(
            f"--done: {new[0]} was not yet run with --ranks {arguments.ranks} and {environment()['threads']} threads "
            "(OMP_NUM_THREADS) on this kind of machine"
        )
    costs = measure_costs(measured, arguments.root, arguments.ranks, before["costs"])
    rows, videos = reference(arguments.root, vpae, split, arguments.clips)
    lines = {name: _as_summary(row) for name, row in rows.items()}
    tables, trained = {}, {}
    for equal in arguments.equal:
        given = arguments.minutes and arguments.minutes * 60 if equal == "seconds" else arguments.clips_seen
        budget = given or whole_cost(vpae, costs["vpae"], equal)
        settings = {e.name: on_budget(e, costs[e.name], equal, budget) for e in chosen}
        root, options = arguments.root / f"equal-{equal}", {"ranks": arguments.ranks, "split": split}
        options |= {"clips": arguments.clips, "known": before["jobs"], "begin": not arguments.done}
        jobs = run_jobs(chosen, arguments.seeds, root, settings, **options)
        jobs = {name: js for name, js in jobs.items() if js}
        if not jobs:
            raise UserError(
                f"--done: no job of --equal {equal} is done with --minutes {arguments.minutes}, --clips "
                f"{arguments.clips}, --clips-seen {arguments.clips_seen}, --ranks {arguments.ranks} and these recipes: "
                "give the options that they were run with"
            )
        done = list(itertools.chain(*jobs.values()))
        store(f"{name}_jobs", costs, done, arguments.root)
        if old := sum(job in before["jobs"] for job in done):
            print(f"{old} of {len(done)} jobs are of an earlier day, from {name}_jobs.json")
        meant = budget if equal == "seconds" else None
        found = {f"{n} {row}": summary(js, row, meant) for n, js in jobs.items() for row in _STEPS}
        print_table(f"equal {equal} ({budget:.0f}), {split} split", lines | found, COLUMNS)
        took = ("seconds_per_clip", "training_minutes", "percent_of_budget", "peak_gib", "diverged")
        print_table("what it took", found, took)
        trained[equal] = jobs
        tables[equal] = {"budget": budget, "settings": settings, "rows": found}
        tables[equal]["seeds"] = {name: [job["seed"] for job in js] for name, js in jobs.items()}
        tables[equal]["commits"] = sorted({job["commit"] for job in done})
        first = {n: root / f"{n}-seed{js[0]['seed']}" for n, js in jobs.items() if "failed" not in js[0]}
        shown = {n: result_file(job, split, arguments.clips).with_suffix(".npz") for n, job in first.items()}
        _sheet(RESULTS / f"{name}_{equal}.png", shown, videos, clips_of(vpae.world(), split, 8))
        title = f"{arguments.world} world, {split} split, equal {equal}"
        write_figure(RESULTS / f"{name}_{equal}.svg", title, lines, {n: v for n, v in found.items() if "mean" in v})
    document = {
        "benchmark": "quality",
        "split": split,
        "looks": looks,
        "world": arguments.world,
        "clips": arguments.clips,
        "seeds": arguments.seeds,
        "ranks": arguments.ranks,
        "costs": {name: dataclasses.asdict(c) for name, c in costs.items()},
        "teacher": rows,
        "tables": tables,
        "bars": {equal: bars(rows["teacher 100 NFE"], jobs) for equal, jobs in trained.items()},
    }
    if not arguments.final and arguments.clips > arguments.chosen_on:
        first = arguments.chosen_on
        other = {equal: on_other_clips(rows["teacher 100 NFE"], jobs, first) for equal, jobs in trained.items()}
        document["on_other_clips"] = {"from": first} | other
        for equal, found in other.items():
            print_table(f"equal {equal}, means on the clips from {first} (--chosen-on) on", found["means"], _STEPS)
    written = json.loads(write_result(name, document).read_text())  # as written: JSON has no NaN
    last = ("benchmark", "split", "seeds", "bars", "on_other_clips")
    print(json.dumps({key: written[key] for key in last if key in written}))


def on_other_clips(teacher: dict[str, Any], jobs: dict[str, list[dict[str, Any]]], first: int) -> dict[str, Any]:
    """Means and bars without the first clips, on which settings were chosen: what was best there was partly lucky."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        return {"clip_means": row["clip_means"][first:], "values": row["values"]}

    whole = {name: [job["rows"] for job in js if "failed" not in job] for name, js in jobs.items()}
    rest = {name: [{"rows": {n: cut(rows[n]) for n in _STEPS}} for rows in js] for name, js in whole.items() if js}
    means = {
        name: {n: spread([np.mean(job["rows"][n]["clip_means"]) for job in js]) for n in _STEPS}
        for name, js in rest.items()
    }
    found = bars(cut(teacher), rest)
    found.pop("dynamic_degree_percent", None)  # of all clips together
    return {"teacher": float(np.mean(teacher["clip_means"][first:])), "means": means, "bars": found}


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 else float("nan")


def bars(teacher: dict[str, Any], jobs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """V-PAE against the best peer and against the teacher, in per cent, each with its 95 % interval.

    Intervals are of a bootstrap over clips and seeds. All models sample the same clips, so clips are drawn once for all
    in each round: what is common to them falls out. The best peer is the best by its mean; choosing it from several
    makes our lead look smaller than it is, not larger.
    """
    own = ("vpae", "priming", "equilibrium")
    whole = {name: [job for job in js if "failed" not in job] for name, js in jobs.items()}
    scores = {
        (name, row): np.array([job["rows"][row]["clip_means"] for job in js])  # [seeds, clips]
        for name, js in whole.items()
        for row in _STEPS
        if js
    }
    if ("vpae", "1 NFE") not in scores:
        return {}
    top = np.array(teacher["clip_means"])[None]
    found = {
        "percent_of_teacher_at_1_nfe": _ratio(scores["vpae", "1 NFE"], top),
        "percent_of_teacher_at_4_nfe": _ratio(scores["vpae", "4 NFE"], top),
    }
    degree = float(np.mean([job["rows"]["1 NFE"]["values"]["dynamic_degree"] for job in whole["vpae"]]))
    found["dynamic_degree_percent"] = _percent(degree, teacher["values"]["dynamic_degree"])
    peers = {name: each.mean() for (name, row), each in scores.items() if row == "1 NFE" and name not in own}
    if peers:
        best = max(peers, key=peers.get)
        ahead = _ratio(scores["vpae", "1 NFE"], scores[best, "1 NFE"])
        found |= {"best_peer": best, "percent_ahead_of_best_peer": {k: v - 100 for k, v in ahead.items()}}
    return found


def _ratio(part: np.ndarray, whole: np.ndarray, rounds: int = 4000) -> dict[str, float]:
    """Per cent that one mean is of another, both ``[seeds, clips]`` on the same clips, with a 95 % interval."""
    draw = np.random.default_rng(0)
    clips = draw.integers(part.shape[1], size=(rounds, part.shape[1]))

    def means(values: np.ndarray) -> np.ndarray:
        seeds = draw.integers(len(values), size=(rounds, len(values)))
        return np.stack([values[s][:, c].mean() for s, c in zip(seeds, clips, strict=True)])

    low, high = np.percentile(100 * means(part) / np.maximum(means(whole), 1e-9), [2.5, 97.5])
    return {"value": _percent(part.mean(), whole.mean()), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
