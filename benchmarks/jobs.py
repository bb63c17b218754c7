"""One job of a comparison: an entry trained under one seed, judged, and kept until something it depends on changes.

Beside a job's folder lie ``NAME.digest`` (which job it is), ``NAME.peak`` (most bytes one of its processes held),
``NAME.SPLIT-CLIPS.json`` and ``.npz`` (scores, and the first eight videos), and ``NAME.lock``: the same command may be
given several times at once, and its processes share the jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from common import commit

from vpae import recipe as recipes
from vpae.data.bounce import Clip, World
from vpae.data.encoders import Encoders
from vpae.engine import checkpoint as checkpoints
from vpae.errors import UserError
from vpae.evaluation import clips_of, sample_clips
from vpae.files import write_json, write_text
from vpae.loading import load_model
from vpae.models import find_model, weights_fingerprint
from vpae.quickstart import seconds_training
from vpae.roles import Role
from vpae.runs import RECIPE, environment, phases_of

if TYPE_CHECKING:
    from contest import Entry


class Diverged(UserError):
    """A loss or gradient was not finite: the same turns would end so again."""


def train(entry: Entry, folder: Path, ranks: int, overrides: Sequence[str]) -> int:
    """Run (or go on with) an entry; returns the most bytes that one of its processes held, of this call.

    Raises:
        Diverged: it can't be trained like this.
        UserError: it failed, or was stopped before its end.
    """
    command = [sys.executable, "-m", "vpae", "distill", str(entry.recipe), "--output", str(folder), "--resume"]
    command += ["--ranks", str(ranks), "--set", *entry.overrides, *overrides]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=_held)
    tail = _Tail(process)
    try:
        peak = _watched(process)
    except KeyboardInterrupt:  # a Ctrl-C has reached the child as well; a SIGTERM (contest.carry_out) has not
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    finally:
        tail.join()
    if process.returncode:
        kind = Diverged if "loss or gradient is not finite" in tail.text else UserError
        raise kind(f"{entry.name} in {folder} failed with status {process.returncode}; see above")
    for phase in phases_of(entry.load(*overrides)):
        found = checkpoints.find(folder / phase / "checkpoints")
        if found is None or found.turn < found.part("turns", int):
            raise UserError(f"{entry.name} was stopped in {folder / phase}; give the same command again to go on")
    return peak


class _Tail(threading.Thread):
    """Hands on what a process says on stderr, and keeps the last of it."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.process, self.text = process, ""
        self.start()

    def run(self) -> None:
        while part := os.read(self.process.stderr.fileno(), 1 << 16):
            words = part.decode(errors="replace")
            sys.stderr.write(words)
            sys.stderr.flush()
            self.text = (self.text + words)[-10_000:]


def _watched(process: subprocess.Popen) -> int:
    """Wait for a process; the largest high-water mark of it and its children, looked at twice a second.

    ``ru_maxrss`` of a child begins at its parent's, and the parent here holds models when it judges.
    """
    peak, asked = 0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            for each in (asked, *asked.children(recursive=True)):
                peak = max(peak, _high_water(each.pid))
        except psutil.Error:
            pass
        time.sleep(0.5)
    return peak


def _high_water(pid: int) -> int:
    """Most resident bytes of a process so far; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else 0


def diversity(role: Role, encoders: Encoders, clips: Sequence[Clip], draws: int, **options: Any) -> float:
    """Mean distance between samples of one condition under different noise: RMS over pixels, in levels of 255."""
    videos = [sample_clips(role, encoders, clips, seed=1000 + d, **options).frames for d in range(draws)]
    gaps = [
        np.sqrt(np.mean((a[i].astype(float) - b[i]) ** 2))
        for a, b in itertools.combinations(videos, 2)
        for i in range(len(clips))
    ]
    return float(np.mean(gaps))


def judge(folder: Path, world: World, split: str, clips: int, plans: Mapping[str, Mapping[str, Any]]):
    """Scores of a run or a teacher under each plan of sampling, with the first eight videos of the first plan."""
    model = load_model(folder)
    encoders = Encoders(model.pipeline, model.role.backbone.transformer.device)
    wanted, rows, shown = clips_of(world, split, clips), {}, None
    for name, options in plans.items():
        options = {"batch": 16, "negative_prompt": model.negative_prompt, "label": name} | dict(options)
        sampled = sample_clips(model.role, encoders, wanted, seed=0, **options)
        shown = shown or sampled.frames[:8]
        spread = diversity(model.role, encoders, wanted[:16], 4, **options)
        each = [round(mean, 3) for mean in sampled.scores.clip_means]
        rows[name] = sampled.plain() | {"diversity": round(spread, 4), "clip_means": each}
    return rows, shown


def job_digest(recipe: recipes.Recipe) -> str:
    """Of all that a job's result depends on: its recipe, its teacher, and the recipe of the run it goes on from."""
    start = getattr(recipe, "priming_run", None)
    before = f"-{recipes.digest(recipes.load_stored(Path(start) / RECIPE))}" if start else ""
    return f"{recipes.digest(recipe)}-{weights_fingerprint(find_model(recipe.teacher.path))[:8]}{before}"


def set_aside(folder: Path, digest: str) -> None:
    """Note beside a folder which job it is for; one of another job is renamed, since training may have taken long.

    Its scores and videos go with it.
    """
    note = folder.with_name(f"{folder.name}.digest")
    if note.is_file() and (found := note.read_text()) != digest:
        about = [*folder.parent.glob(f"{folder.name}.*.json"), *folder.parent.glob(f"{folder.name}.*.npz")]
        for each in (folder, *about):
            if each.exists():
                aside = each.with_name(f"of-{found}-{each.name}")
                shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
                each.rename(aside)
                print(f"{each} was of another recipe: now {aside}")
        _peak_note(folder).unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest)


def result_file(folder: Path, split: str, clips: int) -> Path:
    """Of a job's scores."""
    return folder.with_name(f"{folder.name}.{split}-{clips}.json")


def _peak_note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.peak")


_held: list[int] = []  # locks; a training keeps them after its benchmark was killed


@contextlib.contextmanager
def claimed(lock: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the lock; it goes with the process and the trainings it has started.

    Args:
        wait: until it is free.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            print(f"waiting for another process: {lock.stem}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"{lock} cannot be locked ({error.strerror}): name a --root on another disk") from None
        _held.append(handle.fileno())
        try:
            yield True
        finally:
            _held.remove(handle.fileno())


def share(tasks: Mapping[str, Callable[[], None]], folder: Path, *, wait: bool = True) -> list[str]:
    """Carry out every task, together with other processes that do the same; each does at once what is done already.

    Args:
        folder: of a lock for each task.
        wait: for tasks that another process has under way; otherwise they are left out.

    Returns:
        Names of the tasks that are done.
    """
    left, told = dict(tasks), False
    while left:
        before = len(left)
        for name, task in list(left.items()):
            with claimed(folder / f"{name}.lock") as mine:
                if mine:
                    task()
                    del left[name]
                else:
                    _warn_of_threads()
        if not wait:
            break
        if len(left) == before:
            if not told:
                print(f"waiting for another process: {', '.join(left)}", flush=True)
            told = True
            time.sleep(2)
    return [name for name in tasks if name not in left]


@functools.cache
def _warn_of_threads() -> None:
    threads = torch.get_num_threads()
    if threads > 1 and not torch.cuda.is_available():
        print(
            f"warning: several processes share these jobs, and each computes on {threads} threads: they "
            "take cores from each other; set OMP_NUM_THREADS=1 and --ranks 1, and start one a core",
            file=sys.stderr,
        )


def run_jobs(
    entries: Sequence[Entry],
    seeds: Sequence[int],
    root: Path,
    settings: Mapping[str, tuple[str, ...]],
    *,
    ranks: int,
    split: str,
    clips: int,
    steps: Sequence[int] = (1, 4),
    wait: bool = True,
    known: Sequence[dict[str, Any]] = (),
    begin: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Train and judge every entry under every seed; what is finished is taken as it is.

    A job that diverged is kept as ``{"failed": why}``.

    Args:
        settings: overrides of each entry besides the seed, for which ``{seed}`` in them stands.
        steps: of the student's sampler, each judged as a row of its own.
        wait: for jobs that another process has under way; otherwise they are left out.
        known: jobs of an earlier day, without their weights.
        begin: train and judge what is not finished; False: leave it out.
    """
    asked = {f"{e.name}-seed{seed}": (e, seed) for seed, e in itertools.product(seeds, entries)}
    if not begin:
        found: dict[str, list[dict[str, Any]]] = {e.name: [] for e in entries}
        for name, (entry, seed) in asked.items():
            about = _about(entry, _overrides(settings[entry.name], seed), split, clips)
            if kept := _kept(about, result_file(root / name, split, clips), known, steps):
                found[entry.name].append(kept)
        return found
    options = {"ranks": ranks, "split": split, "clips": clips, "steps": steps, "known": known}
    tasks = {
        name: functools.partial(_job, entry, seed, root / name, settings[entry.name], **options)
        for name, (entry, seed) in asked.items()
    }
    done: dict[str, list[dict[str, Any]]] = {e.name: [] for e in entries}
    for name in share(tasks, root, wait=wait):
        done[asked[name][0].name].append(json.loads(result_file(root / name, split, clips).read_text()))
    return done


def _overrides(settings: tuple[str, ...], seed: int) -> tuple[str, ...]:
    return (*(setting.replace("{seed}", str(seed)) for setting in settings), f"seed={seed}")


def _about(entry: Entry, own: tuple[str, ...], split: str, clips: int) -> dict[str, Any]:
    """What a job's result must say of itself to be this one's."""
    return {"recipe": job_digest(entry.load(*own)), "split": split, "clips": clips}


def _kept(
    about: dict[str, Any], file: Path, known: Sequence[dict[str, Any]], steps: Sequence[int]
) -> dict[str, Any] | None:
    """The job's result, if it is in its file or known from an earlier day."""
    here = [json.loads(file.read_text())] if file.is_file() else []
    for kept in (*here, *known):
        if about.items() <= kept.items() and ("failed" in kept or {f"{n} NFE" for n in steps} <= set(kept["rows"])):
            return kept
    return None


def _job(
    entry: Entry,
    seed: int,
    folder: Path,
    settings: tuple[str, ...],
    *,
    ranks: int,
    split: str,
    clips: int,
    steps: Sequence[int],
    known: Sequence[dict[str, Any]],
) -> None:
    own, file = _overrides(settings, seed), result_file(folder, split, clips)
    asked = _about(entry, own, split, clips)
    if kept := _kept(asked, file, known, steps):
        set_aside(folder, asked["recipe"])
        write_json(file, kept)
        return
    print(f"== {entry.name}, seed {seed}: {' '.join(own)}", flush=True)
    set_aside(folder, asked["recipe"])
    steps = sorted({*steps, *_judged_at(asked, file)})  # what another call asked for stays
    record = {"name": entry.name, "overrides": list(own), "seed": seed, "commit": commit()} | asked
    try:
        record |= _result(entry, folder, own, ranks=ranks, split=split, clips=clips, steps=steps)
    except Diverged as error:
        record |= {"failed": str(error)}
    write_json(file, record | {"environment": environment() | {"ranks": ranks}})


def _judged_at(about: dict[str, Any], file: Path) -> list[int]:
    """Steps of the sampler that the job in a file has been judged at, if it is the one asked for."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    return [int(row.split()[0]) for row in found.get("rows", {})] if about.items() <= found.items() else []


def _result(
    entry: Entry, folder: Path, own: tuple[str, ...], *, ranks: int, split: str, clips: int, steps: Sequence[int]
) -> dict[str, Any]:
    began, note = time.monotonic(), _peak_note(folder)
    peak = max(train(entry, folder, ranks, own), int(note.read_text()) if note.is_file() else 0)
    write_text(note, str(peak))
    rows, shown = judge(folder, entry.world(), split, clips, {f"{n} NFE": {"steps": n} for n in steps})
    np.savez_compressed(result_file(folder, split, clips).with_suffix(".npz"), *shown)
    seconds = seconds_training(folder, entry.load(*own))
    return {"rows": rows, "seconds_training": seconds, "peak_bytes": peak, "seconds_of_job": time.monotonic() - began}
