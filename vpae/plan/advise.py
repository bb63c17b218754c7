"""The cheapest change that makes a plan fit, found by planning it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from vpae import recipe as recipes
from vpae.errors import UserError
from vpae.plan.account import TIGHT, Plan, TurnPlan, make_plan
from vpae.plan.ledger import ACTIVATIONS, TEMPORARY
from vpae.recipe import Distill, Lora


@dataclass(frozen=True)
class Change:
    """A change of the recipe.

    Attributes:
        key: in the recipe; two changes of one key exclude each other.
        settings: as ``--set`` takes them.
        apply: to a recipe.
        spares: bytes of a turn that it can spare at most; what cannot help is not planned.
    """

    key: str
    settings: str
    apply: Callable[[Distill], Distill]
    spares: Callable[[TurnPlan], float]


def _engine(**values: Any) -> Callable[[Distill], Distill]:
    return lambda recipe: replace(recipe, engine=replace(recipe.engine, **values))


def _of(*words: str, share: float = 1.0) -> Callable[[TurnPlan], float]:
    """A share of the bytes of the kinds that begin with one of ``words``."""
    return lambda turn: share * sum(size for kind, size in turn.kinds.items() if kind.startswith(words))


def changes(recipe: Distill, ranks_a_machine: int, heads: int, tokens: int) -> list[Change]:
    """What may be changed, the cheapest first."""
    engine, found = recipe.engine, []
    passing = (ACTIVATIONS, TEMPORARY)
    r1 = recipe.equilibrium.r1 if recipe.equilibrium is not None else None
    exact = r1 is not None and r1.weight > 0 and r1.precision == "fp32"
    if recipe.teacher.dtype == "fp32" and engine.precision == "bf16" and not exact:  # computed with in bf16 anyway
        found.append(
            Change(
                "teacher.dtype",
                "teacher.dtype=bf16",
                lambda r: replace(r, teacher=replace(r.teacher, dtype="bf16")),
                _of("weights of teacher", "gathered", TEMPORARY),
            )
        )
    if engine.micro_batch > 1:  # the same batch in smaller parts
        fewer = _engine(micro_batch=1)
        found.append(Change("engine.micro_batch", "engine.micro_batch=1", fewer, _of(*passing)))
    if not engine.checkpointing:  # a forward more
        found.append(
            Change("engine.checkpointing", "engine.checkpointing=true", _engine(checkpointing=True), _of(*passing))
        )
    if engine.parallel == "replicate" and ranks_a_machine > 1:
        held = ("weights", "optimiser", "EMA", "gradients", TEMPORARY)
        found.append(Change("engine.parallel", "engine.parallel=fsdp", _engine(parallel="fsdp"), _of(*held)))
    sharded = engine.parallel == "fsdp" and ranks_a_machine > 1
    for degree in (2, 4, 8):  # the ranks trade tokens for heads
        if degree <= engine.sequence_parallel or ranks_a_machine % degree or heads % degree or tokens % degree:
            continue
        shared, spared = _engine(sequence_parallel=degree), _of(*passing, share=1 - engine.sequence_parallel / degree)
        found.append(Change("engine.sequence_parallel", f"engine.sequence_parallel={degree}", shared, spared))
    moments = ("bf16", "int8", "cpu")[("fp32", "bf16", "int8", "cpu").index(engine.optimiser_state) :]
    spared = _of("optimiser", TEMPORARY)
    kept = [
        Change("engine.optimiser_state", f"engine.optimiser_state={state}", _engine(optimiser_state=state), spared)
        for state in moments
    ]
    if sharded and engine.ema_on == "device" and recipe.student.kind == "full":
        kept.insert(
            max(0, len(kept) - 1),
            Change("engine.ema_on", "engine.ema_on=cpu", _engine(ema_on="cpu"), _of("EMA", TEMPORARY)),
        )
    found += kept  # less precise, then over the slower link to the host
    if recipe.student.kind == "full":  # another student altogether
        found.append(Change("student", _lora_settings(recipe), _as_lora, lambda turn: turn.peak))
    return found


def _lora_of(recipe: Distill) -> Lora:
    if recipe.student.lora is not None:
        return recipe.student.lora
    every = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    return replace(recipe.priming.fake_lora) if recipe.priming is not None else Lora(64, 64.0, every)


def _as_lora(recipe: Distill) -> Distill:
    student = replace(recipe.student, kind="lora", lora=_lora_of(recipe))
    return replace(recipe, student=student, engine=replace(recipe.engine, ema_on="device"))


def _lora_settings(recipe: Distill) -> str:
    if recipe.student.lora is not None:
        return "student.kind=lora"
    lora = _lora_of(recipe)
    inside = f"rank: {lora.rank}, alpha: {lora.alpha:g}, targets: [{', '.join(lora.targets)}]"
    return f"student.kind=lora 'student.lora={{{inside}}}'"


@dataclass(frozen=True)
class Advice:
    """A change, or two, with which every phase fits."""

    settings: str
    plan: Plan


def advise(plan: Plan, tried: Callable[[str], None] = lambda settings: None) -> Advice | None:
    """The cheapest change with which all phases of ``plan`` fit, with the allowance kept free if one does that.

    Args:
        tried: told of each change before it is planned.
    """
    config, hardware = plan.shapes.config, plan.hardware
    ranks = hardware.ranks // hardware.machines
    single = changes(plan.recipe, ranks, config["num_attention_heads"], plan.shapes.tokens)
    tight = None
    for several in [*((change,) for change in single), *_pairs(single)]:
        if not _could(plan, several):
            continue
        settings = " ".join(change.settings for change in several)
        tried(settings)
        found = _planned(plan, several)
        if found is None or found.failing:
            continue
        if not any(found.verdict(phase) == TIGHT for phase in found.phases):
            return Advice(settings, found)
        tight = tight or Advice(settings, found)
        if len(several) == 2:
            break
    return tight


def _pairs(single: list[Change]) -> Iterator[tuple[Change, Change]]:
    """Pairs in the order of what their dearer half costs."""
    places = itertools.combinations(range(len(single)), 2)
    for i, j in sorted(places, key=lambda pair: (pair[1], pair[0])):
        if single[i].key != single[j].key and "student" not in (single[i].key, single[j].key):
            yield single[i], single[j]


def _could(plan: Plan, several: tuple[Change, ...]) -> bool:
    room = plan.memory * (1 - plan.least_free)
    turns = [turn for phase in plan.failing for turn in plan.phases[phase].turns.values()]
    return all(turn.peak - sum(change.spares(turn) for change in several) <= room for turn in turns)


def _planned(plan: Plan, several: tuple[Change, ...]) -> Plan | None:
    """The plan of the changed recipe: the failing phases first, for what does not mend them mends nothing."""
    recipe = plan.recipe
    for change in several:
        recipe = change.apply(recipe)
    try:
        recipe = recipes.from_plain(recipes.to_plain(recipe), recipe.name)

        def planned(phases: list[str]) -> Plan:
            return make_plan(recipe, plan.hardware, plan.memory, phases=tuple(phases), in_use=plan.in_use)

        first = planned(plan.failing)
        return first if first.failing else planned(list(plan.phases))
    except UserError:  # no such recipe, or not on these ranks
        return None
