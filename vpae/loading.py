"""A model named on the command line: a diffusers folder, or a run of vpae and one of its roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vpae import recipe as recipes
from vpae.backbone import Backbone
from vpae.data.bounce import World
from vpae.data.encoders import transformer_config
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import alone
from vpae.errors import UserError
from vpae.extras import check_attention_backend, sample_with
from vpae.files import is_path
from vpae.models import find_model, student_lora, weights_fingerprint, wrap
from vpae.recipe import Distillation, Engine, FinetuneFlow, Peer, Teacher
from vpae.roles import Role, add_lora
from vpae.runs import RECIPE, phases_of
from vpae.sections import Lora
from vpae.strict import shown
from vpae.weights import give_memory, matrices_in_bf16, read_weights, unborn_transformer

ROLES = ("student", "ema", "teacher", "fake_score", "judge")


@dataclass(frozen=True)
class Model:
    """A role and the pipeline folder whose encoders and scheduler belong to it.

    Attributes:
        recipe: of the run it comes from, None for a plain pipeline folder.
        source: one line for people: which weights these are.
        fill: gives the role of :func:`open_model` memory and weights.
    """

    role: Role
    pipeline: Path
    recipe: recipes.Recipe | None
    source: str
    fill: Callable[[], None] = lambda: None

    def read(self, attention: str, precision: str) -> None:
        """Fill the role of :func:`open_model`, to sample through a kernel that was checked, in ``fp32`` or ``bf16``.

        Raises:
            UserError: its weights are damaged.
        """
        transformer = self.role.backbone.transformer
        if precision == "bf16":
            matrices_in_bf16(transformer)
        self.fill()
        sample_with(self.role.backbone, attention, precision)

    @property
    def _source(self) -> dict[str, Any]:
        return getattr(getattr(self.recipe, "data", None), "source", {})

    @property
    def negative_prompt(self) -> str:
        """What its unconditional branch was trained on; empty where that is unknown."""
        return getattr(getattr(self.recipe, "data", None), "negative_prompt", "")

    @property
    def is_bounce(self) -> bool:
        """Whether it was trained on the simulated world, as far as its recipe tells."""
        return self._source.get("kind") == "bounce"

    @property
    def world(self) -> World:
        """The Bounce world it was trained on; the default one where that is unknown or other data."""
        return World.from_dict(self._source.get("world", {})) if self.is_bounce else World()

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(num_frames, height, width)`` of the clips it was trained on."""
        if self._source.get("kind") in ("videos", "generate", "prompts"):
            return (self._source["num_frames"], *self._source["size"])
        return self.world.num_frames, self.world.size, self.world.size


def load_model(path: Path, role: str | None = None, phase: str | None = None) -> Model:
    """Load a pipeline folder, an asset's name, or a role of a run folder (default: ``ema``, the weights that ship).

    Raises:
        UserError: it is neither, or has no such role or no checkpoint yet, or its weights are damaged.
    """
    model = open_model(path, role, phase)
    model.fill()
    return model


def open_model(path: Path, role: str | None = None, phase: str | None = None) -> Model:
    """As :func:`load_model`, but with a role on the meta device: encoders that are gone later can run before it.

    Raises:
        UserError: it is neither, or has no such role or no checkpoint yet.
    """
    if not is_path(str(path / RECIPE)):
        raise UserError(f"{shown(str(path))} cannot be the path of a model")
    if (path / RECIPE).is_file() and not (path / "model_index.json").is_file():
        return _from_run(path, role or "ema", phase)
    if role not in (None, "teacher"):
        raise UserError(f"--role {role} is for run folders; {path} is not one (no {RECIPE} in it)")
    folder = path if (path / "model_index.json").is_file() else find_model(str(path))
    backbone = _plain_backbone(transformer_config(folder))
    chosen = Role("model", backbone)
    stored = folder / RECIPE
    recipe = recipes.load_stored(stored) if stored.is_file() else None
    return Model(chosen, folder, recipe, str(folder), lambda: _give_weights(chosen, folder))


def _plain_backbone(config: Mapping[str, Any]) -> Backbone:
    transformer = unborn_transformer(config)
    transformer.set_attention_backend(check_attention_backend("native"))
    transformer.requires_grad_(False)
    return Backbone(transformer)


def _from_run(run: Path, role: str, phase: str | None) -> Model:
    recipe = recipes.load_stored(run / RECIPE)
    if isinstance(recipe, FinetuneFlow):
        return _from_teacher_run(run, recipe, role)
    if not isinstance(recipe, Distillation):
        raise UserError(
            f"{run} is a {recipe.kind} run: there is nothing to sample from; its result is {run / recipe.kind}"
        )
    if role not in ROLES:
        raise UserError(f"a distillation has the roles {', '.join(ROLES)} to sample from, not {role!r}")
    place = _place_of(recipe, role)
    only = place.phase or phase
    if phase not in (None, only):
        raise UserError(f"phase {phase} has no {role}; it belongs to {only}")
    phases = phases_of(recipe)
    if only is not None and only not in phases:
        raise UserError(f"{run} has no phase {only}; it has {', '.join(phases)}")
    pipeline = find_model(recipe.teacher.path)
    base = _base(recipe.teacher, recipe.engine, transformer_config(pipeline))
    if place.stored is None:
        teacher = Role("teacher", base)
        return Model(teacher, pipeline, recipe, f"{role} {pipeline}", lambda: _give_weights(teacher, pipeline))
    own = place.stored.split(".")[-1]
    chosen = Role(own, base) if place.lora is None else add_lora(base, own, place.lora, recipe.seed)
    for name in reversed(phases) if only is None else (only,):
        found = checkpoints.find(run / name / "checkpoints")
        if found is not None:
            _check_base(found, pipeline)
            base_from = None if chosen.adapter is None else pipeline
            fill = partial(_read_checkpoint, found, chosen, place.stored, base_from)
            return Model(chosen, pipeline, recipe, f"{role} of {name}, turn {found.turn}, {run}", fill)
    raise UserError(f"{run} holds no checkpoint{f' of phase {only}' if only else ''} yet")


def _check_base(found: checkpoints.Checkpoint, pipeline: Path) -> None:
    """Adapters, and the encoders around any student, belong to the teacher they were trained beside."""
    teacher, here = found.part("identity", dict).get("teacher"), weights_fingerprint(pipeline)
    there = teacher.get("weights") if isinstance(teacher, dict) else None
    if there != here:
        raise UserError(
            f"{found.folder} was distilled from a teacher of other weights ({there}) than {pipeline} holds now "
            f"({here}); put the old ones back, or distil again"
        )


def _base(teacher: Teacher, engine: Engine, config: Mapping[str, Any]) -> Backbone:
    """A backbone without memory, to be sampled in fp32, which a kernel for training may not take."""
    unborn = unborn_transformer(config)
    return wrap(unborn, replace(teacher, attention="native"), replace(engine, checkpointing=False))


def _give_weights(role: Role, pipeline: Path | None) -> None:
    """Memory for a whole network on this process's device; its base from ``pipeline``, or (None) from elsewhere."""
    give_memory(role.backbone, alone())
    if pipeline is not None:
        read_weights(role.backbone, pipeline, alone())


def _read_checkpoint(found: checkpoints.Checkpoint, role: Role, stored: str, pipeline: Path | None) -> None:
    """A role's own weights under the name ``stored`` of a checkpoint, its base as :func:`_give_weights` says."""
    _give_weights(role, pipeline)
    checkpoints.load(found, {f"{stored}.{key}": p.detach() for key, p in role.named_parameters()}, alone())


@dataclass(frozen=True)
class _Place:
    """Where a run keeps a role.

    Attributes:
        stored: the name of its weights in a checkpoint; None: it is the frozen teacher.
        lora: its adapter; None: it has weights of its own.
        phase: the only one that has it; None: all have.
    """

    stored: str | None
    lora: Lora | None = None
    phase: str | None = None


def _place_of(recipe: Distillation, role: str) -> _Place:
    lora = student_lora(recipe.student)
    if role in ("student", "ema"):
        return _Place(role, lora)
    if role == "teacher":
        return _Place(None)
    if isinstance(recipe, Peer):
        return _place_in_peer(recipe, role)
    if role == "fake_score":
        if recipe.priming is None:
            raise UserError("the recipe of this run has no phase I, so there is no fake_score")
        return _Place("fake_score", recipe.priming.fake_lora, "priming")
    if recipe.equilibrium is None:
        raise UserError("the recipe of this run has no phase II, so there is no judge")
    stored = {"unified": "ema", "frozen": None, "trainable": "head.judge"}[recipe.equilibrium.judge]
    return _Place(stored, None if stored is None else lora, "equilibrium")


def _place_in_peer(recipe: Peer, role: str) -> _Place:
    method = recipe.method
    if method.kind == "dmd2":  # its fake score is its judge
        return _Place("critic.fake_score", method.fake_lora, "dmd2")
    if role == "judge" and method.kind == "apt":
        return _Place("head.judge", student_lora(recipe.student), "apt")
    if role == "judge" and method.kind in ("ladd", "pcm"):
        return _Place(None)
    raise UserError(f"the method of this run, {method.kind}, has no {role}")


def _from_teacher_run(run: Path, recipe: FinetuneFlow, role: str) -> Model:
    """The transformer of a flow-matching run, finished or not."""
    if role not in ("student", "ema"):
        raise UserError(f"a flow-matching run has the roles student and ema to sample from, not {role!r}")
    found = checkpoints.find(run / "checkpoints")
    if found is None:
        raise UserError(f"{run} holds no checkpoint yet")
    own = run / "pipeline"
    pipeline = own if (own / "model_index.json").is_file() else find_model(recipe.teacher.path)
    config = transformer_config(pipeline) if recipe.transformer is None else recipe.transformer
    chosen = Role(role, _base(recipe.teacher, recipe.engine, config))
    fill = partial(_read_checkpoint, found, chosen, role, None)
    return Model(chosen, pipeline, recipe, f"{role} of flow matching, turn {found.turn}, {run}", fill)
