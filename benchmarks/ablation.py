"""V-PAE's studies on Bounce: one change at a time, the same number of student steps, several seeds.

    python benchmarks/ablation.py --seeds 0 1 2
    python benchmarks/ablation.py --seeds 0 1 2 --studies head judge

Phase I is trained once a seed and shared by every study of phase II. Jobs lie under outputs/benchmarks/ablation/; give
the same command again after a stop. Scores are of the validation split. Each study ends with whether the order found is
the paper's (V-PAE, arXiv 2508.21019: table of ablations; where the paper gives none, that is said), a difference below
one standard error counting as none. Writes benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import write_result
from contest import COLUMNS, RECIPES, Entry, carry_out, command_line, in_world, print_table, run_jobs, summary

_TIME = "{{kind: {kind}, low: {low}, high: {high}, shift: {shift}, mean: 0.0, std: 1.0}}"


def _law(kind: str = "uniform", low: float = 0.0, high: float = 0.98, shift: float = 1.0) -> str:
    return "equilibrium.judge_time=" + _TIME.format(kind=kind, low=low, high=high, shift=shift)


@dataclass(frozen=True)
class Study:
    """Variants by name: overrides of the recipe. ``paper``: its order, best first; empty where it gives none."""

    variants: dict[str, tuple[str, ...]]
    paper: tuple[str, ...] = ()
    whole: bool = False  # of both phases, not of phase II on a shared phase I


STUDIES = {
    "judge": Study(
        {kind: (f"equilibrium.judge={kind}",) for kind in ("frozen", "unified", "trainable")},
        paper=("unified", "frozen"),  # trainable did not fit into memory at 14B
    ),
    "head": Study(
        {kind: (f"equilibrium.head.kind={kind}",) for kind in ("convolutional", "cross_attention", "semantic")},
        paper=("semantic", "cross_attention", "convolutional"),
    ),
    "lambda": Study({f"lambda {w}": (f"equilibrium.sds.weight={w}",) for w in (0, 1, 10, 100)}, paper=("lambda 10",)),
    "r1": Study(
        {
            "both": (),
            "off": ("equilibrium.r1.weight=0",),
            "spatial alone": ("equilibrium.r1.temporal_sigma=0",),
            "temporal alone": ("equilibrium.r1.spatial_sigma=0",),
        }
    ),
    "judge time": Study(
        {
            "uniform": (_law(),),
            "shift 5": (_law(shift=5.0),),
            "below 0.5": (_law(high=0.5),),
            "logit-normal": (_law(kind="logit_normal"),),
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
}


def priming_study(
    recipe: Path, overrides: tuple[str, ...], seeds: list[int], root: Path, options: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Phase II after VSD, after consistency distillation, and from the teacher itself; each phase I judged as well."""
    consistency = Entry("consistency alone", RECIPES / "peers" / "lcm.yaml", overrides)
    steps = Entry("vpae", recipe, overrides).load().priming.student_steps
    settings = {consistency.name: (f"method.consistency.student_steps={steps}",)}
    found = run_jobs([consistency], seeds, root, settings, **options)
    found |= run_jobs([Entry("VSD alone", recipe, (*overrides, "equilibrium=null"))], seeds, root, _NONE, **options)
    for seed in seeds:
        starts = {"VSD": root / f"VSD alone-seed{seed}", "consistency": root / f"consistency alone-seed{seed}"}
        for name, start in starts.items():
            entry = Entry(name, recipe, (*overrides, "priming=null", f"priming_run={start}"))
            found.setdefault(name, []).extend(run_jobs([entry], [seed], root, _NONE, **options)[name])
    none = Entry("none", recipe, (*overrides, "priming=null"))
    return found | run_jobs([none], seeds, root, _NONE, **options)


class _Nothing(dict):
    def __missing__(self, key: str) -> tuple[str, ...]:
        return ()


_NONE = _Nothing()  # no overrides for any entry


def verdict(rows: dict[str, Any], paper: tuple[str, ...]) -> str:
    """Whether the order found is the paper's."""
    if not paper:
        return "the paper gives no figure"
    means = {name: (row["mean"]["mean"], row["mean"]["standard_error"] or 0.0) for name, row in rows.items()}
    if len(paper) == 1:  # it names a best value alone
        best = max(means, key=lambda name: means[name][0])
        near = means[best][0] - means[paper[0]][0] <= max(means[best][1], means[paper[0]][1])
        return "agree" if best == paper[0] else "no difference" if near else "disagree"
    said = []
    for better, worse in pairwise(paper):
        gap = means[better][0] - means[worse][0]
        error = (means[better][1] ** 2 + means[worse][1] ** 2) ** 0.5
        said.append("no difference" if abs(gap) <= error else "agree" if gap > 0 else "disagree")
    pairs = zip(said, pairwise(paper), strict=True)
    return "; ".join(f"{a} over {b}: {word}" for word, (a, b) in pairs)


def main() -> None:
    parser = command_line(__doc__, "ablation")
    parser.add_argument("--studies", nargs="+", choices=("priming", *STUDIES), default=("priming", *STUDIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    overrides = (*in_world(arguments.world, arguments.recipe), *arguments.overrides)
    options = {"ranks": arguments.ranks, "split": "validation", "clips": arguments.clips}
    root, tables = arguments.root, {}
    jobs = {}
    if "priming" in arguments.studies:
        jobs["priming"] = priming_study(arguments.recipe, overrides, arguments.seeds, root, options)
    for study in (name for name in STUDIES if name in arguments.studies):
        found: dict[str, list] = {}
        for seed in arguments.seeds:
            shared: tuple[str, ...] = ()
            if not STUDIES[study].whole:
                primed = Entry("VSD alone", arguments.recipe, (*overrides, "equilibrium=null"))
                run_jobs([primed], [seed], root, _NONE, **options)
                shared = ("priming=null", f"priming_run={root / f'VSD alone-seed{seed}'}")
            for name, changed in STUDIES[study].variants.items():
                entry = Entry(f"{study} {name}", arguments.recipe, (*overrides, *shared, *changed))
                found.setdefault(name, []).extend(run_jobs([entry], [seed], root, _NONE, **options)[entry.name])
        jobs[study] = found
    for study, found in jobs.items():
        rows = {name: summary(runs, "1 NFE") for name, runs in found.items()}
        paper = ("VSD", "consistency") if study == "priming" else STUDIES[study].paper
        tables[study] = {"rows": rows, "paper": list(paper), "verdict": verdict(rows, paper), "jobs": found}
        print_table(f"{study}: {tables[study]['verdict']}", rows, (*COLUMNS, "training_minutes"))
    about = {"benchmark": "ablation", "world": arguments.world, "seeds": arguments.seeds, "clips": arguments.clips}
    write_result("ablation", about | tables)
    print(json.dumps({"benchmark": "ablation", "verdicts": {name: t["verdict"] for name, t in tables.items()}}))


if __name__ == "__main__":
    main()
