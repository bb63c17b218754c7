"""From simulated turns to a plan: bytes by role, time, host memory, disk, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpae import recipe as recipes
from vpae.engine.checkpoint import kept_bytes
from vpae.engine.host import GIB
from vpae.errors import UserError
from vpae.plan.ledger import ACTIVATIONS, GATHERED, TEMPORARY
from vpae.plan.shapes import Shapes, shapes_of
from vpae.plan.simulate import Hardware, PhaseLoad, TurnLoad, simulate
from vpae.recipe import Distill
from vpae.runs import PHASES

# Shares of a card that are kept free for what cannot be simulated; chosen, not yet measured on a GPU
_NCCL = 0.04  # its buffers, which a single GPU has none of
_CONTEXT_AND_FRAGMENTS = 0.06  # CUDA's context, and what the allocator cannot hand out
_LEAST = 0.04  # below it the context and NCCL alone do not fit
_FRAGMENTS = 0.02  # of what is free once CUDA's context is there: no plan needs less than that
PROCESS = 3 * GIB  # host memory of a rank before anything of ours: Python, torch, CUDA's own
_FILE = 2 * GIB  # that a rank writes of a checkpoint at once, as vpae.engine.checkpoint splits it
FITS, TIGHT, TOO_LARGE = "fits", "tight", "does not fit"
# blocks that a deeper network is planned from: within a segment every byte is linear in them, if each half of the
# backward has two blocks or more (FSDP gathers one ahead) and both numbers are even, as 40 and 30 are
_STAND_IN = (6, 8)
_WHOLE = 8  # blocks up to which a network is simulated as it is


@dataclass(frozen=True)
class TurnPlan:
    """One player's turn on one rank.

    Attributes:
        kinds: bytes on the device at its fullest moment, by whose they are.
        flops: of the turn.
        turns: in the phase.
    """

    kinds: dict[str, float]
    flops: float
    turns: int

    @property
    def peak(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class PhasePlan:
    """One phase on one rank; bytes.

    Attributes:
        turns: by player.
        host: memory of the machine that this rank takes while it trains, by what for.
        loading: memory of the machine that this rank takes before it trains, by what for.
        checkpoint: one of all ranks, on disk.
    """

    turns: dict[str, TurnPlan]
    host: dict[str, float]
    loading: dict[str, float]
    checkpoint: float
    parameters: float

    @property
    def peak(self) -> float:
        return max(turn.peak for turn in self.turns.values())


@dataclass(frozen=True)
class Plan:
    """A recipe on given hardware.

    Attributes:
        memory: of a card, bytes.
        in_use: ``memory`` is what a process with CUDA's context finds free, and not the whole card.
    """

    recipe: Distill
    hardware: Hardware
    memory: float
    shapes: Shapes
    phases: dict[str, PhasePlan]
    in_use: bool = False

    @property
    def kept_free(self) -> float:
        """Share of the memory that a phase which fits leaves free."""
        return _CONTEXT_AND_FRAGMENTS + (_NCCL if self.hardware.ranks > 1 else 0.0)

    @property
    def least_free(self) -> float:
        """Share of the memory without which a phase does not run."""
        return _FRAGMENTS if self.in_use else _LEAST

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints at once."""
        sizes = [phase.checkpoint for phase in self.phases.values()]
        return round(kept_bytes(sizes, self.recipe.engine.keep_checkpoints))

    def verdict(self, phase: str) -> str:
        """Whether a phase fits: with the allowance kept free, only without it, or not at all."""
        share = self.phases[phase].peak / self.memory
        return FITS if share <= 1 - self.kept_free else TIGHT if share <= 1 - self.least_free else TOO_LARGE

    @property
    def failing(self) -> list[str]:
        return [phase for phase in self.phases if self.verdict(phase) == TOO_LARGE]

    def seconds(self, phase: str, flops_a_second: float) -> float:
        return sum(turn.flops * turn.turns for turn in self.phases[phase].turns.values()) / flops_a_second


_memory: dict[str, PhaseLoad] = {}


def load_of(recipe: Distill, phase: str, shapes: Shapes, hardware: Hardware, blocks: int | None = None) -> PhaseLoad:
    """:func:`simulate`, once for all recipes that lay a phase out alike."""
    plain = recipes.to_plain(recipe)
    layout = {key: plain[key] for key in ("teacher", "student", phase)} | {"engine": dict(plain["engine"])}
    for key in ("log_every", "sample_every", "samples", "checkpoint_every", "keep_checkpoints", "async_checkpoints"):
        del layout["engine"][key]
    key = recipes.digest(
        {"layout": layout, "of": [phase, blocks, shapes.config, shapes.kind, shapes.latent, shapes.text_rows]}
    )
    key += f" {hardware}"
    if key not in _memory:
        _memory[key] = simulate(recipe, phase, shapes, hardware, blocks)
    return _memory[key]


def phase_load(recipe: Distill, phase: str, shapes: Shapes, hardware: Hardware, *, whole: bool = False) -> PhaseLoad:
    """What a phase takes; a deep network's from two shallow ones unless ``whole``."""
    layers = shapes.config["num_layers"]
    if whole or layers <= _WHOLE:
        return load_of(recipe, phase, shapes, hardware)
    few, more = (load_of(recipe, phase, shapes, hardware, blocks) for blocks in _STAND_IN)
    return _further(few, more, (layers - _STAND_IN[0]) / (_STAND_IN[1] - _STAND_IN[0]))


def _further(few: PhaseLoad, more: PhaseLoad, steps: float) -> PhaseLoad:
    """The load ``steps`` steps of the difference beyond ``few``."""

    def on(a: float, b: float) -> float:
        return a + steps * (b - a)

    def each(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {key: on(a.get(key, 0.0), b.get(key, 0.0)) for key in a | b}

    turns = {}
    for name, short in few.turns.items():
        long = more.turns[name]
        pairs = zip(short.segments, long.segments, strict=True)
        segments = tuple(each(a, b) for a, b in pairs)
        turns[name] = TurnLoad(segments, on(short.flops, long.flops), short.turns)
    sizes = (on(getattr(few, name), getattr(more, name)) for name in ("checkpoint", "checkpoint_share", "parameters"))
    return PhaseLoad(each(few.resting, more.resting), each(few.host, more.host), turns, *sizes, few.largest_tensor)


def make_plan(
    recipe: recipes.Recipe,
    hardware: Hardware,
    memory: float,
    *,
    whole: bool = False,
    phases: tuple[str, ...] = PHASES,
    in_use: bool = False,
) -> Plan:
    """Plan a recipe.

    Args:
        memory: of a card, bytes.
        whole: simulate every block, which takes minutes for a large network.
        phases: of these, those that the recipe has.
        in_use: ``memory`` is what a process with CUDA's context finds free of it.

    Raises:
        UserError: the recipe is of another kind, or cannot run on these ranks.
    """
    if not isinstance(recipe, Distill):
        raise UserError(f"recipe {recipe.name!r} is of kind {recipe.kind}; vpae plan plans those of kind distill")
    if hardware.ranks % hardware.machines:
        raise UserError(f"{hardware.ranks} GPUs cannot be spread evenly over {hardware.machines} machines")
    shapes = shapes_of(recipe)
    found = {
        phase: _phase(recipe, phase_load(recipe, phase, shapes, hardware, whole=whole), shapes)
        for phase in phases
        if getattr(recipe, phase) is not None
    }
    return Plan(recipe, hardware, memory, shapes, found, in_use)


def _phase(recipe: Distill, load: PhaseLoad, shapes: Shapes) -> PhasePlan:
    turns = {}
    for name, turn in load.turns.items():
        fullest = max(turn.segments, key=lambda kinds: sum(kinds.values()))
        turns[name] = TurnPlan(_tidy({**fullest, "VAE, for samples": shapes.vae}), turn.flops, turn.turns)
    # torch holds a file's bytes up to three times while it writes it
    writing = 3 * min(_FILE, load.checkpoint_share)
    host = {"process": PROCESS, **load.host, "checkpoint being written": writing}
    if recipe.engine.async_checkpoints:
        host["checkpoint on its way (async_checkpoints)"] = load.checkpoint_share
    loading = {"process": PROCESS, **load.host, "slices of weights": 2 * load.largest_tensor}
    if shapes.encoders:
        loading["encoders of clips and captions"] = shapes.encoders
    return PhasePlan(turns, host, loading, load.checkpoint, load.parameters)


def _tidy(kinds: Mapping[str, float]) -> dict[str, float]:
    """In the order in which they are read: what stays, then what a turn adds."""

    def place(kind: str) -> int:
        stays = ("weights", "VAE", "EMA", "optimiser", "gradients", GATHERED, ACTIVATIONS, "other", TEMPORARY)
        return next((i for i, word in enumerate(stays) if kind.startswith(word)), len(stays))

    below = sum(size for size in kinds.values() if size < 0)  # two shallow networks may be fullest at unlike moments
    sizes = {kind: size for kind, size in kinds.items() if size > 0}
    sizes[TEMPORARY] = sizes.get(TEMPORARY, 0.0) + below
    return {kind: sizes[kind] for kind in sorted(sizes, key=place) if abs(sizes[kind]) >= 1}


def document(plan: Plan, tflops: float) -> dict[str, Any]:
    """The plan for machines: bytes, seconds, FLOPs."""
    recipe, engine = plan.recipe, plan.recipe.engine
    per_machine = plan.hardware.ranks // plan.hardware.machines
    phases = {}
    for name, phase in plan.phases.items():
        phases[name] = {
            "verdict": plan.verdict(name),
            "peak": round(phase.peak),
            "players": {
                player: {
                    "peak": round(turn.peak),
                    "by": {kind: round(size) for kind, size in turn.kinds.items()},
                    "flops_a_turn": turn.flops,
                    "seconds_a_turn": turn.flops / tflops / 1e12,
                    "turns": turn.turns,
                }
                for player, turn in phase.turns.items()
            },
            "seconds": plan.seconds(name, tflops * 1e12),
            "host_a_rank": {kind: round(size) for kind, size in phase.host.items()},
            "host_a_machine": round(per_machine * sum(phase.host.values())),
            "host_before_training_a_rank": {kind: round(size) for kind, size in phase.loading.items()},
            "host_before_training_a_machine": round(per_machine * sum(phase.loading.values())),
            "checkpoint": round(phase.checkpoint),
        }
    seconds = math.fsum(phase["seconds"] for phase in phases.values())
    return {
        "recipe": recipe.name,
        "gpus": plan.hardware.ranks,
        "machines": plan.hardware.machines,
        "gpu_memory": round(plan.memory),
        "kept_free": round(plan.kept_free, 3),
        "tflops": tflops,
        "tokens": plan.shapes.tokens,
        "parameters": round(max(p.parameters for p in plan.phases.values())),
        "engine": recipes.to_plain(engine),
        "teacher_dtype": recipe.teacher.dtype,
        "student": recipe.student.kind,
        "phases": phases,
        "seconds": seconds,
        "gpu_hours": seconds * plan.hardware.ranks / 3600,
        "disk": plan.disk,
    }
