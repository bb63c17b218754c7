"""Clips encoded once and whole: latents and conditions in safetensors shards, with a fingerprint.

A cache folder holds ``shard-00000.safetensors`` ..., ``null_text.safetensors`` (the negative prompt),
``probe.safetensors`` (what the encoders said of a fixed clip), ``clips.jsonl`` (what became of each clip of the source)
and ``manifest.json``, which is written last. Building again takes up the shards that are there already.

The fingerprint refuses a cache on any difference in: the source (its clips' names, captions and bytes; resolution,
frames, fps, the rules of cutting and cropping; or world and range; or the teacher's sampler), the hash of each
encoder's weights and config, the negative prompt, the dtype, the format's revision. Versions of libraries are recorded
and refuse nothing by themselves; see :mod:`vpae.data.versions`.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from vpae.conditioning import Kind, condition_of
from vpae.data.encoders import Encoders
from vpae.data.generate import teacher_fingerprint
from vpae.data.locking import alone
from vpae.data.manifest import fault, holds
from vpae.data.pictures import TeacherSource
from vpae.data.shards import (
    FIELDS,
    MANIFEST,
    NULL_TEXT,
    OURS,
    PROBE,
    REPORT,
    Build,
    build,
    check_pictures,
    check_shape,
    clips_per_shard,
    kind_of,
    sign,
)
from vpae.data.sources import Source, open_source
from vpae.data.versions import changed, versions
from vpae.draws import Draws
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.files import sha256
from vpae.methods.base import Batch
from vpae.recipe import Data
from vpae.runs import first_difference

_REVISION = 2
_OPEN_SHARDS = 128  # at once: a cache of large clips has as many shards as clips
_TOLERANCE = 0.02  # of a probe: cards and kernels (TF32 among them) differ by less, another layer or prompt by far more


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
        object.__setattr__(self, "_open", OrderedDict())
        object.__setattr__(self, "_starts", [0, *accumulate(s["clips"] for s in self.manifest["shards"])])

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

    def name(self, index: int) -> str:
        """What the source calls a sample."""
        return self.manifest["names"][index]

    def caption(self, index: int) -> str:
        return self.manifest["captions"][index]

    @property
    def kind(self) -> Kind:
        """Of the models that it serves."""
        return kind_of(self.manifest)

    def read(self, index: int, name: str) -> Tensor:
        """One field (x0, text, and by kind latent and image) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        handles = self._open
        if shard not in handles:
            handles[shard] = safe_open(self.folder / self.manifest["shards"][shard]["file"], framework="pt")
            if len(handles) > _OPEN_SHARDS:
                handles.popitem(last=False)
        handles.move_to_end(shard)
        return handles[shard].get_slice(name)[index - self._starts[shard]]

    def fetch(self, indices: list[int], draws: Draws) -> Batch:
        """The samples ``indices`` as a batch on the device of ``draws``."""
        read = {name: [self.read(i, name) for i in indices] for name in FIELDS[self.kind]}
        rows = int(self.manifest["text_rows"])
        read["text"] = [F.pad(x, (0, 0, 0, rows - len(x))) for x in read["text"]]
        parts = {name: torch.stack(rows) for name, rows in read.items()}
        condition = condition_of(self.kind, parts, self.manifest["temporal_stride"]).to(draws.device)
        return Batch(parts["x0"].to(draws.device), condition, condition.null(self.null_text), draws)


def expected(data: Data, source: Source, encoders: Encoders) -> dict[str, Any]:
    """What decides a cache's content, field by field (reads the encoders' weights and a part of each video)."""
    wanted = {
        "revision": _REVISION,
        "source": source.fingerprint(),
        "encoders": encoders.fingerprint(),
        "negative_prompt": data.negative_prompt,
        "dtype": "float32",
    }
    if encoders.kind != "i2v":  # the only one that caches of before know
        wanted["conditioning"] = encoders.kind
    return wanted | {"teacher": teacher_fingerprint(encoders)} if isinstance(source, TeacherSource) else wanted


def prepare(data: Data, encoders: Encoders, processes: Processes) -> Cache:
    """Open the recipe's cache; build it (all ranks together) where it is not there or not finished.

    Raises:
        UserError: the source or one of its clips is bad, or the cache is damaged or of something else.
    """
    folder, source = Path(data.cache), open_source(data.source)
    check_shape(source.shape, encoders)
    check_pictures(source, encoders)
    wanted = processes.from_main(lambda: expected(data, source, encoders))
    with alone(lambda: _lock_file(folder), f"the cache {folder}", processes):
        missing = processes.agree([not (folder / MANIFEST).is_file()])[0]
        if missing:
            clips = clips_per_shard(source.shape, len(source), encoders)
            build(Build(folder, source, encoders, data.negative_prompt, wanted, clips), processes)
    made = open_cache(folder, wanted, processes, fresh=missing)
    processes.together(lambda: _check_rule(made, source), main_only=True)
    if not missing:
        processes.together(lambda: _check_numbers(made, encoders), main_only=True)
    return made


def find(data: Data, encoders: Encoders, processes: Processes) -> Cache:
    """Open the recipe's finished cache and check every file of it; nothing is built.

    Raises:
        UserError: there is none, or it is damaged or of something else.
    """
    folder = Path(data.cache)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no finished cache; build it with vpae cache and the recipe, without --check")
    source = open_source(data.source)
    return open_cache(folder, processes.from_main(lambda: expected(data, source, encoders)), processes)


def _lock_file(folder: Path) -> TextIO | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).is_file():
            foreign = sorted(file.name for file in folder.iterdir() if not OURS.fullmatch(file.name))
            if foreign:
                raise UserError(f"{folder} holds {foreign[0]} and no cache of ours; name another data.cache")
        return (folder / "lock").open("a")
    except OSError as error:
        if (folder / MANIFEST).is_file():
            return None  # finished and on a read-only disk: there is nothing to guard
        raise UserError(f"cannot write the cache {folder}: {error.strerror}; name another data.cache") from None


def open_cache(folder: Path, wanted: dict[str, Any], processes: Processes, *, fresh: bool = False) -> Cache:
    """Open a finished cache and check that it is the one wanted, unharmed (the ranks share the reading of all of it).

    Args:
        fresh: these ranks have just written it, and hashed it then: its files are not read again.

    Raises:
        UserError: it is damaged, or made from other data or encoders (the field is named).
    """
    mend = f"remove {folder} to build it anew, or name another data.cache"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        have, signed = manifest["fingerprint"], manifest["digest"] == sign(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        have, signed = None, False
    if not isinstance(have, dict):
        raise UserError(f"{folder / MANIFEST} is damaged; {mend}")
    for field, value in wanted.items():
        difference = first_difference(have.get(field), value, field, ("in the cache", "in the recipe"))
        if difference:
            raise UserError(f"cache {folder} does not fit this recipe: {difference}; {mend}")
    if not signed or (wrong := fault(manifest)):
        more = f" ({wrong} is not as it was written)" if signed else ""
        raise UserError(f"{folder / MANIFEST} is damaged{more}; {mend}")
    if not fresh:
        processes.together(lambda: _check_files(folder, manifest, mend, processes))
    return Cache(folder, manifest, _null_text(folder, mend))


def _null_text(folder: Path, mend: str) -> Tensor:
    try:
        return load_file(folder / NULL_TEXT)["null_text"]
    except (OSError, SafetensorError, KeyError):
        raise UserError(f"cache file {folder / NULL_TEXT} is missing or damaged; {mend}") from None


def _check_files(folder: Path, manifest: dict[str, Any], mend: str, processes: Processes) -> None:
    """Compare every file with what was written; each rank its part of the shards."""
    others = {NULL_TEXT: "null_text_sha256", PROBE: "probe_sha256", REPORT: "report_sha256"}
    files = [(f, None, manifest.get(key)) for f, key in others.items()]
    files += [(s["file"], s["bytes"], s["sha256"]) for s in manifest["shards"]]
    entries = {s["file"]: s for s in manifest["shards"]}
    for name, size, hashed in files[processes.rank :: processes.size]:
        file = folder / name
        if not file.is_file() or size not in (None, file.stat().st_size) or sha256(file) != hashed:
            kind = "shard" if size is not None else "file"
            raise UserError(f"cache {kind} {file} is missing or damaged; {mend}")
        if name in entries and not holds(file, entries[name], manifest):
            raise UserError(f"cache shard {file} does not hold what the manifest says; {mend}")


def _check_rule(made: Cache, source: Source) -> None:
    """A cache that leaves clips out does not serve a recipe that wants every clip."""
    count = made.manifest["clips"]["left_out"]
    if count and source.bad == "error":
        raise UserError(
            f"cache {made.folder} leaves out {count} clips that could not be used ({REPORT} in it says why), and "
            f"data.source says bad: error; say bad: skip, or mend the clips and remove {made.folder}"
        )


def _check_numbers(made: Cache, encoders: Encoders) -> None:
    """The encoders must still say of the fixed clip and prompt what they said when the cache was built."""
    then, now = load_file(made.folder / PROBE), encoders.probe()
    for name, tensor in now.items():
        before = then.get(name)
        same = before is not None and before.shape == tensor.shape
        if not same or float((before - tensor).norm()) > _TOLERANCE * float(before.norm()):
            what = changed(made.manifest["made_with"], versions(encoders.device))
            raise UserError(
                f"cache {made.folder}: its encoders give another {name} for the same clip than when it was built "
                f"({what}); put the old versions back, or remove {made.folder} to build it anew"
            )
