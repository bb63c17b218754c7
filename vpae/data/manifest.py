"""The form of a cache's manifest: what is read from it was looked at first, whoever wrote and signed it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")  # in the cache's own folder, and nowhere else
_TEXTS = ("null_text_sha256", "probe_sha256", "report_sha256")


def _count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 40


def _shard(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and _SHARD.fullmatch(entry["file"]) is not None
        and isinstance(entry.get("sha256"), str)
        and _count(entry.get("clips"))
        and _count(entry.get("bytes"))
    )


def fault(manifest: Any) -> str:
    """The first of its fields that is not of the form in which a cache is written; empty where all are."""
    if not isinstance(manifest, dict):
        return "its top level"
    names, captions, shards = (manifest.get(key) for key in ("names", "captions", "shards"))
    clips, count, shape = (manifest.get(key) for key in ("clips", "count", "latent_shape"))
    versions = manifest.get("made_with")
    checks = {
        "fingerprint": isinstance(manifest.get("fingerprint"), dict),
        "made_with": isinstance(versions, list) and all(isinstance(v, dict) for v in versions),
        "shards": isinstance(shards, list) and all(map(_shard, shards)),
        "latent_shape": isinstance(shape, list) and len(shape) == 4 and all(_count(edge, 1) for edge in shape),
        "clips": isinstance(clips, dict) and _count(clips.get("left_out")) and all(map(_count, clips.values())),
        **{key: isinstance(manifest.get(key), str) for key in _TEXTS},
        **{key: _count(manifest.get(key), 1) for key in ("count", "text_rows", "temporal_stride")},
        **{
            key: isinstance(of, list) and len(of) == count and all(isinstance(text, str) and text for text in of)
            for key, of in (("names", names), ("captions", captions))
        },
    }
    if wrong := [key for key, good in checks.items() if not good]:
        return wrong[0]
    files = [entry["file"] for entry in shards]
    fits = len(set(files)) == len(files) and sum(entry["clips"] for entry in shards) == count
    return "" if fits else "count"


def holds(file: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a shard's tensors have the rows and shapes that the manifest says (its header alone is read)."""
    try:
        with safe_open(file, framework="pt") as handle:
            shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    if not entry["clips"]:
        return True
    rows = all(shape and shape[0] == entry["clips"] for shape in shapes.values())
    text, latents = shapes.get("text", []), shapes.get("x0", [])
    return rows and latents[1:] == manifest["latent_shape"] and len(text) == 3 and text[1] <= manifest["text_rows"]
