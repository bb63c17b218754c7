"""One clip on several ranks, each of which holds a part of its tokens (Ulysses, arXiv 2309.14509).

A backbone that is split stays the function it was: ``x_t`` goes in whole and velocity and features come out whole, the
same on every rank of the group, and methods, losses and heads know nothing of it. Between patch embedding and last
projection a rank computes with its own tokens alone. Only self-attention needs those of the others: two all-to-alls
trade tokens for heads and back. Text and image tokens are whole on every rank.

Gradients. The loss is computed on every rank of the group from the same whole tensors, and each rank starts its
backward pass from its own tokens. So what a rank finds for a weight is its tokens' part, and the sum over the group is
the gradient. Everything that averages gradients (FSDP, HSDP, :func:`vpae.engine.parallel.average_gradients`) takes the
mean over all ranks, which makes 1/degree of it; therefore :meth:`SequenceGroup.gather` multiplies by the degree on the
way back, and :meth:`SequenceGroup.enter` divides by it. Weights outside of a backbone (a head), which see whole
tensors on every rank, and ``x_t`` itself get their gradient as it is. (A power of two rounds nothing.) A gradient of a
gradient is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpae.errors import UserError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a clip.

    Attributes:
        group: their process group.
        rank: this one's place among them.
        degree: how many they are.
    """

    group: dist.ProcessGroup
    rank: int
    degree: int

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        return self  # a process group cannot be copied

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that every rank holds; its gradient is zero elsewhere."""
        length = whole.shape[dim] // self.degree
        if length * self.degree != whole.shape[dim]:
            raise ValueError(f"{whole.shape[dim]} tokens cannot be split over {self.degree} ranks")
        return whole.narrow(dim, self.rank * length, length)

    def gather(self, part: Tensor) -> Tensor:
        """All tokens ``[B, L, D]`` of the parts ``[B, L / degree, D]``; see the module for its gradient."""
        return _Gather.apply(part, self)

    def enter(self, whole: Tensor) -> Tensor:
        """The same tensor; its gradient is the sum of what the ranks find for it, over the degree."""
        return _Enter.apply(whole, self)

    def to_heads(self, x: Tensor) -> Tensor:
        """Own tokens of all heads ``[B, L / degree, H, d]`` to all tokens of own heads ``[B, L, H / degree, d]``."""
        parts = x.unflatten(2, (self.degree, -1)).permute(2, 0, 1, 3, 4)
        return _AllToAll.apply(parts.contiguous(), self.group).transpose(0, 1).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_heads`."""
        parts = x.unflatten(1, (self.degree, -1)).transpose(0, 1)
        return _AllToAll.apply(parts.contiguous(), self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it


class _AllToAll(torch.autograd.Function):
    """Row i of rank j becomes row j of rank i: its own inverse and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        out = torch.empty_like(gradient)
        dist.all_to_all_single(out, gradient, group=ctx.group)
        return out, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sequence: SequenceGroup) -> Tensor:
        ctx.sequence = sequence
        parts = part.new_empty(sequence.degree * part.shape[0], *part.shape[1:])
        _all_gather(parts, part.contiguous(), group=sequence.group)
        return parts.unflatten(0, (sequence.degree, -1)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.sequence.part(gradient, 1) * ctx.sequence.degree, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, sequence: SequenceGroup) -> Tensor:
        ctx.sequence = sequence
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.sequence.group)
        return total / ctx.sequence.degree, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [B, L, H, d]``, whose neighbouring channels are a pair; Wan keeps each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = (even * cos - odd * sin).type_as(x), (even * sin + odd * cos).type_as(x)
    return torch.stack(turned, -1).flatten(-2)


class SplitAttentionProcessor(WanAttnProcessor):
    """Wan's self-attention where each rank holds a part of the tokens; any attention backend serves it."""

    def __init__(self, sequence: SequenceGroup) -> None:
        super().__init__()
        self.sequence = sequence

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (*projected, attn.to_v(hidden_states)))
        if rotary_emb is not None:
            query, key = _rotated(query, *rotary_emb), _rotated(key, *rotary_emb)
        query, key, value = (self.sequence.to_heads(x) for x in (query, key, value))
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        out = self.sequence.to_tokens(out).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def split_tokens(transformer: WanTransformer3DModel, sequence: SequenceGroup) -> None:
    """Let a transformer compute with this rank's tokens between its patch embedding and its last projection.

    The attention backend chosen before stays chosen.
    """

    def entered(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (sequence.enter(args[0]), *args[1:])

    def embedded(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # here, and not before the first block, so that checkpointing keeps no whole sequence of that block's
        return sequence.part(output.flatten(2), 2).contiguous()[..., None, None]

    def placed(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(sequence.part(angles, 1) for angles in output)

    def timed(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = kwargs.get("timestep_seq_len")
        if tokens is None:
            return args, kwargs
        own = sequence.part(args[0].unflatten(0, (-1, tokens)), 1)  # a time a token (Wan2.2 TI2V)
        return (own.flatten(), *args[1:]), kwargs | {"timestep_seq_len": own.shape[1]}

    def projected(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return sequence.gather(output)

    transformer.patch_embedding.register_forward_pre_hook(entered)
    transformer.patch_embedding.register_forward_hook(embedded)
    transformer.rope.register_forward_hook(placed)
    transformer.condition_embedder.register_forward_pre_hook(timed, with_kwargs=True)
    transformer.proj_out.register_forward_hook(projected)
    for block in transformer.blocks:
        processor = SplitAttentionProcessor(sequence)
        processor._attention_backend = block.attn1.processor._attention_backend
        block.attn1.set_processor(processor)


def check_split(degree: int, *, heads: int, tokens: int) -> None:
    """Each rank must get as many tokens and as many heads as any other.

    Raises:
        UserError: they cannot be split so; the message names the degrees that can be.
    """
    common = math.gcd(heads, tokens)
    if common % degree:
        fit = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise UserError(
            f"engine.sequence_parallel {degree} cannot split a clip's {tokens} tokens and the transformer's {heads} "
            f"heads evenly; choose one of {fit}"
        )
