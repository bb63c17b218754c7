"""Output folders: one run a folder, never overwritten, never mixed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from vpae import __version__
from vpae import recipe as recipes
from vpae.data.files import atomic
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.strict import read_yaml

RECIPE = "recipe.yaml"


def open_folder(folder: Path, recipe: recipes.Recipe, resume: bool, processes: Processes) -> None:
    """Claim ``folder`` for a run of ``recipe``.

    Raises:
        UserError: it holds a run of another recipe, or a run that ``resume`` was not asked for, or is not writable.
    """
    stored = folder / RECIPE
    if stored.is_file():
        difference = _difference(_read(stored), recipes.to_plain(recipe))
        if difference:
            raise UserError(f"{folder} already holds a different run ({difference}); choose another --output")
        if not resume and any(folder.rglob("state.json")):
            raise UserError(f"{folder} already holds this run; go on with --resume, or choose another --output")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no vpae run; choose another --output")
    processes.barrier()
    if processes.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(stored, recipes.dump(recipe))
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    processes.barrier()


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = read_yaml(path.read_text(encoding="utf-8"))
        return plain if isinstance(plain, dict) else {}
    except (OSError, yaml.YAMLError, ValueError):
        raise UserError(f"{path} is damaged; choose another --output") from None


_FREE = ("log_every", "sample_every", "samples", "checkpoint_every", "keep_checkpoints", "micro_batch")


def _difference(old: Any, new: Any, prefix: str = "") -> str:
    """The first key that differs, leaving out those that may change between a run and its resumption."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**new, **old}:
            if prefix in ("engine", "watch", "evaluate") and (prefix != "engine" or key in _FREE):
                continue
            found = _difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
            if found:
                return found
        return ""
    return "" if old == new else f"{prefix} is {old!r} there and {new!r} here"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN, which JSON has not, becomes null."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
