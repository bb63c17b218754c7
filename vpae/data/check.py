"""``vpae cache --check``: what is in a finished cache, in numbers and for the eye."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vpae.conditioning import TEXT_LENGTH
from vpae.data.cache import Cache
from vpae.data.cards import Card, card_sheet
from vpae.data.encoders import Encoders
from vpae.data.shards import REPORT
from vpae.engine.parallel import Processes
from vpae.engine.watch import motion_energy
from vpae.files import write_json

SHEET, STATISTICS = "check.png", "check.json"
NEAR = 0.05  # squared distance of two clips' coarse latents, relative to their squared sizes: 1 for unrelated clips
STILL = 0.05  # of the median of the later halves' motion: a clip below moves hardly at all
_MOST_CARDS, _LARGE_CLIP, _FEW_CARDS = 24, 4_000_000, 8  # clips of more pixels than that take a CPU minutes to decode
_LISTED = 50  # pairs and names in the JSON
_GRID = (3, 4, 4)  # times, rows and columns that a latent is averaged to


@dataclass(frozen=True)
class Seen:
    """What is measured of one clip.

    Attributes:
        motion: mean squared difference of neighbouring latent frames.
        late_motion: the same of the clip's later half, where the causal VAE has settled: of a still picture it is near
            zero there, and not at the start.
        digest: hash of its latent.
        coarse: the latent averaged to few places, fp32 ``[D]``.
        tokens: rows of text that hold a token.
        moments: sum, sum of squares and number of the latent's elements.
    """

    motion: float
    late_motion: float
    digest: str
    coarse: np.ndarray
    tokens: int
    moments: tuple[float, float, int]


def check(cache: Cache, encoders: Encoders, processes: Processes) -> dict[str, Any] | None:
    """Measure every clip and decode some for a contact sheet, and write both into the cache's folder.

    All ranks call it together and share the work.

    Args:
        encoders: of which the VAE alone is used.

    Returns:
        the statistics, on rank 0.

    Raises:
        UserError: the folder cannot be written.
    """
    mine = range(processes.rank, len(cache), processes.size)
    bar = tqdm(mine, desc="measuring clips", unit="clip", disable=not processes.is_main)
    parts = processes.gather(processes.together(lambda: [_see(cache, i) for i in bar]))
    seen = [parts[i % processes.size][i // processes.size] for i in range(len(cache))]
    statistics = processes.from_main(lambda: _statistics(cache, seen))
    shown = _shown(cache, [s.motion for s in seen], processes)
    frames = processes.together(
        lambda: {i: _three_frames(cache, encoders, i) for i in shown[processes.rank :: processes.size]}
    )
    pictures = {i: f for part in processes.gather(frames) for i, f in part.items()}
    processes.together(lambda: _write(cache, statistics, seen, pictures), main_only=True)
    return statistics if processes.is_main else None


def _see(cache: Cache, index: int) -> Seen:
    x0, text = cache.read(index, "x0").float(), cache.read(index, "text")
    grid = tuple(min(a, b) for a, b in zip(_GRID, x0.shape[1:], strict=True))
    return Seen(
        motion=float(motion_energy(x0[None])),
        late_motion=float(motion_energy(x0[None, :, min(x0.shape[1] // 2, x0.shape[1] - 2) :])),
        digest=hashlib.sha256(x0.numpy().tobytes()).hexdigest(),
        coarse=F.adaptive_avg_pool3d(x0, grid).flatten().numpy(),
        tokens=int((text.abs().sum(-1) > 0).sum()),
        moments=(float(x0.double().sum()), float(x0.double().square().sum()), x0.numel()),
    )


def near_pairs(coarse: Tensor, channels: int) -> list[tuple[float, int, int]]:
    """Pairs of clips whose coarse latents ``[N, D]`` are nearly equal: (relative squared distance, i, j), i < j.

    What all clips share says nothing of a pair, so the mean clip is taken off first; of fewer than eight clips, where
    the mean is mostly the pair itself, each clip's own mean colour instead.
    """
    if len(coarse) >= 8:
        coarse = coarse - coarse.mean(0)
    else:
        coarse = coarse.view(len(coarse), channels, -1)
        coarse = (coarse - coarse.mean(2, keepdim=True)).flatten(1)
    squares, found = coarse.square().sum(1), []
    for start in range(0, len(coarse), 1024):
        part = slice(start, start + 1024)
        sizes = squares[part, None] + squares
        distance = (sizes - 2 * coarse[part] @ coarse.T).clamp(min=0) / sizes.clamp(min=1e-12)
        for i, j in (distance < NEAR).nonzero().tolist():
            if start + i < j:
                found.append((float(distance[i, j]), start + i, j))
    return sorted(found)


def _spread(values: Sequence[float]) -> dict[str, float]:
    least, low, middle, high, most = (float(f"{v:.4g}") for v in np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))
    return {"min": least, "p05": low, "median": middle, "p95": high, "max": most}


def _statistics(cache: Cache, seen: list[Seen]) -> dict[str, Any]:
    motion = np.array([s.motion for s in seen])
    counts, edges = np.histogram(motion, bins=min(24, max(4, len(seen))))
    late = np.array([s.late_motion for s in seen])
    still = [int(i) for i in np.argsort(late, kind="stable") if late[i] < STILL * np.median(late)]
    twins: dict[str, list[int]] = {}
    for i, one in enumerate(seen):
        twins.setdefault(one.digest, []).append(i)
    exact = [group for group in twins.values() if len(group) > 1]
    same = {(i, j) for group in exact for i in group for j in group}
    near = near_pairs(torch.from_numpy(np.stack([s.coarse for s in seen])), cache.latent_shape[0])
    near = [(d, i, j) for d, i, j in near if (i, j) not in same]
    captions = [cache.caption(i) for i in range(len(cache))]
    total, squares, elements = (sum(s.moments[k] for s in seen) for k in range(3))
    mean = total / elements
    lines = (cache.folder / REPORT).read_text(encoding="utf-8").splitlines()
    return {
        "digest": cache.fingerprint,
        "clips": {"in_the_cache": len(cache), **cache.manifest["clips"]},
        "left_out": [line for line in map(json.loads, lines) if line["outcome"] == "left out"],
        "adjusted": [line for line in map(json.loads, lines) if line["outcome"] == "adjusted"],
        "latents": {
            "shape": list(cache.latent_shape),
            "mean": round(mean, 4),
            "std": round((squares / elements - mean**2) ** 0.5, 4),
        },
        "motion_energy": {
            **_spread(motion),
            "histogram": {"counts": counts.tolist(), "edges": [float(f"{e:.4g}") for e in edges]},
            "nearly_still": {"count": len(still), "clips": [cache.name(i) for i in still[:_LISTED]]},
        },
        "duplicates": {
            "exact": {"groups": len(exact), "clips": [[cache.name(i) for i in g] for g in exact[:_LISTED]]},
            "near": {
                "pairs": len(near),
                "clips": [[cache.name(i), cache.name(j), round(d, 4)] for d, i, j in near[:_LISTED]],
            },
        },
        "captions": {
            "words": _spread([len(c.split()) for c in captions]),
            "tokens": _spread([s.tokens for s in seen]),
            "at_the_limit_of_tokens": sum(s.tokens >= TEXT_LENGTH for s in seen),
            "different": len(set(captions)),
        },
    }


def _shown(cache: Cache, motion: list[float], processes: Processes) -> list[int]:
    """The clips of the sheet: all, or some spread over the cache with the stillest and the liveliest among them."""
    _, frames, height, width = cache.latent_shape
    large = 4 * 64 * frames * height * width > _LARGE_CLIP and processes.device.type == "cpu"
    most = _FEW_CARDS if large else _MOST_CARDS
    if len(cache) <= most:
        return list(range(len(cache)))
    order = np.argsort(motion, kind="stable")
    extreme = {int(i) for i in (*order[: most // 8], *order[-(most // 8) :])}
    spread = [round(x) for x in np.linspace(0, len(cache) - 1, most)]
    return sorted(extreme | set([i for i in spread if i not in extreme][: most - len(extreme)]))


def _three_frames(cache: Cache, encoders: Encoders, index: int) -> list[tuple[int, np.ndarray]]:
    """First, middle and last frame of a clip, decoded whole, with their numbers."""
    frames = encoders.decode(cache.read(index, "x0")[None].to(encoders.device))[0]
    return [(i, frames[i]) for i in sorted({0, len(frames) // 2, len(frames) - 1})]


def _write(
    cache: Cache, statistics: dict[str, Any], seen: list[Seen], pictures: dict[int, list[tuple[int, np.ndarray]]]
) -> None:
    write_json(cache.folder / STATISTICS, statistics)
    most, notes = max(s.motion for s in seen), {line["clip"]: line["how"] for line in statistics["adjusted"]}
    cards = [
        Card(
            cache.name(i),
            pictures[i],
            cache.caption(i),
            f"motion {seen[i].motion:.3g} \N{MIDDLE DOT} {seen[i].tokens} tokens",
            notes.get(cache.name(i), ""),
            seen[i].motion / most if most > 0 else 0.0,
        )
        for i in sorted(pictures)
    ]
    counts, (_, latent, height, width) = statistics["clips"], statistics["latents"]["shape"]
    first = pictures[min(pictures)]
    size = f"{first[0][1].shape[1]}x{first[0][1].shape[0]}, {first[-1][0] + 1} frames"
    lines = [
        f"{len(cache)} clips of {size} (latents {latent}x{height}x{width}): {counts['as_it_is']} as they are, "
        f"{counts['adjusted']} adjusted, {counts['left_out']} left out",
        f"{statistics['duplicates']['exact']['groups']} exact and {statistics['duplicates']['near']['pairs']} near "
        f"duplicates, {statistics['motion_energy']['nearly_still']['count']} nearly still; shown: {len(cards)}, "
        "decoded from the cache",
    ]
    histogram = statistics["motion_energy"]["histogram"]
    card_sheet(Path(cache.folder).name, lines, cards, cache.folder / SHEET, ("motion energy", histogram))


def told(statistics: dict[str, Any], folder: Path) -> str:
    """The statistics as lines for people."""
    clips, motion, captions = statistics["clips"], statistics["motion_energy"], statistics["captions"]
    latents = statistics["latents"]
    exact, near = statistics["duplicates"]["exact"], statistics["duplicates"]["near"]
    lines = [
        f"{folder}: every checksum is right; digest {statistics['digest']}",
        f"  clips        {clips['in_the_cache']} in the cache ({clips['as_it_is']} as they are, {clips['adjusted']} "
        f"adjusted), {clips['left_out']} left out",
        *(f"    left out   {line['clip']}: {line['why']}" for line in statistics["left_out"][:12]),
        f"  latents      {'x'.join(map(str, latents['shape']))}, mean {latents['mean']:.3f}, std {latents['std']:.3f}",
        f"  motion       median {motion['median']:.3g}, 5-95 % {motion['p05']:.3g}-{motion['p95']:.3g}, "
        f"all {motion['min']:.3g}-{motion['max']:.3g}; {motion['nearly_still']['count']} nearly still",
        *(f"    still      {name}" for name in motion["nearly_still"]["clips"][:6]),
        f"  duplicates   {exact['groups']} exact groups, {near['pairs']} near pairs",
        *(f"    the same   {', '.join(group)}" for group in exact["clips"][:6]),
        *(f"    alike      {a}, {b} (relative distance {d:.3g})" for a, b, d in near["clips"][:6]),
        f"  captions     {captions['words']['min']:.0f}-{captions['words']['max']:.0f} words (median "
        f"{captions['words']['median']:.0f}), {captions['tokens']['min']:.0f}-{captions['tokens']['max']:.0f} tokens, "
        f"{captions['different']} different"
        + (f"; {captions['at_the_limit_of_tokens']} cut at {TEXT_LENGTH}" * (captions["at_the_limit_of_tokens"] > 0)),
        f"  written to {folder / SHEET} and {STATISTICS}",
    ]
    return "\n".join(lines)
