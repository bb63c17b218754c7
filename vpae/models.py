"""From a recipe to networks in their roles, sharded and ready."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from vpae.backbone import Backbone, default_taps
from vpae.data.cache import Cache
from vpae.data.encoders import latent_shape, pipeline_kind, transformer_config, vae_config
from vpae.draws import generator_of, seed_of
from vpae.engine.host import require_memory
from vpae.engine.parallel import Processes, shard_backbone
from vpae.errors import UserError
from vpae.extras import check_attention_backend, require
from vpae.files import is_path
from vpae.heads import build_head
from vpae.recipe import Distill, Engine, Student, Teacher
from vpae.released import TRANSFORMERS
from vpae.roles import Role, add_lora, copy_weights, full_copy
from vpae.sections import Head, Lora
from vpae.sequence import check_split
from vpae.strict import shown
from vpae.weights import copy_base, give_memory, read_weights, store_as, unborn_transformer


def find_model(path: str) -> Path:
    """A model folder named in a recipe: as given, or among the assets that ship with the package.

    Raises:
        UserError: there is none.
    """
    if not is_path(path):
        raise UserError(f"{shown(path)} cannot be the path of a model")
    direct = Path(path)
    if direct.is_dir():
        return direct
    shipped = Path(__file__).parent / "assets" / path
    if shipped.is_dir():
        return shipped
    if direct.name in TRANSFORMERS:
        fetch = f"; fetch it with: hf download Wan-AI/{direct.name} --local-dir {path}"
    else:
        fetch = ", nor the name of a model that ships with vpae (tiny_wan, tiny_wan_open)"
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
        UserError: the attention kernel, the optimiser or the EMA's place cannot serve the recipe here, or the ranks
            cannot share the batch.
    """
    exact = "engine.precision: fp32" if engine.precision == "fp32" else fp32
    check_attention_backend(teacher.attention, masks=teacher.fold_text_padding, fp32=exact)
    if engine.optimiser_state == "int8":
        require("torchao", "engine.optimiser_state: int8")
    if engine.ema_on == "cpu" and processes.mesh is None and processes.device.type != "cpu":
        raise UserError(
            "engine.ema_on: cpu keeps the shards of the EMA there, and here it is not sharded: set it to device, or "
            "use engine.parallel: fsdp on several ranks"
        )
    processes.share(engine.global_batch)


def check_tokens(
    config: Mapping[str, Any], pipeline: Path, shape: tuple[int, int, int] | None, processes: Processes
) -> None:
    """Ranks that share clips must be able to split them.

    Args:
        config: of the transformer.
        pipeline: folder with the VAE.
        shape: frames, height and width of the clips, px; None where it is not known before they are read.

    Raises:
        UserError: tokens or heads do not divide evenly, or the VAE's config cannot be read.
    """
    if processes.degree == 1 or shape is None:
        return
    _, *latent = latent_shape(vae_config(pipeline / "vae"), shape)
    tokens = math.prod(size // patch for size, patch in zip(latent, config.get("patch_size", (1, 2, 2)), strict=True))
    check_split(processes.degree, heads=config.get("num_attention_heads", 40), tokens=tokens)


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


def materialise(cast: Cast, processes: Processes, ema_on: str = "device") -> None:
    """Shard the networks, give them memory and read the teacher's weights: every role answers as the teacher does.

    Raises:
        UserError: the teacher's files are damaged, or not those of its config; or as :func:`give_shards`.
    """
    give_shards(cast, processes, ema_on)
    base, *copies = cast.backbones
    read_weights(base, cast.pipeline, processes)
    for i, backbone in enumerate(copies):
        if i == 0:  # from the files: the teacher may be kept in less precision
            read_weights(backbone, cast.pipeline, processes)
        else:
            copy_base(copies[0], backbone)
    if cast.student.adapter is not None:
        copy_weights(cast.student, cast.ema)


def give_shards(cast: Cast, processes: Processes, ema_on: str = "device") -> None:
    """Shard the networks and give them memory; their weights are still to be read.

    Args:
        ema_on: the recipe's ``engine.ema_on``; where it is ``cpu``, :func:`preflight` has found shards to keep there.

    Raises:
        UserError: the host lacks memory for the EMA.
    """
    for backbone in cast.backbones:
        on_host = ema_on == "cpu" and backbone is cast.ema.backbone and processes.mesh is not None
        if on_host:
            size = sum(p.numel() * p.element_size() for p in backbone.transformer.parameters())
            wanted = {"engine.ema_on: cpu": size // processes.mesh.shape[-1]}
            processes.together(lambda wanted=wanted: require_memory(wanted))
        shard_backbone(backbone, processes, on_host=on_host)
        give_memory(backbone, processes, on_host=on_host)


def trainable(cast: Cast, name: str, lora: Lora | None, seed: int) -> Role:
    """A network that answers as the teacher at step 0 and learns beside the student.

    Args:
        lora: its adapter on the teacher's weights; None: weights of its own.
    """
    if lora is not None:
        return add_lora(cast.teacher.backbone, name, lora, seed)
    twin = full_copy(cast.student, name)
    cast.backbones.append(twin.backbone)
    return twin


def fake_score(cast: Cast, lora: Lora | None, seed: int) -> Role:
    """Whoever follows the student's distribution, from the teacher on."""
    return trainable(cast, "fake_score", lora, seed)


def student_lora(student: Student) -> Lora | None:
    """The student's adapter; None where it has its own weights."""
    return student.lora if student.kind == "lora" else None


def judge_of(recipe: Distill, cast: Cast) -> Role:
    """Whose blocks feed the head: the student's EMA, the frozen teacher, or a network that trains with the head."""
    kind = recipe.equilibrium.judge
    if kind == "unified":
        return cast.ema
    if kind == "frozen":
        return cast.teacher
    return trainable(cast, "judge", student_lora(recipe.student), recipe.seed)


def choose_taps(chosen: tuple[int, ...] | None, num_layers: int, key: str) -> tuple[int, ...]:
    """The blocks that a recipe's ``key`` names, or the default ones.

    Raises:
        UserError: the transformer has no such block.
    """
    taps = default_taps(num_layers) if chosen is None else tuple(chosen)
    if not taps or max(taps) >= num_layers or min(taps) < 0:
        raise UserError(f"{key} {list(taps)} do not fit a transformer of {num_layers} blocks")
    return taps


def head_of(
    settings: Head, num_taps: int, cast: Cast, seed: int, device: torch.device, *, independent: bool = False
) -> nn.Module:
    """A fresh head for the blocks of any of the cast's networks; ``independent``: one for every tap."""
    config = cast.teacher.backbone.transformer.config
    head = build_head(
        settings.kind,
        feature_dim=cast.teacher.backbone.feature_dim,
        num_taps=num_taps,
        image_dim=config.image_dim,
        text_dim=config.text_dim,
        width=settings.width,
        num_heads=settings.num_heads,
        queries=settings.queries,
        generator=generator_of(seed, "head"),
        independent=independent,
    )
    # fake tensors (vpae plan) cannot be moved, not even to where they are
    return head if device.type == "cpu" else head.to(device)


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
