"""How much memory a rank needs to load its shards of a large teacher, and whether every weight arrives.

    python benchmarks/load_sharded.py --blocks 7 --ranks 2

Writes a checkpoint of random bf16 weights in the released layout (Wan2.1-I2V-14B cut to a few blocks, safetensors files
of 1 GB and their index) into a temporary folder, loads it on several ranks as a frozen bf16 teacher the way `vpae
distill` does, and compares each rank's shard of every tensor with the file. Peak resident memory is the kernel's own
figure (it counts mapped pages of the files too). Writes benchmarks/results/load_sharded.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import write_result
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vpae.engine.parallel import leave, shard_backbone, start
from vpae.models import wrap
from vpae.recipe import Engine, Teacher
from vpae.released import TRANSFORMERS
from vpae.weights import give_memory, read_weights, store_as, unborn_transformer

_FILE = 1_000_000_000  # bytes
_NAME = "diffusion_pytorch_model"


def write_checkpoint(folder: Path, blocks: int) -> int:
    """Random weights in the released layout, one file in memory at a time; returns the bytes of all tensors."""
    config = TRANSFORMERS["Wan2.1-I2V-14B-480P-Diffusers"] | {"num_layers": blocks}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    generator, files, size, total = torch.Generator().manual_seed(0), [{}], 0, 0
    for name, parameter in unborn_transformer(config).named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(generator=generator)
        if size + tensor.nbytes > _FILE:
            _write(folder, files)
            size = 0
        files[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    _write(folder, files)
    names = [f"{_NAME}-{i + 1:05d}-of-{len(files) - 1:05d}.safetensors" for i in range(len(files) - 1)]
    for i, name in enumerate(names):
        (folder / "transformer" / f"{i}.draft").rename(folder / "transformer" / name)
    where = {key: names[i] for i, keys in enumerate(files[:-1]) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "transformer" / f"{_NAME}.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(folder: Path, files: list) -> None:
    save_file(files[-1], folder / "transformer" / f"{len(files) - 1}.draft")
    files[-1] = list(files[-1])
    files.append({})


def _resident() -> float:
    """Peak resident memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def worker(folder: Path) -> None:
    """One rank: load, note the peak, compare."""
    processes = start()
    before = _resident()
    started = time.perf_counter()
    config = json.loads((folder / "transformer" / "config.json").read_text())
    transformer = unborn_transformer(config)
    store_as(transformer, "bf16")
    teacher = Teacher(str(folder), "bf16", "native", False)
    engine = Engine(1, 1, "fsdp", 1, "bf16", True, False, "fp32", "device", 1, 1, 1, 1, False, 1)
    backbone = wrap(transformer, teacher, engine)
    shard_backbone(backbone, processes)
    give_memory(backbone, processes)
    read_weights(backbone, folder, processes)
    seconds, peak = time.perf_counter() - started, _resident()
    index = json.loads((folder / "transformer" / f"{_NAME}.safetensors.index.json").read_text())["weight_map"]
    wrong, mine = [], 0
    for name, parameter in transformer.named_parameters():
        with safe_open(folder / "transformer" / index[name], framework="pt") as file:
            whole = file.get_tensor(name)
        local = parameter.detach()
        if isinstance(local, DTensor):
            shape, offset = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
            whole = whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
            local = local.to_local()
        mine += local.nbytes
        if local.shape != whole.shape or not torch.equal(local, whole.to(local.dtype)):
            wrong.append(name)
    found = {
        "rank": processes.rank,
        "resident_before_gb": round(before, 3),
        "peak_resident_gb": round(peak, 3),
        "shards_gb": round(mine / 1e9, 3),
        "seconds": round(seconds, 1),
        "tensors": len(index),
        "wrong": wrong,
    }
    (folder / f"rank-{processes.rank}.json").write_text(json.dumps(found))
    leave(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7, help="0.8 GB each, beside 0.5 GB around them")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_checkpoint(folder, arguments.blocks)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(arguments.ranks), __file__, "--worker", name]
        status = subprocess.run(command).returncode
        found = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*.json"))]
        if len(found) != arguments.ranks:
            sys.exit(f"only {len(found)} of {arguments.ranks} ranks finished (status {status})")
        files = len(list((folder / "transformer").glob("*.safetensors")))
    bound = total / 1e9 / arguments.ranks + 2
    document = {
        "benchmark": "load_sharded",
        "checkpoint_gb": round(total / 1e9, 3),
        "files": files,
        "blocks": arguments.blocks,
        "bound_gb": round(bound, 3),
        "within_bound": all(rank["peak_resident_gb"] <= bound for rank in found),
        "all_tensors_right": not any(rank["wrong"] for rank in found),
        "ranks": found,
    }
    print(f"checkpoint of {document['checkpoint_gb']} GB in {files} files, {arguments.ranks} ranks")
    for rank in found:
        print(
            f"  rank {rank['rank']}: peak {rank['peak_resident_gb']:.2f} GB (bound {bound:.2f}, before loading "
            f"{rank['resident_before_gb']:.2f}, its shards {rank['shards_gb']:.2f}), {rank['seconds']:.0f} s, "
            f"{rank['tensors'] - len(rank['wrong'])} of {rank['tensors']} tensors right"
        )
    write_result("load_sharded", document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
