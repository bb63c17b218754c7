"""The same number of trial runs for every method, on the validation split: what the recipes' settings were chosen by.

    python benchmarks/tuning.py                                    # all methods, hours; give it again after a stop
    python benchmarks/tuning.py --methods vpae dmd2 --minutes 4

A trial is a method's recipe with the overrides of ``SPACES``, the first of them none, trained for the same wall-clock
(default: what V-PAE's recipe costs) with one seed and judged at 1 NFE. A method has as many trials as any other. The
best trial of each goes into its recipe by hand, since a number in a recipe needs its reason beside it. Jobs lie under
outputs/benchmarks/tuning/. Writes benchmarks/results/tuning.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import write_result
from contest import (
    COLUMNS,
    RECIPES,
    Entry,
    carry_out,
    command_line,
    measure_costs,
    on_budget,
    print_table,
    run_jobs,
    summary,
    whole_cost,
)
from quality import entries

Overrides = tuple[str, ...]


def _rates(*keys: str, each: tuple[float, ...]) -> list[Overrides]:
    """One trial for each learning rate, of all these optimisers."""
    return [tuple(f"{key}.learning_rate={rate}" for key in keys) for rate in each]


_CONSISTENCY = "method.consistency.student_optimiser"


def _both(second: str, rate: float) -> Overrides:
    """One learning rate for the student and for the other player."""
    return tuple(f"method.{player}_optimiser.learning_rate={rate}" for player in ("student", second))


_BOTH_HIGH = _both("critic", 6e-4)

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
        *_rates("method.student_optimiser", "method.critic_optimiser", each=(3e-4, 6e-4, 1e-3)),
        (*_BOTH_HIGH, "method.critic_per_student=3"),
        (*_BOTH_HIGH, "method.student_gan_weight=3.0e-2", "method.critic_gan_weight=1.0"),
    ],
    "apt": [
        (),
        (f"{_CONSISTENCY}.learning_rate=3.0e-4",),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4",),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", *_both("head", 5e-5)),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", *_both("head", 2e-4)),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", "method.head_optimiser.learning_rate=3.0e-4"),
    ],
    "pcm": [
        (),
        *_rates(_CONSISTENCY, each=(3e-4, 6e-4, 1e-3)),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", "method.adversary.head_optimiser.learning_rate=1.0e-3"),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", "method.consistency.grid_steps=10"),
    ],
    "lcm": [
        (),
        *_rates(_CONSISTENCY, each=(3e-4, 6e-4, 1e-3)),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", "method.consistency.target=student"),
        (f"{_CONSISTENCY}.learning_rate=6.0e-4", "method.consistency.grid_steps=10"),
    ],
    "ladd": [
        (),
        *_rates("method.student_optimiser", each=(2e-4, 6e-4)),
        ("method.student_optimiser.learning_rate=2.0e-4", "method.head_optimiser.learning_rate=1.0e-3"),
        ("method.student_optimiser.learning_rate=2.0e-4", "method.judge_time.mean=0.0"),
        ("method.student_optimiser.learning_rate=2.0e-4", "method.head_per_student=3"),
    ],
    "mse": [
        (),
        *_rates("method.student_optimiser", each=(3e-4, 6e-4, 1e-3, 2e-3)),
        ("method.student_optimiser.learning_rate=6.0e-4", "method.ema_decay=0.95"),
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
    vpae, options = every["vpae"], {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips}
    tables: dict[str, Any] = {}
    for method in arguments.methods:
        tried = trials(every[method])
        costs = measure_costs([*([] if arguments.minutes else [vpae]), *tried], arguments.root, arguments.ranks)
        budget = arguments.minutes * 60 if arguments.minutes else whole_cost(vpae, costs["vpae"], "seconds")
        settings = {e.name: on_budget(e, costs[e.name], "seconds", budget) for e in tried}
        jobs = run_jobs(tried, [arguments.seed], arguments.root, settings, **options)
        rows = {name: summary(runs, "1 NFE") for name, runs in jobs.items()}
        best = max(rows, key=lambda name: rows[name]["mean"]["mean"])
        print_table(f"{method}: {budget:.0f} s a trial, best {best}", rows, (*COLUMNS, "training_minutes"))
        changed = {e.name: list(own) for e, own in zip(tried, SPACES[method], strict=True)}
        tables[method] = {"budget_seconds": budget, "best": best, "overrides": changed, "rows": rows, "jobs": jobs}
    document = {"benchmark": "tuning", "world": arguments.world, "seed": arguments.seed, "methods": tables}
    write_result("tuning", document)
    print(json.dumps({"benchmark": "tuning", "best": {m: t["overrides"][t["best"]] for m, t in tables.items()}}))


if __name__ == "__main__":
    main()
