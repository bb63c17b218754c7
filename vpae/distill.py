"""``vpae distill``: the phases of V-PAE, either alone or both, or those of a peer; one process or many."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpae import recipe as recipes
from vpae.data.cache import Cache, prepare
from vpae.data.encoders import Encoders, transformer_config
from vpae.data.samples import TeacherSamples, prepare_samples
from vpae.data.sources import open_source
from vpae.draws import seed_of
from vpae.engine import checkpoint as checkpoints
from vpae.engine.layout import placed
from vpae.engine.parallel import Processes, shard_module
from vpae.engine.trainer import Run, Trainer, identity_of
from vpae.engine.watch import Watch
from vpae.errors import UserError
from vpae.gallery import Gallery
from vpae.methods.base import Method
from vpae.methods.equilibrium import Equilibrium
from vpae.methods.priming import Priming
from vpae.models import (
    Cast,
    check_conditioning,
    check_fit,
    check_tokens,
    choose_taps,
    compile_blocks,
    distillation_cast,
    fake_score,
    find_model,
    head_of,
    judge_of,
    materialise,
    preflight,
    weights_fingerprint,
)
from vpae.peer_recipe import samples_of, taps_of
from vpae.peers import build_peer
from vpae.recipe import Distill, Distillation, Peer
from vpae.roles import copy_weights
from vpae.runs import RECIPE, first_difference, open_folder, phases_of, stored_identity


def distill(
    recipe: recipes.Recipe,
    folder: Path,
    resume: bool,
    processes: Processes,
    *,
    check: Callable[[Distillation, Processes], None] = lambda recipe, processes: None,
) -> bool:
    """Run the phases the recipe holds, in order; False when a signal interrupted one (everything is saved).

    Args:
        check: called on every rank before anything is read or written; may refuse the run.

    Raises:
        UserError: the recipe is of another kind, or anything a phase finds wrong.
    """
    if not isinstance(recipe, Distillation):
        raise UserError(f"recipe {recipe.name!r} is of kind {recipe.kind}; run it with: vpae finetune")
    processes = placed(processes, recipe.engine)
    preflight_distill(recipe, processes)
    check(recipe, processes)
    open_folder(folder, recipe, resume, processes)
    encoders = Encoders(find_model(recipe.teacher.path), processes.device)
    data = open_data(recipe, encoders, processes)
    phases = phases_of(recipe)
    for before, phase in zip((None, *phases[:-1]), phases, strict=True):
        if resume and phase != phases[-1] and _is_finished(folder / phase, processes):
            continue  # the last one is always built
        trainer = None
        gc.collect()  # phase I's networks hold one another in cycles, and must go before phase II's come
        trainer = build_phase(recipe, phase, folder, data, encoders, processes)
        if not (resume and trainer.resume()):
            if before is not None:
                hand_over(recipe, folder, before, trainer, data.fingerprint, processes)
            elif isinstance(recipe, Distill) and recipe.priming_run is not None:
                run = Path(recipe.priming_run)
                hand_over(recipe, run, _last_phase(run), trainer, None, processes)
        if trainer.turn < trainer.method.turns and not trainer.train():
            return False
        if trainer.stopped:  # in the very last turn
            return False
    return True


def open_data(recipe: Distillation, encoders: Encoders, processes: Processes) -> Cache | TeacherSamples:
    """What the recipe's phases train on: the cache, or the teacher's clips for its conditions; made where missing.

    The encoders keep their VAE alone.
    """
    cache = prepare(recipe.data, encoders, processes)
    encoders.keep_vae()
    if isinstance(recipe, Peer) and samples_of(recipe.method) is not None:
        return prepare_samples(recipe, cache, encoders, processes)
    return cache


def preflight_distill(recipe: Distillation, processes: Processes) -> None:
    """Whatever would stop a run before its first turn and can be known without reading a weight or a clip.

    Raises:
        UserError: there is something.
    """
    source = open_source(recipe.data.source)
    pipeline = find_model(recipe.teacher.path)
    check_conditioning(pipeline)
    config = transformer_config(pipeline)
    check_tokens(config, pipeline, source.shape, processes)
    fp32, named = "", None
    if isinstance(recipe, Peer):
        named = taps_of(recipe.method)
    elif recipe.equilibrium is not None:
        named, r1 = (recipe.equilibrium.taps, "equilibrium.taps"), recipe.equilibrium.r1
        fp32 = "equilibrium.r1.precision: fp32" if r1.weight > 0 and r1.precision == "fp32" else ""
    if named is not None:
        chosen, key = named
        choose_taps(chosen, config["num_layers"], key)
    preflight(recipe.teacher, recipe.engine, processes, fp32)


def _is_finished(phase: Path, processes: Processes) -> bool:
    """Whether the phase in this folder has taken all its turns."""
    found = checkpoints.find_agreed(phase / "checkpoints", processes)
    return found is not None and found.turn >= found.part("turns", int)


def build_phase(
    recipe: Distillation,
    phase: str,
    folder: Path,
    data: Cache | TeacherSamples,
    encoders: Encoders,
    processes: Processes,
) -> Trainer:
    """The networks, method and trainer of one phase, at its first turn."""
    cache = data.cache if isinstance(data, TeacherSamples) else data
    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
    check_fit(cast.teacher.backbone.transformer, cache, recipe.teacher.path)
    if isinstance(recipe, Peer):
        method, heads = build_peer(recipe, phase, cast, processes)
        for head in heads:
            head.checkpointing = recipe.engine.checkpointing
    else:
        method, heads = method_of(recipe, phase, cast, processes)
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
        identity=_identity(recipe, data.fingerprint, cache.latent_shape, phase),
        recipe_text=recipes.dump(recipe),
        fetch=data.fetch,
        samples=len(data),
        modules=[b.transformer for b in cast.backbones] + heads,
        watch=Watch(recipe.watch),
        gallery=gallery,
    )
    return Trainer(method, run, processes)


def _identity(recipe: Distillation, data: str, latent_shape: tuple[int, ...], phase: str) -> dict[str, Any]:
    """Phase I does not depend on what comes after it, phase II depends on what it starts from."""
    identity = identity_of(recipe, data, phase) | {"latent_shape": list(latent_shape)}
    if phase == "priming":
        del identity["equilibrium"], identity["priming_run"]
    identity["teacher"] = {**identity["teacher"], "weights": weights_fingerprint(find_model(recipe.teacher.path))}
    del identity["teacher"]["path"]
    return identity


def method_of(
    recipe: Distill,
    phase: str,
    cast: Cast,
    processes: Processes,
    born: Callable[[Cast, Processes, str], None] = materialise,
    built: Callable[..., nn.Module] = head_of,
) -> tuple[Method, list[nn.Module]]:
    """A phase's method over a cast that is still without memory, and its networks besides the backbones.

    Args:
        born: gives the cast memory and weights, which a plan does without.
        built: makes the head.
    """
    if phase == "priming":
        return _priming(recipe, cast, processes, born)
    return _equilibrium(recipe, cast, processes, born, built)


def _priming(
    recipe: Distill, cast: Cast, processes: Processes, born: Callable[[Cast, Processes, str], None]
) -> tuple[Method, list[nn.Module]]:
    fake = fake_score(cast, recipe.priming.fake_lora, recipe.seed)
    born(cast, processes, recipe.engine.ema_on)
    method = Priming(recipe.priming, teacher=cast.teacher, student=cast.student, fake_score=fake, ema=cast.ema)
    return method, []


def _equilibrium(
    recipe: Distill,
    cast: Cast,
    processes: Processes,
    born: Callable[[Cast, Processes, str], None],
    built: Callable[..., nn.Module],
) -> tuple[Method, list[nn.Module]]:
    settings = recipe.equilibrium
    judge = judge_of(recipe, cast)
    taps = choose_taps(settings.taps, cast.teacher.backbone.transformer.config.num_layers, "equilibrium.taps")
    head = built(settings.head, len(taps), cast, recipe.seed, processes.device)
    born(cast, processes, recipe.engine.ema_on)
    shard_module(head, processes)
    head.checkpointing = recipe.engine.checkpointing
    method = Equilibrium(
        settings, teacher=cast.teacher, student=cast.student, ema=cast.ema, judge=judge, head=head, taps=taps
    )
    return method, [head]


def _last_phase(run: Path) -> str:
    """The phase of another run that phase II goes on from: V-PAE's phase I, or a peer's last."""
    if not (run / RECIPE).is_file():
        return "priming"
    recipe = recipes.load_stored(run / RECIPE)
    return phases_of(recipe)[-1] if isinstance(recipe, Peer) else "priming"


def hand_over(
    recipe: Distillation, run: Path, before: str, trainer: Trainer, data: str | None, processes: Processes
) -> None:
    """Start a phase from the EMA of the one before it: student and EMA (and so the unified judge) get its weights.

    Args:
        run: folder of the run that holds the phase ``before``.
        data: fingerprint of the data that it must have seen, and with it the whole recipe that it must have been run
            with; None: a phase of another run, of which only teacher, student and shape of clips must agree.

    Raises:
        UserError: the phase before is not there or not finished, or is not one to go on from.
    """
    what = {"priming": "phase I"}.get(before, f"phase {before}")
    second = "phase II" if isinstance(recipe, Distill) else f"phase {trainer.method.name}"
    folder = run / before
    found = checkpoints.find_agreed(folder / "checkpoints", processes)
    if found is None:
        mend = "; run both, or set priming: null" if before == "priming" else ""
        raise UserError(f"{second} needs {what}, and {folder} holds no checkpoint{mend}")
    shape = tuple(trainer.run.identity["latent_shape"])
    theirs, mine = stored_identity(found.part("identity", dict)), _identity(recipe, data or "", shape, before)
    if data is None:
        theirs, mine = ({key: of.get(key) for key in ("teacher", "student", "latent_shape")} for of in (theirs, mine))
    difference = first_difference(theirs, mine)
    if difference:
        raise UserError(f"{second} cannot go on from {what} in {folder}: {difference}")
    if found.turn < found.part("turns", int):
        raise UserError(
            f"{what} in {folder} stopped at turn {found.turn} of {found.part('turns', int)}; finish it with --resume"
        )
    player = trainer.method.players["student"]
    targets = {f"ema.{name}": p.detach() for name, p in player.ema.parameters.items()}
    checkpoints.load(found, targets, processes)
    with torch.no_grad():
        for name, parameter in player.parameters.items():
            parameter.copy_(player.ema.parameters[name])
    method: Any = trainer.method
    if isinstance(recipe, Distill) and recipe.equilibrium.judge == "trainable":
        copy_weights(method.ema, method.judge)
