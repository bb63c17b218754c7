"""Names of a Wan transformer's weights, diffusers' and those of the released checkpoints, both ways.

The two layouts differ in names alone: every tensor has the same shape and the same numbers in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")

# diffusers' module or parameter: the released one
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",  # the released code counts the norm before the feed-forward as its second
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
LORA_PREFIX = "diffusion_model."  # ComfyUI loads no LoRA without it, and diffusers knows by it that names are Wan's own

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LEAVES = (".weight", ".bias")


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {original: own for own, original in table.items()}


def _translated(name: str, outside: Mapping[str, str], in_block: Mapping[str, str]) -> str:
    leaf = next((leaf for leaf in _LEAVES if name.endswith(leaf)), "")
    path = name.removesuffix(leaf)
    block = _BLOCK.fullmatch(path)
    try:
        return (f"blocks.{block[1]}.{in_block[block[2]]}" if block else outside[path]) + leaf
    except KeyError:
        raise ValueError(f"{name!r} is no weight of a Wan2.1 transformer that the tables of names know") from None


def to_original(name: str) -> str:
    """The released name of diffusers' weight, bias, parameter or module ``name``.

    Raises:
        ValueError: no Wan2.1 transformer has it.
    """
    return _translated(name, OUTSIDE, IN_BLOCK)


def to_diffusers(name: str) -> str:
    """Diffusers' name of the released weight, bias, parameter or module ``name``.

    Raises:
        ValueError: no Wan2.1 checkpoint has it.
    """
    return _translated(name, _inverse(OUTSIDE), _inverse(IN_BLOCK))


def renamed(weights: Mapping[str, T], translate: Callable[[str], str]) -> dict[str, T]:
    """The same values under their names in the other layout, in the same order.

    Raises:
        ValueError: a name is unknown, or two become one.
    """
    result = {translate(name): value for name, value in weights.items()}
    if len(result) != len(weights):
        raise ValueError("two weights would have one name")
    return result
