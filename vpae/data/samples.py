"""Clips by the teacher's own sampler for the conditions of a cache, made once: noise and sample, side by side.

A folder holds ``samples-00000.safetensors`` ... (``noise`` and ``x0`` of one batch each, in the order of the cache) and
``manifest.json``, which is written last. What is there already is taken up when the clips are made again; the noise
of a clip belongs to (seed, its place in the cache), whatever ranks share the work.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vpae.data.cache import Cache
from vpae.data.encoders import Encoders, load_transformer
from vpae.data.locking import alone
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.files import atomic, sha256, write_json
from vpae.methods.base import Batch
from vpae.models import find_model, weights_fingerprint, wrap
from vpae.peer_recipe import Samples, samples_of
from vpae.recipe import Peer, digest, to_plain
from vpae.roles import Role
from vpae.runs import first_difference
from vpae.sampling import euler_scheduler, sample_latents

_MANIFEST, _LOCK, _REVISION = "manifest.json", "lock", 1
_OURS = re.compile(r"\.?samples-.*|\.?manifest\.json.*|lock")  # with a dot: drafts


@dataclass(frozen=True)
class TeacherSamples:
    """The teacher's clips beside the cache that their conditions come from.

    Attributes:
        batch: clips in a file.
        fingerprint: one word for what they are and for the cache.
    """

    cache: Cache
    folder: Path
    batch: int
    count: int
    fingerprint: str

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, name: str) -> Tensor:
        """``noise`` or ``x0`` of a clip."""
        with safe_open(_file(self.folder, index // self.batch), framework="pt") as handle:
            return handle.get_slice(name)[index % self.batch]

    def fetch(self, indices: list[int], draws: Draws) -> Batch:
        """The conditions of the cache with the teacher's clips in the place of the data's."""
        batch = self.cache.fetch(indices, draws)
        noise, x0 = (torch.stack([self.read(i, name) for i in indices]).to(draws.device) for name in ("noise", "x0"))
        return dataclasses.replace(batch, x0=x0, noise=noise)


def prepare_samples(recipe: Peer, cache: Cache, encoders: Encoders, processes: Processes) -> TeacherSamples:
    """Open the recipe's teacher clips; make those that are missing (all ranks together).

    Raises:
        UserError: the cache has fewer clips, the folder holds clips of something else, or they are damaged.
    """
    settings = samples_of(recipe.method)
    if settings.count > len(cache):
        raise UserError(
            f"method.teacher_samples.count is {settings.count}, and the cache {cache.folder} has {len(cache)} clips"
        )
    pipeline, folder = find_model(recipe.teacher.path), Path(settings.folder)
    wanted = {
        "revision": _REVISION,
        "cache": cache.fingerprint,
        "teacher": weights_fingerprint(pipeline),
        "shift": float(euler_scheduler(encoders.pipeline.scheduler).config.shift),
        **{key: value for key, value in to_plain(settings).items() if key != "folder"},
    }
    with alone(lambda: _lock_file(folder), f"the teacher's clips in {folder}", processes):
        processes.together(lambda: _check_folder(folder, wanted), main_only=True)
        files = range(-(-settings.count // settings.batch))
        mine = files[processes.rank :: processes.size]
        processes.together(lambda: _make(recipe, settings, folder, wanted, mine, cache, encoders, processes))
        parts = processes.gather(
            processes.together(lambda: {_file(folder, k).name: sha256(_file(folder, k)) for k in mine})
        )
        hashes = {name: hashed for part in parts for name, hashed in sorted(part.items())}
        processes.together(lambda: _sign(folder, wanted, hashes), main_only=True)
    return TeacherSamples(cache, folder, settings.batch, settings.count, digest(wanted))


def _file(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.safetensors"


def _mend(folder: Path) -> str:
    return f"remove {folder} to make them anew, or name another method.teacher_samples.folder"


def _lock_file(folder: Path) -> TextIO | None:
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    if foreign := [name for name in names if not _OURS.fullmatch(name)]:
        raise UserError(f"{folder} holds {foreign[0]} and no clips of the teacher; {_mend(folder)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / _LOCK).open("a")
    except OSError as error:
        if (folder / _MANIFEST).is_file():
            return None  # finished and on a read-only disk: there is nothing to guard
        mend = "name another method.teacher_samples.folder"
        raise UserError(f"cannot write the teacher's clips into {folder}: {error.strerror}; {mend}") from None


def _check_folder(folder: Path, wanted: dict[str, Any]) -> None:
    """What stands in the folder must be of the same fingerprint."""
    mend = _mend(folder)
    for file in sorted(folder.glob("*")):
        if file.name == _LOCK:
            continue
        if file.name.startswith("."):  # a kill left it half written
            file.unlink()
            continue
        found = _fingerprint_in(file)
        difference = first_difference(found, wanted, places=("there", "in the recipe")) if found else ""
        if difference:
            raise UserError(f"the teacher's clips in {folder} do not fit this recipe: {difference}; {mend}")


def _fingerprint_in(file: Path) -> dict[str, Any] | None:
    """The fingerprint that a file carries; None where it is cut or damaged."""
    try:
        if file.name == _MANIFEST:
            return json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
        with safe_open(file, framework="pt") as handle:
            return json.loads(handle.metadata()["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


@torch.no_grad()
def _make(
    recipe: Peer,
    settings: Samples,
    folder: Path,
    wanted: dict[str, Any],
    mine: range,
    cache: Cache,
    encoders: Encoders,
    processes: Processes,
) -> None:
    """Sample this rank's missing files, with a whole teacher on its device."""
    missing = [number for number in mine if _fingerprint_in(_file(folder, number)) is None]
    if not missing:
        return
    plain = dataclasses.replace(recipe.engine, checkpointing=False)
    # in fp32, which the attention kernel of training may not take
    native = dataclasses.replace(recipe.teacher, attention="native")
    transformer = load_transformer(find_model(recipe.teacher.path)).to(processes.device)
    teacher = Role("teacher", wrap(transformer, native, plain))
    scheduler = encoders.pipeline.scheduler
    for number in tqdm(missing, desc="sampling the teacher", unit="batch", disable=not processes.is_main):
        start = number * settings.batch
        places = list(range(start, min(start + settings.batch, settings.count)))
        draws = Draws(seed_of(settings.seed, "teacher samples"), places, processes.device)
        batch = cache.fetch(places, draws)
        options = {"steps": settings.steps, "guidance_scale": settings.guidance_scale}
        x0 = sample_latents(
            teacher, batch.condition, batch.null, draws, sampler="euler", scheduler=scheduler, **options
        )
        if not x0.isfinite().all():
            raise UserError(f"the teacher's samples hold NaN or infinity (clips {places[0]} to {places[-1]})")
        tensors = {"noise": draws.normal_like("sample noise", x0), "x0": x0}
        with atomic(_file(folder, number)) as draft:
            metadata = {"fingerprint": json.dumps(wanted, sort_keys=True)}
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, draft, metadata=metadata)


def _sign(folder: Path, wanted: dict[str, Any], hashes: dict[str, str]) -> None:
    """Compare every file with what was written, or write down what was."""
    manifest = folder / _MANIFEST
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        write_json(manifest, {"fingerprint": wanted, "sha256": hashes})
        return
    for name, hashed in hashes.items():
        if stored.get(name) != hashed:
            raise UserError(f"{folder / name} is damaged; remove it and {manifest} to make its clips anew")
