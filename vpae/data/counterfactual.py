"""Pairs of one plausible and one impossible version of a Bounce clip.

The two are the same, pixel for pixel, before one frame, at which one law is broken once; from there on the impossible
version follows the laws again, and differs visibly in every frame. Which law, when and for which ball is drawn from
``(split, index, kind)`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vpae.data.bounce import COLOURS, SPLITS, Clip, World, make_clip, render, simulate
from vpae.errors import UserError

VISIBLE = 24  # levels of 255 by which a pixel has to differ to be seen
STRIDE = 1_000_000  # from one candidate clip of an index to its next: no two indices below it share a clip
_TRIES = 600
_REVISION = 1


@dataclass(frozen=True)
class States:
    """What is drawn in each frame; a ball that is not there has radius 0.

    Attributes:
        positions: float64 ``[F, N, 2]``, px.
        velocities: float64 ``[F, N, 2]``, px/frame.
        radii: float64 ``[F, N]``, px.
        colours: the names, object ``[F, N]``.
    """

    positions: np.ndarray
    velocities: np.ndarray
    radii: np.ndarray
    colours: np.ndarray


@dataclass(frozen=True)
class Impossible(States):
    """The impossible version: its frames uint8 ``[F, H, W, 3]``, the plausible version's caption, and its states."""

    frames: np.ndarray
    caption: str


@dataclass(frozen=True)
class Pair:
    """Two versions of a clip.

    Attributes:
        kind: which law is broken, one of ``KINDS``.
        frame: the first frame that differs.
        ball: the index of the ball that breaks it; None where all do.
    """

    plausible: Clip
    impossible: Impossible
    kind: str
    frame: int
    ball: int | None

    @property
    def name(self) -> str:
        return f"{self.plausible.name}-{self.kind}"


@dataclass(frozen=True)
class _Event:
    states: States
    frame: int
    ball: int | None


def make_pair(world: World, split: str, index: int, kind: str | None = None) -> Pair:
    """Make pair ``index`` of ``split``; without a ``kind`` the kinds follow one another.

    Kinds:
        vanish: the ball is gone, the others move on without it.
        teleport: the ball jumps by a quarter of the box or more, keeping its velocity.
        colour_change: the ball takes a colour that no ball has.
        size_change: the radius grows by half or shrinks to six tenths about the same centre.
        gravity_flip: gravity pulls up instead of down, on every ball (the first frame shows a shift of one g).
        pass_through: where the ball would bounce off another, each runs on as if the other were not there,
            overlapping by half the sum of their radii or more, with the closest approach inside the clip; the box
            still holds both.

    Not every clip has room, gravity or a contact for a kind, or keeps the two versions visibly apart to its end. So
    clip ``index`` is tried first, then ``index + STRIDE``, ``index + 2 STRIDE`` and so on, until one fits.

    Raises:
        UserError: no clip of this world fits (one ball and ``pass_through``, no gravity and ``gravity_flip``).
        ValueError: an unknown kind or split, or a negative index.
    """
    kind = KINDS[index % len(KINDS)] if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of a pair; known: {', '.join(KINDS)}")
    for attempt in range(_TRIES):
        clip = make_clip(world, split, index + attempt * STRIDE)
        key = [
            _REVISION,
            SPLITS.index(split),
            clip.index,
            1 + KINDS.index(kind),
        ]  # a last 0 would be the clip's own key
        event = _BREAKS[kind](clip, np.random.Generator(np.random.PCG64(key)))
        if event is None:
            continue
        frames = np.concatenate([clip.frames[: event.frame], _draw(clip, event)])
        contrast = np.abs(frames.astype(int) - clip.frames).max(axis=(1, 2, 3))
        if contrast[event.frame :].min() >= VISIBLE:
            return Pair(
                clip,
                Impossible(**vars(event.states), frames=frames, caption=clip.caption),
                kind,
                event.frame,
                event.ball,
            )
    raise UserError(
        f"pair {index} of {split}: no clip of this world allows {kind} in {_TRIES} tries; use another kind or world"
    )


def _draw(clip: Clip, event: _Event) -> np.ndarray:
    states, frame = event.states, event.frame
    colours = tuple(str(c) for c in states.colours[frame])  # constant from the event on
    return render(clip.world, colours, states.positions[frame:], states.radii[frame:])


def _states(clip: Clip) -> States:
    colours = np.tile(np.array(clip.colours, dtype=object), (len(clip.positions), 1))
    return States(clip.positions.copy(), clip.velocities.copy(), clip.radii.copy(), colours)


def _draw_frame(clip: Clip, rng: np.random.Generator) -> int:
    """A frame of the middle half, so that both what was and what becomes of it are seen."""
    first, last = _window(clip)
    return int(rng.integers(first, last + 1))


def _window(clip: Clip) -> tuple[int, int]:
    total = len(clip.positions)
    return max(1, total // 4), max(1, total - 1 - total // 4)


def _run_on(clip: Clip, states: States, frame: int, members: list[int], *, world: World | None = None) -> None:
    """Overwrite the states after ``frame`` of the balls ``members`` by the laws, with no other ball in the box."""
    if not members:
        return
    balls = tuple(
        replace(clip.balls[m], position=tuple(states.positions[frame, m]), radius=float(states.radii[frame, m]))
        for m in members
    )
    positions, velocities = simulate(
        world or clip.world,
        balls,
        clip.gravity,
        velocities=states.velocities[frame, members],
        num_frames=len(states.positions) - frame,
    )
    states.positions[frame + 1 :, members] = positions[1:]
    states.velocities[frame + 1 :, members] = velocities[1:]


def _has_room(clip: Clip, states: States, frame: int, ball: int) -> bool:
    """Whether the ball touches neither wall nor ball at ``frame``."""
    wall = clip.world.wall * clip.world.scale
    (x, y), radius = states.positions[frame, ball], states.radii[frame, ball]
    if min(x, y) - radius < wall or max(x, y) + radius > clip.world.size - wall:
        return False
    distance = np.linalg.norm(states.positions[frame] - (x, y), axis=-1) - states.radii[frame] - radius
    return bool(np.all(np.delete(distance, ball) > 0))


def _vanish(clip: Clip, rng: np.random.Generator) -> _Event:
    frame, ball, states = _draw_frame(clip, rng), int(rng.integers(len(clip.balls))), _states(clip)
    states.radii[frame:, ball] = 0
    states.velocities[frame:, ball] = 0
    states.positions[frame:, ball] = states.positions[frame, ball]
    _run_on(clip, states, frame, [b for b in range(len(clip.balls)) if b != ball])
    return _Event(states, frame, ball)


def _teleport(clip: Clip, rng: np.random.Generator) -> _Event | None:
    frame, ball, states = _draw_frame(clip, rng), int(rng.integers(len(clip.balls))), _states(clip)
    origin = states.positions[frame, ball].copy()
    for _ in range(100):
        states.positions[frame, ball] = rng.uniform(0, clip.world.size, 2)
        if np.linalg.norm(states.positions[frame, ball] - origin) < clip.world.size / 4:
            continue
        if _has_room(clip, states, frame, ball):
            _run_on(clip, states, frame, list(range(len(clip.balls))))
            return _Event(states, frame, ball)
    return None


def _colour_change(clip: Clip, rng: np.random.Generator) -> _Event | None:
    frame, ball, states = _draw_frame(clip, rng), int(rng.integers(len(clip.balls))), _states(clip)
    free = [c for c in COLOURS if c not in clip.colours]
    if not free:
        return None
    states.colours[frame:, ball] = rng.choice(free)
    return _Event(states, frame, ball)


def _size_change(clip: Clip, rng: np.random.Generator) -> _Event | None:
    frame, ball, states = _draw_frame(clip, rng), int(rng.integers(len(clip.balls))), _states(clip)
    states.radii[frame:, ball] *= rng.choice([0.6, 1.5])
    if not _has_room(clip, states, frame, ball):
        return None
    _run_on(clip, states, frame, list(range(len(clip.balls))))
    return _Event(states, frame, ball)


def _gravity_flip(clip: Clip, rng: np.random.Generator) -> _Event | None:
    if not clip.gravity or clip.world.gravity == 0:
        return None
    frame, states = _draw_frame(clip, rng), _states(clip)
    upward = replace(clip.world, gravity=-clip.world.gravity)
    _run_on(clip, states, frame - 1, list(range(len(clip.balls))), world=upward)
    return _Event(states, frame, None)


def _pass_through(clip: Clip, rng: np.random.Generator) -> _Event | None:
    """The first contact of a ball shows as the first frame at which its path alone in the box is another one."""
    if len(clip.balls) < 2:
        return None
    first, last = _window(clip)
    for ball in rng.permutation(len(clip.balls)):
        alone = _states(clip)
        _run_on(clip, alone, 0, [int(ball)])
        parted = np.linalg.norm(alone.positions[:, ball] - clip.positions[:, ball], axis=-1) > 1e-3 * clip.world.scale
        frame = int(np.argmax(parted))
        if not parted.any() or not first <= frame <= last:
            continue
        states = _states(clip)
        _run_on(clip, states, frame - 1, [int(ball)])
        _run_on(clip, states, frame - 1, [b for b in range(len(clip.balls)) if b != ball])
        distance = np.linalg.norm(states.positions - states.positions[:, [ball]], axis=-1)
        depth = 1 - distance / (states.radii + states.radii[:, [ball]])
        depth[:, ball] = 0
        if depth.max() >= 0.5 and depth.max() > depth[-1].max():
            return _Event(states, frame, int(ball))
    return None


_BREAKS: dict[str, Callable[[Clip, np.random.Generator], _Event | None]] = {
    "vanish": _vanish,
    "teleport": _teleport,
    "colour_change": _colour_change,
    "size_change": _size_change,
    "gravity_flip": _gravity_flip,
    "pass_through": _pass_through,
}
KINDS = tuple(_BREAKS)
