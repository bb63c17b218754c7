"""What a rank can say of its machine by itself, and what is wrong with what all ranks say.

The GPU parts have not been run on a GPU yet.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vpae import __version__
from vpae import recipe as recipes
from vpae.data.encoders import transformer_config
from vpae.engine.host import GIB
from vpae.engine.parallel import device_of_rank
from vpae.errors import UserError
from vpae.extras import ATTENTION_BACKENDS, check_attention_backend
from vpae.models import find_model, weights_fingerprint

_LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "safetensors")
_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_")
_FILES = 4096  # open files: a shard of the cache each, a socket to each rank, the teacher's files
_SHARED_MEMORY = GIB  # NCCL's between ranks of one machine takes some MB each; containers have 64 MB by default
_HELD = 2 * GIB  # of a GPU before anything of ours is on it
_SKEW = 2.0  # seconds


@dataclass(frozen=True)
class Line:
    """One line of the report: ``mark`` is ok, warning or fails; ``mend`` is empty where nothing need be done."""

    mark: str
    what: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.mark:<8} {self.what:<12} {self.text}" + (f"; mend: {self.mend}" if self.mend else "")


def facts(rank: int, recipe: recipes.Recipe | None) -> dict[str, Any]:
    """Plain values about this rank; nothing here waits for another one."""
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "gpu": _gpu(),
        "blind": not torch.cuda.is_available() and Path("/dev/nvidiactl").exists(),
        "versions": _versions(),
        "recipe": None if recipe is None else recipes.digest(recipe),
        "teacher": _answer(lambda: _teacher(recipe)),
        "attention": _answer(lambda: _attention(recipe)),
        "kernels": _kernels(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": Path("/dev/infiniband").exists(),
        "shared_memory": shared.free if shared else 0,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
        "cores": len(os.sched_getaffinity(0)),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _answer(question: Callable[[], Any]) -> tuple[Any, str]:
    """What it says, and what is wrong where it cannot."""
    try:
        return question(), ""
    except (UserError, OSError) as error:
        return None, str(error)


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    device = device_of_rank()
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "index": device.index,
        "id": str(getattr(properties, "uuid", device.index)),
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total": total,
        "used": total - free,
        "driver": _driver(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _versions() -> dict[str, str]:
    cuda = torch.version.cuda
    return {
        "vpae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": cuda or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.cuda.is_available() else "none",
        **{name: metadata.version(name) for name in _LIBRARIES},
    }


def _teacher(recipe: recipes.Recipe | None) -> str | None:
    if not isinstance(recipe, recipes.Distillation):
        return None
    pipeline = find_model(recipe.teacher.path)
    transformer_config(pipeline)
    return weights_fingerprint(pipeline)


def _attention(recipe: recipes.Recipe | None) -> str | None:
    if not isinstance(recipe, (recipes.Distillation, recipes.FinetuneFlow)):
        return None
    exact = "engine.precision: fp32" if recipe.engine.precision == "fp32" else ""
    check_attention_backend(recipe.teacher.attention, masks=recipe.teacher.fold_text_padding, fp32=exact)
    return recipe.teacher.attention


def _kernels() -> list[str]:
    """Attention kernels that train here; those of the Hub are loaded by asking, and asked for by a recipe alone."""
    own = [name for name, backend in ATTENTION_BACKENDS.items() if backend.package != "kernels"]
    return [name for name in own if not _answer(lambda n=name: check_attention_backend(n))[1]]


def judge(all_facts: list[dict[str, Any]], recipe: recipes.Recipe | None) -> list[Line]:
    """What is right and wrong with what all ranks said of themselves, in order of rank."""
    hosts: dict[str, list[int]] = {}
    for fact in all_facts:
        hosts.setdefault(fact["host"], []).append(fact["rank"])
    placed = ", ".join(f"{host}: {_span(ranks)}" for host, ranks in hosts.items())
    lines = [Line("ok", "ranks", f"{len(all_facts)} on {len(hosts)} machine{'s' * (len(hosts) > 1)} ({placed})")]
    lines += _gpus(all_facts, recipe)
    lines.append(_agree(all_facts, "versions", "install the same versions on every machine"))
    if recipe is not None:
        lines.append(_agree(all_facts, "recipe", "give every machine the same recipe and --set"))
        lines += _answers(all_facts, "teacher") + _answers(all_facts, "attention")
    kernels = set.intersection(*(set(f["kernels"]) for f in all_facts))
    lines.append(Line("ok", "kernels", "that train here: " + ", ".join(k for k in ATTENTION_BACKENDS if k in kernels)))
    return lines + _limits(all_facts) + _variables(all_facts)


def _span(ranks: list[int]) -> str:
    whole = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1
    return f"{ranks[0]}-{ranks[-1]}" if whole else ", ".join(map(str, ranks))


def _where(fact: dict[str, Any]) -> str:
    return f"rank {fact['rank']} ({fact['host']})"


def _gpus(all_facts: list[dict[str, Any]], recipe: recipes.Recipe | None) -> list[Line]:
    lines, seen = [], {}
    for fact in all_facts:
        gpu = fact["gpu"]
        if gpu is None:
            if fact["blind"]:
                mend = "install torch's CUDA build and a driver that serves it (nvidia-smi says which CUDA it can)"
                lines.append(
                    Line(
                        "fails",
                        "GPU",
                        f"{_where(fact)} has an NVIDIA GPU that torch {torch.__version__} cannot use",
                        mend,
                    )
                )
            continue
        text = (
            f"{_where(fact)}: {gpu['index']} {gpu['name']}, {gpu['total'] / GIB:.1f} GiB, {gpu['used'] / GIB:.1f} "
            f"used, capability {gpu['capability']}, driver {gpu['driver']}"
        )
        first = seen.setdefault((fact["host"], gpu["id"]), fact)
        if first is not fact:
            mend = "one rank a GPU: fewer ranks, or a CUDA_VISIBLE_DEVICES with more"
            lines.append(Line("fails", "GPU", f"{text}: the same as that of rank {first['rank']}", mend))
        elif recipe is not None and recipe.engine.precision == "bf16" and float(gpu["capability"]) < 8:
            lines.append(Line("fails", "GPU", text, "bf16 needs capability 8.0 or more; set engine.precision=fp32"))
        elif gpu["used"] > _HELD:
            lines.append(Line("warning", "GPU", text, "another process holds memory of it: nvidia-smi names it"))
        else:
            lines.append(Line("ok", "GPU", text))
    if not any(f["gpu"] or f["blind"] for f in all_facts):
        lines.append(Line("ok", "GPU", "none on any rank: everything runs on the CPU, over gloo"))
    elif len({(f["gpu"] or {}).get("name") for f in all_facts}) > 1:
        lines.append(Line("warning", "GPU", "ranks have different ones", "all wait for the slowest; take equal ones"))
    return lines


def _agree(all_facts: list[dict[str, Any]], key: str, mend: str) -> Line:
    first = all_facts[0][key]
    for fact in all_facts[1:]:
        if fact[key] == first:
            continue
        if isinstance(first, dict):
            name = next(k for k in first if first[k] != fact[key].get(k))
            text = f"{name} is {first[name]} on {_where(all_facts[0])} and {fact[key].get(name)} on {_where(fact)}"
        else:
            text = f"{first} on {_where(all_facts[0])} and {fact[key]} on {_where(fact)}"
        return Line("fails", key, text, mend)
    text = ", ".join(f"{k} {v}" for k, v in first.items()) if isinstance(first, dict) else str(first)
    return Line("ok", key, text + (", the same on all ranks" if len(all_facts) > 1 else ""))


def _answers(all_facts: list[dict[str, Any]], key: str) -> list[Line]:
    """A line for what a rank could not answer, or for what all of them agree on."""
    for fact in all_facts:
        if fact[key][1]:
            return [Line("fails", key, f"{_where(fact)}: {fact[key][1]}")]
    if all_facts[0][key][0] is None:
        return []
    mend = "put one copy of the teacher where every machine sees it"
    return [_agree([f | {key: f[key][0]} for f in all_facts], key, mend)]


def _limits(all_facts: list[dict[str, Any]]) -> list[Line]:
    """One line of limits a machine."""
    lines = []
    for fact in {f["host"]: f for f in reversed(all_facts)}.values():
        unlimited = resource.RLIM_INFINITY
        locked = "unlimited" if fact["locked"] == unlimited else f"{fact['locked'] / GIB:.2f} GiB"
        text = (
            f"{fact['host']}: {fact['cores']} cores, {fact['memory'] / GIB:.0f} GiB of memory free, {fact['files']} "
            f"open files, {locked} locked memory, {fact['shared_memory'] / GIB:.1f} GiB in /dev/shm"
        )
        mends = []
        if fact["files"] != unlimited and fact["files"] < _FILES:
            mends.append("ulimit -n 65536")
        if fact["infiniband"] and fact["locked"] != unlimited:
            mends.append("ulimit -l unlimited (InfiniBand pins its buffers)")
        if fact["gpu"] and fact["shared_memory"] < _SHARED_MEMORY:
            mends.append("docker run --ipc=host or --shm-size=16g (NCCL's buffers between ranks of a machine)")
        lines.append(Line("warning" if mends else "ok", "limits", text, ", ".join(mends)))
    return lines[::-1]


def _variables(all_facts: list[dict[str, Any]]) -> list[Line]:
    """The environment variables that change how ranks talk or compute."""
    lines, first = [], all_facts[0]["variables"]
    for fact in all_facts[1:]:
        # each rank may be given a GPU of its own by this one
        different = [k for k in {**first, **fact["variables"]} if first.get(k) != fact["variables"].get(k)]
        different = [k for k in different if k != "CUDA_VISIBLE_DEVICES"]
        if different:
            key = different[0]
            values = first.get(key), fact["variables"].get(key)
            text = f"{key} is {values[0]} on {_where(all_facts[0])} and {values[1]} on {_where(fact)}"
            lines.append(Line("warning", "variables", text, "export the same on every machine"))
            break
    for key in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        if first.get(key, "0") != "0":
            lines.append(
                Line("warning", "variables", f"{key}={first[key]} takes NCCL's fast path away", f"unset {key}")
            )
    if len(all_facts) > 1 and "OMP_NUM_THREADS" not in first:
        cores = all_facts[0]["cores"]
        mend = f"export OMP_NUM_THREADS={max(1, cores // len(all_facts))}"
        lines.append(Line("warning", "variables", "OMP_NUM_THREADS is not set: every rank takes all cores", mend))
    if not lines:
        lines.append(Line("ok", "variables", " ".join(f"{k}={v}" for k, v in first.items()) or "none that matter"))
    return lines


def clocks(times: list[float]) -> Line:
    """How far the clocks apart that all ranks read in one moment."""
    apart = max(times) - min(times)
    late = times.index(min(times))
    text = f"{apart:.2f} s apart"
    if apart > _SKEW:
        return Line("warning", "clocks", f"{text}, rank {late} is last", "let chrony or ntpd set every machine's clock")
    return Line("ok", "clocks", text)
