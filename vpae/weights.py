"""Weights of networks that are put together without memory, so that no rank ever holds one whole.

A 14B transformer is 61 GiB in fp32. Roles are built on the meta device and sharded there; only then do they get memory,
into which each rank reads its own slices of the teacher's safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from vpae.backbone import Backbone
from vpae.engine.checkpoint import read_tensors, stored_shapes
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.roles import Role, set_whole, start_lora

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def unborn_transformer(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """A Wan transformer on the meta device, fp32: names and shapes, no memory.

    Raises:
        UserError: the config is not one that WanTransformer3DModel takes.
    """
    try:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(dict(config)).eval()
    except Exception as error:  # whatever of many kinds a number that fits nothing makes diffusers raise
        raise UserError(f"the config does not make a WanTransformer3DModel: {_line(error)}") from None


def store_as(transformer: WanTransformer3DModel, dtype: Literal["fp32", "bf16"]) -> None:
    """Keep the weights in ``dtype``, but for the parts that diffusers keeps in fp32 (norms, time, modulation)."""
    if dtype == "fp32":
        transformer.float()
        return
    exact = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if not exact & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()


def matrices_in_bf16(transformer: WanTransformer3DModel) -> None:
    """Keep the linear layers of the blocks in bf16, for sampling under bf16 autocast.

    That rounds a matrix to bf16 at each use: held so, it gives the same numbers in half the room (14B: 33 GB, not 66).
    """
    for block in transformer.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def give_memory(backbone: Backbone, processes: Processes, *, on_host: bool = False) -> None:
    """Give a backbone (sharded or not) memory on this rank's device; its weights are still to be read.

    Buffers are computed and adapters drawn anew, since neither is in the teacher's files.

    Args:
        on_host: weights lie in host memory, as :func:`vpae.engine.parallel.shard_backbone` was told.
    """
    transformer = backbone.transformer
    transformer.to_empty(device="cpu" if on_host else processes.device)
    for module in transformer.modules() if on_host else ():
        for name, buffer in module.named_buffers(recurse=False):  # what is computed with is no shard
            setattr(module, name, buffer.to(processes.device))
    rope = transformer.rope
    fresh = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    computed = {f"rope.{name}": buffer for name, buffer in fresh.named_buffers()}
    for name, buffer in transformer.named_buffers():
        buffer.copy_(computed[name])
    for name in backbone.adapter_seeds:
        start_lora(Role(name, backbone, name))


def read_weights(backbone: Backbone, pipeline: Path, processes: Processes) -> None:
    """Read a pipeline folder's transformer into a backbone's own weights; adapters on it are left as they are.

    Raises:
        UserError: the files are damaged, or not those of this architecture.
    """
    folder = pipeline / "transformer"
    wrong = f"cannot load the transformer in {pipeline}: "
    tensors = {name: p.detach() for name, p in Role("base", backbone).named_parameters()}
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    try:
        _check_files(folder)
        stored = stored_shapes(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{wrong}{_line(error)}") from None
    ignored = WanTransformer3DModel._keys_to_ignore_on_load_unexpected
    more = sorted(name for name in set(stored) - set(tensors) if not any(part in name for part in ignored))
    if more:
        raise UserError(f"{wrong}its files hold {more[0]!r}, which its config.json knows nothing of")
    for name, tensor in tensors.items():
        if stored.get(name) != tuple(tensor.shape):
            have = f"is {stored[name]}" if name in stored else "is not in its files"
            raise UserError(f"{wrong}{name!r} {have}; its config.json makes it {tuple(tensor.shape)}")
    try:
        read_tensors(folder, tensors, processes)
    except CheckpointException as error:
        raise UserError(f"{wrong}{_line(next(iter(error.failures.values()))[0])}") from error


def _check_files(folder: Path) -> None:
    """The safetensors files must be those that the folder's index names: others would be read as weights too."""
    index = folder / f"{_WEIGHTS}.index.json"
    named = {_WEIGHTS}
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    there = {file.name for file in folder.glob("*.safetensors")}
    if missing := sorted(named - there):
        raise ValueError(f"{missing[0]} is missing from {folder}")
    if more := sorted(there - named):
        raise ValueError(f"{folder / more[0]} is none of the files that make up the model; move it elsewhere")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def set_weights(backbone: Backbone, whole: Mapping[str, Tensor]) -> None:
    """Give a backbone (sharded or not) weights that every rank holds whole, as one drawn from a seed is."""
    for name, parameter in Role("base", backbone).named_parameters():
        set_whole(parameter, whole[name])


@torch.no_grad()
def copy_base(source: Backbone, target: Backbone) -> None:
    """Make ``target``'s own weights those of ``source`` (of the same architecture, sharded alike)."""
    theirs = dict(Role("base", source).named_parameters())
    for name, parameter in Role("base", target).named_parameters():
        parameter.copy_(theirs[name])
