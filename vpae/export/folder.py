"""Writing diffusers pipeline folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor

from vpae.conditioning import Kind
from vpae.files import share, writing

_INDEX: dict[str, Any] = {
    "_diffusers_version": diffusers.__version__,
    "boundary_ratio": None,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def model_index(kind: Kind) -> dict[str, Any]:
    """The model_index.json of a pipeline of tiny parts."""
    index = _INDEX | {"expand_timesteps": kind == "ti2v"}
    index["_class_name"] = "WanPipeline" if kind == "t2v" else "WanImageToVideoPipeline"
    if kind != "t2v":
        clip = kind == "i2v"
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if clip else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if clip else [None, None]
    return dict(sorted(index.items()))


def transformer_of(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """A transformer that holds these very tensors, without ever having drawn weights of its own.

    Raises:
        RuntimeError: the weights are not exactly the transformer's.
    """
    with init_empty_weights(include_buffers=False):  # rotary tables are in no file and must be real
        transformer = WanTransformer3DModel.from_config(dict(config))
    transformer.load_state_dict(dict(weights), strict=True, assign=True)
    return transformer.requires_grad_(False).eval()


def write_transformer(config: Mapping[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Write ``folder/transformer`` from a config and whole weights; shards stay below 16 MB for small models.

    Raises:
        RuntimeError: the weights are not exactly the transformer's.
        UserError: the folder cannot be written.
    """
    own = {key: value for key, value in config.items() if key != "_name_or_path"}  # a path of this machine
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(own)
    transformer.load_state_dict(weights, strict=True, assign=True)
    target = folder / "transformer"
    small = sum(w.numel() * w.element_size() for w in weights.values()) < 100e6
    shutil.rmtree(target, ignore_errors=True)
    with writing(target):
        transformer.save_pretrained(target, safe_serialization=True, max_shard_size="15MB" if small else "10GB")
        for file in target.glob("*.safetensors"):
            share(file)
