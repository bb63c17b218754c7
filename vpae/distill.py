"""``vpae distill``: phase I, hand-over, phase II, either alone or both; one process or many."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpae import recipe as recipes
from vpae.backbone import default_taps
from vpae.data.cache import Cache, prepare
from vpae.data.encoders import Encoders, transformer_config
from vpae.data.sources import open_source
from vpae.draws import generator_of, seed_of
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import Processes, placed, shard_module
from vpae.engine.trainer import Run, Trainer, identity_of
from vpae.engine.watch import Watch
from vpae.errors import UserError
from vpae.gallery import Gallery
from vpae.heads import build_head
from vpae.methods.base import Method
from vpae.methods.equilibrium import Equilibrium
from vpae.methods.priming import Priming
from vpae.models import (
    Cast,
    check_conditioning,
    check_fit,
    compile_blocks,
    distillation_cast,
    fake_score,
    find_model,
    judge_of,
    materialise,
    preflight,
    weights_fingerprint,
)
from vpae.recipe import Distill
from vpae.roles import copy_weights
from vpae.runs import PHASES, first_difference, open_folder, stored_identity


def distill(recipe: recipes.Recipe, folder: Path, resume: bool, processes: Processes) -> bool:
    """Run the phases the recipe holds, in order; False when a signal interrupted one (everything is saved).

    Raises:
        UserError: the recipe is of another kind, or anything a phase finds wrong.
    """
    if not isinstance(recipe, Distill):
        raise UserError(f"recipe {recipe.name!r} is of kind {recipe.kind}; run it with: vpae finetune")
    processes = placed(processes, recipe.engine.parallel)
    preflight_distill(recipe, processes)
    open_folder(folder, recipe, resume, processes)
    encoders = Encoders(find_model(recipe.teacher.path), processes.device)
    cache = prepare(recipe.data, encoders, processes)
    encoders.keep_vae()
    for phase in PHASES:
        if getattr(recipe, phase) is None or (resume and _is_finished(recipe, phase, folder, processes)):
            continue
        trainer = None
        gc.collect()  # phase I's networks hold one another in cycles, and must go before phase II's come
        trainer = build_phase(recipe, phase, folder, cache, encoders, processes)
        resumed = resume and trainer.resume()
        if phase == "equilibrium" and not resumed:
            if recipe.priming is not None:
                hand_over(recipe, folder, trainer, cache.fingerprint, processes)
            elif recipe.priming_run is not None:
                hand_over(recipe, Path(recipe.priming_run), trainer, None, processes)
        if trainer.turn < trainer.method.turns and not trainer.train():
            return False
        if trainer.stopped:  # in the very last turn
            return False
    return True


def preflight_distill(recipe: Distill, processes: Processes) -> None:
    """Whatever would stop a run before its first turn and can be known without reading a weight or a clip.

    Raises:
        UserError: there is something.
    """
    open_source(recipe.data.source)
    check_conditioning(find_model(recipe.teacher.path))
    fp32 = ""
    if recipe.equilibrium is not None:
        _taps(recipe.equilibrium.taps, transformer_config(find_model(recipe.teacher.path))["num_layers"])
        r1 = recipe.equilibrium.r1
        fp32 = "equilibrium.r1.precision: fp32" if r1.weight > 0 and r1.precision == "fp32" else ""
    preflight(recipe.teacher, recipe.engine, processes, fp32)


def _taps(chosen: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    taps = default_taps(num_layers) if chosen is None else tuple(chosen)
    if not taps or max(taps) >= num_layers or min(taps) < 0:
        raise UserError(f"equilibrium.taps {list(taps)} do not fit a transformer of {num_layers} blocks")
    return taps


def _is_finished(recipe: Distill, phase: str, folder: Path, processes: Processes) -> bool:
    """Whether a phase that need not be looked at again has taken all its turns (the last one is always built)."""
    if phase == "equilibrium" or recipe.equilibrium is None:
        return False
    found = checkpoints.find_agreed(folder / phase / "checkpoints", processes)
    return found is not None and found.turn >= found.state["turns"]


def build_phase(
    recipe: Distill, phase: str, folder: Path, cache: Cache, encoders: Encoders, processes: Processes
) -> Trainer:
    """The networks, method and trainer of one phase, at its first turn."""
    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
    check_fit(cast.teacher.backbone.transformer, cache, recipe.teacher.path)
    method, heads = (_priming if phase == "priming" else _equilibrium)(recipe, cast, processes)
    if recipe.engine.compile:
        compile_blocks(cast.backbones)
    gallery = Gallery(
        folder / phase,
        cache,
        encoders,
        recipe.evaluate,
        recipe.engine.samples,
        recipe.engine.precision,
        processes,
        student=cast.ema,
        teacher=cast.teacher,
    )
    run = Run(
        folder=folder / phase,
        settings=recipe.engine,
        seed=seed_of(recipe.seed, phase),
        identity=_identity(recipe, cache.fingerprint, cache.latent_shape, phase),
        recipe_text=recipes.dump(recipe),
        fetch=cache.fetch,
        samples=len(cache),
        modules=[b.transformer for b in cast.backbones] + heads,
        watch=Watch(recipe.watch),
        gallery=gallery,
    )
    return Trainer(method, run, processes)


def _identity(recipe: Distill, data: str, latent_shape: tuple[int, ...], phase: str) -> dict[str, Any]:
    """Phase I does not depend on what comes after it, phase II depends on what it starts from."""
    identity = identity_of(recipe, data, phase) | {"latent_shape": list(latent_shape)}
    if phase == "priming":
        del identity["equilibrium"], identity["priming_run"]
    identity["teacher"] = {**identity["teacher"], "weights": weights_fingerprint(find_model(recipe.teacher.path))}
    del identity["teacher"]["path"]
    return identity


def _priming(recipe: Distill, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    fake = fake_score(cast, recipe.priming.fake_lora, recipe.seed)
    materialise(cast, processes)
    method = Priming(recipe.priming, teacher=cast.teacher, student=cast.student, fake_score=fake, ema=cast.ema)
    return method, []


def _equilibrium(recipe: Distill, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    settings = recipe.equilibrium
    judge = judge_of(recipe, cast)
    config = cast.teacher.backbone.transformer.config
    taps = _taps(settings.taps, config.num_layers)
    head = build_head(
        settings.head.kind,
        feature_dim=cast.teacher.backbone.feature_dim,
        num_taps=len(taps),
        image_dim=config.image_dim,
        text_dim=config.text_dim,
        width=settings.head.width,
        num_heads=settings.head.num_heads,
        queries=settings.head.queries,
        generator=generator_of(recipe.seed, "head"),
    ).to(processes.device)
    materialise(cast, processes)
    shard_module(head, processes)
    method = Equilibrium(
        settings, teacher=cast.teacher, student=cast.student, ema=cast.ema, judge=judge, head=head, taps=taps
    )
    return method, [head]


def hand_over(recipe: Distill, run: Path, trainer: Trainer, data: str | None, processes: Processes) -> None:
    """Start phase II from the EMA of phase I: student and EMA (and so the unified judge) get its weights.

    Args:
        run: folder of the run that holds phase I.
        data: fingerprint of the cache that phase I must have seen, and with it the whole recipe that it must have been
            run with; None: another run's phase I, of which only teacher, student and shape of clips must agree.

    Raises:
        UserError: phase I is not there or not finished, or is not one to go on from.
    """
    priming = run / "priming"
    found = checkpoints.find_agreed(priming / "checkpoints", processes)
    if found is None:
        raise UserError(f"phase II needs phase I, and {priming} holds no checkpoint; run both, or set priming: null")
    shape = tuple(trainer.run.identity["latent_shape"])
    theirs, mine = stored_identity(found.state), _identity(recipe, data or "", shape, "priming")
    if data is None:
        theirs, mine = ({key: of.get(key) for key in ("teacher", "student", "latent_shape")} for of in (theirs, mine))
    difference = first_difference(theirs, mine)
    if difference:
        raise UserError(f"phase II cannot go on from phase I in {priming}: {difference}")
    if found.turn < found.state["turns"]:
        raise UserError(
            f"phase I in {priming} stopped at turn {found.turn} of {found.state['turns']}; finish it with --resume"
        )
    player = trainer.method.players["student"]
    targets = {f"ema.{name}": p.detach() for name, p in player.ema.parameters.items()}
    checkpoints.load(found, targets, processes)
    with torch.no_grad():
        for name, parameter in player.parameters.items():
            parameter.copy_(player.ema.parameters[name])
    method: Any = trainer.method
    if recipe.equilibrium.judge == "trainable":
        copy_weights(method.ema, method.judge)
