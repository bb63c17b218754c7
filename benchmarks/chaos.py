"""kill -9 at random moments from the first clip to the export: does everything end as if nothing had happened?

    python benchmarks/chaos.py --ranks 2
    python benchmarks/chaos.py recipes/quickstart.yaml --set priming.student_steps=12 equilibrium.student_steps=24

Without a recipe: quickstart.yaml shortened, on a pipeline of random weights, small enough for fifty kills in half an
hour. A *life* is a cache, a distillation and an export, each command given again until it comes to its end. One life is
left alone (and exports twice). The others, with one kind of export each by turns, are killed in the places of ``PLAN``,
at moments drawn from (seed, number of the try), a quarter of them anywhere, imports included; with several ranks a
third of the kills take one rank alone, and the rest falls as it may. A kill that comes too late for its place is made
up for in the next life. At its end each life is compared with the undisturbed one: every file of the cache, every
tensor of every checkpoint kept and its counters, every log line but for its seconds, every picture, every tensor and
file of the export and whether its proof is its own. What was lost, doubled or differs is named. Interrupted, it goes on
with ``--resume``. ``--fork`` saves the seconds of imports before every kill, which are then not among the moments.
Writes benchmarks/results/chaos.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_result
from ranks import Ranks, ended, kill, start
from safetensors import deserialize, safe_open

from vpae import recipe as recipes
from vpae.engine.tracking import read_log
from vpae.files import sha256, write_json
from vpae.runs import PHASES

ROOT = Path(__file__).resolve().parents[1]
# in this order in each life
PLAN = ("cache", "cache", "priming", "writing in priming", "priming", "writing in priming", "equilibrium")
PLAN += ("writing in equilibrium", "equilibrium", "writing in equilibrium", "export", "export")
MICRO = {
    "teacher.attention": "native",
    "data.source.count": 64,
    "data.source.world": "{size: 32, num_frames: 5}",
    "priming.student_steps": 12,
    "priming.fake_per_student": 2,
    "equilibrium.student_steps": 16,
    "equilibrium.taps": "null",
    "equilibrium.head.width": 16,
    "equilibrium.head.num_heads": 2,
    "engine.global_batch": 4,
    "engine.micro_batch": 2,
    "engine.parallel": "fsdp",
    "engine.precision": "fp32",
    "engine.log_every": 1,
    "engine.sample_every": 5,
    "engine.samples": 2,
    "engine.checkpoint_every": 2,
    "engine.keep_checkpoints": 3,
    "evaluate.clips": 2,
    "evaluate.batch": 2,
    "evaluate.teacher_steps": 2,
}
_PATIENCE = 20.0  # seconds that the other ranks have to fall after one of them was killed


@dataclass(frozen=True)
class Life:
    """A folder, and the commands that are to come to their end in it; paths in them are relative to it."""

    folder: Path
    recipe: str
    overrides: tuple[str, ...]
    ranks: int
    exports: tuple[str, ...]
    fork: bool

    def command(self, what: str) -> list[str]:
        if what in EXPORTS:
            return ["export", "run", "--format", what, "--output", EXPORTS[what]]
        options = {"cache": ["cache", self.recipe], "run": ["distill", self.recipe, "--output", "run", "--resume"]}
        return [*options[what], "--set", *self.overrides, "data.cache=cache"]

    def start(self, what: str) -> Ranks:
        self.folder.mkdir(parents=True, exist_ok=True)
        return start(self.command(what), 1 if what in EXPORTS else self.ranks, self.folder, fork=self.fork)

    def drafts(self, what: str) -> list[Path]:
        """What is half written now, by the names that half-written things have."""
        if what == "cache":
            found = [*self.folder.glob("cache/*.partial"), *self.folder.glob("cache/.*tmp*")]
        elif what in EXPORTS:
            found = [*self.folder.glob("student.partial*"), *self.folder.glob(".student*partial*")]
        else:
            found = [*self.folder.glob(f"run/{what}/checkpoints/*.partial")]
        return sorted(found)


EXPORTS = {"diffusers": "student", "wan": "student.safetensors"}


def moved(path: Path) -> Callable[[], bool]:
    """Whether ``path`` was written since now."""

    def stamp() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    before = stamp()
    return lambda: stamp() > before


def written(life: Life, what: str, count: int) -> Callable[[], bool]:
    """Whether the ``count``-th draft since now is being written."""
    before, seen = set(life.drafts(what)), 0

    def begun() -> bool:
        nonlocal before, seen
        there = set(life.drafts(what))
        seen += len(there - before)
        before = there
        return seen >= count

    return begun


def strike(life: Life, place: str, usual: dict[str, float], chance: random.Random) -> dict[str, Any] | None:
    """Start a command or go on with it, kill it in ``place`` and say when; None where it came to its end before."""
    what = {"cache": "cache", "export": life.exports[-1]}.get(place, "run")
    draft = what if what != "run" else place.split()[-1]
    began = time.monotonic()
    if place.startswith("writing"):
        due, longest = written(life, draft, chance.randint(1, 3)), 1.5 * usual[f"writing in {draft}"]
    elif place == "export" or chance.random() < 0.25:  # at any moment, imports and loading included
        due, longest = (lambda: True), usual[what]
    else:
        stamp = "cache/building.json" if place == "cache" else f"run/{place}/log.jsonl"
        due, longest = moved(life.folder / stamp), usual[place if place != "cache" else "encoding"] / 2
    ranks = life.start(what)
    while not due():
        if all(rank.poll() is not None for rank in ranks):
            ended(ranks)
            return None
        time.sleep(0.001)
    ready = time.monotonic()
    until = ready + chance.uniform(0, longest)
    while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
        time.sleep(min(0.002, max(0.0, until - time.monotonic())))
    if all(rank.poll() is not None for rank in ranks):
        ended(ranks)
        return None
    alone = chance.randrange(len(ranks)) if len(ranks) > 1 and chance.random() < 1 / 3 else None
    kill(ranks if alone is None else [ranks[alone]])
    now, halves = time.monotonic(), {path.name: _held(path) for path in _halves(life, what)}
    fell = time.monotonic() + _PATIENCE
    while time.monotonic() < fell and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    survived = sum(rank.poll() is None for rank in ranks)
    kill(ranks)
    found = {"place": place, "command": what, "seconds_after_start": round(now - began, 2)}
    found |= {"seconds_after_its_mark": round(now - ready, 3), "half_written": halves}
    return found if alone is None else found | {"rank_killed": alone, "ranks_that_had_to_be_killed": survived}


def _halves(life: Life, what: str) -> list[Path]:
    return [p for name in (PHASES if what == "run" else (what,)) for p in life.drafts(name)]


def _held(path: Path) -> list[str] | int:
    """The names in a draft that is a folder, the bytes of one that is a file."""
    return sorted(p.name for p in path.iterdir()) if path.is_dir() else path.stat().st_size


def undisturbed(life: Life) -> dict[str, float]:
    """Live once without a kill; returns the usual seconds of each command, phase and checkpoint."""
    usual: dict[str, float] = {}
    for what in ("cache", "run", *life.exports):
        began, ranks = time.monotonic(), life.start(what)
        marks: dict[Path, float] = {}
        lengths: dict[str, list[float]] = {phase: [] for phase in PHASES}
        encoding = None
        while any(rank.poll() is None for rank in ranks):
            if what == "run":
                there = {path: phase for phase in PHASES for path in life.drafts(phase)}
                for path in [p for p in marks if p not in there]:
                    lengths[path.parents[1].name].append(time.monotonic() - marks.pop(path))
                for path in there:
                    marks.setdefault(path, time.monotonic())
            if what == "cache" and encoding is None and (life.folder / "cache/building.json").exists():
                encoding = time.monotonic()
            time.sleep(0.002)
        ended(ranks)
        usual[what] = time.monotonic() - began
        if what == "cache":
            usual["encoding"] = time.monotonic() - (encoding or began)
        usual |= {f"writing in {phase}": statistics.median(of) for phase, of in lengths.items() if of}
    for phase in PHASES:
        log = life.folder / "run" / phase / "log.jsonl"
        if log.exists():
            usual[phase] = read_log(log)[-1]["seconds"]
    return {name: round(seconds, 3) for name, seconds in usual.items()}


def timeless(value: Any) -> Any:
    """A plain value without what a clock said, nor the checksums of texts that hold it."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k not in ("sha256", "crc32")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def said(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Each tensor of a safetensors file, and its header's words: the order of these in the file is by chance."""
    with safe_open(path, framework="pt") as handle:
        yield f"{name}: header", said(handle.metadata())
    for key, of in deserialize(path.read_bytes()):
        yield f"{name}: {key}", hashlib.sha256(f"{of['dtype']} {of['shape']} ".encode() + of["data"]).hexdigest()


def content(life: Life) -> Iterator[tuple[str, str]]:
    """Name and hash of all that two lives must agree in."""
    for path in sorted((life.folder / "cache").iterdir()):
        if path.name != "lock":
            yield f"cache/{path.name}", sha256(path)
    for phase in PHASES:
        folder = life.folder / "run" / phase
        for path in sorted(folder.glob("checkpoints/*/*")):
            name = f"{phase}/{path.parent.name}/{path.name}"
            if path.suffix == ".json":
                yield name, said(timeless(json.loads(path.read_text())))
            else:
                yield from tensors(path, name)
        for line, record in enumerate(read_log(folder / "log.jsonl")):
            yield f"{phase}/log.jsonl, line {line}", said(timeless(record))
        for path in sorted(folder.glob("samples/*")):
            yield f"{phase}/samples/{path.name}", sha256(path)
    for path in sorted(life.folder.glob("student*")) + sorted(life.folder.glob("student/**/*")):
        name = str(path.relative_to(life.folder))
        if "proof" in path.name:  # it holds hashes of files, the float error of a reading and where it was read
            hashes = json.loads(path.read_text())["sha256"]
            yield name, said({file: sha256(path.parent / file) == of for file, of in hashes.items()})
        elif path.suffix == ".safetensors":
            yield from tensors(path, name)
        elif path.is_file():
            yield name, sha256(path)
    left = {*life.folder.rglob(".*"), *(path for what in ("cache", *PHASES, *EXPORTS) for path in life.drafts(what))}
    for path in left:
        yield f"left behind: {path.relative_to(life.folder)}", ""


def compared(whole: dict[str, str], life: Life) -> dict[str, list[str]]:
    """Names that are in the undisturbed life alone, in this one alone, and in both with another content."""
    mine = dict(content(life))
    ending = {"diffusers": "/", "wan": "."}
    others = tuple(f"student{ending[what]}" for what in EXPORTS if what not in life.exports)
    whole = {name: value for name, value in whole.items() if not name.startswith(others)}
    differing = [name for name in whole if name in mine and whole[name] != mine[name]]
    return {
        "lost": sorted(whole.keys() - mine.keys()),
        "more": sorted(mine.keys() - whole.keys()),
        "differing": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", help="of vpae distill; default: the micro pipeline")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="commands start from this process, with all imported")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted benchmark")
    parser.add_argument("--result", default="chaos", help="name of the file in benchmarks/results")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[])
    arguments = parser.parse_args()
    root = (Path("outputs") / arguments.result).resolve()
    if not arguments.resume:
        shutil.rmtree(root, ignore_errors=True)
    if arguments.fork:
        from diffusers import AutoencoderKLWan, WanImageToVideoPipeline  # noqa: F401
        from transformers import CLIPVisionModel, UMT5EncoderModel  # noqa: F401

        import vpae.commands
        import vpae.distill  # noqa: F401  and all that they import, diffusers' lazy classes among them
    overrides = tuple(arguments.overrides)
    if arguments.recipe is None:
        if not (root / "pipeline" / "model_index.json").is_file():
            code = "import sys, pathlib; from conftest import make_pipeline; make_pipeline(pathlib.Path(sys.argv[1]))"
            subprocess.run([sys.executable, "-c", code, str(root / "pipeline")], check=True, cwd=ROOT / "tests")
        micro = MICRO | {"teacher.path": root / "pipeline"}
        overrides = (*(f"{key}={value}" for key, value in micro.items()), *overrides)
    path = (arguments.recipe or ROOT / "recipes" / "quickstart.yaml").resolve()
    name = recipes.load(path, overrides).name

    def life(number: int | None = None) -> Life:
        exports = tuple(EXPORTS) if number is None else (list(EXPORTS)[number % len(EXPORTS)],)
        folder = root / ("undisturbed" if number is None else f"life{number}")
        return Life(folder, str(path), overrides, arguments.ranks, exports, arguments.fork)

    progress = root / "progress.json"
    if progress.is_file():
        state = json.loads(progress.read_text())
    else:
        state = {"usual": undisturbed(life()), "lives": [{"kills": [], "tried": 0}]}
        write_json(progress, state)
    usual, lives, began = state["usual"], state["lives"], time.monotonic()
    print(f"undisturbed, seconds: {usual}", flush=True)
    whole = dict(content(life()))

    def hits() -> int:
        return sum(len(of["kills"]) for of in lives)

    while True:
        current, mine = lives[-1], life(len(lives) - 1)
        while current["tried"] < len(PLAN) and hits() < arguments.kills:
            place = PLAN[current["tried"]]
            found = strike(mine, place, usual, random.Random(f"{arguments.seed} {sum(of['tried'] for of in lives)}"))
            current["tried"] += 1
            if found is not None:
                current["kills"].append(found)
                print(f"kill {hits()} of {arguments.kills}: {found}", flush=True)
            write_json(progress, state)
        for what in ("cache", "run", *mine.exports):
            ended(mine.start(what))
        counts = ", ".join(f"{len(names)} {key}" for key, names in compared(whole, mine).items())
        print(f"life {len(lives)}: {len(current['kills'])} kills, {len(whole)} compared: {counts}", flush=True)
        state["seconds"] = state.get("seconds", 0) + time.monotonic() - began
        began = time.monotonic()
        write_json(progress, state)
        if hits() >= arguments.kills:
            break
        if len(lives) > arguments.kills:
            sys.exit("the commands end before they can be killed; make them longer")
        lives.append({"kills": [], "tried": 0})
        write_json(progress, state)
    for number, of in enumerate(lives):
        of |= compared(whole, life(number))
    kills = [found for of in lives for found in of["kills"]]
    faults = [(i, key, name) for i, of in enumerate(lives) for key in ("lost", "more", "differing") for name in of[key]]
    wrong = [f"life {i}: {key}: {name}" for i, key, name in faults]
    inside = Counter(found["place"] for found in kills if found["half_written"])
    document = {
        "benchmark": "chaos",
        "recipe": name,
        "overrides": [text.replace(f"{root}/", "") for text in overrides],
        "ranks": arguments.ranks,
        "seed": arguments.seed,
        "forked_after_imports": arguments.fork,
        "usual_seconds": usual,
        "kills": len(kills),
        "kills_by_place": dict(Counter(found["place"] for found in kills)),
        "kills_that_left_something_half_written": dict(inside),
        "kills_inside_checkpoint_writing": sum(1 for f in kills if f["command"] == "run" and f["half_written"]),
        "kills_of_one_rank_alone": sum("rank_killed" in found for found in kills),
        "compared_in_each_life": len(whole),
        "lost_doubled_or_differing": wrong,
        "seconds": round(state["seconds"], 1),
        "lives": lives,
    }
    write_result(arguments.result, document)
    print(f"{len(kills)} kills in {len(lives)} lives; {len(wrong)} of {len(whole)} names in each lost, more or other")
    print(json.dumps({k: document[k] for k in ("benchmark", "kills", "kills_inside_checkpoint_writing", "ranks")}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
