"""Output folders: one run a folder, never overwritten, never mixed."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from vpae import __version__
from vpae import recipe as recipes
from vpae.engine import restarts
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.files import write_text
from vpae.strict import read_yaml, shown

RECIPE = "recipe.yaml"
PHASES = ("priming", "equilibrium")  # of V-PAE, in order, and their folders' names
PEER_PHASES = ("consistency", "dmd2", "apt", "pcm", "ladd", "mse")


def phases_of(recipe: recipes.Distillation) -> tuple[str, ...]:
    """What a distillation consists of, in order; each has a folder of its name."""
    if isinstance(recipe, recipes.Distill):
        return tuple(phase for phase in PHASES if getattr(recipe, phase) is not None)
    method = recipe.method
    first = ("consistency",) if method.kind == "apt" and method.consistency is not None else ()
    return (*first, method.kind)


def open_folder(folder: Path, recipe: recipes.Recipe, resume: bool, processes: Processes) -> None:
    """Claim ``folder`` for a run of ``recipe``.

    Raises:
        UserError: it holds a run of another recipe, or a run that ``resume`` was not asked for, or is not writable.
    """
    processes.together(lambda: _claim(folder, recipe, resume), main_only=True)
    restarts.note_claim()


def _claim(folder: Path, recipe: recipes.Recipe, resume: bool) -> None:
    stored = folder / RECIPE
    if stored.is_file():
        difference = first_difference(what_is_learnt(_read(stored)), what_is_learnt(recipes.to_plain(recipe)))
        trained = _holds_work(folder)
        if difference and trained:
            raise UserError(f"{folder} already holds a different run ({difference}); choose another --output")
        if difference:  # it failed before its first checkpoint: what it had prepared may not be what this recipe wants
            shutil.rmtree(folder / "pipeline", ignore_errors=True)
        if trained and not resume:
            raise UserError(f"{folder} already holds this run; go on with --resume, or choose another --output")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no vpae run; choose another --output")
    write_text(stored, recipes.dump(recipe))


def _holds_work(folder: Path) -> bool:
    """Whether anything was trained, exported or measured here that another recipe must not touch."""
    made = any((folder / name).is_file() for name in ("model_index.json", "evaluation.json"))
    return made or any(folder.rglob("state.json")) or any(log.stat().st_size for log in folder.rglob("log.jsonl"))


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = read_yaml(path.read_text(encoding="utf-8"))
        return recipes.completed(plain) if isinstance(plain, dict) else {}
    except (OSError, yaml.YAMLError, ValueError):
        raise UserError(f"{path} is damaged; choose another --output") from None


def first_difference(there: Any, here: Any, prefix: str = "", places: tuple[str, str] = ("there", "here")) -> str:
    """Names the first key in which two plain values differ, with both values; empty where they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**here, **there}:
            name = str(key) if str(key).isprintable() else shown(key)  # on one line, whatever a damaged file holds
            found = first_difference(there.get(key), here.get(key), f"{prefix}.{name}" if prefix else name, places)
            if found:
                return found
        return ""
    return "" if there == here else f"{prefix} is {shown(there)} {places[0]} and {shown(here)} {places[1]}"


# keys of section engine that change the numbers
_LEARNT = ("global_batch", "precision", "compile", "optimiser_state")
_FREE = ("name", "watch", "evaluate", "evaluate_clips")  # sections that change no weights


def what_is_learnt(plain: dict[str, Any]) -> dict[str, Any]:
    """The part of a plain recipe that changes the weights a run ends in; the rest may change when it is resumed.

    Where the cache (or the teacher's clips) lie is free, what is in it is not: checkpoints hold its fingerprint.
    """
    kept = {key: value for key, value in plain.items() if key not in _FREE}
    if isinstance(plain.get("data"), dict):
        kept["data"] = {key: value for key, value in plain["data"].items() if key != "cache"}
    method = plain.get("method")
    if isinstance(method, dict) and isinstance(method.get("teacher_samples"), dict):
        clips = {key: value for key, value in method["teacher_samples"].items() if key != "folder"}
        kept["method"] = method | {"teacher_samples": clips}
    if isinstance(plain.get("engine"), dict):
        kept["engine"] = {key: plain["engine"].get(key) for key in _LEARNT}
        if kept["engine"]["optimiser_state"] == "cpu":  # where fp32 lies changes no number
            kept["engine"]["optimiser_state"] = "fp32"
    return kept


def stored_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity in a checkpoint's state, of this version or an earlier one, as this version writes it."""
    return what_is_learnt(recipes.completed(identity))


def environment() -> dict[str, Any]:
    """What a measured number depends on besides the recipe."""
    import diffusers
    import peft
    import transformers

    return {
        "vpae": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
