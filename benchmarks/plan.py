"""How near a plan's peak memory is to what training really takes.

    python benchmarks/plan.py                 on CPUs: resident memory; on a GPU: what torch's allocator had at most

Each case is planned, then trained for a turn of each player in fresh processes with random weights of the same shapes,
by the same builders and trainer. On CPUs the peak is the kernel's own figure (VmHWM, reset before each turn) over what
was resident before the networks were built and after the same turns of a micro one, so that code pages and libraries'
own buffers, 45 MiB that no plan counts, are in both. glibc returns every larger block at once (MALLOC_MMAP_THRESHOLD_),
and the holes between small ones before the first figure is read (malloc_trim): left there, small tensors fill them
unseen. What stays uncounted, some 20 MiB of Python's objects and small blocks and the buffers inside kernels and gloo,
is the reason why the batches of the tiny network are not smaller. Writes
benchmarks/results/plan_cpu.json or plan_cuda.json after each case.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result

from vpae import recipe as recipes
from vpae.data.encoders import transformer_config
from vpae.distill import method_of
from vpae.engine.layout import placed
from vpae.engine.parallel import Processes, alone, leave, start
from vpae.engine.trainer import Run, Trainer
from vpae.files import write_json
from vpae.models import distillation_cast, find_model, give_shards
from vpae.plan.account import phase_load
from vpae.plan.shapes import shapes_of
from vpae.plan.simulate import Hardware, Silent

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
MIB = 2**20
_NAMES = ("plan_cpu", "plan_cuda")
_KEYS = 6  # of a row, that say what was measured: of the case four, phase, player
_NETWORKS: dict[str, dict[str, int]] = {
    "micro": {"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2, "added_kv_proj_dim": 64},
    "tiny": {},
    "300M": {
        "num_attention_heads": 16,
        "attention_head_dim": 64,
        "ffn_dim": 4096,
        "num_layers": 14,
        "added_kv_proj_dim": 1024,
    },
}
_LORA = "student.lora={rank: 16, alpha: 16, targets: [to_q, to_k, to_v, to_out.0, net.0.proj, net.2]}"
CASES: list[dict[str, Any]] = [
    {"model": model, "student": student, "ranks": ranks, "checkpointing": checkpointing}
    for model, ranks_of, student_of in (("tiny", (1, 2), ("full", "lora")), ("300M", (1, 2), ("full", "lora")))
    for ranks in ranks_of
    for student in student_of
    for checkpointing in ((False, True) if model == "tiny" else (True,))
]


def recipe_of(case: dict[str, Any], folder: Path) -> recipes.Distill:
    """The quickstart's recipe with the case's network, sharded, fp32."""
    config = transformer_config(find_model("tiny_wan")) | _NETWORKS[case["model"]]
    write_json(folder / "transformer" / "config.json", config)
    batch = {"micro": 1, "tiny": 64, "300M": 2}[case["model"]]
    settings = [
        f"teacher.path={folder}",
        "teacher.attention=native",
        f"student.kind={case['student']}",
        "engine.parallel=fsdp",
        "engine.precision=fp32",
        f"engine.checkpointing={str(case['checkpointing']).lower()}",
        f"engine.global_batch={2 * batch * case['ranks']}",
        f"engine.micro_batch={batch}",
        *(["equilibrium.taps=[0, 1]"] if case["model"] == "micro" else []),
    ]
    return recipes.load(RECIPE, (*settings, *([_LORA] if case["student"] == "lora" else [])))


def _resident(key: str) -> int:
    """Bytes of this process by /proc/self/status: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def worker(folder: Path) -> None:
    """One rank: turns of a very small network, then the case's, and their peaks over what the small ones left."""
    case = json.loads((folder / "case.json").read_text())
    small = recipe_of(case | {"model": "micro"}, folder / "small")
    recipe = recipe_of(case, folder)
    processes = placed(start(), recipe.engine)
    take_turns(small, case["phase"], processes, folder / "small")
    gc.collect()
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # holes in the heap would be filled unseen
        before = _resident("VmRSS")
    peaks = take_turns(recipe, case["phase"], processes, folder)
    write_json(folder / f"rank-{processes.rank}.json", {name: peak - before for name, peak in peaks.items()})
    leave(0)


def take_turns(recipe: recipes.Distill, phase: str, processes: Processes, folder: Path) -> dict[str, int]:
    """A turn of each player of a phase; the most bytes this process held in each, all told."""
    cuda, shapes = processes.device.type == "cuda", shapes_of(recipe)
    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)

    def born(cast, processes, ema_on):
        give_shards(cast, processes, ema_on)
        for backbone in cast.backbones:
            with torch.no_grad():
                for name, parameter in backbone.transformer.named_parameters():
                    if "lora_" not in name:
                        parameter.normal_(std=0.02)

    method, heads = method_of(recipe, phase, cast, processes, born)
    modules = [b.transformer for b in cast.backbones] + heads

    def fetch(indices, draws):
        batch = shapes.batch(draws)
        batch.condition.text.normal_()  # rows of zeros are padding, which heads do not look at
        return dataclasses.replace(
            batch, x0=batch.x0.normal_().to(processes.device), condition=batch.condition.to(processes.device),
            null=batch.null.to(processes.device),
        )  # fmt: skip

    trainer = Trainer(method, Run(folder, recipe.engine, 0, {}, "", fetch, 1 << 20, modules), processes)
    peaks = {}
    for name in method.players:
        while method.player_of(trainer.turn) != name:
            trainer.turn += 1
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        trainer._take_turn(Silent())
        peaks[name] = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    return peaks


def measure(case: dict[str, Any], folder: Path) -> dict[str, int]:
    """Peaks by player, bytes: of the rank that had most."""
    write_json(folder / "case.json", case)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case["ranks"])]
    command = [sys.executable, *(launcher if case["ranks"] > 1 else []), __file__, "--worker", str(folder)]
    variables = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    status = subprocess.run(command, env=variables).returncode
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
    if len(found) != case["ranks"]:
        sys.exit(f"only {len(found)} of {case['ranks']} ranks finished (status {status}): {case}")
    return {player: max(rank[player] for rank in found) for player in found[0]}


def _written(cuda: bool) -> list[dict[str, Any]]:
    file = RESULTS / f"{_NAMES[cuda]}.json"
    return json.loads(file.read_text())["cases"] if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose description holds this, as 'tiny full 1'")
    parser.add_argument("--add", action="store_true", help="keep the rows of other cases that were written before")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    cuda, rows = alone().device.type == "cuda", []
    for case in CASES:
        told = f"{case['model']} {case['student']} {case['ranks']}" + (" checkpointed" if case["checkpointing"] else "")
        if arguments.only not in told:
            continue
        for phase in ("priming", "equilibrium"):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                recipe = recipe_of(case, folder)
                load = phase_load(recipe, phase, shapes_of(recipe), Hardware(case["ranks"], cuda=cuda), whole=True)
                measured = measure(case | {"phase": phase}, folder)
            for player, peak in measured.items():
                planned = max(sum(kinds.values()) for kinds in load.turns[player].segments)
                error = round(100 * (planned / peak - 1), 1)
                figures = {"planned": round(planned), "measured": peak, "error_percent": error}
                rows.append(case | {"phase": phase, "player": player} | figures)
                sizes = f"planned {planned / MIB:7.0f} MiB, measured {peak / MIB:7.0f}, {error:+.1f} %"
                print(f"{told:28} {phase:12} {player:11} {sizes}", flush=True)
        written = (_written(cuda) if arguments.add else []) + rows
        found = list({tuple(map(str, list(row.values())[:_KEYS])): row for row in written}.values())
        worst = max(abs(row["error_percent"]) for row in found)
        bar = {"bar_percent": 10, "worst_percent": worst, "within_bar": worst <= 10}
        document = {"benchmark": "plan", **bar, "cases": found}
        write_result(_NAMES[cuda], document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
