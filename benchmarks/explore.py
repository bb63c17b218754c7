"""Trial runs by a list: settings looked for beyond ``tuning.py``'s six, and every one of them kept.

    python benchmarks/explore.py benchmarks/trials/open_second.yaml --ranks 1

The list is a YAML of ``name: {of: METHOD, minutes: M, set: [key=value, ...]}``, in the order in which they were thought
of: METHOD is an entry of ``quality.py``, its recipe under the overrides is trained for that long and judged on the
validation split, at 1 NFE or at every number of ``--steps``. ``{root}`` in an override is the folder of jobs and
``{seed}`` the seed, so that a trial of phase II can start from another's phase I
(``priming_run={root}/NAME-seed{seed}``), which then stands before it. One seed and 128 clips leave a standard error of
two points: the best of many such trials is partly luck, so give ``--seeds 0 1 2`` and ``--clips 256`` where settings
are near one another. Give it again after a stop, or several times at once, as for quality.py. Writes
benchmarks/results/exploration_NAME.json: for each trial a row and every seed's mean, by number of steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import yaml
from common import write_result
from contest import (
    COLUMNS,
    RECIPES,
    Entry,
    carry_out,
    check_one_world,
    command_line,
    measure_costs,
    on_budget,
    print_table,
    stored,
    summary,
)
from jobs import run_jobs
from quality import entries, pick

from vpae.errors import UserError

_KEYS = ("of", "minutes", "set")


def read_trials(file: Path) -> dict[str, dict[str, Any]]:
    """A list of trials by name.

    Raises:
        UserError: it is no YAML, or a trial lacks a key, has one too many, or one that can't be.
    """
    try:
        trials = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read as a list of trials: {error}") from None
    if not isinstance(trials, dict) or not trials:
        raise UserError(f"{file} holds no trials: it wants `name: {{of: METHOD, minutes: M, set: [key=value, ...]}}`")
    for name, trial in trials.items():
        where = f"{file}: trial {name}"
        if not isinstance(name, str) or "/" in name:
            raise UserError(f"{where}: a name is a word without a slash, since its run's folder is called so")
        if not isinstance(trial, dict) or set(trial) != set(_KEYS):
            raise UserError(f"{where} is {trial!r}; write {{of: METHOD, minutes: M, set: [key=value, ...]}}")
        if not isinstance(trial["of"], str):
            raise UserError(f"{where}: of is {trial['of']!r}; write a method of quality.py, e.g. of: dmd2")
        minutes = trial["minutes"]
        if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 < minutes < float("inf"):
            raise UserError(f"{where}: minutes is {minutes!r}; write a number above 0, e.g. minutes: 4")
        if not isinstance(trial["set"], list) or not all(isinstance(o, str) and "=" in o for o in trial["set"]):
            raise UserError(f"{where}: set is {trial['set']!r}; write overrides, e.g. set: [engine.global_batch=16]")
    return trials


def as_entries(trials: dict[str, dict[str, Any]], every: list[Entry], root: Path, seed: int) -> dict[str, Entry]:
    """The trials as entries of their methods, under one seed.

    Raises:
        UserError: a trial is of no entry of ``every``, or starts from the run of one that does not stand before it.
    """
    tried: dict[str, Entry] = {}
    for name, trial in trials.items():
        try:
            (of,) = pick(every, [trial["of"]])
        except UserError as error:
            raise UserError(f"trial {name}: of: {error}") from None
        own = [override.replace("{root}", str(root)).replace("{seed}", str(seed)) for override in trial["set"]]
        starts = [o for o in own if o.startswith(f"priming_run={root}/")]
        if strange := [o for o in starts if o not in {_start(root, before, seed) for before in tried}]:
            raise UserError(f"trial {name}: {strange[0]} is the run of no trial before it: {', '.join(tried)}")
        tried[name] = Entry(name, of.recipe, (*of.overrides, *own))
    return tried


def _start(root: Path, name: str, seed: int) -> str:
    return f"priming_run={root}/{name}-seed{seed}"


def main() -> None:
    parser = command_line(__doc__, "explore")
    parser.add_argument("trials", type=Path, help="the list")
    parser.add_argument("--peers", type=Path, default=RECIPES / "peers", help="folder of the others' recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", choices=(1, 4), default=[1], help="NFE to judge at")
    parser.set_defaults(clips=128)
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    trials, every, root = read_trials(arguments.trials), entries(arguments), arguments.root
    seeded = {seed: as_entries(trials, every, root, seed) for seed in arguments.seeds}
    tried = seeded[arguments.seeds[0]]
    check_one_world(list(tried.values()))
    options = {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips}
    options["steps"] = sorted(set(arguments.steps))
    nfe = [f"{n} NFE" for n in options["steps"]]
    known = stored(f"quality_{arguments.world}_validation_jobs")["costs"]
    settings: dict[str, tuple[str, ...]] = {}
    jobs: dict[str, list[dict[str, Any]]] = {name: [] for name in tried}
    for name, entry in tried.items():  # one by one: a trial may start from the run of one before it
        cost = measure_costs([entry], root, arguments.ranks, known)[name]
        settings[name] = on_budget(entry, cost, "seconds", 60 * trials[name]["minutes"])
        for seed, own in seeded.items():  # several processes share the seeds
            run_jobs([own[name]], [seed], root, settings, wait=False, **options)
        for seed, own in seeded.items():
            if any(_start(root, name, seed) in e.overrides for e in own.values()):
                (start,) = run_jobs([own[name]], [seed], root, settings, **options)[name]
                if "failed" in start:
                    raise UserError(
                        f"{name} diverged with seed {seed}, and other trials start from it: leave the seed out"
                    )
    for name, (seed, own) in itertools.product(tried, seeded.items()):
        jobs[name] += run_jobs([own[name]], [seed], root, settings, **options)[name]
    rows = {n: {name: summary(js, n, 60 * trials[name]["minutes"]) for name, js in jobs.items()} for n in nfe}
    for n in nfe:
        print_table(n, rows[n], (*COLUMNS, "training_minutes", "percent_of_budget", "diverged"))
    about = {key: getattr(arguments, key) for key in ("world", "seeds", "clips", "ranks")}
    written = {
        name: trials[name]
        | {"settings": list(settings[name]), "rows": {n: rows[n][name] for n in nfe}}
        | {"means": {n: [j["rows"][n]["values"]["mean"] if "rows" in j else None for j in js] for n in nfe}}
        | {"commits": sorted({job["commit"] for job in js})}
        for name, js in jobs.items()
    }
    name = f"exploration_{arguments.trials.stem}"
    write_result(name, {"benchmark": "explore", "set": list(arguments.overrides)} | about | {"trials": written})
    means = {n: {name: row["mean"]["mean"] for name, row in rows[n].items() if "mean" in row} for n in nfe}
    print(json.dumps({"benchmark": "explore", "means": means}))


if __name__ == "__main__":
    main()
