"""The tables of names, against lists of names and shapes written out from the released model's own dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from vpae.data.encoders import transformer_config
from vpae.export import keys
from vpae.models import find_model

_SHARED = {"text_dim": 4096, "freq_dim": 256, "attention_head_dim": 128, "patch_size": (1, 2, 2), "out_channels": 16}
_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_BIG = _SHARED | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_SMALL = _SHARED | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "in_channels": 16}
_FIVE = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
MODELS = {
    "i2v_14b": (_BIG | _IMAGE, 16_394_878_784),
    "t2v_14b": (_BIG | {"in_channels": 16}, 14_288_491_584),
    "t2v_1_3b": (_SMALL, 1_418_996_800),
    "ti2v_5b": (_SHARED | _FIVE, 4_999_787_712),
    "tiny_wan": (None, None),
}


def _config(model: str) -> dict:
    given, _ = MODELS[model]
    if given is not None:
        return given
    return {k: v for k, v in transformer_config(find_model("tiny_wan")).items() if not k.startswith("_")}


def _meta(config: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(WanTransformer3DModel(**config).state_dict())


def released(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released checkpoint, written down module by module."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    image, ffn = config.get("image_dim"), config["ffn_dim"]
    patch = tuple(config["patch_size"])
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (width,)
        if bias:
            shapes[f"{name}.bias"] = (width,)

    shapes["patch_embedding.weight"], shapes["patch_embedding.bias"] = (d, config["in_channels"], *patch), (d,)
    linear("text_embedding.0", d, config["text_dim"])
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, config["freq_dim"])
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    if image:
        norm("img_emb.proj.0", image, True)
        linear("img_emb.proj.1", image, image)
        linear("img_emb.proj.3", d, image)
        norm("img_emb.proj.4", d, True)
    for i in range(config["num_layers"]):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                linear(f"{block}.{attention}.{projection}", d, d)
            norm(f"{block}.{attention}.norm_q", d, False)
            norm(f"{block}.{attention}.norm_k", d, False)
        if image:
            linear(f"{block}.cross_attn.k_img", d, d)
            linear(f"{block}.cross_attn.v_img", d, d)
            norm(f"{block}.cross_attn.norm_k_img", d, False)
        norm(f"{block}.norm3", d, True)
        linear(f"{block}.ffn.0", ffn, d)
        linear(f"{block}.ffn.2", d, ffn)
    linear("head.head", config["out_channels"] * math.prod(patch), d)
    shapes["head.modulation"] = (1, 2, d)
    return shapes


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_a_bijection(model):
    config = _config(model)
    own = _meta(config)
    original = keys.renamed(own, keys.to_original)
    assert {name: tuple(w.shape) for name, w in original.items()} == released(config)
    assert list(keys.renamed(original, keys.to_diffusers)) == list(own)
    count = MODELS[model][1]
    if count is not None:
        assert sum(w.numel() for w in original.values()) == count


def _differs_from_diffusers(own: dict[str, torch.Tensor]) -> list[str]:
    """Weights that diffusers' own converter would put elsewhere than where they came from."""
    marked = {keys.to_original(name): name for name in own}
    back = convert_wan_transformer_to_diffusers(
        {name: torch.tensor(i) for i, name in enumerate(marked)}  # a scalar that tells who it is
    )
    owners = list(marked.values())
    return [name for name, mark in back.items() if owners[int(mark)] != name]


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_own_converter_reads_every_name_back(model):
    assert _differs_from_diffusers(_meta(_config(model))) == []


@pytest.mark.parametrize(
    ("table", "first", "second"),
    [
        ("IN_BLOCK", "attn1.to_q", "attn1.to_k"),
        ("IN_BLOCK", "attn2.to_k", "attn2.add_k_proj"),
        ("OUTSIDE", "condition_embedder.time_embedder.linear_2", "condition_embedder.text_embedder.linear_2"),
    ],
)
def test_a_swapped_pair_of_names_is_noticed(table, first, second, monkeypatch):
    """Both weights have one shape, so that only the names can tell."""
    entries = getattr(keys, table)
    monkeypatch.setattr(keys, table, entries | {first: entries[second], second: entries[first]})
    assert _differs_from_diffusers(_meta(_config("tiny_wan")))


def test_a_name_that_no_checkpoint_has_is_refused():
    for name in ("blocks.0.attn1.norm_added_q.weight", "blocks.x.attn1.to_q.weight", "img_emb.proj.0.weight"):
        with pytest.raises(ValueError, match="no weight of a Wan2.1 transformer"):
            keys.to_original(name)
    with pytest.raises(ValueError, match="one name"):
        keys.renamed({"a": 1, "b": 2}, lambda name: "c")
