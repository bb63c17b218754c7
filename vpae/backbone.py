"""The one adapter over diffusers' ``WanTransformer3DModel`` that every role looks through.

    out = backbone(x_t, t, condition, taps=(2, 4))      # out.velocity, out.features

It knows how the condition is packed, the time scale, block features with early exit, and which LoRA adapter answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpae.conditioning import TEXT_LENGTH, Condition, pad_text
from vpae.folding import FoldedTextProcessor
from vpae.sequence import SequenceGroup, split_tokens

TRAIN_TIMESTEPS = 1000  # the network's time input is 1000 t


@dataclass(frozen=True)
class Prediction:
    """What a backbone says of x_t.

    Attributes:
        velocity: ``[B, C, T, h, w]`` fp32, 0 where the condition gives a frame; None when the forward stopped at the
            last tap.
        features: one ``[B, T h w / 4, D]`` for each tapped block, in the order of ``taps``.
        grid: latent tokens as (frames, height, width).
    """

    velocity: Tensor | None
    features: list[Tensor] = field(default_factory=list)
    grid: tuple[int, int, int] = (0, 0, 0)


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Blocks at about 1/2, 3/4 and the last: {19, 29, 39} of 40, as AAD-1 (arXiv 2606.03972) uses on Wan 14B."""
    return (num_layers // 2 - 1, 3 * num_layers // 4 - 1, num_layers - 1)


def _as_it_came(norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(args[0].dtype)


def _keep_dtype_of_queries(transformer: WanTransformer3DModel) -> None:
    """Let q and k leave their norms in the dtype of v.

    CUDA's autocast (not the CPU's) computes RMS norms in fp32 and leaves the result so; torch's own attention casts it
    back, flash-attn and xformers refuse three tensors of two dtypes.
    """
    for module in transformer.modules():
        if isinstance(module, WanAttention):
            for name in ("norm_q", "norm_k", "norm_added_k"):
                norm = getattr(module, name, None)  # the last one reads image tokens, in cross-attention alone
                if norm is not None:
                    norm.register_forward_hook(_as_it_came)


class Backbone(nn.Module):
    """A Wan transformer seen as ``velocity, features = backbone(x_t, t, condition, taps)``.

    Args:
        transformer: diffusers' module; its weights stay where they are.
        fold_text_padding: compute the padding rows of the 512 text tokens once (exact; see :mod:`vpae.folding`).
    """

    def __init__(self, transformer: WanTransformer3DModel, *, fold_text_padding: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        self.fold_text_padding = fold_text_padding
        _keep_dtype_of_queries(transformer)
        self._text_rows = FoldedTextProcessor.install(transformer) if fold_text_padding else [0]
        self.sequence: SequenceGroup | None = None
        self.adapter: str | None = None
        self._tuned: tuple[tuple[str, ...], list[BaseTunerLayer]] = ((), [])  # adapters, and the layers that carry them
        self.adapter_seeds: dict[str, int] = {}  # of every LoRA on it, by name: what its first weights are drawn from

    @property
    def feature_dim(self) -> int:
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    def share_tokens(self, sequence: SequenceGroup) -> None:
        """From now on, compute each clip together with the other ranks of ``sequence``, which are all asked alike."""
        if self.sequence is None:
            split_tokens(self.transformer, sequence)
            self.sequence = sequence

    def enable_checkpointing(self) -> None:
        """Recompute each block in the backward pass, with the adapter and text rows of the forward pass."""
        # a bound method, not a closure: a deep copy of this backbone then asks itself and not its original
        self.transformer.enable_gradient_checkpointing(self._run_checkpointed)

    def _run_checkpointed(self, block: nn.Module, *args: Tensor) -> Tensor:
        adapter, rows = self.adapter, self._text_rows[0]

        @contextlib.contextmanager
        def as_before() -> Iterator[None]:
            with self.answering_as(adapter), self._reading(rows):
                yield

        def contexts():
            return contextlib.nullcontext(), as_before()

        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    def _lora_layers(self, adapters: tuple[str, ...]) -> list[BaseTunerLayer]:
        """The layers that carry adapters; looked for anew when one is added (peft may wrap further layers for it).

        A walk over all modules takes as long as a small block's forward, and every recomputed block would make one.
        """
        if self._tuned[0] != adapters:
            self._tuned = adapters, [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]
        return self._tuned[1]

    @contextlib.contextmanager
    def answering_as(self, adapter: str | None) -> Iterator[None]:
        """Let LoRA ``adapter`` answer (None: the base weights alone).

        peft's own switches also flip ``requires_grad``, by which gradients of a forward made under another adapter are
        lost without a word; this one changes nothing but who answers.
        """
        known = getattr(self.transformer, "peft_config", {})
        if adapter is not None and adapter not in known:
            carried = ", ".join(known) or "none"
            raise RuntimeError(f"adapter {adapter!r} is asked for, but this transformer carries {carried}")
        if not known:
            yield
            return
        layers = self._lora_layers(tuple(known))
        before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
        previous, self.adapter = self.adapter, adapter
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        try:
            yield
        finally:
            self.adapter = previous
            for layer, (disabled, active) in zip(layers, before, strict=True):
                layer._disable_adapters, layer._active_adapter = disabled, active

    @contextlib.contextmanager
    def _reading(self, text_rows: int) -> Iterator[None]:
        """Tell the folding processors how many text rows there are; 0 outside a forward of this backbone."""
        before, self._text_rows[0] = self._text_rows[0], text_rows
        try:
            yield
        finally:
            self._text_rows[0] = before

    @contextlib.contextmanager
    def _tapping(self, taps: Sequence[int], stop: bool, store: dict[int, Tensor]) -> Iterator[None]:
        if not taps:
            yield
            return
        blocks = self.transformer.blocks
        if max(taps) >= len(blocks) or min(taps) < 0:
            raise ValueError(f"taps {tuple(taps)} do not fit a backbone of {len(blocks)} blocks")

        def keep(index: int):
            return lambda module, args, output: store.__setitem__(index, output)

        hooks = [blocks[k].register_forward_hook(keep(k)) for k in taps]
        if stop:
            # swapping the list keeps FSDP's root hooks intact, which raising from a hook would skip
            self.transformer.blocks = nn.ModuleList(list(blocks)[: max(taps) + 1])
        try:
            yield
        finally:
            self.transformer.blocks = blocks
            for hook in hooks:
                hook.remove()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Sequence[int] = (),
        stop_at_last_tap: bool = False,
        adapter: str | None = None,
    ) -> Prediction:
        """Predict the velocity at x_t.

        Args:
            x_t: ``[B, 16, T, h, w]``.
            t: ``[B]`` in [0, 1].
            condition: of the same batch.
            taps: blocks whose output tokens are wanted.
            stop_at_last_tap: run no block past the last tap (velocity is None then).
            adapter: which LoRA answers; None is the base.
        """
        if self.fold_text_padding and condition.text.shape[1] < TEXT_LENGTH:  # there is padding to fold
            text = FoldedTextProcessor.fold(condition.text)
            rows = text.shape[1]
        else:
            text, rows = pad_text(condition.text, TEXT_LENGTH), 0
        store: dict[int, Tensor] = {}
        packed = condition.pack(x_t)
        pt, ph, pw = self.transformer.config.patch_size
        grid = (x_t.shape[2] // pt, x_t.shape[3] // ph, x_t.shape[4] // pw)
        with self.answering_as(adapter), self._reading(rows), self._tapping(taps, stop_at_last_tap, store):
            (velocity,) = self.transformer(
                hidden_states=packed.to(self.dtype),
                timestep=condition.times(t.float() * TRAIN_TIMESTEPS, grid),
                encoder_hidden_states=text.to(self.dtype),
                encoder_hidden_states_image=None if condition.image is None else condition.image.to(self.dtype),
                return_dict=False,
            )
        velocity = None if taps and stop_at_last_tap else condition.still(velocity.float())
        features = [store[k] if self.sequence is None else self.sequence.gather(store[k]) for k in taps]
        return Prediction(velocity, features, grid)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.patch_embedding.weight.dtype
