"""What benchmarks of speed are run on: a stored model, or networks of the released shapes with random weights.

Time and memory do not depend on the values of weights, quality does: nothing is said of it here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from vpae.backbone import Backbone
from vpae.conditioning import PATCH, TEXT_LENGTH
from vpae.data.bounce import World, make_clip
from vpae.data.encoders import Encoders, load_transformer, quiet, transformer_config
from vpae.engine.parallel import alone
from vpae.errors import UserError
from vpae.models import find_model
from vpae.released import TRANSFORMERS
from vpae.roles import Role
from vpae.weights import give_memory, store_as, unborn_transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A model and the clips it is asked for."""

    model: str
    frames: int
    size: tuple[int, int]
    guidance: float  # of the teacher


SHAPES = {
    "tiny": Shape("tiny_wan", 17, (64, 64), 2.0),
    "480p": Shape("Wan2.1-I2V-14B-480P-Diffusers", 81, (480, 832), 5.0),
    "720p": Shape("Wan2.1-I2V-14B-720P-Diffusers", 81, (720, 1280), 5.0),
}

# umT5-XXL and CLIP ViT-H/14 as the released folders carry them
_TEXT = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
_TEXT |= {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "tie_word_embeddings": False}
_IMAGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
_IMAGE |= {"image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu"}


@dataclass(frozen=True)
class Subject:
    """A denoiser with its encoders, and a request to put to them.

    Attributes:
        role: teacher and student alike: they are one architecture, and the same weights answer for both.
        weights: for people, where the weights come from.
        request: what is asked, a first frame uint8 ``[H, W, 3]`` and a prompt.
        fold: whether the padding of the text is computed once.
    """

    role: Role
    encoders: Encoders
    shape: Shape
    weights: str
    request: tuple[np.ndarray, str]
    fold: bool

    @property
    def transformer(self) -> nn.Module:
        return self.role.backbone.transformer

    @property
    def device(self) -> torch.device:
        return self.encoders.device

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        stride = self.encoders.vae.config.scale_factor_spatial
        height, width = self.shape.size
        return 16, (self.shape.frames - 1) // 4 + 1, height // stride, width // stride

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latent_shape
        return frames * (height // PATCH) * (width // PATCH)


class _Encoders(Encoders):
    """Encoders around a pipeline that lies in memory and in no folder."""

    def __init__(self, pipeline: WanImageToVideoPipeline, device: torch.device) -> None:
        self.folder, self.device, self.pipeline = Path(), device, pipeline
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.image_encoder):
            part.requires_grad_(False)


def random_encoders(device: torch.device, dtype: torch.dtype, layers: int | None) -> Encoders:
    """The released umT5, CLIP and VAE with random weights; ``layers`` cuts the first two, and umT5's table of words."""
    tiny = find_model("tiny_wan")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
        image_processor = CLIPImageProcessor()
    cut = {} if layers is None else {"num_layers": layers, "vocab_size": 64}
    shallow = {} if layers is None else {"num_hidden_layers": layers + 1}  # the layer before the last is the one used
    before = torch.get_default_dtype()
    with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan().eval()
        try:
            torch.set_default_dtype(dtype)
            text = UMT5EncoderModel(UMT5Config(**(_TEXT | cut))).eval()
            image = CLIPVisionModel(CLIPVisionConfig(**(_IMAGE | shallow))).eval()
        finally:
            torch.set_default_dtype(before)
    pipeline = WanImageToVideoPipeline(
        tokenizer, text, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), image_processor, image, transformer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return _Encoders(pipeline, device)


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int = 0) -> None:
    """Random weights in place, of a scale at which activations keep theirs: matrices 1 / fan-in, gains 1, biases 0."""
    generator = None
    for name, parameter in module.named_parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(seed)
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def random_transformer(config: dict, device: torch.device, dtype: str) -> nn.Module:
    """A Wan transformer of a config, stored as the engine stores a teacher, with random weights."""
    transformer = unborn_transformer(config)
    store_as(transformer, dtype)
    give_memory(Backbone(transformer), alone())
    draw_weights(transformer)
    return transformer.to(device).requires_grad_(False)


def build(arguments: argparse.Namespace, device: torch.device) -> Subject:
    """The subject that the command line names.

    Raises:
        UserError: no such model, a shape it does not take, or ``--layers`` without random weights.
    """
    shape = SHAPES[arguments.shape]
    shape = Shape(
        arguments.model or shape.model,
        arguments.frames or shape.frames,
        tuple(arguments.size or shape.size),
        shape.guidance,
    )
    if shape.frames % 4 != 1 or any(edge % 16 for edge in shape.size):
        raise UserError(
            f"--frames {shape.frames} --size {shape.size[0]} {shape.size[1]}: frames are 4 n + 1, edges multiples of 16"
        )
    if arguments.layers and not arguments.random_weights:
        raise UserError("--layers cuts a network, which needs --random-weights")
    tiny = arguments.shape == "tiny"
    if arguments.random_weights:
        config = transformer_config(find_model(shape.model)) if tiny else dict(TRANSFORMERS[shape.model])
        if arguments.layers:
            config["num_layers"] = arguments.layers
        transformer = random_transformer(config, device, arguments.precision)
        encoders = (
            Encoders(find_model(shape.model), device)
            if tiny
            else random_encoders(device, DTYPES[arguments.precision], arguments.layers)
        )
        weights = "random" + (
            f", {arguments.layers} blocks of {shape.model}" if arguments.layers else f", {shape.model}"
        )
    else:
        folder = find_model(shape.model)
        transformer = load_transformer(folder)
        store_as(transformer, arguments.precision)
        transformer, weights = transformer.to(device).requires_grad_(False), f"{shape.model}, as stored"
        encoders = Encoders(folder, device)
        if arguments.precision == "bf16":
            encoders.pipeline.text_encoder.to(torch.bfloat16)
            encoders.pipeline.image_encoder.to(torch.bfloat16)
    backbone = Backbone(transformer, fold_text_padding=tiny)
    return Subject(Role("model", backbone), encoders, shape, weights, _request(tiny, shape), tiny)


def _request(tiny: bool, shape: Shape) -> tuple[np.ndarray, str]:
    if tiny and shape.size == (64, 64):
        clip = make_clip(World(), "test", 0)
        return clip.frames[0], clip.caption
    ramp = np.linspace(0, 255, shape.size[0] * shape.size[1] * 3).reshape(*shape.size, 3)
    return ramp.astype(np.uint8), "A red ball moves right fast. No gravity."


def text_rows(subject: Subject, rows: int) -> int:
    """Text rows that cross-attention reads of a prompt with ``rows`` of its own."""
    return rows + 1 if subject.fold and rows < TEXT_LENGTH else TEXT_LENGTH
