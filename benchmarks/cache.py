"""kill -9 at random moments of `vpae cache`: is the cache that of an undisturbed build?

    python benchmarks/cache.py FOLDER --size 480 832 --frames 81 --fps 16 --ranks 2 --kills 5

FOLDER holds videos with captions (anything that ``data.source: {kind: videos}`` takes). They are encoded with the tiny
teacher's encoders, once undisturbed and once killed, all ranks at once as when a machine dies, until all kills have
hit. The kills take turns: once a shard more is whole than before, up to the time that a clip takes later; uniform over
half of the time that the undisturbed build encoded, counted from when encoding begins; at any moment from the start,
imports and loading included. A build that comes to its end before its kill is compared and another is begun, ten times
a kill at most. Short clips repeat their last frame and bad ones are left out.
Writes benchmarks/results/cache_kills.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import write_result
from ranks import Ranks, ended, kill, start

from vpae.files import sha256

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
MOMENTS = ("after a shard", "encoding", "anywhere")


def content(folder: Path) -> dict[str, Any]:
    """What two builds must agree in: the digest, and every file of the finished cache byte for byte."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = sorted(p for p in folder.iterdir() if p.name != "lock")
    return {"digest": manifest["digest"], "clips": manifest["clips"], "files": {p.name: sha256(p) for p in files}}


def shards(folder: Path) -> list[Path]:
    """Of a cache, finished or not, those that are whole."""
    return sorted(folder.glob("shard-*.safetensors"))


def until(ranks: Ranks, happened: Callable[[], bool]) -> bool:
    """Wait for something; False where all ranks ended before."""
    while not happened():
        if ended(ranks, 0.05):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--fps", type=float, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", default="cache_kills", help="name of the file in benchmarks/results")
    arguments = parser.parse_args()
    root = Path("outputs/cache_kills")
    shutil.rmtree(root, ignore_errors=True)
    shape = {"size": list(arguments.size), "num_frames": arguments.frames, "fps": arguments.fps}
    source = {"kind": "videos", "path": str(arguments.clips), **shape, "short": "repeat_last", "bad": "skip"}

    def build(folder: Path) -> Ranks:
        settings = [f"data.source={json.dumps(source)}", f"data.cache={folder}"]
        return start(["cache", str(RECIPE), "--set", *settings], arguments.ranks)

    def encoding(folder: Path, ranks: Ranks, since: int) -> bool:
        """Wait until a build has said that it encodes (later than ``since``, ns); False where it ended before."""
        stamp = folder / "building.json"
        return until(ranks, lambda: stamp.exists() and stamp.stat().st_mtime_ns > since)

    def killed(folder: Path, moment: str) -> dict[str, Any] | None:
        """Build or go on, kill at a moment of a kind and say when; None where the build was done before."""
        began, since, before = time.monotonic(), time.time_ns(), len(shards(folder))
        ranks, limits = build(folder), {"anywhere": took, "encoding": encoded / 2, "after a shard": encoded / count}
        if moment == "encoding" and not encoding(folder, ranks, since):
            return None
        if moment == "after a shard" and not until(ranks, lambda: len(shards(folder)) > before):
            return None
        ready = time.monotonic() - began
        if ended(ranks, generator.uniform(0, limits[moment])):
            return None
        kill(ranks)
        after = time.monotonic() - began
        found = {"moment": moment, "seconds_after_start": round(after, 2), "seconds_after_it": round(after - ready, 2)}
        return found | {"shards_before": before, "shards_there": len(shards(folder))}

    began = time.monotonic()
    ranks = build(root / "undisturbed")
    encoding(root / "undisturbed", ranks, 0)
    started = time.monotonic()
    ended(ranks)
    took, encoded, generator = time.monotonic() - began, time.monotonic() - started, random.Random(arguments.seed)
    undisturbed, runs, hits = content(root / "undisturbed"), [], 0
    count = sum(undisturbed["clips"].values())
    print(f"undisturbed: {count} clips in {took:.1f} s, {encoded:.1f} s of it encoding, {count / encoded:.3g} clips/s")
    while hits < arguments.kills:
        if len(runs) >= 10 * arguments.kills:
            sys.exit("the builds end before they can be killed; take more or larger clips")
        folder, kills = root / f"killed{len(runs)}", []
        while hits < arguments.kills:
            found = killed(folder, MOMENTS[hits % len(MOMENTS)])
            if found is None:
                break
            kills, hits = [*kills, found], hits + 1
            print(f"kill {hits} of {arguments.kills}: {found}", flush=True)
        ended(build(folder))
        made = content(folder)
        differing = sorted(
            name
            for name in undisturbed["files"].keys() | made["files"].keys()
            if undisturbed["files"].get(name) != made["files"].get(name)
        )
        runs.append({"kills": kills, "digest": made["digest"], "differing_files": differing})
        print(
            f"build {len(runs)}: {len(kills)} kills, digest {made['digest']}, {len(differing)} files differ", flush=True
        )
    same = all(run["digest"] == undisturbed["digest"] and not run["differing_files"] for run in runs)
    document = {
        "benchmark": "cache",
        **shape,
        "ranks": arguments.ranks,
        "seed": arguments.seed,
        "clips": undisturbed["clips"],
        "files": len(undisturbed["files"]),
        "seconds_undisturbed": round(took, 1),
        "seconds_of_encoding": round(encoded, 1),
        "clips_per_second": round(count / encoded, 4),
        "digest": undisturbed["digest"],
        "kills_that_hit_a_running_build": hits,
        "builds": runs,
        "same": same,
    }
    write_result(arguments.result, document)
    print(f"{hits} kills hit; digests and files {'are the same' if same else 'DIFFER'}")
    print(json.dumps({k: document[k] for k in ("benchmark", "digest", "kills_that_hit_a_running_build", "same")}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
