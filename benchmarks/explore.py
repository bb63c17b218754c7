"""Trial runs by a list: settings looked for beyond ``tuning.py``'s six, and every one of them kept.

    python benchmarks/explore.py benchmarks/trials/open_second.yaml --ranks 1

The list is a YAML of ``name: {of: METHOD, minutes: M, set: [key=value, ...]}``, in the order in which they were thought
of: METHOD is an entry of ``quality.py``, its recipe under the overrides is trained for that long with one seed and
judged at 1 NFE on the validation split. ``{root}`` in an override is the folder of jobs, so that a trial of phase II
can start from another's phase I (``priming_run={root}/NAME-seed0``), which then stands before it. Give it again after a
stop, or several times at once, as for quality.py. Writes benchmarks/results/exploration_NAME.json.
"""

from __future__ import annotations

import argparse
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

_KEYS = {"of": str, "minutes": (int, float), "set": list}


def read_trials(file: Path) -> dict[str, dict[str, Any]]:
    """A list of trials by name.

    Raises:
        UserError: it is no YAML, or a trial lacks a key or has one of another kind.
    """
    try:
        trials = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be read as a list of trials: {error}") from None
    if not isinstance(trials, dict) or not trials:
        raise UserError(f"{file} holds no trials: it wants `name: {{of: METHOD, minutes: M, set: [key=value, ...]}}`")
    for name, trial in trials.items():
        found = trial if isinstance(trial, dict) else {}
        for key, kind in _KEYS.items():
            if not isinstance(found.get(key), kind):
                raise UserError(f"{file}: trial {name} wants {key}, one of {', '.join(_KEYS)}; it has {trial}")
    return trials


def as_entries(trials: dict[str, dict[str, Any]], every: list[Entry], root: Path) -> dict[str, Entry]:
    """The trials as entries of their methods.

    Raises:
        UserError: a trial is of no entry of ``every``.
    """
    tried = {}
    for name, trial in trials.items():
        (of,) = pick(every, [trial["of"]])
        own = (str(override).replace("{root}", str(root)) for override in trial["set"])
        tried[name] = Entry(name, of.recipe, (*of.overrides, *own))
    return tried


def _start(root: Path, name: str) -> str:
    return f"priming_run={root}/{name}-seed"


def main() -> None:
    parser = command_line(__doc__, "explore")
    parser.add_argument("trials", type=Path, help="the list")
    parser.add_argument("--peers", type=Path, default=RECIPES / "peers", help="folder of the others' recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(clips=128)
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    trials, every, root = read_trials(arguments.trials), entries(arguments), arguments.root
    tried = as_entries(trials, every, root)
    check_one_world(list(tried.values()))
    options = {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips, "steps": (1,)}
    known = stored(f"quality_{arguments.world}_validation_jobs")["costs"]
    settings: dict[str, tuple[str, ...]] = {}
    jobs: dict[str, list[dict[str, Any]]] = {}
    for name, entry in tried.items():  # one by one: a trial may start from the run of one before it
        cost = measure_costs([entry], root, arguments.ranks, known)[name]
        settings[name] = on_budget(entry, cost, "seconds", 60 * trials[name]["minutes"])
        started_from = any(_start(root, name) in override for e in tried.values() for override in e.overrides)
        run_jobs([entry], [arguments.seed], root, settings, wait=started_from, **options)
    for entry in tried.values():
        jobs |= run_jobs([entry], [arguments.seed], root, settings, **options)
    rows = {name: summary(js, "1 NFE", 60 * trials[name]["minutes"]) for name, js in jobs.items()}
    print_table("trials", rows, (*COLUMNS, "training_minutes", "percent_of_budget", "diverged"))
    about = {key: getattr(arguments, key) for key in ("world", "seed", "clips", "ranks")}
    written = {
        n: trials[n] | {"steps": list(settings[n]), "row": rows[n], "commit": jobs[n][0]["commit"]} for n in tried
    }
    name = f"exploration_{arguments.trials.stem}"
    write_result(name, {"benchmark": "explore", "set": list(arguments.overrides)} | about | {"trials": written})
    print(json.dumps({"benchmark": "explore", "means": {n: r["mean"]["mean"] for n, r in rows.items() if "mean" in r}}))


if __name__ == "__main__":
    main()
