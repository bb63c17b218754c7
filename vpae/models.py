"""From a recipe to networks in their roles, sharded and ready."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from vpae.backbone import Backbone
from vpae.data.cache import Cache
from vpae.data.encoders import pipeline_kind, transformer_config
from vpae.draws import seed_of
from vpae.engine.parallel import Processes, shard_backbone
from vpae.errors import UserError
from vpae.extras import check_attention_backend
from vpae.recipe import Distill, Engine, Lora, Student, Teacher
from vpae.released import TRANSFORMERS
from vpae.roles import Role, add_lora, copy_weights, full_copy
from vpae.weights import copy_base, give_memory, read_weights, store_as, unborn_transformer


def find_model(path: str) -> Path:
    """A model folder named in a recipe: as given, or among the assets that ship with the package.

    Raises:
        UserError: there is none.
    """
    direct = Path(path)
    if direct.is_dir():
        return direct
    shipped = Path(__file__).parent / "assets" / path
    if shipped.is_dir():
        return shipped
    if direct.name in TRANSFORMERS:
        fetch = f"; fetch it with: hf download Wan-AI/{direct.name} --local-dir {path}"
    else:
        fetch = ", nor the name of a model that ships with vpae (tiny_wan)"
    raise UserError(f"teacher.path {path!r} is no folder{fetch}")


def weights_fingerprint(pipeline: Path) -> str:
    """Hash that tells one set of transformer weights from another without reading all of it.

    Takes each file's name, size, safetensors header and the 64 KiB at both ends: seconds for 14B.
    """
    digest, edge = hashlib.sha256(), 1 << 16
    for file in sorted((pipeline / "transformer").glob("*.safetensors")):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode() + stream.read(min(header + edge, size)))
            stream.seek(max(0, size - edge))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def wrap(transformer: WanTransformer3DModel, teacher: Teacher, engine: Engine) -> Backbone:
    """A frozen backbone with the recipe's attention and checkpointing, where the transformer is."""
    transformer.set_attention_backend(check_attention_backend(teacher.attention, masks=teacher.fold_text_padding))
    backbone = Backbone(transformer, fold_text_padding=teacher.fold_text_padding)
    backbone.transformer.requires_grad_(False)
    if engine.checkpointing:
        backbone.enable_checkpointing()
    return backbone


def check_fit(transformer: WanTransformer3DModel, cache: Cache, where: str) -> None:
    """The cache's tensors must be what the transformer takes.

    Raises:
        UserError: another number of channels or another token width.
    """
    channels, config = cache.latent_shape[0], transformer.config
    joined = channels + cache.manifest["temporal_stride"] if cache.kind == "i2v" else 0  # latent and mask
    expected = {
        "latent channels": (config.out_channels, channels),
        "number of input channels": (config.in_channels, channels + joined),
        "text width": (config.text_dim, cache.read(0, "text").shape[-1]),
        "image width": (config.image_dim, cache.read(0, "image").shape[-1] if cache.kind == "i2v" else None),
    }
    for what, (model, data) in expected.items():
        if model != data:
            raise UserError(
                f"the cache {cache.folder} and the transformer in {where} do not fit: {what} is {data} in the cache "
                f"and {model} in the transformer; encode with that model's own VAE and text encoder"
            )


def check_conditioning(pipeline: Path) -> None:
    """A transformer that is told of CLIP tokens belongs into a pipeline that makes them, and no other does.

    Raises:
        UserError: the pipeline's transformer and its other parts are of different models.
    """
    kind, config = pipeline_kind(pipeline), transformer_config(pipeline)
    if (config.get("image_dim") is not None) != (kind == "i2v"):
        raise UserError(
            f"{pipeline} is a {kind} pipeline, whose transformer has {'an' if kind == 'i2v' else 'no'} image_dim, but "
            f"transformer/config.json says image_dim: {config.get('image_dim')}"
        )


def preflight(teacher: Teacher, engine: Engine, processes: Processes, fp32: str = "") -> None:
    """What would end the run only after hours of encoding or training, asked before the first weight is read.

    Args:
        fp32: the key of the recipe, besides the engine's precision, that makes attention compute in fp32.

    Raises:
        UserError: the attention kernel cannot serve the recipe here, or the ranks cannot share the batch.
    """
    exact = "engine.precision: fp32" if engine.precision == "fp32" else fp32
    check_attention_backend(teacher.attention, masks=teacher.fold_text_padding, fp32=exact)
    processes.share(engine.global_batch)


@dataclass(frozen=True)
class Cast:
    """Teacher, student and its EMA; ``backbones`` are the distinct networks behind all roles, the teacher's first.

    Until :func:`materialise` all of them are on the meta device.
    """

    pipeline: Path
    teacher: Role
    student: Role
    ema: Role
    backbones: list[Backbone]


def distillation_cast(teacher: Teacher, student: Student, engine: Engine, seed: int) -> Cast:
    """Teacher, and a student and EMA that will start from it; :func:`materialise` once all adapters are on."""
    pipeline = find_model(teacher.path)
    transformer = unborn_transformer(transformer_config(pipeline))
    base = Role("teacher", wrap(transformer, teacher, engine))
    if student.kind == "lora":
        store_as(transformer, teacher.dtype)
        live, ema = (add_lora(base.backbone, name, student.lora, seed) for name in ("student", "ema"))
        return Cast(pipeline, base, live, ema, [base.backbone])
    live, ema = full_copy(base, "student"), full_copy(base, "ema")
    store_as(transformer, teacher.dtype)
    return Cast(pipeline, base, live, ema, [base.backbone, live.backbone, ema.backbone])


def materialise(cast: Cast, processes: Processes) -> None:
    """Shard the networks, give them memory and read the teacher's weights: every role answers as the teacher does.

    Raises:
        UserError: the teacher's files are damaged, or not those of its config.
    """
    for backbone in cast.backbones:
        shard_backbone(backbone, processes)
        give_memory(backbone, processes)
    base, *copies = cast.backbones
    read_weights(base, cast.pipeline, processes)
    for i, backbone in enumerate(copies):
        if i == 0:  # from the files: the teacher may be kept in less precision
            read_weights(backbone, cast.pipeline, processes)
        else:
            copy_base(copies[0], backbone)
    if cast.student.adapter is not None:
        copy_weights(cast.student, cast.ema)


def fake_score(cast: Cast, lora: Lora, seed: int) -> Role:
    """The teacher plus a zero-initialised LoRA: equal to the teacher at step 0."""
    return add_lora(cast.teacher.backbone, "fake_score", lora, seed)


def judge_of(recipe: Distill, cast: Cast) -> Role:
    """Whose blocks feed the head: the student's EMA, the frozen teacher, or a network that trains with the head."""
    kind = recipe.equilibrium.judge
    if kind == "unified":
        return cast.ema
    if kind == "frozen":
        return cast.teacher
    if recipe.student.kind == "lora":
        return add_lora(cast.teacher.backbone, "judge", recipe.student.lora, recipe.seed)
    judge = full_copy(cast.student, "judge")
    cast.backbones.append(judge.backbone)
    return judge


def compile_blocks(backbones: list[Backbone]) -> None:
    """Let torch.compile fuse each block (one compilation serves all blocks of a model)."""
    for backbone in backbones:
        for block in backbone.transformer.blocks:
            block.compile(dynamic=False)


def fresh_transformer(config: dict, seed: int) -> WanTransformer3DModel:
    """A Wan transformer from scratch, weights drawn from ``seed``.

    Raises:
        UserError: the config is not one that WanTransformer3DModel takes.
    """
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "transformer"))
            return WanTransformer3DModel(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"section 'transformer' of the recipe does not make a WanTransformer3DModel: {error}") from None
