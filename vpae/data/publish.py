"""Clips given to others: Bounce as a folder of video files or as a Hugging Face dataset, and a cache as one."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pymunk

from vpae.data import bounce
from vpae.data.bounce import Clip, World, make_clip
from vpae.data.counterfactual import make_pair
from vpae.data.manifest import fault
from vpae.data.shards import FIELDS, MANIFEST, kind_of
from vpae.data.sources import CAPTIONS, BounceSource
from vpae.data.videos import write_video
from vpae.errors import UserError
from vpae.files import write_text

if TYPE_CHECKING:
    import datasets

FPS = 8  # of Bounce clips as files: the world itself counts time in frames
STATES, PAIRS, ORIGIN = "states.jsonl", "pairs.jsonl", "bounce.json"


def export_bounce(world: World, split: str, count: int, folder: str | Path, *, start: int = 0) -> None:
    """Write clips as lossless mp4 with ``captions.jsonl`` (what :class:`VideoFolderSource` reads) and ``states.jsonl``.

    A line of the states has the clip's file, index, gravity, colours and, a frame, positions, velocities and radii.
    ``bounce.json`` says of which world they are. Written again, the same export gives the same bytes.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    source, folder = BounceSource(world, split, count, start), Path(folder)
    _claim(folder, source.fingerprint())
    captions, states = [], []
    for item in range(count):
        clip = source.clip(item)
        file = f"{clip.name}.mp4"
        write_video(folder / file, clip.frames, FPS, lossless=True)
        captions.append({"file": file, "caption": clip.caption})
        states.append({"file": file, **_states(clip)})
    write_text(folder / STATES, "".join(json.dumps(line) + "\n" for line in states))
    write_text(folder / CAPTIONS, "".join(json.dumps(line) + "\n" for line in captions))


def export_pairs(world: World, split: str, count: int, folder: str | Path, *, start: int = 0) -> None:
    """Write pairs of one plausible and one impossible version as lossless mp4, with ``pairs.jsonl``.

    A line has both files, the caption, the kind, the first frame that differs and the ball (null: all of them).

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    _claim(folder, {"pairs": True, **BounceSource(world, split, count, start).fingerprint()})
    lines = []
    for index in range(start, start + count):
        pair = make_pair(world, split, index)
        line = {"plausible": f"{pair.name}-plausible.mp4", "impossible": f"{pair.name}-impossible.mp4"}
        write_video(folder / line["plausible"], pair.plausible.frames, FPS, lossless=True)
        write_video(folder / line["impossible"], pair.impossible.frames, FPS, lossless=True)
        lines.append(
            {**line, "caption": pair.plausible.caption, "kind": pair.kind, "frame": pair.frame, "ball": pair.ball}
        )
    write_text(folder / PAIRS, "".join(json.dumps(line) + "\n" for line in lines))


def _claim(folder: Path, what: dict[str, Any]) -> None:
    origin = json.dumps(what, indent=1) + "\n"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / ORIGIN).is_file() or (folder / ORIGIN).read_text() != origin:
            raise UserError(f"{folder}: already holds something else; name a new folder, or empty this one")
    write_text(folder / ORIGIN, origin)


def _states(clip: Clip) -> dict[str, Any]:
    return {
        "split": clip.split,
        "index": clip.index,
        "gravity": clip.gravity,
        "colours": list(clip.colours),
        "positions": clip.positions.tolist(),
        "velocities": clip.velocities.tolist(),
        "radii": clip.radii.tolist(),
    }


def _rows(world: World, split: str, start: int, count: int) -> Iterator[dict[str, Any]]:
    for index in range(start, start + count):
        clip = make_clip(world, split, index)
        yield {"frames": clip.frames, "caption": clip.caption, **_states(clip)}


def bounce_dataset(
    world: World, split: str, count: int, *, start: int = 0, cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """Bounce as a Hugging Face dataset, simulated once into the library's own cache (0.5 MB a clip of 17 x 64 x 64).

    The cache is named by the world, the split, the range and the code that simulates, so no two worlds share one.

    Returns:
        A dataset in numpy format with ``frames`` uint8 ``[F, H, W, 3]``, ``positions`` and ``velocities`` float64
        ``[F, N, 2]``, ``radii`` ``[F, N]``, ``colours`` ``[N]``, ``caption``, ``gravity``, ``split``, ``index``.

    Raises:
        UserError: an unknown split, a negative start, or no clip at all.
    """
    import datasets

    source = BounceSource(world, split, count, start)
    code = inspect.getsource(bounce)
    identity = json.dumps([source.fingerprint(), code, pymunk.version, np.__version__], sort_keys=True)
    number, word = datasets.Value("float64"), datasets.Value("string")
    track = datasets.List(datasets.List(datasets.List(number)))
    features = datasets.Features(
        {
            "frames": datasets.Array4D((world.num_frames, world.size, world.size, 3), "uint8"),
            "caption": word,
            "split": word,
            "index": datasets.Value("int64"),
            "gravity": datasets.Value("bool"),
            "colours": datasets.List(word),
            "positions": track,
            "velocities": track,
            "radii": datasets.List(datasets.List(number)),
        }
    )
    return datasets.Dataset.from_generator(
        _rows,
        features=features,
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"world": world, "split": split, "start": start, "count": count},
        split=datasets.NamedSplit(split),
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
    ).with_format("numpy", dtype=None)  # None: keep the dtype, where the format would make int64 of uint8


def cache_dataset(folder: str | Path) -> datasets.Dataset:
    """A finished cache of ``vpae cache`` as a Hugging Face dataset, read from its shards where it lies.

    Nothing is copied: the dataset itself holds names, captions and places, and the tensors come from the shards when
    rows are asked for. Checksums are not compared; ``vpae cache RECIPE --check`` does that.

    Returns:
        A dataset with ``name``, ``caption``, and as fp32 tensors ``x0`` ``[C, T, h, w]``, ``text`` ``[L, D]`` (umT5
        tokens, without padding) and, where the cache's model is told of them, ``latent`` (the encoded first frame) and
        ``image`` ``[N, D]`` (CLIP tokens).

    Raises:
        UserError: there is no finished cache.
    """
    import datasets

    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if wrong := fault(manifest):
            raise ValueError(f"{MANIFEST} is damaged: {wrong}")
        fields = FIELDS[kind_of(manifest)]
        places = [(Path(s["file"]).name, row) for s in manifest["shards"] for row in range(s["clips"])]
        columns = {
            "name": manifest["names"],
            "caption": manifest["captions"],
            "file": [file for file, _ in places],
            "row": [row for _, row in places],
        }
        rows = datasets.Dataset.from_dict(columns)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} holds no finished cache ({error}); build it with: vpae cache RECIPE") from error

    def with_tensors(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        from safetensors import safe_open  # here: datasets pickles this function, and cannot pickle that class

        read: dict[str, list[Any]] = {name: [] for name in fields}
        for file, row in zip(batch["file"], batch["row"], strict=True):
            with safe_open(folder / file, framework="pt") as shard:
                for name in fields:
                    read[name].append(shard.get_slice(name)[row])
        read["text"] = [text[text.abs().sum(-1) > 0] for text in read["text"]]
        return {"name": batch["name"], "caption": batch["caption"], **read}

    return rows.with_transform(with_tensors)
