"""The same number of trial runs for every method, on the validation split: what the recipes' settings were chosen by.

    python benchmarks/tuning.py --minutes 3                        # all methods, hours; give it again after a stop
    python benchmarks/tuning.py --minutes 3 --methods dmd2 pcm     # is added to what was tried on the same terms

A trial is a method's recipe with the overrides of ``SPACES``, trained for the same wall-clock (default: what V-PAE's
recipe costs now; say ``--minutes`` where recipes will change between calls) with one seed and judged at 1 NFE. The best
trial of each goes into its recipe by hand, since a number in a recipe needs its reason beside it. Given several times
at once, its processes share the trials. Jobs lie under outputs/benchmarks/tuning/. Writes
benchmarks/results/tuning.json.

V-PAE's recipe for the open world was found in runs of several lengths on the same clips, before
(benchmarks/results/exploration_open.json) and after this (exploration_open_second.json, by explore.py). What the first
showed of learning rates (six times higher, and falling by a cosine) is in every method's space here.
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
    check_one_world,
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


def _rate(rate: float, *optimisers: str, schedule: str = "cosine") -> Overrides:
    """All these optimisers at one rate, falling to its tenth or constant."""
    keys = (f"method.{optimiser}_optimiser" for optimiser in optimisers)
    return tuple(f"{key}.{name}" for key in keys for name in (f"learning_rate={rate}", f"schedule={schedule}"))


_PRIMED = _rate(6e-4, "consistency.student")
_GUIDED = "method.guidance_scale=2.0"
_FIVE = (_GUIDED, "method.critic_per_student=5")
_SHARES = ("method.consistency.student_steps=300", "method.student_steps=150")  # of APT's phases, not yet tuned
_FIRM = _rate(1e-5, "student", "head", schedule="constant")  # and the rates of the second
_ONE = "method.head_per_student=1"
_EMA = "method.consistency.target=ema"

# Spelt out, the first of each as well, since recipes take over what was best; V-PAE's are changes of its recipe.
SPACES: dict[str, list[Overrides]] = {
    "vpae": [
        (),
        ("priming.fake_per_student=4", "priming.student_optimiser.learning_rate=6.0e-4"),
        ("priming.student_time.low=0.9",),
        ("equilibrium.student_optimiser.learning_rate=1.0e-4",),
        ("equilibrium.head_per_student=1",),
        ("equilibrium.sds.weight=1",),
    ],
    "dmd2": [
        (*_rate(1e-4, "student", "critic", schedule="constant"), *_FIVE),
        *((*_rate(rate, "student", "critic"), *_FIVE) for rate in (3e-4, 6e-4, 1e-3)),
        (*_rate(6e-4, "student", "critic"), _GUIDED, "method.critic_per_student=3"),
        (*_rate(6e-4, "student", "critic"), *_FIVE, "method.student_gan_weight=3.0e-2", "method.critic_gan_weight=1.0"),
    ],
    "apt": [
        (*_SHARES, *_rate(1e-4, "consistency.student", schedule="constant"), *_FIRM),
        *((*_SHARES, *_rate(rate, "consistency.student"), *_FIRM) for rate in (3e-4, 6e-4)),
        (*_SHARES, *_PRIMED, *_rate(5e-5, "student", "head")),
        (*_SHARES, *_PRIMED, *_rate(2e-4, "student", "head")),
        (
            *_SHARES,
            *_PRIMED,
            *_FIRM,
            "method.head_optimiser.learning_rate=3.0e-4",
            "method.head_optimiser.betas=[0.9, 0.99]",
        ),
    ],
    "pcm": [
        _rate(1e-4, "consistency.student", schedule="constant"),
        *(_rate(rate, "consistency.student") for rate in (3e-4, 6e-4, 1e-3)),
        (*_PRIMED, "method.adversary.head_optimiser.learning_rate=1.0e-3"),
        (*_PRIMED, "method.consistency.grid_steps=10"),
    ],
    "lcm": [
        (*_rate(1e-4, "consistency.student", schedule="constant"), _EMA),
        *((*_rate(rate, "consistency.student"), _EMA) for rate in (3e-4, 6e-4, 1e-3)),
        (*_PRIMED, "method.consistency.target=student"),
        (*_PRIMED, _EMA, "method.consistency.grid_steps=10"),
    ],
    "ladd": [
        (*_rate(5e-5, "student", schedule="constant"), _ONE),
        *((*_rate(rate, "student"), _ONE) for rate in (2e-4, 6e-4)),
        (*_rate(2e-4, "student"), _ONE, "method.head_optimiser.learning_rate=1.0e-3"),
        (*_rate(2e-4, "student"), _ONE, "method.judge_time.mean=0.0"),
        (*_rate(2e-4, "student"), "method.head_per_student=3"),
    ],
    "mse": [
        _rate(1e-4, "student", schedule="constant"),
        *(_rate(rate, "student") for rate in (3e-4, 6e-4, 1e-3, 2e-3)),
        (*_rate(6e-4, "student"), "method.ema_decay=0.95"),
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
    vpae = every["vpae"]
    check_one_world([vpae, *(every[method] for method in arguments.methods)])
    options = {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips, "steps": (1,)}
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
