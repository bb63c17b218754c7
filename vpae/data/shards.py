"""Building a cache: each shard written whole under another name and then renamed, by whichever rank has its turn.

A shard stands for a fixed range of the source's clips, the bad ones too: it holds the tensors of those that could be
used and, in its header, what became of every one. So what a shard holds depends on its clips alone, not on the ranks
that share the work nor on when one of them was killed, and a finished shard is never made again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vpae.conditioning import Kind, condition_of
from vpae.data.encoders import Encoders
from vpae.data.generate import Teacher
from vpae.data.outcomes import Outcome, parsed, summary, tally
from vpae.data.pictures import TeacherSource
from vpae.data.records import Record, Source, Unreachable
from vpae.data.versions import versions
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.files import sha256, write_json, write_text, writing
from vpae.recipe import digest

FIELDS: dict[Kind, tuple[str, ...]] = {  # tensors of a clip
    "i2v": ("x0", "latent", "text", "image"),
    "t2v": ("x0", "text"),
    "ti2v": ("x0", "latent", "text"),
}
MANIFEST, NULL_TEXT, PROBE, REPORT = "manifest.json", "null_text.safetensors", "probe.safetensors", "clips.jsonl"
STAMP, STOP = "building.json", "stop"
# all that a folder may hold while a cache is built in it
OURS = re.compile(
    r"lock|building\.json|stop|clips\.jsonl|(null_text|probe)\.safetensors|shard-\d{5,}\.(safetensors|partial)"
    r"|\..*\.tmp|\.tmp\w{6}"  # the last: safetensors' own, which a kill leaves
)
_ENCODE_BATCH = 8
_MOST_CLIPS, _MOST_BYTES, _FEWEST_SHARDS = 256, 32_000_000, 64
_LOOK = 2.0  # seconds between two looks at how far the other ranks are


@dataclass(frozen=True)
class Build:
    """What is built, and where.

    Attributes:
        clips: of the source in one shard.
        wanted: the fingerprint.
    """

    folder: Path
    source: Source
    encoders: Encoders
    negative_prompt: str
    wanted: dict[str, Any]
    clips: int

    @property
    def fields(self) -> tuple[str, ...]:
        return FIELDS[self.encoders.kind]

    @property
    def shards(self) -> int:
        return -(-len(self.source) // self.clips)

    def file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def positions(self, shard: int) -> range:
        return range(shard * self.clips, min((shard + 1) * self.clips, len(self.source)))


def clips_per_shard(shape: tuple[int, int, int], clips: int, encoders: Encoders) -> int:
    """How many clips a shard holds, from the size of one and the number of all.

    A power of two up to 256: at most 32 MB of latents, so that a killed rank loses at most one clip of 832x480x81
    (16.8 MB, minutes on a CPU); and so many shards that 64 ranks could share them, unless these would be smaller than
    the batches of 8 in which small clips are encoded. It depends on nothing that a run may change.
    """
    whole = 2 if encoders.kind == "i2v" else 1  # latents of the whole clip's size
    sample = whole * 4 * math.prod(encoders.latent_shape(shape))
    fitting = max(1, min(_MOST_CLIPS, _MOST_BYTES // sample, max(_ENCODE_BATCH, clips // _FEWEST_SHARDS)))
    return 1 << (fitting.bit_length() - 1)


def check_shape(shape: tuple[int, int, int], encoders: Encoders) -> None:
    """A source's clips must be of a shape that VAE and transformer divide evenly.

    Raises:
        UserError: they are not.
    """
    frames, height, width = shape
    stride, edge = encoders.stride, encoders.edge
    if frames % stride != 1 or height % edge or width % edge or not min(height, width):
        raise UserError(
            f"data.source gives clips of {frames} frames of {height}x{width}; the model takes {stride}k + 1 frames "
            f"with edges that are multiples of {edge}"
        )


def check_pictures(source: Source, encoders: Encoders) -> None:
    """Clips that the teacher makes start from pictures where it is told of a first frame, and else from texts alone.

    Raises:
        UserError: the source gives the other.
    """
    if not isinstance(source, TeacherSource) or source.has_pictures == encoders.has_pictures:
        return
    if encoders.has_pictures:
        raise UserError(f"data.source: {encoders.folder} makes clips from a first frame; use kind: generate")
    raise UserError(f"data.source: {encoders.folder} makes clips from text alone; use kind: prompts")


def build(job: Build, processes: Processes) -> None:
    """Make the shards that are missing and, when all are there, report and manifest. All ranks call it together.

    Raises:
        UserError: a bad clip where the source's rule is ``error``; no clip that could be used; a file that cannot be
            written, or is not seen by all ranks.
    """
    todo = processes.from_main(lambda: _stamp(job))
    started = time.monotonic()
    processes.together(lambda: _encode_shards(job, todo, processes))
    seconds = time.monotonic() - started
    mine = processes.together(lambda: [_describe(job, s) for s in range(processes.rank, job.shards, processes.size)])
    parts = processes.gather(mine)
    entries = [parts[s % processes.size][s // processes.size] for s in range(job.shards)]
    processes.together(lambda: _finish(job, entries), main_only=True)
    if processes.is_main and todo:
        clips = sum(len(job.positions(s)) for s in todo)
        taken = f", {len(job.source) - clips} taken up from before" if clips < len(job.source) else ""
        ranks = f" on {processes.size} ranks" if processes.size > 1 else ""
        print(f"encoded {clips} clips{ranks} in {seconds:.1f} s, {clips / seconds:.3g} clips/s{taken}", flush=True)


def _stamp(job: Build) -> list[int]:
    """Say what is being built here and with what; shards of anything else go, and what a kill left half written.

    Returns:
        the shards still to be made.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    stamp, made_with = job.folder / STAMP, []
    try:
        plain = json.loads(stamp.read_text(encoding="utf-8"))
        if json.dumps(plain["fingerprint"], sort_keys=True) == json.dumps(job.wanted, sort_keys=True):
            made_with = list(plain["made_with"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for stale in [*job.folder.glob("*.partial"), *job.folder.glob(".*tmp*"), job.folder / STOP]:
        stale.unlink(missing_ok=True)
    if not made_with:
        for stale in job.folder.glob("shard-*"):
            stale.unlink()
    now = versions(job.encoders.device)
    write_json(stamp, {"fingerprint": job.wanted, "made_with": made_with + [now] * (now not in made_with)})
    return [shard for shard in range(job.shards) if not _is_whole(job.file(shard))]


def _is_whole(file: Path) -> bool:
    """Whether a shard is there; one that a power cut left without its end is removed."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as handle:
            parsed(handle.metadata()["clips"])
            return True
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        file.unlink()
        return False


def _encode_shards(job: Build, todo: list[int], processes: Processes) -> None:
    """Make this rank's part of the shards ``todo``; leave early when another rank has failed."""
    mine = todo[processes.rank :: processes.size]
    missing = sum(len(job.positions(s)) for s in todo)
    looked, before = 0.0, len(job.source) - missing
    options = {"total": len(job.source), "initial": before, "desc": "encoding clips", "unit": "clip"}
    with tqdm(**options, disable=not processes.is_main or not todo) as bar:
        own = 0

        def went_on(clips: int) -> None:
            nonlocal looked, own
            own += clips
            if bar.disable or (processes.size > 1 and time.monotonic() - looked < _LOOK):
                return
            looked = time.monotonic()
            others = _clips_of_others(job, todo, processes) if processes.size > 1 else 0
            bar.update(before + own + others - bar.n)

        try:
            teacher = Teacher(job.source, job.encoders) if mine and isinstance(job.source, TeacherSource) else None
            for shard in mine:
                if (job.folder / STOP).exists():
                    return
                _write_shard(job, shard, teacher, went_on)
        except BaseException:
            with contextlib.suppress(OSError):
                (job.folder / STOP).touch()
            raise
        if not bar.disable and not (job.folder / STOP).exists():
            bar.update(before + missing - bar.n)


def _clips_of_others(job: Build, todo: list[int], processes: Processes) -> int:
    there = {entry.name for entry in os.scandir(job.folder)}
    theirs = [s for i, s in enumerate(todo) if i % processes.size != processes.rank]
    return sum(len(job.positions(s)) for s in theirs if job.file(s).name in there)


def _write_shard(job: Build, shard: int, teacher: Teacher | None, went_on: Callable[[int], None]) -> None:
    file = job.file(shard)
    tensors, outcomes = _encode_shard(job, job.positions(shard), teacher, went_on)
    partial = file.with_suffix(".partial")
    try:
        with writing(file):
            # one key alone: safetensors writes several in no fixed order
            save_file(tensors, partial, metadata={"clips": json.dumps([o.plain() for o in outcomes])})
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _encode_shard(
    job: Build, positions: range, teacher: Teacher | None, went_on: Callable[[int], None]
) -> tuple[dict[str, Tensor], list[Outcome]]:
    parts: dict[str, list[Tensor]] = {name: [] for name in job.fields}
    outcomes = []
    for start in range(positions.start, positions.stop, _ENCODE_BATCH):
        batch = range(start, min(start + _ENCODE_BATCH, positions.stop))
        read = {position: _read(job.source, position) for position in batch}
        good = {position: record for position, record in read.items() if isinstance(record, Record)}
        encoded = _encode(job, good, teacher) if good else {}
        for row, (position, record) in enumerate(good.items()):
            broken = [name for name in job.fields if not encoded[name][row].isfinite().all()]
            if broken:
                why = UserError(f"clip {record.name}: its {broken[0]} holds NaN or infinity")
                read[position] = _left_out(job.source, position, why)
        kept = [row for row, position in enumerate(good) if isinstance(read[position], Record)]
        for name, tensor in encoded.items():
            parts[name].append(tensor[kept])
        outcomes += [o if isinstance(o, Outcome) else Outcome(o.name, o.caption, o.note) for o in read.values()]
        went_on(len(batch))
    rows = max((t.shape[1] for t in parts["text"]), default=0)
    parts["text"] = [F.pad(t, (0, 0, 0, rows - t.shape[1])) for t in parts["text"]]
    tensors = {name: torch.cat(of).contiguous() for name, of in parts.items() if of}
    return {name: tensor for name, tensor in tensors.items() if len(tensor)}, outcomes


def _read(source: Source, position: int) -> Record | Outcome:
    try:
        record = source[position]
        if not record.caption.strip():
            raise UserError(f"clip {record.name} has an empty caption; give it one")
        return record
    except Unreachable:
        raise
    except UserError as error:
        return _left_out(source, position, error)


def _left_out(source: Source, position: int, error: UserError) -> Outcome:
    if source.bad == "error":
        more = "" if source.folder is None else "; or leave such clips out with bad: skip"
        raise UserError(f"{error}{more}") from error
    # the report, and with it the shard's hash, is to be the same wherever the clips lie
    return Outcome(source.name(position), "", left_out=str(error).replace(f"{source.folder}/", ""))


@torch.no_grad()
def _encode(job: Build, good: dict[int, Record], teacher: Teacher | None) -> dict[str, Tensor]:
    """The fields of some clips, fp32 on the CPU, by name ``[B, ...]``."""
    encoders, records = job.encoders, list(good.values())
    first = [r.frames[0] for r in records] if encoders.has_pictures else []
    encoded = encoders.parts(first, [r.caption for r in records], job.source.shape[0])
    if teacher is None:
        encoded["x0"] = encoders.latents([r.frames for r in records])
    else:
        encoded["x0"] = teacher(list(good), condition_of(encoders.kind, encoded, encoders.stride))
    return {name: encoded[name].float().cpu() for name in job.fields}


def _describe(job: Build, shard: int) -> dict[str, Any]:
    """What the manifest says of a shard, and what became of its clips."""
    file = job.file(shard)
    try:
        with safe_open(file, framework="pt") as handle:
            outcomes = parsed(handle.metadata()["clips"])
            shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: was written and is not there ({error}); let all ranks see one folder") from None
    kept = sum(1 for o in outcomes if "left_out" not in o)
    if len(outcomes) != len(job.positions(shard)) or any((shapes.get(n) or [0])[0] != kept for n in job.fields):
        raise UserError(f"{file}: does not hold what its header says; remove {job.folder} to build it anew")
    entry = {"file": file.name, "clips": kept, "bytes": file.stat().st_size, "sha256": sha256(file)}
    return {"entry": entry, "outcomes": outcomes, "shapes": shapes}


def kind_of(manifest: dict[str, Any]) -> Kind:
    """Of the models that a cache serves; caches of before there were others say nothing."""
    return manifest["fingerprint"].get("conditioning", "i2v")


def sign(manifest: dict[str, Any]) -> str:
    """The digest of a manifest: over all that it says, but for what differs between machines that made the same."""
    machine = ("digest", "made_with", "probe_sha256")
    return digest({key: value for key, value in manifest.items() if key not in machine})


def _finish(job: Build, parts: list[dict[str, Any]]) -> None:
    """Write report, null text, probe and, last, the manifest."""
    outcomes = [Outcome.from_plain(o) for part in parts for o in part["outcomes"]]
    write_text(job.folder / REPORT, "".join(json.dumps(o.reported(), ensure_ascii=False) + "\n" for o in outcomes))
    kept = [o for o in outcomes if not o.left_out]
    print(summary(outcomes, job.folder / REPORT), flush=True)
    if not kept:
        raise UserError(f"no clip is left of {len(outcomes)}; {job.folder / REPORT} says why each was left out")
    null = job.encoders.texts([job.negative_prompt]).cpu().contiguous()
    for name, tensors in ((NULL_TEXT, {"null_text": null}), (PROBE, job.encoders.probe())):
        with writing(job.folder / name):
            save_file(tensors, job.folder / name)
    shapes = [part["shapes"] for part in parts if part["shapes"]]
    manifest = {
        "fingerprint": job.wanted,
        "made_with": json.loads((job.folder / STAMP).read_text(encoding="utf-8"))["made_with"],
        "null_text_sha256": sha256(job.folder / NULL_TEXT),
        "probe_sha256": sha256(job.folder / PROBE),
        "report_sha256": sha256(job.folder / REPORT),
        "count": len(kept),
        "clips": tally(outcomes),
        "latent_shape": shapes[0]["x0"][1:],
        "text_rows": max([null.shape[1], *(s["text"][1] for s in shapes)]),
        "temporal_stride": job.encoders.stride,
        "shards": [part["entry"] for part in parts],
        "names": [o.name for o in kept],
        "captions": [o.caption for o in kept],
    }
    write_json(job.folder / MANIFEST, manifest | {"digest": sign(manifest)})
    (job.folder / STAMP).unlink()
