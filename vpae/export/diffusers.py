"""``vpae export``: the student as a diffusers folder that proves itself."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vpae import recipe as recipes
from vpae.data.bounce import make_clip
from vpae.data.encoders import PARTS, Encoders, load_pipeline
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import reshard
from vpae.errors import UserError
from vpae.export.card import model_card
from vpae.export.folder import write_transformer
from vpae.files import sha256, write_json, write_text, writing
from vpae.loading import Model
from vpae.recipe import FinetuneFlow
from vpae.roles import merge_adapter
from vpae.runs import environment
from vpae.sampling import euler_scheduler, sample_latents

TOLERANCE = 1e-3  # of latents of unit variance: fp32 round-off over all blocks is about 1e-5, a wrong weight above 1e-1
_COPIED = tuple(part for part in PARTS if part != "scheduler")


@dataclass(frozen=True)
class Proof:
    """One stock pipeline call beside our own sampler on the same noise.

    Attributes:
        max_error: largest absolute difference of the normalised latents.
        rms: root mean square of our latents, for scale.
    """

    max_error: float
    rms: float


def export_student(model: Model, target: Path, measured: str | None = None) -> Proof:
    """Write the model as a diffusers folder, reload it, compare, and leave the proof beside the weights.

    The folder appears under its name only when the proof holds.

    Args:
        measured: Markdown for the model card: how good it is, on what.

    Raises:
        UserError: ``target`` is taken by something else, or the reloaded pipeline does not reproduce the student.
    """
    if isinstance(model.recipe, FinetuneFlow):
        raise UserError("a flow-matching run makes a teacher, which its folder pipeline/ holds; export is for students")
    if target.exists() and not (target / "proof.json").is_file():
        raise UserError(f"{target} exists and is not an earlier export; choose another --output")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial):
        partial.mkdir(parents=True)
    reshard([model.role.backbone.transformer])
    transformer = merge_adapter(model.role)
    weights = {name: w.detach().cpu().contiguous() for name, w in transformer.state_dict().items()}
    write_transformer(transformer.config, weights, partial)
    scheduler = euler_scheduler(load_pipeline(model.pipeline, transformer=False).scheduler)
    with writing(partial):
        for part in _COPIED:
            shutil.copytree(model.pipeline / part, partial / part)
        scheduler.save_pretrained(partial / "scheduler")
    index = json.loads((model.pipeline / "model_index.json").read_text(encoding="utf-8"))
    write_json(partial / "model_index.json", index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]})
    proof = prove(model, partial)
    if proof.max_error > TOLERANCE:
        shutil.rmtree(partial)
        raise UserError(
            f"the exported pipeline does not reproduce the student (latents differ by {proof.max_error:.2e}, "
            f"{TOLERANCE:.0e} allowed); the export was removed"
        )
    files = {str(f.relative_to(partial)): sha256(f) for f in sorted(partial.rglob("*.safetensors"))}
    write_json(
        partial / "proof.json",
        {
            "what": "WanImageToVideoPipeline(image, prompt, num_inference_steps=1, guidance_scale=1.0) against the "
            "student's own sampler on the same noise, normalised latents",
            "max_error": proof.max_error,
            "tolerance": TOLERANCE,
            "rms": proof.rms,
            "source": model.source,
            "recipe": None if model.recipe is None else recipes.digest(model.recipe),
            "sha256": files,
            "environment": environment(),
        },
    )
    if model.recipe is not None:
        write_text(partial / "recipe.yaml", recipes.dump(model.recipe))
    write_text(partial / "README.md", model_card(model, measured))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return proof


@torch.no_grad()
def prove(model: Model, folder: Path) -> Proof:
    """Call the reloaded pipeline as a user would and compare with our sampler on the same noise."""
    encoders = Encoders(model.pipeline, model.role.backbone.transformer.device)
    clip, (num_frames, height, width) = make_clip(model.world, "test", 0), model.shape
    picture = Image.fromarray(clip.frames[0]).resize((width, height))
    condition = encoders.condition([np.asarray(picture)], [clip.caption], num_frames)
    draws = Draws(seed_of("proof"), [0], encoders.device)
    ours = sample_latents(model.role, condition, None, draws, steps=1)
    pipeline = load_pipeline(folder, transformer=True).to(encoders.device)
    theirs = pipeline(
        image=picture,
        prompt=clip.caption,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=draws.normal_like("sample noise", condition.latent),
        output_type="latent",
    ).frames
    return Proof(float((ours - theirs).abs().max()), float(ours.square().mean().sqrt()))
