"""Sections that several kinds of recipe have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Lora:
    """A peft LoRA: rank, alpha, and the linear layers it is put on (suffixes of diffusers' module names)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Optimiser:
    """AdamW of one player; ``schedule`` is constant or cosine (to a tenth), after a linear warm-up."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    clip_norm: float | None


@dataclass(frozen=True)
class Head:
    """The discriminator's head; sizes are ours, the paper gives none."""

    kind: Literal["convolutional", "cross_attention", "semantic"]
    width: int
    num_heads: int
    queries: int
