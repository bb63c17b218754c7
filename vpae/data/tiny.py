"""The untrained parts of the tiny teacher's folder: tokenizer, umT5, CLIP and scheduler, all from fixed seeds.

They have the classes, file formats and call signatures of Wan2.1-I2V's, at a size that costs nothing. What must be
learnt (VAE and transformer) is trained by recipes/tiny_vae.yaml and recipes/tiny_teacher.yaml.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from vpae.data.bounce import COLOURS, DIRECTIONS, World
from vpae.draws import generator_of

TEXT_DIM, IMAGE_DIM = 128, 64
_WORDS = ("a", "the", "ball", "balls", "and", "moves", "is", "at", "rest", "gravity", "pulls", "down", "no", ".", ",")
_OFFSETS = (-4, -3, -1, 0, 1, 2, 3, 4)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of Bounce's captions (lower-cased); any other word is <unk>."""
    words = [*_WORDS, *COLOURS, *DIRECTIONS, *World().speeds]
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(".", " . "), normalizers.Replace(",", " , ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@torch.no_grad()
def _draw(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Every matrix normal with variance 1 / fan-in, from an explicit generator; biases zero, norms one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name and "shared" not in name:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif parameter.ndim >= 1 and ("embed" in name or "shared" in name):
            parameter.normal_(0, 1, generator=generator)
        elif "bias" in name:
            parameter.zero_()
        else:
            parameter.fill_(1)


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A one-layer umT5 whose heads each look at one neighbour.

    Wan's transformer gives text tokens no positions, so what binds "red" to "left" must come out of the text encoder. A
    trained umT5 does that; here each head's relative-position bias selects a fixed offset, and all else is random.
    """
    heads = len(_OFFSETS)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=TEXT_DIM // heads,
        d_ff=2 * TEXT_DIM,
        num_layers=1,
        num_heads=heads,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder = UMT5EncoderModel(config).eval()
    _draw(encoder, generator_of("tiny", "text encoder"))
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        attention.q.weight.mul_(0.05)
        attention.relative_attention_bias.weight.zero_()
        for head, offset in enumerate(_OFFSETS):
            bucket = abs(offset) + (config.relative_attention_num_buckets // 2 if offset > 0 else 0)
            attention.relative_attention_bias.weight[bucket, head] = 20.0
    return encoder


def build_image_encoder() -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """A CLIP vision tower over 32-pixel pictures in patches of 8: 17 tokens, random weights."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=2 * IMAGE_DIM,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=IMAGE_DIM,
    )
    encoder = CLIPVisionModel(config).eval()
    _draw(encoder, generator_of("tiny", "image encoder"))
    size = {"height": 32, "width": 32}
    return encoder, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)


def write_encoders(folder: Path, shift: float, *, images: bool = True) -> None:
    """Write tokenizer/, text_encoder/, scheduler/ and, where ``images``, image_encoder/ and image_processor/."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(folder / "tokenizer")
        build_text_encoder(len(tokenizer)).save_pretrained(folder / "text_encoder")
        if images:
            encoder, processor = build_image_encoder()
            encoder.save_pretrained(folder / "image_encoder")
            processor.save_pretrained(folder / "image_processor")
        FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / "scheduler")
