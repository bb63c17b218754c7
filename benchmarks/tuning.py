"""The same number of trial runs for every method, on the validation split: what the recipes' settings were chosen by.

    python benchmarks/tuning.py --minutes 3                        # all methods, hours; give it again after a stop
    python benchmarks/tuning.py --minutes 3 --methods dmd2 pcm     # is added to what was tried on the same terms

A trial is a method's recipe with the overrides of ``SPACES``, the first of them none, trained for the same wall-clock
(default: what V-PAE's recipe costs now; say ``--minutes`` where recipes will change between calls) with one seed and
judged at 1 NFE. The best trial of each goes into its recipe by hand, since a number in a recipe needs its reason beside
it. Jobs lie under outputs/benchmarks/tuning/. Writes benchmarks/results/tuning.json.

V-PAE's recipe for the open world was found before, in runs of several lengths on the same clips
(benchmarks/results/exploration_open.json). What they showed of learning rates (six times higher, and falling by a
cosine) is in every method's space here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from contest import (
    COLUMNS,
    RECIPES,
    Entry,
    carry_out,
    command_line,
    measure_costs,
    on_budget,
    print_table,
    summary,
    whole_cost,
    write_part,
)
from jobs import run_jobs
from quality import entries

from vpae.errors import UserError
from vpae.recipe import digest

Overrides = tuple[str, ...]


def _rates(*optimisers: str, each: tuple[float, ...]) -> list[Overrides]:
    """One trial for each learning rate, of all these optimisers, falling to its tenth."""
    return [tuple(part for key in optimisers for part in _rate(key, rate)) for rate in each]


def _rate(optimiser: str, rate: float) -> Overrides:
    return f"{optimiser}.learning_rate={rate}", f"{optimiser}.schedule=cosine"


_STUDENT, _CRITIC, _HEAD = (f"method.{player}_optimiser" for player in ("student", "critic", "head"))
_CONSISTENCY = "method.consistency.student_optimiser"
_DMD2 = (*_rate(_STUDENT, 6e-4), *_rate(_CRITIC, 6e-4))
_PRIMED = _rate(_CONSISTENCY, 6e-4)

SPACES: dict[str, list[Overrides]] = {
    "vpae": [
        (),
        ("priming.fake_per_student=4", "priming.student_optimiser.learning_rate=4.0e-4"),
        ("priming.student_optimiser.learning_rate=1.0e-3",),
        ("equilibrium.student_optimiser.learning_rate=1.0e-4",),
        ("equilibrium.head_per_student=1",),
        ("equilibrium.sds.weight=1",),
    ],
    "dmd2": [
        (),
        *_rates(_STUDENT, _CRITIC, each=(3e-4, 6e-4, 1e-3)),
        (*_DMD2, "method.critic_per_student=3"),
        (*_DMD2, "method.student_gan_weight=3.0e-2", "method.critic_gan_weight=1.0"),
    ],
    "apt": [
        (),
        *_rates(_CONSISTENCY, each=(3e-4, 6e-4)),
        (*_PRIMED, *_rate(_STUDENT, 5e-5), *_rate(_HEAD, 5e-5)),
        (*_PRIMED, *_rate(_STUDENT, 2e-4), *_rate(_HEAD, 2e-4)),
        (*_PRIMED, f"{_HEAD}.learning_rate=3.0e-4", f"{_HEAD}.betas=[0.9, 0.99]"),
    ],
    "pcm": [
        (),
        *_rates(_CONSISTENCY, each=(3e-4, 6e-4, 1e-3)),
        (*_PRIMED, "method.adversary.head_optimiser.learning_rate=1.0e-3"),
        (*_PRIMED, "method.consistency.grid_steps=10"),
    ],
    "lcm": [
        (),
        *_rates(_CONSISTENCY, each=(3e-4, 6e-4, 1e-3)),
        (*_PRIMED, "method.consistency.target=student"),
        (*_PRIMED, "method.consistency.grid_steps=10"),
    ],
    "ladd": [
        (),
        *_rates(_STUDENT, each=(2e-4, 6e-4)),
        (*_rate(_STUDENT, 2e-4), f"{_HEAD}.learning_rate=1.0e-3"),
        (*_rate(_STUDENT, 2e-4), "method.judge_time.mean=0.0"),
        (*_rate(_STUDENT, 2e-4), "method.head_per_student=3"),
    ],
    "mse": [
        (),
        *_rates(_STUDENT, each=(3e-4, 6e-4, 1e-3, 2e-3)),
        (*_rate(_STUDENT, 6e-4), "method.ema_decay=0.95"),
    ],
}


def trials(entry: Entry) -> list[Entry]:
    """A method's recipe under each of its space's overrides."""
    space = SPACES[entry.name]
    return [Entry(f"{entry.name}-{i}", entry.recipe, (*entry.overrides, *own)) for i, own in enumerate(space)]


def main() -> None:
    parser = command_line(__doc__, "tuning")
    parser.add_argument("--peers", type=Path, default=RECIPES / "peers", help="folder of the others' recipes")
    parser.add_argument("--methods", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--minutes", type=float, help="of training; default: what V-PAE's recipe takes")
    parser.add_argument("--seed", type=int, default=0)
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    every = {e.name: e for e in entries(arguments)}
    vpae, options = (
        every["vpae"],
        {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips, "steps": (1,)},
    )
    about = {"benchmark": "tuning", "set": list(arguments.overrides)}
    about |= {key: getattr(arguments, key) for key in ("world", "seed", "clips", "ranks", "minutes")}
    about |= {} if arguments.minutes else {"budget_of": digest(vpae.load())}
    budget_of = [] if arguments.minutes else [vpae]
    tried = {method: trials(every[method]) for method in arguments.methods}
    costs = measure_costs([*budget_of, *itertools.chain(*tried.values())], arguments.root, arguments.ranks)
    budget = arguments.minutes * 60 if arguments.minutes else whole_cost(vpae, costs["vpae"], "seconds")
    left = list(tried)
    for wait in (False, True):  # what another process has under way comes last
        for method in list(left):
            settings = {e.name: on_budget(e, costs[e.name], "seconds", budget) for e in tried[method]}
            jobs = run_jobs(tried[method], [arguments.seed], arguments.root, settings, wait=wait, **options)
            if not all(jobs.values()):
                continue
            left.remove(method)
            table = judged(method, tried[method], jobs, budget) | {"recipe": digest(every[method].load())}
            tables = write_part("tuning", about, "methods", {method: table}, arguments.root)
    best = {m: t["overrides"][t["best"]] for m, t in tables.items()}
    print(json.dumps({"benchmark": "tuning", "best": best}))


def judged(method: str, tried: list[Entry], jobs: dict[str, list[dict[str, Any]]], budget: float) -> dict[str, Any]:
    """A method's trials side by side, with the best of them.

    Raises:
        UserError: every one diverged.
    """
    rows = {name: summary(runs, "1 NFE", budget) for name, runs in jobs.items()}
    if not (whole := [name for name in rows if "mean" in rows[name]]):
        raise UserError(f"every trial of {method} diverged: widen its space in tuning.SPACES to lower rates")
    best = max(whole, key=lambda name: rows[name]["mean"]["mean"])
    columns = (*COLUMNS, "training_minutes", "percent_of_budget", "diverged")
    print_table(f"{method}: {budget:.0f} s a trial, best {best}", rows, columns)
    changed = {e.name: list(own) for e, own in zip(tried, SPACES[method], strict=True)}
    return {"budget_seconds": budget, "best": best, "overrides": changed, "rows": rows, "jobs": jobs}


if __name__ == "__main__":
    main()
