"""Discriminator heads: block features of the judge to one logit a video (torch alone).

Every head takes ``features`` (one ``[B, L, D]`` a tap), the token ``grid`` (frames, height, width; L is their product),
and the condition's tokens, and returns logits ``[B]``. None receives t: the features, which it modulates, carry it.
V-PAE's ablation: convolutional < cross-attention < semantic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head attention of ``x`` over ``context``, pre-normed on both sides, with a residual connection."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_x, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(context_width)
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """``x [B, Q, width]``, ``context [B, K, context_width]``, ``keep [B, K]`` true where a key counts."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = heads(self.to_q(self.norm_x(x)))
        key, value = (heads(y) for y in self.to_kv(self.norm_context(context)).chunk(2, -1))
        mask = None if keep is None else keep[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.to_out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Pre-normed two-layer perceptron with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _normalise(features: Tensor) -> Tensor:
    """Residual streams grow with depth and with training; the head must see them at one scale."""
    return F.layer_norm(features.float(), features.shape[-1:])


class Head(nn.Module):
    """A head; ``checkpointing`` computes what it reads in a tap anew in the backward pass.

    At 75,600 tokens of 5,120 channels a semantic head keeps 11.7 GiB for the backward pass of one call, and 2.3 with
    it: the features alone, in bf16. A turn of the head with ST-R1 is four calls.
    """

    checkpointing = False

    def look(self, read: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """``read(*args)``."""
        if not self.checkpointing:
            return read(*args)
        return checkpoint(read, *args, use_reentrant=False, preserve_rng_state=False)


class ConvolutionalHead(Head):
    """Per tap two strided 3D convolutions and a mean; the logit is the mean over taps."""

    def __init__(self, feature_dim: int, num_taps: int, width: int) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(feature_dim, width, 3, padding=1),
                nn.GroupNorm(math.gcd(8, width), width),
                nn.SiLU(),
                nn.Conv3d(width, width, 3, stride=(1, 2, 2), padding=1),
                nn.GroupNorm(math.gcd(8, width), width),
                nn.SiLU(),
                nn.Conv3d(width, 1, 1),
            )
            for _ in range(num_taps)
        )

    def forward(
        self,
        features: Sequence[Tensor],
        grid: tuple[int, int, int],
        image: Tensor | None,
        text: Tensor,
        text_keep: Tensor,
    ) -> Tensor:
        logits = []
        for stack, tap in zip(self.stacks, features, strict=True):

            def read(tap: Tensor, stack: nn.Module = stack) -> Tensor:
                volume = _normalise(tap).transpose(1, 2).unflatten(2, grid)
                return stack(volume).flatten(1).mean(1)

            logits.append(self.look(read, tap))
        return torch.stack(logits).mean(0)


class CrossAttentionHead(Head):
    """A learnable query per tap attends to that tap's tokens (APT, arXiv 2501.08316); outputs join to one logit."""

    def __init__(self, feature_dim: int, num_taps: int, width: int, num_heads: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_taps, queries, width))
        self.attentions = nn.ModuleList(Attention(width, feature_dim, num_heads) for _ in range(num_taps))
        self.feed_forwards = nn.ModuleList(FeedForward(width) for _ in range(num_taps))
        joined = num_taps * queries * width
        self.to_logit = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, 1))

    def read(self, tap: int, queries: Tensor, features: Tensor) -> Tensor:
        """Let ``queries [B, Q, width]`` look at the features of one tap."""
        return self.feed_forwards[tap](self.attentions[tap](queries, _normalise(features)))

    def prepare(self, batch: int, image: Tensor | None, text: Tensor, text_keep: Tensor) -> list[Tensor]:
        """The queries of each tap, ``[B, Q, width]``."""
        return [q.expand(batch, -1, -1) for q in self.queries]

    def forward(
        self,
        features: Sequence[Tensor],
        grid: tuple[int, int, int],
        image: Tensor | None,
        text: Tensor,
        text_keep: Tensor,
    ) -> Tensor:
        queries = self.prepare(len(features[0]), image, text, text_keep)
        taps = enumerate(zip(queries, features, strict=True))
        read = [self.look(partial(self.read, k), q, tap) for k, (q, tap) in taps]
        return self.to_logit(torch.cat(read, 1).flatten(1)).squeeze(1)


class SemanticHead(CrossAttentionHead):
    """V-PAE's head: queries joined with image and text tokens, self-attention, then cross-attention into each tap.

    The queries thereby know what the video should show before they look at it. ``image`` are Wan's CLIP tokens of the
    first frame, ``text`` the umT5 tokens of the prompt, both through linear projections (the paper leaves the
    encoder of ``e_i`` open). A model without CLIP tokens (``image_dim`` None) has none to show: its head is told the
    text alone, and a first frame that is given in its place (Wan2.2-TI2V) is seen in the features, where it is clean.
    """

    def __init__(
        self,
        feature_dim: int,
        num_taps: int,
        width: int,
        num_heads: int,
        queries: int,
        image_dim: int | None,
        text_dim: int,
    ) -> None:
        super().__init__(feature_dim, num_taps, width, num_heads, queries)
        if image_dim is not None:
            self.from_image = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, width))
        self.from_text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.self_attention, self.feed_forward = Attention(width, width, num_heads), FeedForward(width)

    def prepare(self, batch: int, image: Tensor | None, text: Tensor, text_keep: Tensor) -> list[Tensor]:
        count, per_tap, _ = self.queries.shape
        queries = self.queries.flatten(0, 1).expand(batch, -1, -1)
        seen = [] if image is None else [self.from_image(image.float())]
        tokens = torch.cat([queries, *seen, self.from_text(text.float())], 1)
        always = text_keep.new_ones(batch, tokens.shape[1] - text.shape[1])
        # padding rows may be looked from but never looked at
        mixed = self.feed_forward(self.self_attention(tokens, tokens, torch.cat([always, text_keep], 1)))
        return list(mixed[:, : count * per_tap].unflatten(1, (count, per_tap)).unbind(1))


class IndependentHeads(Head):
    """A head of its own for every tap, each with its own verdict: logits ``[B, taps]`` (LADD, PCM)."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(
        self, features: Sequence[Tensor], grid: tuple[int, int, int], image: Tensor, text: Tensor, text_keep: Tensor
    ) -> Tensor:
        told = (grid, image, text, text_keep)
        logits = [self.look(head, [tap], *told) for head, tap in zip(self.heads, features, strict=True)]
        return torch.stack(logits, 1)


def initialise(head: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw a head's weights from an explicit generator: truncated normal of variance 1 / fan-in, a zero last layer.

    A zero last layer makes every first logit 0, in the middle of the hinge's active band.
    """
    for module in head.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5, generator=generator)
            nn.init.zeros_(module.bias)
    if isinstance(head, ConvolutionalHead):
        last = [stack[-1] for stack in head.stacks]
    else:
        nn.init.trunc_normal_(head.queries, std=1.0, generator=generator)
        last = [head.to_logit[-1]]
    for layer in last:
        nn.init.zeros_(layer.weight)
    return head


def build_head(
    kind: str,
    *,
    feature_dim: int,
    num_taps: int,
    image_dim: int | None,
    text_dim: int,
    width: int,
    num_heads: int,
    queries: int,
    generator: torch.Generator,
    independent: bool = False,
) -> nn.Module:
    """Build a ``convolutional``, ``cross_attention`` or ``semantic`` head; ``independent``: one for every tap.

    Raises:
        ValueError: unknown kind.
    """
    if independent:
        sizes = {"feature_dim": feature_dim, "num_taps": 1, "image_dim": image_dim, "text_dim": text_dim}
        sizes |= {"width": width, "num_heads": num_heads, "queries": queries}
        return IndependentHeads([build_head(kind, **sizes, generator=generator) for _ in range(num_taps)])
    with torch.random.fork_rng(devices=[]):  # torch's constructors draw from the global generator
        if kind == "convolutional":
            head: nn.Module = ConvolutionalHead(feature_dim, num_taps, width)
        elif kind == "cross_attention":
            head = CrossAttentionHead(feature_dim, num_taps, width, num_heads, queries)
        elif kind == "semantic":
            head = SemanticHead(feature_dim, num_taps, width, num_heads, queries, image_dim, text_dim)
        else:
            raise ValueError(f"kind of a head is convolutional, cross_attention or semantic, not {kind!r}")
    return initialise(head, generator)
