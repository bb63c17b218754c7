"""The Wan models that exist in the world: what a recipe may name before a weight of it has been fetched."""

from __future__ import annotations

from typing import Any

_WAN_14B: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}
_I2V_14B = _WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

# Config of the transformer in each released diffusers folder (huggingface.co/Wan-AI/NAME).
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Wan2.1-I2V-14B-480P-Diffusers": _I2V_14B,
    "Wan2.1-I2V-14B-720P-Diffusers": _I2V_14B,
    "Wan2.1-T2V-14B-Diffusers": _WAN_14B,
    "Wan2.1-T2V-1.3B-Diffusers": _WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "Wan2.2-TI2V-5B-Diffusers": _WAN_14B
    | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
}
