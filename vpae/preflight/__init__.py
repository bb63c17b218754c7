"""``vpae preflight``: whether these machines can carry a run, asked before anything is encoded or trained."""

from __future__ import annotations

import time
from pathlib import Path

from vpae import recipe as recipes
from vpae.engine import parallel
from vpae.errors import UserError
from vpae.peer_recipe import samples_of
from vpae.preflight import disk, machine
from vpae.preflight.machine import Line
from vpae.preflight.meeting import Meeting


def preflight(recipe: recipes.Recipe | None, output: Path, patience: float) -> bool:
    """Look at every rank, its machine, the network and the disks; rank 0 prints the report. False: something fails.

    Args:
        patience: seconds that ranks wait for each other; one that hangs is named then.

    Raises:
        UserError: a rank cannot reach the others.
    """
    meeting = Meeting(patience)
    meeting.begin()
    mine = machine.facts(meeting.rank, recipe)
    with meeting.stage("telling of the machines"):
        facts = meeting.processes.gather(mine)
        meeting.processes.barrier()
    lines = machine.judge(facts, recipe)
    if meeting.size > 1:
        lines.append(machine.clocks(meeting.processes.gather(time.time())))
    lines += meeting.collectives()
    with meeting.stage("looking for a file of rank 0"):
        lines += _disks(recipe, output, meeting.processes)
    if recipe is not None:
        lines += _shares(recipe, meeting.processes)
    good = all(line.mark != "fails" for line in lines)
    if meeting.processes.is_main:
        _report(lines)
    return good


def _disks(recipe: recipes.Recipe | None, output: Path, processes: parallel.Processes) -> list[Line]:
    lines = [disk.shared("output", output, disk.output_bytes(recipe), processes)]
    if isinstance(recipe, (recipes.Distillation, recipes.FinetuneFlow)):
        needs = {"cache": (Path(recipe.data.cache), 0)}
        samples = samples_of(recipe.method) if isinstance(recipe, recipes.Peer) else None
        try:
            needs["cache"] = (Path(recipe.data.cache), disk.cache_bytes(recipe))
            if samples:
                needs["samples"] = (Path(samples.folder), disk.samples_bytes(recipe))
        except UserError as error:
            lines.append(Line("fails", "data", str(error)))
        lines += [disk.shared(what, folder, need, processes) for what, (folder, need) in needs.items()]
    return lines


def _shares(recipe: recipes.Recipe, processes: parallel.Processes) -> list[Line]:
    batch, degree, ranks = recipe.engine.global_batch, recipe.engine.sequence_parallel, processes.size
    if ranks % degree:
        mend = f"a multiple of {degree} ranks, or engine.sequence_parallel=1"
        return [Line("fails", "batch", f"{ranks} ranks are no groups of engine.sequence_parallel {degree}", mend)]
    groups = ranks // degree
    shared = f" in groups of {degree} that share clips" if degree > 1 else ""
    if batch % groups:
        text = f"engine.global_batch {batch} cannot be split over {ranks} ranks{shared}"
        return [Line("fails", "batch", text, f"make it a multiple of {groups}")]
    return [Line("ok", "batch", f"{batch} clips a turn, {batch // groups} a rank{shared}")]


def _report(lines: list[Line]) -> None:
    print("\n".join(map(str, lines)))
    count = {mark: sum(line.mark == mark for line in lines) for mark in ("warning", "fails")}
    if count["fails"]:
        print(f"preflight: {count['fails']} of {len(lines)} checks fail")
    else:
        print(f"preflight: ready ({count['warning']} warnings)" if count["warning"] else "preflight: ready")
