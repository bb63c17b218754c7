"""One-step quality on Bounce: V-PAE, its phases alone and every peer, on equal wall-clock and on equal clips seen.

    python benchmarks/quality.py --seeds 0 1 2 3 4                 # validation split: for choosing settings
    python benchmarks/quality.py --seeds 0 1 2 3 4 --final         # test split, once
    python benchmarks/quality.py --lines --world open              # the teacher alone

Each (table, method, seed) is a job of its own under outputs/benchmarks/quality/, trained with checkpoints: give the
same command again after a stop, however long later. The budget is what V-PAE's recipe costs (``--minutes``, ``--clips-
seen`` for others). Reference lines are the teacher at 100, 8, 4, 2 and 1 NFE. ``--final`` is allowed once for each
recipe set; asked for again it wants ``--because`` and records that. Writes benchmarks/results/quality_SPLIT.json and,
beside it, quality_SPLIT.svg and quality_SPLIT.png (the same eight conditions for every method).
"""

from __future__ import annotations

import argparse
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
    command_line,
    in_world,
    judge,
    measure_costs,
    on_budget,
    print_table,
    run_jobs,
    spread,
    summary,
    whole_cost,
)
from quality_figure import write_figure

from vpae.data.look import contact_sheet
from vpae.errors import UserError
from vpae.evaluation import clips_of
from vpae.recipe import digest

TEACHER = {  # few steps on Wan's own grid: the last evaluation on diffusers' moves nothing
    "teacher 100 NFE": {"steps": 50, "guidance_scale": 2.0, "sampler": "euler"},
    "teacher 8 NFE": {"steps": 8, "sampler": "euler_even"},
    "teacher 4 NFE": {"steps": 4, "sampler": "euler_even"},
    "teacher 2 NFE": {"steps": 2, "sampler": "euler_even"},
    "teacher 1 NFE": {"steps": 1, "sampler": "euler"},
    "teacher 8 NFE, guided": {"steps": 4, "guidance_scale": 2.0, "sampler": "euler_even"},
    "teacher 2 NFE, guided": {"steps": 1, "guidance_scale": 2.0, "sampler": "euler"},
}


def entries(arguments: argparse.Namespace) -> list[Entry]:
    """V-PAE, its phases alone, and the peers' recipes of a folder, in the world and with the overrides asked for."""
    ours, overrides = arguments.recipe, arguments.overrides
    own = (*in_world(arguments.world, ours), *overrides)
    peers = sorted(arguments.peers.glob("*.yaml"))
    return [
        Entry("vpae", ours, own),
        Entry("priming", ours, (*own, "equilibrium=null")),
        Entry("equilibrium", ours, (*own, "priming=null")),
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
    asked = {"teacher": teacher, "world": entry.world().fingerprint(), "plans": TEACHER}
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if any(kept.get(key) != value for key, value in asked.items()):
        rows, videos = judge(Path(teacher), entry.world(), split, clips, TEACHER)
        root.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(shown, *videos)
        file.write_text(json.dumps(asked | {"rows": rows}))
    return json.loads(file.read_text())["rows"], list(np.load(shown).values())


def _as_summary(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """One measurement in the shape of several: its standard error is over clips, where there is one."""
    values = {k: {"mean": v, "standard_error": row["standard_errors"].get(k, np.nan)} for k, v in row["values"].items()}
    return values | {key: spread([row[key]]) for key in ("frechet", "diversity", "seconds_per_clip")}


def write_sheet(path: Path, root: Path, split: str, teacher: list[np.ndarray], names: list[str], real) -> None:
    """The same eight conditions for every method, first seed."""
    videos = {"real": [c.frames for c in real], "teacher 100 NFE": teacher}
    for name in names:
        found = sorted(root.glob(f"{name}-seed*/{split}-shown.npz"))
        if found:
            videos[name] = list(np.load(found[0]).values())
    contact_sheet([(f"{name} {i}", v[i]) for i in range(len(teacher)) for name, v in videos.items()], path)


def guard(split: str, digest: dict[str, str], because: str | None) -> list[dict[str, str]]:
    """The test split is looked at once for a set of recipes; every further look is recorded with its reason.

    Raises:
        UserError: it has been looked at, and no reason is given.
    """
    file = RESULTS / f"quality_{split}.json"
    before = json.loads(file.read_text()) if split == "test" and file.is_file() else {}
    looks = before.get("looks", [])
    if looks and digest != looks[-1]["recipes"] and not because:
        raise UserError(
            f"{file} holds a table of other recipes already; say --because why the test split is used again"
        )
    if looks and digest == looks[-1]["recipes"]:
        return looks
    return [*looks, {"recipes": digest, "because": because or "first"}]


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
    parser.add_argument("--lines", action="store_true", help="judge the teacher alone: how far its lines lie apart")
    parser.add_argument("--because", help="why the test split is looked at again")
    carry_out(run, parser)


def run(arguments: argparse.Namespace) -> None:
    split = "test" if arguments.final else "validation"
    every = entries(arguments)
    vpae, chosen = every[0], pick(every, arguments.methods)
    if arguments.lines:
        write_lines(arguments, vpae, split)
        return
    looks = guard(split, {e.name: digest(e.load()) for e in chosen}, arguments.because)
    costs = measure_costs([vpae, *(e for e in chosen if e.name != "vpae")], arguments.root, arguments.ranks)
    rows, videos = reference(arguments.root, vpae, split, arguments.clips)
    lines = {name: _as_summary(row) for name, row in rows.items()}
    tables: dict[str, Any] = {}
    for equal in arguments.equal:
        given = arguments.minutes and arguments.minutes * 60 if equal == "seconds" else arguments.clips_seen
        budget = given or whole_cost(vpae, costs["vpae"], equal)
        settings = {e.name: on_budget(e, costs[e.name], equal, budget) for e in chosen}
        root = arguments.root / f"equal-{equal}"
        jobs = run_jobs(
            chosen,
            arguments.seeds,
            root,
            settings,
            ranks=arguments.ranks,
            split=split,
            clips=arguments.clips,
        )
        found = {f"{n} {row}": summary(js, row) for n, js in jobs.items() for row in ("1 NFE", "4 NFE")}
        print_table(f"equal {equal} ({budget:.0f}), {split} split", lines | found, COLUMNS)
        print_table("what it took", found, ("seconds_per_clip", "training_minutes", "peak_gib"))
        tables[equal] = {"budget": budget, "settings": settings, "rows": found, "jobs": jobs}
        sheet = RESULTS / f"quality_{split}.png"
        clips = clips_of(vpae.world(), split, 8)
        write_sheet(sheet, root, split, videos, [e.name for e in chosen], clips)
        write_figure(RESULTS / f"quality_{split}.svg", lines, found)
    document = {
        "benchmark": "quality",
        "split": split,
        "looks": looks,
        "world": arguments.world,
        "clips": arguments.clips,
        "seeds": arguments.seeds,
        "costs": {name: {"seconds": c.seconds, "clips": c.clips} for name, c in costs.items()},
        "teacher": rows,
        "tables": tables,
        "bars": bars(lines, tables),
    }
    written = json.loads(write_result(f"quality_{split}", document).read_text())  # as written: JSON has no NaN
    print(json.dumps({key: written[key] for key in ("benchmark", "split", "seeds", "bars")}))


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole > 0 else float("nan")


def bars(lines: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """V-PAE against the best peer and against the teacher, in per cent of the mean of SA, TC and FQ."""
    teacher, found = lines["teacher 100 NFE"], {}
    for equal, table in tables.items():
        means = {name: values["mean"]["mean"] for name, values in table["rows"].items()}
        own = ("vpae", "priming", "equilibrium")
        peers = {n: m for n, m in means.items() if n.endswith(" 1 NFE") and n.split()[0] not in own}
        if "vpae 1 NFE" not in means:
            continue
        ours = table["rows"]["vpae 1 NFE"]
        found[equal] = {
            "percent_of_teacher_at_1_nfe": _percent(means["vpae 1 NFE"], teacher["mean"]["mean"]),
            "percent_of_teacher_at_4_nfe": _percent(means["vpae 4 NFE"], teacher["mean"]["mean"]),
            "dynamic_degree_percent": _percent(ours["dynamic_degree"]["mean"], teacher["dynamic_degree"]["mean"]),
        }
        if peers:
            best = max(peers, key=peers.get)
            ahead = _percent(means["vpae 1 NFE"], peers[best]) - 100
            found[equal] |= {"best_peer": best, "percent_ahead_of_best_peer": ahead}
    return found


if __name__ == "__main__":
    main()
