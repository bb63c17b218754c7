"""Whether all ranks see one file system, and whether what a run writes has room there."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from vpae import recipe as recipes
from vpae.conditioning import TEXT_LENGTH, Kind
from vpae.data.encoders import latent_shape, pipeline_kind, transformer_config, vae_config
from vpae.data.shards import FIELDS, MANIFEST
from vpae.data.sources import open_source
from vpae.engine.checkpoint import kept_bytes, stored_shapes
from vpae.engine.host import GIB
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.models import find_model
from vpae.peer_recipe import samples_of
from vpae.preflight.machine import Line
from vpae.recipe import Distillation, Peer
from vpae.runs import phases_of
from vpae.sections import Lora

_LAG = 10.0  # seconds that a file of rank 0 may take to be seen elsewhere
_CLIP_TOKENS = 257  # of ViT-H/14 at 224 px, as Wan's
_STATE_BYTES = {"fp32": 4, "cpu": 4, "bf16": 2, "int8": 1}  # of each of Adam's two moments


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def shared(what: str, folder: Path, need: int, processes: Processes) -> Line:
    """A file that rank 0 writes is seen by all, and ``need`` bytes are free."""
    place = existing(folder)
    token = processes.gather(uuid.uuid4().hex)[0]
    probe, failure = place / f".vpae-preflight-{token[:12]}", ""
    if processes.is_main:
        try:
            probe.write_text(token)
        except OSError as error:
            failure = error.strerror or str(error)
    failure = processes.gather(failure)[0]
    seconds = -1.0 if failure else _seen(probe, token)
    waits = processes.gather(seconds)
    if processes.is_main:
        probe.unlink(missing_ok=True)
    if failure:
        return Line("fails", what, f"{place} cannot be written ({failure})", "allow it, or choose another place")
    blind = [rank for rank, wait in enumerate(waits) if wait < 0]
    if blind:
        text = f"rank {blind[0]} does not see in {place} what rank 0 writes there"
        return Line("fails", what, text, "a file system that all machines share (NFS, Lustre, ...)")
    free = shutil.disk_usage(place).free
    text = (
        f"{place}: {free / GIB:.1f} GiB free, about {need / GIB:.1f} needed"
        if need
        else f"{place}: {free / GIB:.1f} GiB free"
    )
    if free < need:
        mend = "free some, choose another place, or keep fewer with engine.keep_checkpoints=1"
        return Line("fails", what, text, mend if what == "output" else "free some, or choose another data.cache")
    if max(waits) > 1:
        return Line("warning", what, f"{text}; a new file is seen after {max(waits):.1f} s", "none needed, but slow")
    return Line("ok", what, text)


def _seen(file: Path, token: str) -> float:
    started = time.monotonic()
    while time.monotonic() - started < _LAG:
        try:
            if file.read_text() == token:
                return time.monotonic() - started
        except OSError:
            pass
        time.sleep(0.05)
    return -1.0


def checkpoint_bytes(recipe: Distillation, phase: str) -> int:
    """About what one checkpoint of a phase takes: student and who trains against it, both with Adam's moments, and the
    EMA. Heads, some thousandths of it, are left out.

    Raises:
        UserError: the teacher is not there.
    """
    shapes = stored_shapes(find_model(recipe.teacher.path) / "transformer")
    moments = 2 * _STATE_BYTES[recipe.engine.optimiser_state]
    student = sum(_elements(shape) for shape in shapes.values())
    if recipe.student.kind == "lora":
        student = _adapter(shapes, recipe.student.lora)
    return student * (4 + moments + 4) + _opponent(recipe, phase, shapes, student) * (4 + moments)


def _opponent(recipe: Distillation, phase: str, shapes: dict[str, tuple[int, ...]], student: int) -> int:
    """Weights of the network that trains in a phase against a student of ``student`` weights."""
    if isinstance(recipe, recipes.Peer):
        if phase == "apt":
            return student
        if phase != "dmd2":
            return 0
        lora = recipe.method.fake_lora
        return sum(map(_elements, shapes.values())) if lora is None else _adapter(shapes, lora)
    if phase == "priming":
        return _adapter(shapes, recipe.priming.fake_lora)
    return student if recipe.equilibrium.judge == "trainable" else 0


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _adapter(shapes: dict[str, tuple[int, ...]], lora: Lora) -> int:
    matrices = [s for n, s in shapes.items() if len(s) == 2 and n.removesuffix(".weight").endswith(lora.targets)]
    return sum(lora.rank * (rows + columns) for rows, columns in matrices)


def output_bytes(recipe: recipes.Recipe) -> int:
    """Of all checkpoints that a distillation keeps, and the one it is writing; 0 where that is not known."""
    if not isinstance(recipe, Distillation):
        return 0
    try:
        sizes = [checkpoint_bytes(recipe, phase) for phase in phases_of(recipe)]
        return round(kept_bytes(sizes, recipe.engine.keep_checkpoints))
    except (UserError, OSError, ValueError):  # told of under "teacher"
        return 0


def cache_bytes(recipe: recipes.Recipe) -> int:
    """Of the latents and conditions that are still to be encoded, at most; 0 where the cache is there.

    Latents of clips whose size the source does not say are left out.

    Raises:
        UserError: the source is not there.
    """
    if isinstance(recipe, recipes.FinetuneVae) or (Path(recipe.data.cache) / MANIFEST).is_file():
        return 0
    source = open_source(recipe.data.source)
    try:
        kind, config, vae = _model(recipe)
    except UserError:  # told of under "teacher"
        return 0
    fields, numbers = FIELDS[kind], TEXT_LENGTH * config.get("text_dim", 4096)
    if source.shape is not None:
        channels, frames, height, width = latent_shape(vae, source.shape)
        given = frames if kind == "i2v" else 1  # with grey frames after the first one, or that one by itself
        numbers += channels * height * width * (frames + given * ("latent" in fields))
    if "image" in fields:
        numbers += _CLIP_TOKENS * (config.get("image_dim") or 0)
    return len(source) * 4 * numbers


def samples_bytes(recipe: Peer) -> int:
    """Of the teacher's clips, noise and sample, that a method still has to make; 0 where it needs none or has them.

    Raises:
        UserError: the source is not there.
    """
    settings = samples_of(recipe.method)
    if settings is None or (Path(settings.folder) / MANIFEST).is_file():
        return 0
    shape = open_source(recipe.data.source).shape
    try:
        _, _, vae = _model(recipe)
    except UserError:  # told of under "teacher"
        return 0
    return 2 * 4 * settings.count * math.prod(latent_shape(vae, shape)) if shape is not None else 0


def _model(recipe: Distillation | recipes.FinetuneFlow) -> tuple[Kind, dict[str, Any], dict[str, Any]]:
    """Kind of the pipeline, and the configs of its transformer and VAE.

    Raises:
        UserError: they are not there.
    """
    folder, fresh = find_model(recipe.teacher.path), getattr(recipe, "transformer", None)
    if fresh is None:
        return pipeline_kind(folder), transformer_config(folder), vae_config(folder / "vae")
    kind: Kind = "t2v" if fresh.get("image_dim") is None else "i2v"
    return kind, fresh, vae_config(folder if (folder / "config.json").is_file() else folder / "vae")
