"""``vpae finetune``: make the parts of a teacher: a VAE, or a Wan transformer by flow matching."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from vpae import recipe as recipes
from vpae.conditioning import Kind
from vpae.data.cache import Cache, prepare
from vpae.data.encoders import Encoders, quiet, to_pixels, transformer_config
from vpae.data.sources import Source, open_source
from vpae.data.tiny import write_encoders
from vpae.draws import Draws, seed_of
from vpae.engine.layout import placed
from vpae.engine.parallel import Processes, shard_backbone, shard_module, whole
from vpae.engine.trainer import Run, Trainer, identity_of
from vpae.engine.watch import Watch
from vpae.errors import UserError
from vpae.export.folder import model_index, write_transformer
from vpae.extras import require
from vpae.files import write_json, writing
from vpae.gallery import Gallery
from vpae.methods.flow_matching import FlowMatching
from vpae.methods.vae import Frames, VaeMethod
from vpae.models import check_fit, check_tokens, compile_blocks, find_model, fresh_transformer, preflight, wrap
from vpae.recipe import FinetuneFlow, FinetuneVae
from vpae.roles import Role, full_copy
from vpae.runs import environment, open_folder
from vpae.weights import copy_base, give_memory, read_weights, set_weights, unborn_transformer


def build_vae(config: dict, seed: int) -> AutoencoderKLWan:
    """A fresh VAE from its diffusers config, weights drawn from ``seed``.

    Raises:
        UserError: the config is not one that AutoencoderKLWan takes.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "vae"))
            return AutoencoderKLWan(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"section 'vae' of the recipe does not make an AutoencoderKLWan: {error}") from None


def first_vae(recipe: FinetuneVae) -> AutoencoderKLWan:
    """The VAE that training starts from: fresh, or the one in ``init``.

    Raises:
        UserError: ``init`` holds no VAE, or one of another architecture.
    """
    vae = build_vae(recipe.vae, recipe.seed)
    if recipe.init is None:
        return vae
    try:
        with quiet():
            given = AutoencoderKLWan.from_pretrained(recipe.init, use_safetensors=True, local_files_only=True)
        vae.load_state_dict(given.state_dict())
        if recipe.training.trained == "decoder":
            vae.register_to_config(latents_mean=given.config.latents_mean, latents_std=given.config.latents_std)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"init {recipe.init!r} is not a VAE of the recipe's architecture: {reason}") from None
    return vae


def train_vae(recipe: FinetuneVae, folder: Path, resume: bool, processes: Processes) -> bool:
    """Train a VAE; at the end ``folder/vae`` is a diffusers folder with its latents' mean and std measured."""
    for key in ("compile", "checkpointing"):
        if getattr(recipe.engine, key):
            raise UserError(f"engine.{key}: true is for transformers; set it to false for a VAE")
    if recipe.engine.ema_on == "cpu":
        raise UserError("engine.ema_on: cpu is for transformers; set it to device for a VAE")
    if recipe.engine.optimiser_state == "int8":
        require("torchao", "engine.optimiser_state: int8")
    open_folder(folder, recipe, resume, processes)
    source = open_source(recipe.source)
    first = first_vae(recipe)
    moments = (first.config.latents_mean, first.config.latents_std) if recipe.training.trained == "decoder" else None
    method = VaeMethod(recipe.training, first.to(processes.device))
    for stage in recipe.training.stages:
        if stage.frames % 4 != 1 or stage.batch % processes.size:
            raise UserError(
                f"a stage of the VAE's training needs 4k + 1 frames and a batch that {processes.size} ranks can split, "
                f"not {stage.frames} frames and batch {stage.batch}"
            )
    shard_module(method.model, processes)
    shard_module(method.ema, processes)
    method.attach()

    def fetch(indices: list[int], draws: Draws) -> Frames:
        frames = method.stage(trainer.turn).frames
        clips = []
        for index, u in zip(indices, draws.uniform("crop").tolist(), strict=True):
            clip = source[index].frames
            if len(clip) < frames:
                raise UserError(f"clip {source[index].name} has {len(clip)} frames, a stage of training wants {frames}")
            start = int(u * (len(clip) - frames + 1))
            clips.append(clip[start : start + frames])
        return Frames(to_pixels(clips, processes.device), draws)

    run = Run(
        folder=folder,
        settings=recipe.engine,
        seed=seed_of(recipe.seed, "vae training"),
        identity=identity_of(recipe, recipes.digest(source.fingerprint()), "vae"),
        recipe_text=recipes.dump(recipe),
        fetch=fetch,
        samples=len(source),
        modules=[method.model, method.ema],
        portion=method.portion,
    )
    trainer = Trainer(method, run, processes)
    if resume:
        trainer.resume()
    if not trainer.train() or trainer.stopped:
        return False
    state = {name.removeprefix("vae."): whole(p).cpu() for name, p in method.ema.state_dict().items()}
    processes.together(lambda: _finish_vae(recipe, state, moments, source, folder), main_only=True)
    return True


@torch.no_grad()
def _finish_vae(
    recipe: FinetuneVae, state: dict, moments: tuple[list, list] | None, source: Source, folder: Path
) -> None:
    """Measure the latents' moments on training clips (unless given: the encoder was kept) and the PSNR on test clips.

    Writes the diffusers folder.

    Video files have no test split of their own: there the PSNR is of training clips, and the report says so.
    """
    vae = build_vae(recipe.vae, recipe.seed)
    vae.load_state_dict(state)
    vae.eval()

    if moments is None:
        generator = np.random.Generator(np.random.PCG64(seed_of(recipe.seed, "moments")))
        chosen = generator.choice(len(source), min(128, len(source)), replace=False)
        latents = torch.cat(
            [
                vae.encode(to_pixels([source[int(i)].frames for i in chosen[k : k + 8]])).latent_dist.mode()
                for k in range(0, len(chosen), 8)
            ]
        )
        moments = tuple([round(v, 6) for v in of((0, 2, 3, 4)).tolist()] for of in (latents.mean, latents.std))
    vae.register_to_config(latents_mean=list(moments[0]), latents_std=list(moments[1]))
    with writing(folder / "vae"):
        vae.save_pretrained(folder / "vae", max_shard_size="15MB")
    held_out = {"split": "test", "start": 0, "count": recipe.evaluate_clips}
    is_bounce = recipe.source.get("kind") == "bounce"
    test = open_source(recipe.source | held_out) if is_bounce else source
    psnr = []
    for i in range(min(len(test), recipe.evaluate_clips)):
        x = to_pixels([test[i].frames])
        error = (vae.decode(vae.encode(x).latent_dist.mode()).sample - x).square().mean()
        psnr.append(float(10 * torch.log10(4 / error)))
    report = {
        "clips": len(psnr),
        "split": "test" if is_bounce else "train",
        "psnr_db_mean": round(float(np.mean(psnr)), 3),
        "psnr_db_min": round(float(np.min(psnr)), 3),
        "recipe": recipes.digest(recipe),
        "environment": environment(),
    }
    write_json(folder / "evaluation.json", report)
    mean, worst = report["psnr_db_mean"], report["psnr_db_min"]
    print(f"VAE on {len(psnr)} {report['split']} clips: {mean:.2f} dB (worst {worst:.2f})")


def _given(recipe: FinetuneFlow) -> Path:
    """The folder, or asset, that ``teacher.path`` names."""
    try:
        return find_model(recipe.teacher.path)
    except UserError:
        if recipe.transformer is None:
            raise
        return Path(recipe.teacher.path)  # whose VAE is asked for


def assemble(recipe: FinetuneFlow, folder: Path, processes: Processes) -> Path:
    """The pipeline folder a flow-matching run trains in: VAE given, encoders given or (for the tiny teacher) built.

    A model from scratch starts from a first frame (``i2v``) where it has an ``image_dim``, and from text alone
    (``t2v``) where it has none; a ``ti2v`` one goes on from a folder that says so.

    Raises:
        UserError: ``teacher.path`` holds neither a pipeline nor a VAE.
    """
    given, target = _given(recipe), folder / "pipeline"
    if (given / "model_index.json").is_file() and recipe.transformer is None:
        # the given folder is never written to
        processes.together(lambda: _copied(given, target, recipe.scheduler_shift), main_only=True)
        return target
    if not (given / "config.json").is_file() and not (given / "vae" / "config.json").is_file():
        raise UserError(
            f"teacher.path {recipe.teacher.path!r} must be a pipeline folder, or for a model from scratch the folder "
            "of a VAE (make the tiny one with: vpae finetune recipes/tiny_vae.yaml)"
        )
    vae = given if (given / "config.json").is_file() else given / "vae"
    kind: Kind = "i2v" if (recipe.transformer or {}).get("image_dim") is not None else "t2v"
    processes.together(lambda: _composed(vae, target, recipe.scheduler_shift, kind), main_only=True)
    return target


def _copied(given: Path, target: Path, scheduler_shift: float) -> None:
    if (target / "model_index.json").is_file():
        return
    draft = target.with_name(target.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    with writing(draft):
        shutil.copytree(given, draft)
    config = draft / "scheduler" / "scheduler_config.json"
    plain = json.loads(config.read_text(encoding="utf-8"))
    plain["flow_shift" if "flow_shift" in plain else "shift"] = scheduler_shift  # UniPC's name for it, and Euler's
    write_json(config, plain)
    draft.rename(target)


def _composed(vae: Path, target: Path, scheduler_shift: float, kind: Kind) -> None:
    if (target / "model_index.json").is_file():
        return
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        write_encoders(target, scheduler_shift, images=kind == "i2v")
        shutil.copytree(vae, target / "vae", dirs_exist_ok=True)
    write_json(target / "model_index.json", model_index(kind))


def _networks(recipe: FinetuneFlow, cache: Cache, processes: Processes) -> tuple[Role, Role]:
    """The transformer that is trained and its EMA, equal, each rank with its own shards.

    Given weights are read slice by slice; drawn ones are drawn whole on each rank's CPU, so that they do not depend on
    the number of ranks.
    """
    given, drawn = _given(recipe), None
    if recipe.transformer is not None:
        drawn = fresh_transformer(recipe.transformer, recipe.seed)
    transformer = unborn_transformer(transformer_config(given) if drawn is None else drawn.config)
    check_fit(transformer, cache, recipe.teacher.path if drawn is None else "section 'transformer' of the recipe")
    student = Role("student", wrap(transformer, recipe.teacher, recipe.engine))
    ema = full_copy(student, "ema")
    for role in (student, ema):
        on_host = role is ema and recipe.engine.ema_on == "cpu" and processes.mesh is not None
        shard_backbone(role.backbone, processes, on_host=on_host)
        give_memory(role.backbone, processes, on_host=on_host)
    if drawn is None:
        read_weights(student.backbone, given, processes)
    else:
        set_weights(student.backbone, drawn.state_dict())
    copy_base(student.backbone, ema.backbone)
    return student, ema


def train_flow(recipe: FinetuneFlow, folder: Path, resume: bool, processes: Processes) -> bool:
    """Train a Wan transformer by flow matching; at the end ``folder/pipeline`` samples with the EMA weights."""
    preflight(recipe.teacher, recipe.engine, processes)
    open_folder(folder, recipe, resume, processes)
    pipeline = assemble(recipe, folder, processes)
    config = recipe.transformer or transformer_config(pipeline)
    check_tokens(config, pipeline, open_source(recipe.data.source).shape, processes)
    encoders = Encoders(pipeline, processes.device)
    cache = prepare(recipe.data, encoders, processes)
    encoders.keep_vae()
    student, ema = _networks(recipe, cache, processes)
    if recipe.engine.compile:
        compile_blocks([student.backbone])
    method = FlowMatching(recipe.training, student=student, ema=ema)
    gallery = Gallery(
        folder,
        cache,
        encoders,
        recipe.evaluate,
        recipe.engine.samples,
        recipe.engine.precision,
        processes,
        student=ema,
        teacher=None,
        steps=recipe.evaluate.teacher_steps,
    )
    run = Run(
        folder=folder,
        settings=recipe.engine,
        seed=seed_of(recipe.seed, "flow matching"),
        identity=identity_of(recipe, cache.fingerprint, "flow_matching"),
        recipe_text=recipes.dump(recipe),
        fetch=cache.fetch,
        samples=len(cache),
        modules=[student.backbone.transformer, ema.backbone.transformer],
        watch=Watch(recipe.watch),
        gallery=gallery,
    )
    trainer = Trainer(method, run, processes)
    if resume:
        trainer.resume()
    if not trainer.train() or trainer.stopped:
        return False
    weights = {}
    for name, parameter in ema.named_parameters():
        gathered = whole(parameter.detach())  # by all ranks; one keeps it
        if processes.is_main:
            weights[name] = gathered.cpu()
    config = ema.backbone.transformer.config
    processes.together(lambda: write_transformer(config, weights, pipeline), main_only=True)
    if processes.is_main:
        print(
            f"teacher written to {pipeline}; judge it with: vpae evaluate {pipeline} --steps "
            f"{recipe.evaluate.teacher_steps} --guidance-scale {recipe.evaluate.teacher_guidance}"
        )
    return True


def finetune(recipe: recipes.Recipe, folder: Path, resume: bool, processes: Processes) -> bool:
    """Train what the recipe says; False when a signal interrupted it.

    Raises:
        UserError: the recipe is one of distillation, or anything the training finds wrong.
    """
    processes = placed(processes, recipe.engine)
    if isinstance(recipe, FinetuneVae):
        return train_vae(recipe, folder, resume, processes)
    if isinstance(recipe, FinetuneFlow):
        return train_flow(recipe, folder, resume, processes)
    raise UserError(f"recipe {recipe.name!r} is of kind {recipe.kind}; run it with: vpae distill")
