"""A plan for people."""

from __future__ import annotations

from vpae.engine.host import GIB
from vpae.plan.account import Plan
from vpae.plan.advise import Advice


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + row[0].ljust(widths[0])
        + "".join("  " + text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _size(size: float) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def headline(plan: Plan) -> str:
    """What is planned, in one line."""
    hardware, recipe, engine = plan.hardware, plan.recipe, plan.recipe.engine
    where = f"{hardware.ranks} x {plan.memory / GIB:.4g} GiB"
    machines = f" on {hardware.machines} machines" if hardware.machines > 1 else ""
    parameters = max(phase.parameters for phase in plan.phases.values())
    how = [f"{recipe.student.kind} student", f"teacher {recipe.teacher.dtype}", engine.parallel]
    how += [f"sequence_parallel {engine.sequence_parallel}"] if engine.sequence_parallel > 1 else []
    how += [f"optimiser_state {engine.optimiser_state}"] if engine.optimiser_state != "fp32" else []
    how += ["ema_on cpu"] if engine.ema_on == "cpu" else []
    how += ["checkpointing"] if engine.checkpointing else []
    return (
        f"{recipe.name} on {where}{machines}: {parameters / 1e9:.2f} B parameters a network, {plan.shapes.tokens:,} "
        f"tokens a clip, global batch {engine.global_batch}; {', '.join(how)}"
    )


def phase_lines(plan: Plan, name: str, tflops: float) -> list[str]:
    """The table of one phase."""
    phase, ranks = plan.phases[name], plan.hardware.ranks // plan.hardware.machines
    players = list(phase.turns)
    kinds = list(dict.fromkeys(kind for turn in phase.turns.values() for kind in turn.kinds))
    rows = [["GiB a GPU at its fullest", *(f"{player} turn" for player in players)]]
    rows += [[kind, *(_size(phase.turns[p].kinds.get(kind, 0.0)) for p in players)] for kind in kinds]
    rows.append(["peak", *(_size(phase.turns[p].peak) for p in players)])
    rows.append(["PFLOP a turn and GPU", *(f"{phase.turns[p].flops / 1e15:.3g}" for p in players)])
    rows.append([f"a turn at {tflops:g} TFLOP/s", *(_duration(phase.turns[p].flops / tflops / 1e12) for p in players)])
    rows.append(["turns", *(str(phase.turns[p].turns) for p in players)])
    host = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in phase.host.items())
    loading = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in phase.loading.items())
    return [
        f"{name}: {plan.verdict(name)}, {phase.peak / GIB:.1f} of {plan.memory / GIB:.4g} GiB "
        f"({100 * phase.peak / plan.memory:.0f} %)",
        *_aligned(rows),
        f"  host memory a machine: {ranks * sum(phase.host.values()) / GIB:.0f} GiB; GiB a rank: {host}",
        f"  before training: {ranks * sum(phase.loading.values()) / GIB:.0f} GiB; GiB a rank: {loading}",
        f"  a checkpoint: {phase.checkpoint / 1e9:.1f} GB on disk",
    ]


def plan_text(plan: Plan, tflops: float) -> str:
    """The whole plan."""
    lines = [headline(plan), ""]
    for name in plan.phases:
        lines += [*phase_lines(plan, name, tflops), ""]
    seconds = sum(plan.seconds(name, tflops * 1e12) for name in plan.phases)
    keep = plan.recipe.engine.keep_checkpoints
    lines += [
        f"The run: {_duration(seconds)} at {tflops:g} TFLOP/s, {seconds * plan.hardware.ranks / 3600:,.0f} GPU hours "
        "(communication, data and samples come on top)",
        f"Disk: {plan.disk / 1e9:,.0f} GB for checkpoints ({keep} kept a phase and one being written)",
        f"Kept free: {100 * plan.kept_free:.0f} % of each GPU for what cannot be simulated (CUDA's context, "
        f"{'NCCL buffers, ' if plan.hardware.ranks > 1 else ''}fragments)",
    ]
    return "\n".join(lines)


def advice_text(plan: Plan, advice: Advice | None) -> str:
    """What to do where it does not fit."""
    if advice is None:
        return "No single change and no pair of changes makes it fit: use more or larger GPUs, or smaller clips"
    peaks = ", ".join(
        f"{name} {phase.peak / GIB:.1f} GiB ({advice.plan.verdict(name)})" for name, phase in advice.plan.phases.items()
    )
    return f"The cheapest change that makes it fit: --set {advice.settings}\n  {peaks}"
