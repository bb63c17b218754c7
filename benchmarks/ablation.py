"""V-PAE's studies on Bounce: one change at a time, the same number of student steps, several seeds.

    python benchmarks/ablation.py --seeds 0 1 2
    python benchmarks/ablation.py --seeds 0 1 2 --studies head judge

Phase I is trained once a seed and shared by every study of phase II, as is the recipe where it stands in several.
Where phase I itself is studied, consistency distillation gets VSD's wall-clock and its own tuned rates
(recipes/peers/lcm.yaml). Jobs lie under outputs/benchmarks/ablation/; give the same command again after a stop, or
several times at once, as for quality.py. Scores are of the validation split. Each study ends with whether the order
found is the paper's (V-PAE, arXiv 2508.21019, table of ablations: TC for judge and head; where it gives no figures,
that is said): seeds are compared in pairs, and a difference below two standard errors counts as none. Beside every
score stands by how much it is above the recipe's as it stands, and above phase I alone, in the same pairs. Writes
benchmarks/results/ablation.json; studies of an earlier call on the same terms stay in it.
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
    COLUMNS,
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
    summary,
    whole_cost,
    write_part,
)
from jobs import run_jobs

from vpae.recipe import digest

_TIME = "{{kind: {kind}, low: {low}, high: {high}, shift: {shift}, mean: {mean}, std: 1.0}}"


def _law(kind: str = "uniform", high: float = 0.98, shift: float = 1.0, mean: float = 0.0) -> str:
    return "equilibrium.judge_time=" + _TIME.format(kind=kind, low=0.0, high=high, shift=shift, mean=mean)


@dataclass(frozen=True)
class Study:
    """Variants by name: overrides of the recipe. ``paper``: its order by ``measure``, best first; empty: none."""

    variants: dict[str, tuple[str, ...]]
    paper: tuple[str, ...] = ()
    measure: str = "mean"
    whole: bool = False  # of both phases, not of phase II on a shared phase I


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
    "r1": Study(
        {
            "both": (),
            "off": ("equilibrium.r1.weight=0",),
            "spatial alone": ("equilibrium.r1.temporal_sigma=0",),
            "temporal alone": ("equilibrium.r1.spatial_sigma=0",),
            "both, weight 100": ("equilibrium.r1.weight=100",),  # APT's, where the paper has 1
        }
    ),
    "judge time": Study(
        {
            "uniform": (_law(),),
            "shift 5": (_law(shift=5.0),),
            "below 0.5": (_law(high=0.5),),
            "logit-normal": (_law(kind="logit_normal", mean=1.0),),  # LADD's (arXiv 2403.12015)
        }
    ),
    "student": Study(
        {
            "full": (),
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


_COLUMNS = ("mean", "against_recipe", "against_phase_1", *(c for c in COLUMNS if c != "mean"))
_FIRST = ("VSD alone", "consistency alone")  # phases I that phase II goes on from


def start_of(study: str, name: str) -> str | None:
    """The phase I that a variant's phase II goes on from; None where it has its own, or none."""
    if study == "priming":
        return {"VSD": _FIRST[0], "consistency": _FIRST[1]}.get(name)
    return None if STUDIES[study].whole else _FIRST[0]


def plan(
    studies: Sequence[str], recipe: Path, overrides: tuple[str, ...], world: str
) -> tuple[list[Entry], dict[str, dict[str, Entry]]]:
    """Phases I that are trained first, and every study's variants by name, as entries.

    The recipe as it stands is a variant of most studies: it is one entry (VSD: phase II on the shared phase I), trained
    once a seed.
    """
    lcm = RECIPES / "peers" / "lcm.yaml"
    common = tuple(o for o in overrides if not o.startswith(("priming", "equilibrium")))  # it has no such sections
    first = [
        Entry(_FIRST[0], recipe, (*overrides, "equilibrium=null")),
        Entry(_FIRST[1], lcm, (*in_world(world, lcm), *common)),
    ]
    variants: dict[str, dict[str, Entry]] = {}
    if "priming" in studies:
        unprimed = (*overrides, "priming=null")
        variants["priming"] = {e.name: e for e in first}
        variants["priming"] |= {n: Entry(n, recipe, unprimed) for n in ("VSD", "consistency", "none")}
    for study in (name for name in STUDIES if name in studies):
        shared = () if STUDIES[study].whole else ("priming=null",)
        variants[study] = {
            name: Entry(f"{study} {name}", recipe, (*overrides, *shared, *changed))
            for name, changed in STUDIES[study].variants.items()
        }
    # named first, and so alike in every call, whatever studies it asks for
    stand = (
        (Entry("VSD", recipe, (*overrides, "priming=null")), _FIRST[0]),
        (Entry("both phases", recipe, overrides), None),
    )
    once = {(digest(entry.load()), start): entry for entry, start in stand}
    for study, entries in variants.items():
        for name, entry in entries.items():
            entries[name] = once.setdefault((digest(entry.load()), start_of(study, name)), entry)
    return first if "priming" in studies else first[:1], variants


def verdict(jobs: dict[str, list[dict[str, Any]]], paper: tuple[str, ...], measure: str) -> str:
    """Whether the order found is the paper's, by pairs of runs of one seed (the same clips, and the same phase I)."""
    if not paper:
        return "the paper gives no figures"
    said = []
    for better, worse in itertools.pairwise(paper):
        pairs = zip(jobs[better], jobs[worse], strict=True)
        whole = [(a["rows"], b["rows"]) for a, b in pairs if "failed" not in a and "failed" not in b]
        leads = [a["1 NFE"]["values"][measure] - b["1 NFE"]["values"][measure] for a, b in whole]
        said.append(f"{better} over {worse}: {_word(leads)}")
    return f"{measure}: {'; '.join(said)}"


def _word(leads: list[float]) -> str:
    if len(leads) < 2:
        return "too few seeds to tell"
    lead, error = spread(leads).values()
    word = "no difference" if abs(lead) < 2 * error else "agree" if lead > 0 else "disagree"
    return f"{word} ({lead:+.2f} ± {error:.2f})"


def lead_over(jobs: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """By how much the mean score of runs is above that of others, in pairs of one seed; None where no pair is whole."""
    pairs = [(a["rows"], b["rows"]) for a, b in zip(jobs, other, strict=True) if "rows" in a and "rows" in b]
    return spread([a["1 NFE"]["values"]["mean"] - b["1 NFE"]["values"]["mean"] for a, b in pairs]) if pairs else None


def as_it_stands(study: str, entries: dict[str, Entry], whole: Entry) -> str | None:
    """The variant of a study that is the recipe itself; None where ``--set`` has moved it away from all."""
    if study == "priming":
        return "VSD"
    stands = whole if STUDIES[study].whole else Entry("", whole.recipe, (*whole.overrides, "priming=null"))
    return next((n for n, entry in entries.items() if digest(entry.load()) == digest(stands.load())), None)


def main() -> None:
    parser = command_line(__doc__, "ablation")
    parser.add_argument("--studies", nargs="+", choices=("priming", *STUDIES), default=("priming", *STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    recipe, root = ours(arguments), arguments.root
    overrides = (*in_world(arguments.world, recipe), *arguments.overrides)
    options = {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips}
    first, variants = plan(arguments.studies, recipe, overrides, arguments.world)
    check_one_world(first)
    settings: dict[str, tuple[str, ...]] = {first[0].name: ()}
    if len(first) > 1:  # consistency distillation gets VSD's wall-clock
        costs = measure_costs(first, root, arguments.ranks)
        budget = whole_cost(first[0], costs[first[0].name], "seconds")
        settings[first[1].name] = on_budget(first[1], costs[first[1].name], "seconds", budget)
    done = run_jobs(first, arguments.seeds, root, settings, **options)
    later: dict[str, Entry] = {}
    for study, entries in variants.items():
        for name, entry in entries.items():
            if entry not in first:
                later[entry.name], start = entry, start_of(study, name)
                settings[entry.name] = (f"priming_run={root}/{start}-seed{{seed}}",) if start else ()
    done |= run_jobs(list(later.values()), arguments.seeds, root, settings, **options)
    jobs = {study: {n: done[e.name] for n, e in entries.items()} for study, entries in variants.items()}
    about = {"benchmark": "ablation", "world": arguments.world, "seeds": arguments.seeds, "clips": arguments.clips}
    whole = Entry("vpae", recipe, overrides)
    about |= {"recipe": digest(whole.load()), "set": list(arguments.overrides), "ranks": arguments.ranks}
    tables = {}
    for study, found in jobs.items():
        rows = {name: summary(runs, "1 NFE") for name, runs in found.items()}
        base = as_it_stands(study, variants[study], whole)
        against = {"against_recipe": found[base]} if base else {}
        if study != "priming" and not STUDIES[study].whole:  # what phase II went on from
            rows["phase I alone"], against["against_phase_1"] = summary(done[_FIRST[0]], "1 NFE"), done[_FIRST[0]]
        for (name, runs), (key, other) in itertools.product(found.items(), against.items()):
            if lead := lead_over(runs, other):
                rows[name][key] = lead
        paper = _FIRST if study == "priming" else STUDIES[study].paper
        measure = "mean" if study == "priming" else STUDIES[study].measure
        word = verdict(found, paper, measure)
        tables[study] = {"rows": rows, "paper": list(paper), "verdict": word, "jobs": found}
        print_table(f"{study}: {word}", rows, (*_COLUMNS, "training_minutes", "diverged"))
    tables = write_part("ablation", about, "studies", tables, root)
    print(json.dumps({"benchmark": "ablation", "verdicts": {name: t["verdict"] for name, t in tables.items()}}))


if __name__ == "__main__":
    main()
