"""What the types of a recipe cannot say: ranges, and keys that do not go together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vpae import peer_recipe
from vpae.errors import UserError
from vpae.files import is_path
from vpae.recipe import Distill, Distillation, FinetuneFlow, FinetuneVae, Peer, Recipe
from vpae.strict import check_ranges, shown


def _paths(recipe: Recipe) -> dict[str, str | None]:
    if isinstance(recipe, FinetuneVae):
        return {"init": recipe.init}
    paths = {"teacher.path": recipe.teacher.path, "data.cache": recipe.data.cache}
    return paths | ({"priming_run": recipe.priming_run} if isinstance(recipe, Distill) else {})


def check(recipe: Recipe, where: str) -> None:
    """Refuse what cannot be run; ``where`` names the file in errors.

    Raises:
        UserError: ranges, names and paths, or keys that do not go together.
    """
    check_ranges(recipe, where, "")

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{where}: {message}")

    need(
        is_path(recipe.name)
        and "/" not in recipe.name
        and recipe.name not in (".", "..")
        and recipe.name.isprintable(),
        f"name {shown(recipe.name)} must be one that a file can have: its run goes to outputs/NAME",
    )
    for key, path in _paths(recipe).items():
        need(path is None or is_path(path), f"{key} {shown(path)} cannot be a path")
    engine = recipe.engine
    need(
        engine.global_batch % engine.micro_batch == 0,
        f"engine.global_batch {engine.global_batch} is not a multiple of engine.micro_batch {engine.micro_batch}",
    )
    if isinstance(recipe, FinetuneVae):
        need(
            engine.sequence_parallel == 1,
            "engine.sequence_parallel splits a transformer's tokens: set it to 1 for a VAE",
        )
        need(
            recipe.training.trained == "all" or recipe.init is not None,
            "training.trained is decoder, so init must name the VAE whose encoder is kept",
        )
    if isinstance(recipe, FinetuneFlow):
        need(recipe.teacher.dtype == "fp32", "teacher.dtype must be fp32: flow matching trains these weights")
    if not isinstance(recipe, Distillation):
        return
    need(
        recipe.teacher.dtype == "fp32" or engine.precision == "bf16",
        "teacher.dtype bf16 has no fp32 to compute in: set engine.precision to bf16, or teacher.dtype to fp32",
    )
    if recipe.student.kind == "lora":
        need(recipe.student.lora is not None, "student.kind is lora, so student.lora must say its rank, alpha, targets")
        need(
            engine.ema_on == "device",
            "engine.ema_on is cpu, and the EMA of a LoRA student is a small adapter on the teacher's weights: set it "
            "to device",
        )
    if isinstance(recipe, Peer):
        peer_recipe.check(recipe.method, recipe.student.kind, need)
        return
    need(recipe.priming is not None or recipe.equilibrium is not None, "both phases are null: nothing to do")
    need(
        recipe.priming_run is None or (recipe.priming is None and recipe.equilibrium is not None),
        "priming_run starts phase II from another run's phase I: set priming: null and keep equilibrium",
    )
    _check_phases(recipe, need)


def _check_phases(recipe: Distill, need: Callable[[bool, str], None]) -> None:
    if recipe.priming is not None:
        need(
            recipe.priming.score_time.low > 0, "priming.score_time.low must be above 0 (the score is infinite at t = 0)"
        )
    if recipe.equilibrium is not None:
        phase = recipe.equilibrium
        need(
            float(np.float32(phase.judge_time.high)) < 1,
            "equilibrium.judge_time.high must be below 1: at t = 1 the judge sees pure noise and no gradient is left",
        )
        need(phase.taps is None or len(phase.taps) > 0, "equilibrium.taps names no block; null takes the default ones")
        on_teacher = recipe.student.kind == "lora" or phase.judge == "frozen"
        need(
            recipe.teacher.dtype == "fp32" or not on_teacher or phase.r1.weight == 0 or phase.r1.precision == "engine",
            "equilibrium.r1.precision fp32 needs a judge of fp32 weights, and this one stands on the teacher's, in "
            "bf16: set it to engine, or teacher.dtype to fp32",
        )
        need(
            phase.head.width % phase.head.num_heads == 0, "equilibrium.head.width must be a multiple of head.num_heads"
        )
