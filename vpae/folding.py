"""Text padding computed once instead of hundreds of times, exactly in fp32.

Wan's image-to-video transformer takes 512 text tokens, whatever the prompt: rows after its end are zeros, and all
their keys and values are the same vector. Softmax over n equal keys is softmax over one of them with ``log n`` added
to its logit, so one row can stand for all. At 80 video tokens (the tiny teacher) the 512 rows would cost more than
the video itself; at 32,760 tokens (480p) they are nothing, and the stock processor, which any attention backend can
serve, is the better choice. Kernels take the mask in the query's dtype, and bf16 rounds ``log n`` so that the padding
weighs up to 2 % too much or too little: no more than bf16 does to any logit of that size.
"""

from __future__ import annotations

import math

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor
from torch.nn import functional as F

from vpae.conditioning import TEXT_LENGTH


class FoldedTextProcessor(WanAttnProcessor):
    """Cross-attention in which the last text row stands for all rows of padding.

    Args:
        text_rows: a list of one number, shared by all blocks: text rows of this forward, the folded one included;
            0 where nothing is folded, and diffusers' own processor answers.
    """

    def __init__(self, text_rows: list[int]) -> None:
        super().__init__()
        self.text_rows = text_rows

    @classmethod
    def install(cls, transformer: WanTransformer3DModel) -> list[int]:
        """Give every cross-attention of the transformer a folding processor; returns their ``text_rows``.

        The attention backend chosen before stays chosen.
        """
        shared = [0]
        for block in transformer.blocks:
            folding = cls(shared)
            folding._attention_backend = block.attn2.processor._attention_backend
            block.attn2.set_processor(folding)
        return shared

    @staticmethod
    def fold(text: Tensor) -> Tensor:
        """Append the row that stands for the padding: ``[B, L, D]`` to ``[B, L + 1, D]``; L < 512."""
        return F.pad(text, (0, 0, 0, 1))

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rows = self.text_rows[0]
        if rows == 0:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        text = encoder_hidden_states[:, -rows:]
        image = encoder_hidden_states[:, :-rows] if attn.add_k_proj is not None else None

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        # the process-wide default may be a backend without masks, set for some other model
        backend = self._attention_backend or AttentionBackendName.NATIVE

        def attend(key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
            return dispatch_attention_fn(query, key, value, attn_mask=bias, backend=backend).flatten(2)

        query = heads(attn.norm_q(attn.to_q(hidden_states)))
        key, value = heads(attn.norm_k(attn.to_k(text))), heads(attn.to_v(text))
        bias = torch.zeros(rows, dtype=query.dtype, device=query.device)
        bias[-1] = math.log(TEXT_LENGTH - rows + 1)
        # four dimensions: some backends take a mask of two for one of (batch, keys)
        out = attend(key, value, bias.expand(query.shape[0], attn.heads, query.shape[1], rows))
        if image is not None:
            key_image, value_image = heads(attn.norm_added_k(attn.add_k_proj(image))), heads(attn.add_v_proj(image))
            out = out + attend(key_image, value_image)
        return attn.to_out[1](attn.to_out[0](out.type_as(hidden_states)))
