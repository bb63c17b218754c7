"""Small tools of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import WanTransformer3DModel
from torch import Tensor

from vpae import recipe as recipes
from vpae.data.encoders import Encoders
from vpae.distill import build_phase, open_data
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import Processes, start
from vpae.engine.trainer import Trainer


def write_recipe(plain: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(plain))
    return path


def make_trainer(plain: dict, phase: str, folder: Path, processes: Processes | None = None) -> Trainer:
    """A trainer of one phase without its gallery."""
    processes = processes or start()
    recipe = recipes.from_plain(plain, "test")
    encoders = Encoders(recipe.teacher.path)
    trainer = build_phase(recipe, phase, folder, open_data(recipe, encoders, processes), encoders, processes)
    trainer.run.gallery = None
    return trainer


def rank_processes(mark: object) -> dict[int, int]:
    """Rank -> process id of the ranks in whose command line ``mark`` stands."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if rank and str(mark).encode() in command:
            found[int(rank[0][5:])] = int(process.name)
    return found


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.tensors().items()}


def read_tensors(run: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint under a phase's folder, whole, whatever number of ranks wrote it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = checkpoints.find(run / "checkpoints")
    stored = HuggingFaceStorageReader(str(found.folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(tuple(meta.size)) for name, meta in stored.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(found.folder)), no_dist=True)
    return tensors


def differing(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    """Names of the tensors that differ by more than ``tolerance``; both must have the same names."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.allclose(a[name], b[name], rtol=0, atol=tolerance)]


def tiny_transformer(**changes) -> WanTransformer3DModel:
    """A WanTransformer3DModel in the I2V layout, small enough for unit tests, on the current default device."""
    config = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=16,
        added_kv_proj_dim=24,
        rope_max_seq_len=64,
    )
    return WanTransformer3DModel(**(config | changes))
