"""The student as a diffusers folder that proves itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from vpae import recipe as recipes
from vpae.data.encoders import PARTS, pipeline_kind
from vpae.errors import UserError
from vpae.export.card import model_card
from vpae.export.folder import write_transformer
from vpae.export.proof import Examination, Proof, check_student, proof_record
from vpae.files import write_json, write_text, writing
from vpae.loading import Model
from vpae.sampling import euler_scheduler


def export_student(model: Model, target: Path, measured: str | None = None, dtype: str = "fp32") -> Proof:
    """Write the model as a diffusers folder, read it again in a fresh process, compare, and leave the proof in it.

    The folder appears under its name only when the proof holds.

    Args:
        measured: Markdown for the model card: how good it is, on what.
        dtype: of the transformer, a key of :data:`vpae.export.precision.PRECISIONS`; the encoders stay as they are.

    Raises:
        UserError: ``target`` is taken by something else, or the reloaded pipeline does not reproduce the student.
    """
    check_student(model)
    if target.exists() and not (target / "proof.json").is_file():
        raise UserError(f"{target} exists and is not an earlier export; choose another --output")
    partial, before = (target.with_name(target.name + ending) for ending in (".partial", ".before"))
    for stale in (partial, before):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        proof = _write(model, partial, measured, dtype)
        if target.exists():  # moved whole: half of an earlier export would be taken for something else
            os.replace(target, before)
        os.replace(partial, target)
    finally:
        for stale in (partial, before):
            shutil.rmtree(stale, ignore_errors=True)
    return proof


def _write(model: Model, folder: Path, measured: str | None, dtype: str) -> Proof:
    with writing(folder):
        folder.mkdir(parents=True)
    examination = Examination(model)
    kept, expected = examination.kept(dtype)
    write_transformer(model.role.backbone.transformer.config, kept, folder)
    with writing(folder):
        for part in PARTS[pipeline_kind(model.pipeline)]:
            if part != "scheduler":
                shutil.copytree(model.pipeline / part, folder / part)
        euler_scheduler(examination.encoders.pipeline.scheduler).save_pretrained(folder / "scheduler")
    index = json.loads((model.pipeline / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]})
    proof = examination.prove(folder, {"diffusers from_pretrained": expected}, dtype)
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*.safetensors"))}
    write_json(folder / "proof.json", proof_record(model, proof, dtype, files))
    if model.recipe is not None:
        write_text(folder / "recipe.yaml", recipes.dump(model.recipe))
    write_text(folder / "README.md", model_card(model, measured))
    return proof
