"""A run, written down whole: frozen dataclasses, strict YAML, dotted overrides. Nothing else reads YAML.

Every number that changes a result stands in the file. A missing, unknown or mistyped key is an error that names the
key, the file and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from vpae import peer_recipe
from vpae.errors import UserError
from vpae.flow import TimeLaw
from vpae.sections import Head, Lora, Optimiser
from vpae.strict import build, kind_of, read_yaml, shown


@dataclass(frozen=True)
class Teacher:
    """The frozen model. ``path`` is a diffusers folder of a WanImageToVideoPipeline or a WanPipeline.

    ``dtype`` is how its weights (the base of every LoRA) are kept in memory; a full student's are always fp32.
    """

    path: str
    dtype: Literal["fp32", "bf16"]
    attention: str
    fold_text_padding: bool


@dataclass(frozen=True)
class Data:
    """What is trained on: ``source`` as understood by vpae.data.sources, encoded once into ``cache``."""

    source: dict[str, Any]
    cache: str
    negative_prompt: str


@dataclass(frozen=True)
class Student:
    """``full``: own weights, all trained. ``lora``: adapters on the teacher's frozen weights."""

    kind: Literal["full", "lora"]
    lora: Lora | None


@dataclass(frozen=True)
class Priming:
    """Phase I, stability priming (V-PAE, arXiv 2508.21019)."""

    student_steps: int
    fake_per_student: int
    student_time: TimeLaw
    score_time: TimeLaw
    fake_time: TimeLaw
    guidance_scale: float
    normaliser: Literal["dmd", "score", "none"]
    fake_lora: Lora
    ema_decay: float
    student_optimiser: Optimiser
    fake_optimiser: Optimiser


@dataclass(frozen=True)
class R1:
    """ST-R1: finite differences under spatial and temporal noise, weight 0 switches it off.

    ``form``: ``separate`` two differences, one under noise that is constant in time, one under noise that is constant
    over space; ``joint`` one difference under their sum; ``differences`` as ``separate``, but the temporal noise moves
    each pixel's step from frame to frame. ``precision``: of the judge's forwards for this term; where the engine's is
    bf16, a difference at sigma 0.01 is mostly rounding, and fp32 costs one forward more and slower ones. ``every``: on
    every so many-th turn of the head, with as many times the weight (lazy regularisation, StyleGAN2, arXiv 1912.04958).
    """

    weight: float
    spatial_sigma: float
    temporal_sigma: float
    form: Literal["separate", "joint", "differences"]
    on: Literal["real", "both"]
    precision: Literal["engine", "fp32"]
    every: int


@dataclass(frozen=True)
class Sds:
    """Conditional SDS against the frozen teacher; ``weight`` is the paper's lambda.

    ``first_frame_weight`` is of no effect where the model is given its first latent frame (Wan2.2-TI2V).
    """

    weight: float
    time: TimeLaw
    guidance_scale: float
    first_frame_weight: float


@dataclass(frozen=True)
class Equilibrium:
    """Phase II, unified adversarial equilibrium (V-PAE).

    ``head_warmup_turns`` come before the first turn of the student, who else may outrun a head that knows nothing yet.
    """

    student_steps: int
    head_per_student: int
    head_warmup_turns: int
    judge: Literal["unified", "frozen", "trainable"]
    taps: tuple[int, ...] | None
    head: Head
    adversarial: Literal["hinge", "softplus"]
    judge_time: TimeLaw
    judge_input: Literal["noised", "clean"]
    share_noise: bool
    r1: R1
    sds: Sds
    ema_decay: float
    student_optimiser: Optimiser
    head_optimiser: Optimiser


@dataclass(frozen=True)
class Engine:
    """How a run is carried out.

    Only ``global_batch``, ``precision``, ``compile`` and ``optimiser_state`` change what is learnt.

    ``micro_batch`` is the most samples that a rank computes at once; the rest of its share is accumulated.
    ``parallel`` says how several ranks hold the weights: ``fsdp`` in shards over all of them, gathered block by block,
    as a large model needs it; ``hsdp`` in shards over the ranks of one machine, the same on every machine, so that only
    gradients cross the network; ``replicate`` whole on every rank, where only gradients travel, faster where it fits.
    ``sequence_parallel`` ranks share each clip's tokens. ``optimiser_state``: precision of Adam's two moments, or
    ``cpu`` to keep them (in fp32, the same numbers) in the machine's own memory. ``ema_on``: where the EMA of a sharded
    full student is kept; from ``cpu`` each block's weights come to the device when they are wanted.
    ``async_checkpoints``: training goes on while a checkpoint is written from a copy in the machine's memory.
    """

    global_batch: int
    micro_batch: int
    parallel: Literal["fsdp", "hsdp", "replicate"]
    sequence_parallel: int
    precision: Literal["fp32", "bf16"]
    checkpointing: bool
    compile: bool
    optimiser_state: Literal["fp32", "bf16", "int8", "cpu"]
    ema_on: Literal["device", "cpu"]
    log_every: int
    sample_every: int
    samples: int
    checkpoint_every: int
    async_checkpoints: bool
    keep_checkpoints: int


@dataclass(frozen=True)
class Watch:
    """Limits of the collapse alarm; see vpae.engine.watch."""

    action: Literal["warn", "stop"]
    after_steps: int
    patience: int
    min_motion_ratio: float
    max_motion_ratio: float
    max_frame0_likeness: float
    max_channel_drift: float
    max_logit: float


@dataclass(frozen=True)
class Evaluate:
    """What the trained student is judged on, and the teacher's sampler beside it."""

    clips: int
    batch: int
    teacher_steps: int
    teacher_guidance: float
    seed: int


@dataclass(frozen=True)
class Distill:
    """``vpae distill``: phase I, hand-over, phase II. A phase set to null is not run.

    ``priming_run`` is the folder of another run whose finished phase I phase II starts from; ``priming`` is null then.
    """

    kind: Literal["distill"]
    name: str
    seed: int
    teacher: Teacher
    data: Data
    student: Student
    priming_run: str | None
    priming: Priming | None
    equilibrium: Equilibrium | None
    engine: Engine
    watch: Watch
    evaluate: Evaluate


@dataclass(frozen=True)
class Peer:
    """``vpae distill`` by a method that V-PAE is compared with; see :mod:`vpae.peer_recipe`."""

    kind: Literal["peer"]
    name: str
    seed: int
    teacher: Teacher
    data: Data
    student: Student
    method: peer_recipe.Method
    engine: Engine
    watch: Watch
    evaluate: Evaluate


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching of a whole transformer; with ``text_dropout`` so that guidance works."""

    steps: int
    time: TimeLaw
    text_dropout: float
    ema_decay: float
    optimiser: Optimiser


@dataclass(frozen=True)
class FinetuneFlow:
    """``vpae finetune``: train a Wan transformer, from ``teacher.path`` or from scratch (``transformer`` given)."""

    kind: Literal["flow_matching"]
    name: str
    seed: int
    teacher: Teacher
    transformer: dict[str, Any] | None
    scheduler_shift: float
    data: Data
    training: FlowMatching
    engine: Engine
    watch: Watch
    evaluate: Evaluate


@dataclass(frozen=True)
class VaeStage:
    """Part of the VAE's curriculum: clips of ``frames`` frames, ``batch`` of them a step."""

    steps: int
    frames: int
    batch: int


@dataclass(frozen=True)
class VaeTraining:
    """Reconstruction (squared + absolute error) and a small KL term; losses per element on [-1, 1] pixels.

    ``trained: decoder`` leaves encoder and latents as they are, so that what was trained on them stays right.
    """

    trained: Literal["all", "decoder"]
    stages: tuple[VaeStage, ...]
    absolute_weight: float
    kl_weight: float
    ema_decay: float
    optimiser: Optimiser


@dataclass(frozen=True)
class FinetuneVae:
    """``vpae finetune``: train an AutoencoderKLWan, from scratch or from the folder ``init``."""

    kind: Literal["vae"]
    name: str
    seed: int
    init: str | None
    vae: dict[str, Any]
    source: dict[str, Any]
    training: VaeTraining
    engine: Engine
    evaluate_clips: int


Distillation = Distill | Peer
Recipe = Distillation | FinetuneFlow | FinetuneVae
KINDS: dict[str, type] = {"distill": Distill, "peer": Peer, "flow_matching": FinetuneFlow, "vae": FinetuneVae}


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply ``key.sub=value`` overrides (values are YAML).

    Raises:
        UserError: no such file, bad YAML, or any key that is missing, unknown or of the wrong type.
    """
    plain = _read(Path(path))
    for text in overrides:
        _override(plain, text)
    return from_plain(plain, str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; the ones that ship are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(plain, dict):
        raise UserError(f"{path} is not a recipe: its top level is {kind_of(plain)}, not a mapping of keys")
    return plain


# keys that recipes of earlier versions lack, by section, and the value that stands for what was done then
ADDED: dict[str, dict[str, Any]] = {
    "engine": {"sequence_parallel": 1, "optimiser_state": "fp32", "ema_on": "device", "async_checkpoints": False},
    "optimiser": {"eps": 1e-8},
    "equilibrium": {"head_warmup_turns": 0},
    "r1": {"every": 1},
}


def completed(plain: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe of an earlier version (or part of one) with the keys that have come since."""

    def filled(name: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {key: filled(key, item) for key, item in value.items()}
        return ADDED.get("optimiser" if name.endswith("optimiser") else name, {}) | value

    return filled("", plain)


def load_stored(path: Path) -> Recipe:
    """The resolved recipe that a run or an export carries, of this version or an earlier one.

    Raises:
        UserError: as :func:`load`.
    """
    return from_plain(completed(_read(path)), str(path))


def from_plain(plain: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from plain YAML values; ``where`` names the file in errors."""
    kind = plain.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}: key 'kind' must be one of {', '.join(KINDS)}, not {shown(kind)}")
    from vpae.recipe_check import check  # which knows the classes of this module

    recipe = build(KINDS[kind], plain, where, "")
    check(recipe, where)
    return recipe


def to_plain(value: Any) -> Any:
    """Back to plain YAML values, every key in place."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return value


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; it travels with every checkpoint and export."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True, width=110)


def digest(value: Any) -> str:
    """A short hash of (part of) a recipe, by content and not by formatting."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _override(plain: dict[str, Any], text: str) -> None:
    key, found, value = text.partition("=")
    if not found:
        raise UserError(f"override {shown(text)} is not of the form key.sub=value")
    *parents, last = key.strip().split(".")
    node: Any = plain
    for part in parents:
        if not isinstance(node.get(part), dict):
            raise UserError(f"override {shown(text)}: the recipe has no section {part!r}")
        node[part] = dict(node[part])  # a YAML alias may stand for one mapping in two places
        node = node[part]
    try:
        node[last] = read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"override {shown(text)}: the value is not valid YAML") from None
