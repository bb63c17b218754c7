"""Clips encoded once and whole: latents and conditions in safetensors shards, with a fingerprint.

A cache folder holds ``shard-00000.safetensors`` ... and ``manifest.json``. A shard is written under another name and
renamed when it is whole; the manifest is written last. Building again takes up the shards that are there already.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vpae.conditioning import PATCH, Condition, first_frame_mask
from vpae.data.encoders import Encoders
from vpae.data.sources import Source, open_source
from vpae.draws import Draws
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.files import sha256, write_json, write_text, writing
from vpae.methods.base import Batch
from vpae.recipe import Data, digest
from vpae.runs import first_difference

_REVISION, _SHARD, _ENCODE_BATCH = 1, 256, 8
_STAMP, _MANIFEST, _NULL_TEXT = "building.json", "manifest.json", "null_text.safetensors"
_FIELDS = ("x0", "latent", "text", "image")
_OURS = re.compile(r"lock|building\.json|null_text\.safetensors|shard-\d{5}\.(safetensors|partial)")


@dataclass(frozen=True)
class Cache:
    """An open cache; samples are read from disk when asked for.

    Attributes:
        folder: where it is.
        manifest: counts, shards, fingerprint.
        null_text: the encoded negative prompt ``[1, L, D]``.
    """

    folder: Path
    manifest: dict[str, Any]
    null_text: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "_open", {})

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @property
    def fingerprint(self) -> str:
        """One word that stands for the whole content."""
        return self.manifest["digest"]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """``(C, T, h, w)`` of a sample."""
        return tuple(self.manifest["latent_shape"])

    def caption(self, index: int) -> str:
        return self.manifest["captions"][index]

    def read(self, index: int, name: str) -> Tensor:
        """One field (x0, latent, text, image) of a sample."""
        shard, row = divmod(index, _SHARD)
        handles = self._open
        if shard not in handles:
            handles[shard] = safe_open(self.folder / self.manifest["shards"][shard]["file"], framework="pt")
        return handles[shard].get_slice(name)[row]

    def fetch(self, indices: list[int], draws: Draws) -> Batch:
        """The samples ``indices`` as a batch on the device of ``draws``."""
        parts = {name: [self.read(i, name) for i in indices] for name in _FIELDS}
        rows = int(self.manifest["text_rows"])
        text = torch.stack([F.pad(x, (0, 0, 0, rows - len(x))) for x in parts["text"]])
        latent = torch.stack(parts["latent"])
        mask = first_frame_mask(*latent.shape[2:], stride=self.manifest["temporal_stride"])
        condition = Condition(text, torch.stack(parts["image"]), latent, mask.expand(len(indices), -1, -1, -1, -1))
        condition = condition.to(draws.device)
        return Batch(torch.stack(parts["x0"]).to(draws.device), condition, condition.null(self.null_text), draws)


def expected(data: Data, source: Source, encoders: Encoders) -> dict[str, Any]:
    """What decides a cache's content, field by field (reads the encoders' weights and a part of each video)."""
    return {
        "revision": _REVISION,
        "source": source.fingerprint(),
        "encoders": encoders.fingerprint(),
        "negative_prompt": data.negative_prompt,
        "dtype": "float32",
    }


def prepare(data: Data, encoders: Encoders, processes: Processes) -> Cache:
    """Open the recipe's cache; build it (all ranks together) where it is not there or not finished."""
    folder, source = Path(data.cache), open_source(data.source)
    wanted = processes.from_main(lambda: expected(data, source, encoders))
    with _alone(folder, processes):
        if processes.agree([not (folder / _MANIFEST).is_file()])[0]:
            _build(folder, source, encoders, data, wanted, processes)
    return open_cache(folder, wanted, processes)


@contextlib.contextmanager
def _alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Let one run at a time look at and build a cache folder; another that wants it waits."""
    lock = processes.together(lambda: _lock_file(folder), main_only=True)
    if lock is None:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that is using the cache {folder} ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            print(f"the cache {folder} cannot be locked ({error.strerror}): let one run build it at a time", flush=True)
        yield


def _lock_file(folder: Path) -> TextIO | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _MANIFEST).is_file():
            foreign = sorted(file.name for file in folder.iterdir() if not _OURS.fullmatch(file.name))
            if foreign:
                raise UserError(f"{folder} holds {foreign[0]} and no cache of ours; name another data.cache")
        return (folder / "lock").open("a")
    except OSError as error:
        if (folder / _MANIFEST).is_file():
            return None  # finished and on a read-only disk: there is nothing to guard
        raise UserError(f"cannot write the cache {folder}: {error.strerror}; name another data.cache") from None


def _build(
    folder: Path, source: Source, encoders: Encoders, data: Data, wanted: dict[str, Any], processes: Processes
) -> None:
    shards = -(-len(source) // _SHARD)
    processes.together(lambda: _stamp(folder, wanted), main_only=True)
    processes.together(lambda: _encode_shards(folder, source, encoders, shards, processes))
    processes.together(lambda: _write_manifest(folder, shards, encoders, data, wanted), main_only=True)


def _stamp(folder: Path, wanted: dict[str, Any]) -> None:
    """Say what is being built here; shards of anything else go."""
    stamp = folder / _STAMP
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != _json(wanted):
        for stale in folder.glob("shard-*"):
            if _OURS.fullmatch(stale.name):
                stale.unlink()
    write_text(stamp, _json(wanted))


def _encode_shards(folder: Path, source: Source, encoders: Encoders, shards: int, processes: Processes) -> None:
    mine = range(processes.rank, shards, processes.size)
    total = sum(min(_SHARD, len(source) - s * _SHARD) for s in mine)
    with tqdm(total=total, desc="encoding clips", unit="clip", disable=not processes.is_main) as bar:
        for shard in mine:
            file = folder / f"shard-{shard:05d}.safetensors"
            size = min(_SHARD, len(source) - shard * _SHARD)
            if file.is_file():
                bar.update(size)
                continue
            tensors, captions = _encode(source, range(shard * _SHARD, shard * _SHARD + size), encoders, bar)
            partial = file.with_suffix(".partial")
            try:
                with writing(file):
                    save_file(tensors, partial, metadata={"captions": json.dumps(captions)})
                    partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)


def _encode(source: Source, indices: range, encoders: Encoders, bar: tqdm) -> tuple[dict[str, Tensor], list[str]]:
    parts: dict[str, list[Tensor]] = {name: [] for name in _FIELDS}
    captions, texts = [], []
    for start in range(indices.start, indices.stop, _ENCODE_BATCH):
        records = [source[i] for i in range(start, min(start + _ENCODE_BATCH, indices.stop))]
        for record in records:
            if not record.caption.strip():
                raise UserError(f"clip {record.name} has an empty caption; give it one or leave the clip out")
        frames, first = [r.frames for r in records], [r.frames[0] for r in records]
        _check_shape(frames[0], encoders)
        encoded = {
            "x0": encoders.latents(frames),
            "latent": encoders.first_frame(first, len(frames[0])),
            "image": encoders.images(first),
        }
        texts.append(encoders.texts([r.caption for r in records]))
        for name, tensor in encoded.items():
            bad = (~tensor.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                raise UserError(f"clip {records[bad[0]].name}: its {name} holds NaN or infinity; leave the clip out")
            parts[name].append(tensor.float().cpu())
        captions += [r.caption for r in records]
        bar.update(len(records))
    rows = max(t.shape[1] for t in texts)
    parts["text"] = [F.pad(t.float().cpu(), (0, 0, 0, rows - t.shape[1])) for t in texts]
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}, captions


def _check_shape(frames: np.ndarray, encoders: Encoders) -> None:
    """The clips of a source have one shape: it must be one that VAE and transformer divide evenly."""
    count, height, width = frames.shape[:3]
    stride, edge = encoders.vae.config.scale_factor_temporal, PATCH * encoders.vae.config.scale_factor_spatial
    if count % stride != 1 or height % edge or width % edge:
        raise UserError(
            f"data.source gives clips of {count} frames of {height}x{width}; the model takes {stride}k + 1 frames "
            f"with edges that are multiples of {edge}"
        )


def _write_manifest(folder: Path, shards: int, encoders: Encoders, data: Data, wanted: dict[str, Any]) -> None:
    entries, captions, rows, shape = [], [], 1, None
    for shard in range(shards):
        file = folder / f"shard-{shard:05d}.safetensors"
        with safe_open(file, framework="pt") as handle:
            captions += json.loads(handle.metadata()["captions"])
            rows = max(rows, handle.get_slice("text").get_shape()[1])
            shape = handle.get_slice("x0").get_shape()[1:]
        entries.append({"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)})
    null = encoders.texts([data.negative_prompt])
    with writing(folder / _NULL_TEXT):
        save_file({"null_text": null.cpu().contiguous()}, folder / _NULL_TEXT)
    null_sha256 = sha256(folder / _NULL_TEXT)
    manifest = {
        "fingerprint": wanted,
        "digest": digest([wanted, null_sha256, [e["sha256"] for e in entries]]),
        "null_text_sha256": null_sha256,
        "count": len(captions),
        "latent_shape": shape,
        "text_rows": max(rows, null.shape[1]),
        "temporal_stride": encoders.vae.config.scale_factor_temporal,
        "shards": entries,
        "captions": captions,
    }
    write_json(folder / _MANIFEST, manifest)
    (folder / _STAMP).unlink()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def open_cache(folder: Path, wanted: dict[str, Any], processes: Processes) -> Cache:
    """Open a finished cache and check that it is the one wanted, unharmed (rank 0 reads all of it).

    Raises:
        UserError: it is damaged, or made from other data or encoders (the field is named).
    """
    mend = f"remove {folder} to build it anew, or name another data.cache"
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        have, _, _ = manifest["fingerprint"], manifest["shards"], manifest["null_text_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / _MANIFEST} is damaged; {mend}") from None
    for field, value in wanted.items():
        difference = first_difference(have.get(field), value, field, ("in the cache", "in the recipe"))
        if difference:
            raise UserError(f"cache {folder} does not fit this recipe: {difference}; {mend}")
    processes.together(lambda: _check_files(folder, manifest, mend), main_only=True)
    with safe_open(folder / _NULL_TEXT, framework="pt") as handle:
        null_text = handle.get_tensor("null_text")
    return Cache(folder, manifest, null_text)


def _check_files(folder: Path, manifest: dict[str, Any], mend: str) -> None:
    """Compare every file with what was written."""
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        if not file.is_file() or file.stat().st_size != shard["bytes"] or sha256(file) != shard["sha256"]:
            raise UserError(f"cache shard {file} is missing or damaged; {mend}")
    null = folder / _NULL_TEXT
    if not null.is_file() or sha256(null) != manifest["null_text_sha256"]:
        raise UserError(f"cache file {null} is missing or damaged; {mend}")
