"""What the engine asks of an algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from vpae.conditioning import Condition
from vpae.draws import Draws
from vpae.recipe import Optimiser


@dataclass(frozen=True)
class Batch:
    """Encoded clips of one micro-batch.

    Attributes:
        x0: normalised latents ``[B, 16, T, h, w]``.
        condition: their condition.
        null: the same condition with the recipe's ``negative_prompt``, for guidance and dropout.
        draws: the random numbers of these samples.
        noise: where ``x0`` are the teacher's own samples, the noise that it made them from.
        turn: that it is for.
    """

    x0: Tensor
    condition: Condition
    null: Condition
    draws: Draws
    noise: Tensor | None = None
    turn: int = 0


@dataclass
class Player:
    """Whoever takes an optimiser step of its own.

    Attributes:
        name: student, fake_score, head, ...
        parameters: by name; exactly these require grad in its turn.
        optimiser: its settings.
        ema: the role that follows it, with its decay a turn.
        steps: turns it will have taken when the run ends (for schedules).
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimiser: Optimiser
    steps: int
    ema: Ema | None = None


@dataclass(frozen=True)
class Ema:
    """A role whose weights follow a player's: ``ema <- decay ema + (1 - decay) weights``."""

    name: str
    parameters: dict[str, nn.Parameter]
    decay: float


@dataclass
class Outcome:
    """A player's loss on one micro-batch.

    Attributes:
        loss: scalar, mean over the batch.
        scalars: detached values to log, each a mean over the batch.
        student_x0: the student's sample, detached, for the watch; None where the turn makes none.
    """

    loss: Tensor
    scalars: dict[str, Tensor] = field(default_factory=dict)
    student_x0: Tensor | None = None


class Method(Protocol):
    """An algorithm: players who take turns, and what each turn minimises.

    Turns are numbered from 0; ``player_of`` alone decides who moves, so that a run can stop between any two turns.
    """

    name: str
    players: dict[str, Player]
    turns: int

    def player_of(self, turn: int) -> str:
        """Whose turn it is."""

    def loss(self, player: str, batch: Batch) -> Outcome:
        """The player's loss; the graph reaches its parameters and no other player's."""
