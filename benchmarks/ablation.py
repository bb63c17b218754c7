"""V-PAE's studies on Bounce: one change at a time, the same number of student steps, several seeds.

    python benchmarks/ablation.py --seeds 0 1 2
    python benchmarks/ablation.py --seeds 0 1 2 --studies head judge

Phase I is trained once a seed and shared by every study of phase II, as is the recipe where it stands in several.
Where phase I itself is studied, consistency distillation gets VSD's wall-clock and its own tuned rates
(recipes/peers/lcm.yaml). Jobs lie under outputs/benchmarks/ablation/; give the same command again after a stop, or
several times at once, as for quality.py. Scores are of the validation split. Each study ends with whether the order
found is the paper's (V-PAE, arXiv 2508.21019, table of ablations: TC for judge and head; where it gives no figures,
that is said): runs of one seed are compared, which share clips and phase I, and a difference whose 95 % interval
(Student's t) holds 0 counts as none. Beside means and Fréchet distances, at 1 and at 4 NFE, stands by how much they
are above those of the recipe as it stands and, of phase II on a phase I of this call, of that. The first clips of the
split are those that recipes were chosen on, which favours the recipe. Writes benchmarks/results/ablation.json, its
runs beside it as ablation_jobs.json; studies of an earlier call on the same terms stay in it. Runs lie by name: give
a --root of its own with other ``--set``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import (
    RECIPES,
    Entry,
    carry_out,
    check_one_world,
    command_line,
    in_world,
    measure_costs,
    on_budget,
    ours,
    print_table,
    spread,
    store,
    summary,
    whole_cost,
    write_part,
)
from jobs import run_jobs
from scipy import stats

from vpae.errors import UserError
from vpae.recipe import digest


def _law(
    kind: str = "uniform",
    low: float = 0.0,
    high: float = 0.98,
    shift: float = 1.0,
    mean: float = 0.0,
    of: str = "judge_time",
) -> str:
    law = {"kind": kind, "low": low, "high": high, "shift": shift, "mean": mean, "std": 1.0}
    return f"equilibrium.{of}={json.dumps(law)}"


@dataclass(frozen=True)
class Study:
    """Variants by name: overrides of the recipe. ``paper``: its order by ``measure``, best first; empty: none."""

    variants: dict[str, tuple[str, ...]]
    paper: tuple[str, ...] = ()
    measure: str = "mean"
    whole: bool = False  # of both phases, not of phase II on a shared phase I


def _r1(weight: float = 1.0, spatial: float = 0.01, temporal: float = 0.1) -> tuple[str, ...]:
    values = {"weight": weight, "spatial_sigma": spatial, "temporal_sigma": temporal}
    return tuple(f"equilibrium.r1.{key}={value}" for key, value in values.items())


STUDIES = {
    "judge": Study(
        {kind: (f"equilibrium.judge={kind}",) for kind in ("frozen", "unified", "trainable")},
        paper=("unified", "frozen"),  # trainable did not fit into memory at 14B
        measure="tc",
    ),
    "head": Study(
        {kind: (f"equilibrium.head.kind={kind}",) for kind in ("convolutional", "cross_attention", "semantic")},
        paper=("semantic", "cross_attention", "convolutional"),
        measure="tc",
    ),
    "lambda": Study({f"lambda {w}": (f"equilibrium.sds.weight={w}",) for w in (0, 1, 10, 100)}),
    # a target of much noise is the mean of what may follow, and blurred
    "sds time": Study(
        {
            name: (_law(low=0.02, high=high, of="sds.time"),)
            for name, high in (("uniform", 0.98), ("below 0.5", 0.5), ("below 0.2", 0.2))
        }
    ),
    "r1": Study(
        {
            "both": _r1(),
            "off": _r1(weight=0),
            "spatial alone": _r1(temporal=0),
            "temporal alone": _r1(spatial=0),
            "both, weight 100": _r1(weight=100),  # APT's, where the paper has 1
        }
    ),
    "judge time": Study(
        {
            "uniform": (_law(),),
            "shift 5": (_law(shift=5.0),),
            "below 0.5": (_law(high=0.5),),
            "logit-normal": (_law(kind="logit_normal", mean=1.0),),  # LADD's (arXiv 2403.12015), below pure noise
        }
    ),
    "student": Study(
        {
            "full": ("student.kind=full", "student.lora=null"),
            "lora": (
                "student.kind=lora",
                "student.lora={rank: 64, alpha: 64, targets: [to_q, to_k, to_v, to_out.0, net.0.proj, net.2]}",
            ),
        },
        whole=True,
    ),
    "student time": Study(
        {f"from {low}": (f"priming.student_time.low={low}",) for low in (0.9, 0.97, 0.99, 1.0)}, whole=True
    ),
}


_COLUMNS = ("mean", "mean_against_recipe", "mean_against_phase_1", "sa", "tc", "fq", "dynamic_degree", "frechet")
_COLUMNS += ("frechet_against_recipe", "frechet_against_phase_1")
_FIRST = ("VSD alone", "consistency alone")  # phases I that phase II goes on from


def start_of(study: str, name: str) -> str | None:
    """The phase I that a variant's phase II goes on from; None where it has its own, or none."""
    if study == "priming":
        return {"VSD": _FIRST[0], "consistency": _FIRST[1]}.get(name)
    return None if STUDIES[study].whole else _FIRST[0]


def as_it_stands(study: str) -> str:
    """The entry that is the recipe itself: its phase II on the shared phase I, or both its phases."""
    return "both phases" if study != "priming" and STUDIES[study].whole else "VSD"


def plan(
    studies: Sequence[str], recipe: Path, overrides: tuple[str, ...], world: str
) -> tuple[list[Entry], dict[str, Entry], dict[str, dict[str, Entry]]]:
    """Phases I that are trained first, what the recipe itself is, and every study's variants by name, as entries.

    A variant that is the recipe is one entry in all studies (:func:`as_it_stands`), under one name in every call.
    """
    lcm = RECIPES / "peers" / "lcm.yaml"
    common = tuple(o for o in overrides if not o.startswith(("priming", "equilibrium")))  # it has no such sections
    first = [
        Entry(_FIRST[0], recipe, (*overrides, "equilibrium=null")),
        Entry(_FIRST[1], lcm, (*in_world(world, lcm), *common)),
    ]
    unprimed = (*overrides, "priming=null")
    own = {"VSD": Entry("VSD", recipe, unprimed), "both phases": Entry("both phases", recipe, overrides)}
    variants: dict[str, dict[str, Entry]] = {}
    if "priming" in studies:
        variants["priming"] = {e.name: e for e in first}
        variants["priming"] |= {n: Entry(n, recipe, unprimed) for n in ("VSD", "consistency", "none")}
    for study in (name for name in STUDIES if name in studies):
        shared = () if STUDIES[study].whole else ("priming=null",)
        variants[study] = {
            name: Entry(f"{study} {name}", recipe, (*overrides, *shared, *changed))
            for name, changed in STUDIES[study].variants.items()
        }
    once = {(digest(own[name].load()), start): own[name] for name, start in (("VSD", _FIRST[0]), ("both phases", None))}
    for study, entries in variants.items():
        for name, entry in entries.items():
            entries[name] = once.setdefault((digest(entry.load()), start_of(study, name)), entry)
    starts = {start_of(study, name) for study, entries in variants.items() for name in entries}
    own = {as_it_stands(study): own[as_it_stands(study)] for study in variants}
    return [e for e in first if e.name in starts], own, variants


def leads(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], measure: str = "mean", row: str = "1 NFE"
) -> list[float]:
    """By how much runs score above others of the same seeds; pairs of which one diverged are left out."""
    pairs = [(x["rows"], y["rows"]) for x, y in zip(a, b, strict=True) if "failed" not in x and "failed" not in y]

    def score(rows: dict[str, Any]) -> float:
        return rows[row]["frechet"] if measure == "frechet" else rows[row]["values"][measure]

    return [score(x) - score(y) for x, y in pairs]


def verdict(jobs: dict[str, list[dict[str, Any]]], paper: tuple[str, ...], measure: str) -> str:
    """Whether the order found is the paper's."""
    if not paper:
        return "the paper has no such figures"
    said = (f"{a} over {b}: {_word(leads(jobs[a], jobs[b], measure))}" for a, b in itertools.pairwise(paper))
    return f"{measure}: {'; '.join(said)}"


def _word(found: list[float]) -> str:
    if len(found) < 2:
        return "too few seeds to tell"
    lead = spread(found)
    reach = float(stats.t.ppf(0.975, len(found) - 1)) * lead["standard_error"]
    word = "agree" if lead["mean"] > reach else "disagree" if lead["mean"] < -reach else "no difference"
    return f"{word} ({lead['mean']:+.2f} ± {lead['standard_error']:.2f})"


def main() -> None:
    parser = command_line(__doc__, "ablation")
    parser.add_argument("--studies", nargs="+", choices=("priming", *STUDIES), default=("priming", *STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    recipe, root = ours(arguments), arguments.root
    overrides = (*in_world(arguments.world, recipe), *arguments.overrides)
    options = {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips}
    first, own, variants = plan(arguments.studies, recipe, overrides, arguments.world)
    check_one_world([*first, *own.values()])
    settings: dict[str, tuple[str, ...]] = {_FIRST[0]: ()}
    if len(first) > 1:  # consistency distillation gets VSD's wall-clock
        costs = measure_costs(first, root, arguments.ranks)
        budget = whole_cost(first[0], costs[first[0].name], "seconds")
        settings[first[1].name] = on_budget(first[1], costs[first[1].name], "seconds", budget)
    done = run_jobs(first, arguments.seeds, root, settings, **options)
    for name, runs in done.items():
        if lost := [str(job["seed"]) for job in runs if "failed" in job]:
            raise UserError(
                f"{name} diverged with seed {', '.join(lost)}: no phase II can go on from it; leave that seed out of "
                "--seeds, or lower priming.student_optimiser.learning_rate with --set"
            )
    later, starts = dict(own), {"VSD": _FIRST[0]}
    for study, entries in variants.items():
        for name, entry in entries.items():
            if entry.name not in done:
                later[entry.name], starts[entry.name] = entry, start_of(study, name)
    for name in later:
        start = starts.get(name)
        settings[name] = (f"priming_run={root}/{start}-seed{{seed}}",) if start else ()
    done |= run_jobs(list(later.values()), arguments.seeds, root, settings, **options)
    store("ablation_jobs", {}, [job for runs in done.values() for job in runs], root)
    whole, every = Entry("vpae", recipe, overrides), plan(("priming", *STUDIES), recipe, overrides, arguments.world)[2]
    about = {"benchmark": "ablation", "world": arguments.world, "seeds": arguments.seeds, "clips": arguments.clips}
    about |= {"recipe": digest(whole.load()), "set": sorted(arguments.overrides), "ranks": arguments.ranks}
    about |= {"variants": digest({study: {n: digest(e.load()) for n, e in es.items()} for study, es in every.items()})}
    tables = {study: _table(study, entries, done) for study, entries in variants.items()}
    for study, table in tables.items():
        for row, rows in table["rows"].items():
            said = f": {table['verdict']}" if row == "1 NFE" else ""
            print_table(f"{study}, {row}{said}", rows, (*_COLUMNS, "training_minutes", "diverged"))
    tables = write_part("ablation", about, "studies", tables, root)
    print(json.dumps({"benchmark": "ablation", "verdicts": {name: t["verdict"] for name, t in tables.items()}}))


def _table(study: str, entries: dict[str, Entry], done: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A study's rows, each beside the recipe and beside the phase I that it went on from, and what the paper says."""
    found = {name: done[entry.name] for name, entry in entries.items()}
    starts = {name: start_of(study, name) for name in found}
    paper, measured = _FIRST, "mean"
    if study != "priming":
        paper, measured = STUDIES[study].paper, STUDIES[study].measure
    shown = found | ({"phase I alone": done[_FIRST[0]]} if set(starts.values()) == {_FIRST[0]} else {})
    against = {"recipe": dict.fromkeys(shown, as_it_stands(study)), "phase_1": starts}
    tables = {row: {name: summary(runs, row) for name, runs in shown.items()} for row in ("1 NFE", "4 NFE")}
    for (row, rows), (name, runs), (key, others) in itertools.product(tables.items(), shown.items(), against.items()):
        for measure in ("mean", "frechet"):
            if (other := others.get(name)) and (pairs := leads(runs, done[other], measure, row)):
                rows[name][f"{measure}_against_{key}"] = spread(pairs)
    jobs = {
        name: {"name": entry.name, "recipes": [job["recipe"] for job in found[name]]} for name, entry in entries.items()
    }
    return {"rows": tables, "paper": list(paper), "verdict": verdict(found, paper, measured), "jobs": jobs}


if __name__ == "__main__":
    main()
