"""What the commands sample, evaluate, export and cache do."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from vpae import recipe as recipes
from vpae.data.bounce import World
from vpae.data.cache import find as find_cache
from vpae.data.cache import prepare
from vpae.data.check import check, told
from vpae.data.encoders import Encoders
from vpae.data.look import contact_sheet
from vpae.data.pictures import open_picture
from vpae.data.publish import export_bounce, export_pairs
from vpae.data.shards import REPORT
from vpae.data.videos import fit, write_video
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import Processes, alone
from vpae.errors import UserError
from vpae.evaluation import clips_of, encode_clips, sample_clips
from vpae.export.diffusers import export_student
from vpae.export.precision import MOTION
from vpae.export.single import DEFAULT_RANK, export_lora, export_wan
from vpae.extras import check_attention_backend
from vpae.files import write_json
from vpae.finetune import assemble
from vpae.loading import Model, load_model, open_model
from vpae.models import find_model
from vpae.recipe import Distillation, FinetuneVae
from vpae.runs import environment
from vpae.sampling import sample_latents


def cache(arguments: argparse.Namespace, processes: Processes) -> bool:
    """Encode a recipe's clips, or look at a finished cache of them."""
    recipe = recipes.load(arguments.recipe, tuple(arguments.overrides))
    if isinstance(recipe, FinetuneVae):
        raise UserError(f"{arguments.recipe} trains a VAE on pixels: there is nothing to encode")
    if isinstance(recipe, Distillation):
        pipeline = find_model(recipe.teacher.path)
    else:
        beside = Path(recipe.data.cache).with_name(Path(recipe.data.cache).name + "-encoders")
        # the VAE may have been trained anew
        processes.together(lambda: shutil.rmtree(beside / "pipeline", ignore_errors=True), main_only=True)
        pipeline = assemble(recipe, beside, processes)
    encoders = Encoders(pipeline, processes.device, vae_only=arguments.check)
    if arguments.check:
        found = find_cache(recipe.data, encoders, processes)
        statistics = check(found, encoders, processes)
        if processes.is_main:
            print(told(statistics, found.folder))
        return True
    made = prepare(recipe.data, encoders, processes)
    if processes.is_main:
        left = made.manifest["clips"]["left_out"]
        clips = f"{len(made)} clips" + (f" ({left} left out, see {REPORT} in it)" if left else "")
        print(f"cache {made.folder}: {clips}, latents {list(made.latent_shape)}, digest {made.fingerprint}")
    return True


def read_picture(path: Path, size: tuple[int, int] | None, edge: int) -> np.ndarray:
    """A first frame uint8 ``[H, W, 3]``, scaled and centre-cropped to ``size`` (height, width) where given.

    Raises:
        UserError: no such file, not a picture, or (without a size) edges that are no multiples of ``edge``.
    """
    picture = open_picture(path)
    if size is None:
        size = picture.shape[:2]
    _check_size(size, edge, f"{path}: a first frame")
    return fit(picture, size)


def _check_size(size: tuple[int, int], edge: int, what: str) -> None:
    height, width = size
    if height % edge or width % edge or min(size) < edge:
        raise UserError(f"{what} of {height}x{width} does not fit; edges must be multiples of {edge} (--size)")


def _asked(
    arguments: argparse.Namespace, model: Model, encoders: Encoders
) -> tuple[list[np.ndarray | None], list[str], list[str], tuple[int, int] | None]:
    """What to sample: first frames (None where the model takes none), prompts, names, and the size of the clips."""
    size = tuple(arguments.size) if arguments.size else model.shape[1:] if model.recipe else None
    if arguments.bounce:
        clips = clips_of(model.world, "test", arguments.bounce)
        pictures = [c.frames[0] if encoders.has_pictures else None for c in clips]
        return pictures, [c.caption for c in clips], [c.name for c in clips], (model.world.size, model.world.size)
    if encoders.has_pictures:
        if not arguments.image or len(arguments.image) != len(arguments.prompt):
            raise UserError(
                f"give one --prompt for each --image, in the same order (got {len(arguments.image)} images and "
                f"{len(arguments.prompt)} prompts), or --bounce N"
            )
        names = [f"{i:03d}-{p.stem}" for i, p in enumerate(arguments.image)]
        return [read_picture(p, size, encoders.edge) for p in arguments.image], arguments.prompt, names, None
    if arguments.image:
        raise UserError(f"{model.source} makes clips from text alone; leave --image out")
    if not arguments.prompt:
        raise UserError("give at least one --prompt, or --bounce N")
    if size is None:
        raise UserError("no recipe says how large the clips of this model are; give --size HEIGHT WIDTH")
    _check_size(size, encoders.edge, "a clip")
    return [None] * len(arguments.prompt), arguments.prompt, [f"{i:03d}" for i in range(len(arguments.prompt))], size


def _open(arguments: argparse.Namespace) -> tuple[Model, Encoders]:
    """The model to sample, still without weights: umT5 and a 14B transformer have no room beside each other."""
    fp32 = "--precision fp32" if arguments.precision == "fp32" else ""
    check_attention_backend(arguments.attention, training=False, fp32=fp32)
    model = open_model(arguments.model, arguments.role)
    return model, Encoders(model.pipeline, alone().device)


def sample(arguments: argparse.Namespace) -> bool:
    """Images and prompts (or prompts alone) to mp4 and a contact sheet."""
    model, encoders = _open(arguments)
    shape = model.shape
    num_frames = arguments.num_frames or shape[0]
    if num_frames % 4 != 1:
        raise UserError(f"--num-frames must be 4k + 1 (17, 81, ...), not {num_frames}")
    pictures, prompts, names, size = _asked(arguments, model, encoders)
    negative = model.negative_prompt if arguments.negative_prompt is None else arguments.negative_prompt
    null_text, rows = encoders.texts([negative]), []
    conditions = [
        encoders.condition([picture], [prompt], num_frames).widened(null_text.shape[1])
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]
    encoders.keep_vae()
    model.read(arguments.attention, arguments.precision)
    for i, (name, picture, prompt, condition) in enumerate(zip(names, pictures, prompts, conditions, strict=True)):
        height, width = size if picture is None else picture.shape[:2]
        latents = sample_latents(
            model.role,
            condition,
            condition.null(null_text),
            Draws(seed_of(arguments.seed, "sample"), [i], encoders.device),
            steps=arguments.steps,
            shape=encoders.latent_shape((num_frames, height, width)),
            sampler=arguments.sampler,
            guidance_scale=arguments.guidance_scale,
            scheduler=encoders.pipeline.scheduler,
        )
        frames = encoders.decode(latents)[0]
        write_video(arguments.output / f"{name}.mp4", frames, arguments.fps)
        rows.append((prompt, frames))
        print(f"{arguments.output / f'{name}.mp4'}: {prompt}")
    contact_sheet(rows, arguments.output / "contact_sheet.png")
    print(f"{arguments.output / 'contact_sheet.png'}: {len(rows)} clips from {model.source}")
    return True


def evaluate(arguments: argparse.Namespace, processes: Processes) -> bool:
    """Judge a model on Bounce clips; every rank samples a part of them."""
    model, encoders = _open(arguments)
    clips = clips_of(model.world, arguments.split, arguments.clips)
    conditions = processes.together(
        lambda: encode_clips(encoders, clips, arguments.batch, model.negative_prompt, processes)
    )
    encoders.keep_vae()
    processes.together(lambda: model.read(arguments.attention, arguments.precision))
    sampled = sample_clips(
        model.role,
        encoders,
        clips,
        steps=arguments.steps,
        seed=arguments.seed,
        batch=arguments.batch,
        sampler=arguments.sampler,
        guidance_scale=arguments.guidance_scale,
        conditions=conditions,
        processes=processes,
    )
    if not processes.is_main:
        return True
    values, errors = sampled.scores.values, sampled.scores.errors
    print(f"{model.source}: {sampled.nfe} NFE on {len(clips)} {arguments.split} clips")
    units = {"frame0_psnr": " dB", "trajectory_error": " px"}
    for name, value in values.items():
        print(f"  {name:<18}{value:8.2f} ± {errors[name]:.2f}{units.get(name, '')}")
    print(f"  {'frechet':<18}{sampled.scores.frechet:8.3f}")
    print(f"  {'seconds per clip':<18}{sampled.seconds_per_clip:8.4f} (denoiser)")
    if arguments.output:
        record = {
            "model": model.source,
            "split": arguments.split,
            "steps": arguments.steps,
            "guidance_scale": arguments.guidance_scale,
            "seed": arguments.seed,
            "batch": arguments.batch,
            "attention": arguments.attention,
            "precision": arguments.precision,
            **sampled.plain(),
            "environment": environment(),
        }
        write_json(arguments.output / "scores.json", record)
        rows = [
            (f"{kind} {i}", f)
            for i in range(min(6, len(clips)))
            for kind, f in (("real", clips[i].frames), ("model", sampled.frames[i]))
        ]
        contact_sheet(rows, arguments.output / "contact_sheet.png")
        print(f"  written to {arguments.output}/scores.json and contact_sheet.png")
    return True


def bounce(arguments: argparse.Namespace) -> bool:
    """Clips of Bounce, or pairs, as files."""
    write = export_pairs if arguments.pairs else export_bounce
    write(World(), arguments.split, arguments.count, arguments.output, start=arguments.start)
    what = "pairs, listed in pairs.jsonl" if arguments.pairs else "clips with captions.jsonl and states.jsonl"
    print(f"{arguments.output}: {arguments.count} {what}")
    return True


def export(arguments: argparse.Namespace) -> bool:
    """A run's student as a proven diffusers folder or single file."""
    kind, dtype, rank = arguments.format, arguments.dtype, arguments.rank
    if rank is not None and kind != "lora":
        raise UserError(f"--rank {rank} is for --format lora; --format {kind} holds whole weights")
    model = load_model(arguments.run, arguments.role, arguments.phase)
    target = arguments.output or arguments.run / _export_name(model, kind, dtype, rank)
    truncation, ignored = None, []
    if kind == "diffusers":
        proof = export_student(model, target, dtype=dtype)
    elif kind == "wan":
        proof = export_wan(model, target, dtype)
    else:
        proof, truncation, ignored = export_lora(model, target, dtype, rank)
    print(f"{target}: {model.source}")
    if truncation is not None:
        for layer, error in truncation.layers.items():
            print(f"  {layer:<28} {error:.4f} of its difference to the teacher left out")
        print(f"  rank {truncation.rank}: {truncation.total:.4f} of all linear layers' difference left out")
    for reading in proof.readings:
        print(
            f"  read by {reading.reader}: latents differ by at most {reading.max_error:.1e} from what was stored, "
            f"by {100 * reading.distance:.2g} % from the student in {reading.dtype}; motion {reading.motion_ratio:.3f}"
        )
    if ignored:
        print(
            f"  note: diffusers passes over {len(ignored)} entries (norms, modulation, patches), hence its distance; "
            "ComfyUI reads them all, and --format wan or diffusers holds them for both"
        )
        if not MOTION[0] <= proof.readings[-1].motion_ratio <= MOTION[1]:
            print("  warning: in diffusers this LoRA does not move as the student does; use it in ComfyUI only")
    return True


def _export_name(model: Model, kind: str, dtype: str, rank: int | None) -> str:
    """Where an export goes in its run's folder: a name that still says what it is among others' files."""
    if kind == "diffusers":
        return "student" if dtype == "fp32" else f"student-{dtype}"
    name, student = getattr(model.recipe, "name", "student"), getattr(model.recipe, "student", None)
    if kind == "lora":
        name += f"-lora-r{student.lora.rank if student and student.kind == 'lora' else rank or DEFAULT_RANK}"
    return f"{name}-1step-{dtype}.safetensors"
