"""The student as one safetensors file: all weights in the released layout, or a LoRA on its teacher."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vpae.data.encoders import load_transformer
from vpae.errors import UserError
from vpae.export.header import header
from vpae.export.keys import renamed, to_original
from vpae.export.lora import Truncation, adapter_entries, applied, difference_entries, passed_over
from vpae.export.precision import PRECISIONS, stored
from vpae.export.proof import Examination, Proof, check_student, proof_record
from vpae.files import share, write_json, writing
from vpae.loading import Model
from vpae.recipe import Distillation
from vpae.sampling import euler_scheduler

DEFAULT_RANK = 64


def proof_path(target: Path) -> Path:
    """Where the proof of a single file lies: ``NAME.safetensors`` has ``NAME.proof.json``."""
    return target.with_suffix(".proof.json")


def export_wan(model: Model, target: Path, dtype: str = "fp32") -> Proof:
    """Write all weights under their released names, as ComfyUI and LightX2V read them.

    The file appears under its name only when the proof holds.

    Args:
        dtype: a key of :data:`vpae.export.precision.PRECISIONS`.

    Raises:
        UserError: ``target`` is taken or cannot be written, the model is no student, or the proof fails.
    """
    _check(model, target)
    examination = Examination(model)
    kept, expected = examination.kept(dtype)
    return _write(
        examination,
        target,
        renamed(kept, to_original),
        header(model, layout="wan", dtype=dtype, shift=_shift(examination)),
        {"diffusers from_single_file": expected},
        dtype,
    )


def export_lora(
    model: Model, target: Path, dtype: str = "fp32", rank: int | None = None
) -> tuple[Proof, Truncation | None, list[str]]:
    """Write the student as a LoRA on its teacher, under keys that ComfyUI and diffusers read.

    A LoRA student is written as it was trained. Of a full student, the difference of each linear layer is cut to
    ``rank``; what else differs is kept whole, for ComfyUI, and diffusers passes over it.

    Args:
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        rank: of a full student's LoRA, default 64.

    Returns:
        The proof, what the rank left out (None: nothing, it is a LoRA student), and the entries that diffusers does
        not read.

    Raises:
        UserError: ``target`` is taken or cannot be written, the model has no teacher, ``dtype`` or ``rank`` do not
            fit, or the proof fails.
    """
    _check(model, target)
    precision, full = PRECISIONS[dtype], model.role.adapter is None
    if not isinstance(model.recipe, Distillation):
        raise UserError(f"a LoRA is the difference to a teacher; {model.source} is no run of vpae distill")
    if dtype == "fp8":
        raise UserError("--dtype fp8 is for whole weights (--format wan, diffusers); a LoRA is small: choose bf16")
    if rank is not None and not full:
        raise UserError(f"--rank {rank} is for full students; this one is a LoRA already, its rank is in its recipe")
    examination = Examination(model)
    teacher, truncation = load_transformer(model.pipeline).state_dict(), None
    if full:
        student = {name: w.detach() for name, w in model.role.backbone.transformer.state_dict().items()}
        device = examination.device
        entries, truncation = difference_entries(student, teacher, rank or DEFAULT_RANK, precision.matrices, device)
    else:
        entries = adapter_entries(model.role)
    entries = stored(entries, precision)
    ignored = passed_over(entries)
    if precision.is_exact and not full:
        whole = heard = examination.student
    else:
        whole = heard = examination.expected(applied(teacher, entries))
        if ignored:
            heard = examination.expected(applied(teacher, {k: w for k, w in entries.items() if k not in ignored}))
    del teacher  # 66 GB at 14B, while the file is read again in another process
    width = next(w.shape[0] for key, w in entries.items() if key.endswith(".lora_A.weight"))
    proof = _write(
        examination,
        target,
        entries,
        header(model, layout="lora", dtype=dtype, shift=_shift(examination), rank=width),
        {"every entry": whole, "diffusers load_lora_weights": heard},
        dtype,
        truncated=full,
        incomplete=["diffusers load_lora_weights"] if ignored else [],
        more={"truncation": truncation and vars(truncation), "not_read_by_diffusers": ignored},
    )
    return proof, truncation, ignored


def _check(model: Model, target: Path) -> None:
    check_student(model)
    if target.suffix != ".safetensors":
        raise UserError(f"--output {target} must end in .safetensors for a single file")
    if target.exists() and not proof_path(target).is_file():
        raise UserError(f"{target} exists and is not an earlier export; choose another --output")


def _shift(examination: Examination) -> float:
    return float(euler_scheduler(examination.encoders.pipeline.scheduler).config.shift)


def _write(
    examination: Examination,
    target: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    expected: Mapping[str, Tensor],
    dtype: str,
    *,
    truncated: bool = False,
    incomplete: Collection[str] = (),
    more: Mapping[str, Any] | None = None,
) -> Proof:
    draft = target.with_name(f".{target.stem}.partial")  # a folder: safetensors writes by way of a file of its own
    partial = draft / target.name
    try:
        with writing(target):
            shutil.rmtree(draft, ignore_errors=True)  # of a killed export
            draft.mkdir(parents=True)
            save_file(tensors, partial, metadata=metadata)
            share(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        proof = examination.prove(partial, expected, dtype, truncated=truncated, incomplete=incomplete)
        record = proof_record(examination.model, proof, dtype, {target.name: partial})
        # weights never lie beside a proof that is not theirs, whenever this is interrupted
        target.unlink(missing_ok=True)
        write_json(proof_path(target), record | {"header": metadata} | dict(more or {}))
        with writing(target):
            partial.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return proof
