"""Bounce: coloured balls in a box, the world whose physics is known exactly.

A clip is a pure function of ``(World, split, index)``: nothing is stored and nothing depends on the
order in which clips are asked for. Coordinates are pixels with y pointing down, time is counted in
frames, so velocities are px/frame and accelerations px/frame^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property

import numpy as np
import pymunk

SPLITS = ("train", "validation", "test")
_WORLD_REVISION = 1  # part of every seed: a change of the drawing or sampling code must change the clips' names

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (232, 56, 56),
    "green": (62, 204, 84),
    "blue": (64, 112, 255),
    "yellow": (250, 212, 54),
    "purple": (206, 76, 224),
    "cyan": (60, 214, 232),
}
BACKGROUND = (22, 24, 30)
WALL = (112, 118, 130)

_ROOM = 16.0  # px at size 64: balls of a larger radius than this less the wall leave a crowd no place to start
_TRIES = 10_000  # draws of all places at once; the standard world needs about 2


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_number, value))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 16


_CONSTANTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "size": (_whole, "a whole number of px"),
    "num_frames": (_whole, "a whole number"),
    "ball_counts": (_numbers, "a list of probabilities"),
    "radius": (lambda v: _numbers(v) and len(v) == 2, "[smallest, largest] in px"),
    "speeds": (
        lambda v: isinstance(v, dict) and all(isinstance(k, str) and _number(s) for k, s in v.items()),
        "a mapping of words to px/frame",
    ),
    # a world of counterfactual clips may pull up, one that is captioned "Gravity pulls down." may not
    "gravity": (lambda v: _number(v) and v >= 0, "a number of px/frame^2 downwards, from 0"),
    "wall": (_number, "a number of px"),
    "unsaid": (lambda v: _number(v) and 0 <= v <= 1, "a probability"),
}

_DIAGONAL = 2**-0.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "down-right": (_DIAGONAL, _DIAGONAL),
    "down": (0.0, 1.0),
    "down-left": (-_DIAGONAL, _DIAGONAL),
    "left": (-1.0, 0.0),
    "up-left": (-_DIAGONAL, -_DIAGONAL),
    "up": (0.0, -1.0),
    "up-right": (_DIAGONAL, -_DIAGONAL),
}


@dataclass(frozen=True)
class World:
    """The constants of the world; lengths are given for a 64-pixel box and scale with ``size``.

    Attributes:
        size: edge of the square picture in pixels.
        num_frames: frames of a clip (4k + 1 for the Wan VAE).
        ball_counts: probability of 1, 2, 3, ... balls in a clip.
        radius: smallest and largest ball radius, px at size 64.
        speeds: px/frame at size 64 of each speed word.
        gravity: downward acceleration where the caption says so, px/frame^2 at size 64.
        wall: thickness of the drawn wall, px at size 64.
        unsaid: probability that a caption keeps a ball's direction and speed to itself. Frame 0 and caption then leave
            several futures open, of which a model has to choose one and must not show the mean.
    """

    size: int = 64
    num_frames: int = 17
    ball_counts: tuple[float, ...] = (0.45, 0.40, 0.15)
    radius: tuple[float, float] = (5.0, 8.0)
    speeds: dict[str, float] = field(default_factory=lambda: {"slowly": 1.0, "steadily": 2.0, "fast": 3.0})
    gravity: float = 0.25
    wall: float = 2.0
    unsaid: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 16 or self.num_frames < 2:
            raise ValueError(
                f"a Bounce world needs size >= 16 and num_frames >= 2, not {self.size} and {self.num_frames}"
            )
        counts = self.ball_counts
        if not 1 <= len(counts) <= len(COLOURS) or min(counts) < 0 or abs(sum(counts) - 1) > 1e-8:
            raise ValueError(
                f"ball_counts holds the probabilities of 1..{len(COLOURS)} balls and sums to 1, not {counts}"
            )
        if not 0 < self.radius[0] <= self.radius[1] <= _ROOM - self.wall:
            raise ValueError(f"radius is [smallest, largest], above 0 and at most {_ROOM:g} - wall, not {self.radius}")
        if not self.speeds or any(not word.isidentifier() or speed < 0 for word, speed in self.speeds.items()):
            raise ValueError(f"speeds gives each speed's word (one word each) px/frame from 0, not {self.speeds}")
        if self.wall < 0:
            raise ValueError(f"wall is at least 0, not {self.wall}")

    @property
    def scale(self) -> float:
        """Pixels of this world for one pixel at size 64."""
        return self.size / 64

    def fingerprint(self) -> dict:
        """All that determines the clips of a split, in the plain values that survive JSON."""
        constants = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if not self.unsaid:  # as it was before worlds could be silent: their caches and names stay good
            del constants["unsaid"]
        return {"revision": _WORLD_REVISION, **constants}

    @classmethod
    def from_dict(cls, values: dict) -> World:
        """Build a world from plain YAML values.

        Raises:
            ValueError: a key is not a constant of the world, or its value is of another type or out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown key {unknown[0]!r} of a Bounce world; known: {', '.join(sorted(known))}")
        for key, value in values.items():
            good, wanted = _CONSTANTS[key]
            if not good(value):
                raise ValueError(f"{key} is {value!r}; it has to be {wanted}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class Ball:
    """One ball at frame 0: what the caption and the first frame say of it."""

    colour: str
    direction: str
    speed: str
    radius: float
    position: tuple[float, float]


@dataclass(frozen=True)
class Clip:
    """A simulated clip.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``.
        positions: float64 ``[F, N, 2]``, centres (x, y) in px.
        velocities: float64 ``[F, N, 2]``, px/frame.
        radii: float64 ``[F, N]``, px.
        unsaid: colours of the balls whose motion the caption does not tell.
        caption: the text that with frame 0 determines the rest, but for them.
    """

    world: World
    split: str
    index: int
    balls: tuple[Ball, ...]
    gravity: bool
    positions: np.ndarray
    velocities: np.ndarray
    radii: np.ndarray
    unsaid: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:06d}"

    @property
    def colours(self) -> tuple[str, ...]:
        return tuple(ball.colour for ball in self.balls)

    @cached_property
    def caption(self) -> str:
        return write_caption(self.balls, self.gravity, self.unsaid)

    @cached_property
    def frames(self) -> np.ndarray:
        return render(self.world, self.colours, self.positions, self.radii)


def write_caption(balls: tuple[Ball, ...], gravity: bool, unsaid: frozenset[str] = frozenset()) -> str:
    """Say in words what frame 0 cannot show: each ball's direction and speed (but of the ``unsaid``), and the law."""
    moves = [
        f"A {ball.colour} ball moves{'' if ball.colour in unsaid else f' {ball.direction} {ball.speed}'}."
        for ball in balls
    ]
    return " ".join([*moves, "Gravity pulls down." if gravity else "No gravity."])


@dataclass(frozen=True)
class Motion:
    """What a caption says of one ball; direction and speed are None where it only says that it moves."""

    colour: str
    direction: str | None
    speed: str | None


def read_caption(caption: str) -> tuple[tuple[Motion, ...], bool]:
    """Invert :func:`write_caption`: the motions it names and whether there is gravity.

    Raises:
        ValueError: the text is not a Bounce caption.
    """
    sentences = [s.strip() for s in caption.strip().split(".") if s.strip()]
    if not sentences or sentences[-1] not in ("Gravity pulls down", "No gravity"):
        raise ValueError(f"not a Bounce caption (no sentence about gravity at its end): {caption!r}")
    if len(sentences) == 1:
        raise ValueError(f"not a Bounce caption (no ball in it): {caption!r}")
    motions = []
    for sentence in sentences[:-1]:
        words = sentence.split()
        if (
            len(words) not in (4, 6)
            or (words[0], words[2], words[3]) != ("A", "ball", "moves")
            or words[1] not in COLOURS
            or (words[4:] and words[4] not in DIRECTIONS)
        ):
            raise ValueError(f"not a Bounce caption (sentence {sentence!r}): {caption!r}")
        if words[1] in {motion.colour for motion in motions}:
            raise ValueError(f"not a Bounce caption (two balls that are {words[1]}): {caption!r}")
        motions.append(Motion(words[1], *(words[4:] or (None, None))))
    return tuple(motions), sentences[-1] == "Gravity pulls down"


def _generator(split: str, index: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; Bounce has {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"a clip's index starts at 0, got {index}")
    return np.random.Generator(np.random.PCG64([_WORLD_REVISION, SPLITS.index(split), index]))


def _place(world: World, rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    lo, hi = world.wall * world.scale, world.size - world.wall * world.scale
    gap = 2.0 * world.scale
    for _ in range(_TRIES):
        centres = np.stack([rng.uniform(lo + r + 1, hi - r - 1, size=2) for r in radii])
        apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1) - (radii[:, None] + radii[None])
        if np.all(apart[np.triu_indices(len(radii), 1)] > gap):
            return centres
    raise ValueError(
        f"{len(radii)} balls of radius {radii.round(1).tolist()} px find no place in the box; smaller ones do"
    )


def make_clip(world: World, split: str, index: int) -> Clip:
    """Simulate clip ``index`` of ``split``.

    Raises:
        ValueError: unknown split or negative index.
    """
    rng = _generator(split, index)
    count = 1 + int(rng.choice(len(world.ball_counts), p=world.ball_counts))
    colours = rng.permutation(list(COLOURS))[:count]
    radii = rng.uniform(*world.radius, size=count) * world.scale
    centres = _place(world, rng, radii)
    directions = rng.choice(list(DIRECTIONS), size=count)
    speeds = rng.choice(list(world.speeds), size=count)
    gravity = bool(rng.random() < 0.5)
    # drawn last, so that the clips of a world are the same whatever is said of them
    unsaid = frozenset(str(c) for c, draw in zip(colours, rng.random(count), strict=True) if draw < world.unsaid)
    balls = tuple(
        Ball(str(c), str(d), str(s), float(r), (float(p[0]), float(p[1])))
        for c, d, s, r, p in zip(colours, directions, speeds, radii, centres, strict=True)
    )
    positions, velocities = simulate(world, balls, gravity)
    shape = (world.num_frames, count)
    radii = np.broadcast_to(radii, shape).copy()
    return Clip(world, split, index, balls, gravity, positions, velocities, radii, unsaid)


def initial_velocity(world: World, motion: Ball | Motion) -> np.ndarray:
    """Velocity ``[2]`` in px/frame that the words of a caption stand for.

    Raises:
        ValueError: nothing is said, or a speed that this world has no word for.
    """
    if motion.direction is None:
        raise ValueError(f"nothing is said of how the {motion.colour} ball moves")
    if motion.speed not in world.speeds:
        raise ValueError(f"no speed is called {motion.speed!r} in this world; it has {', '.join(world.speeds)}")
    return np.array(DIRECTIONS[motion.direction]) * world.speeds[motion.speed] * world.scale


def simulate(
    world: World,
    balls: tuple[Ball, ...],
    gravity: bool,
    *,
    velocities: np.ndarray | None = None,
    num_frames: int | None = None,
    substeps: int = 60,
) -> tuple[np.ndarray, np.ndarray]:
    """Run the laws of motion: elastic walls and balls, no friction, mass proportional to area.

    Args:
        velocities: px/frame ``[N, 2]`` to start with instead of the ones the words stand for.
        num_frames: frames to simulate, the world's own number unless given.
        substeps: solver steps a frame; contacts resolve to about 1/substeps of a frame's motion.

    Returns:
        positions and velocities, each float64 ``[F, N, 2]``.
    """
    space = pymunk.Space()
    space.gravity = (0.0, world.gravity * world.scale if gravity else 0.0)
    space.iterations = 20
    space.collision_slop = 1e-3
    lo, hi = world.wall * world.scale, world.size - world.wall * world.scale
    thick = 4.0 * world.scale  # walls are thick outwards, so that a fast ball cannot tunnel
    corners = [(lo - thick, lo - thick), (hi + thick, lo - thick), (hi + thick, hi + thick), (lo - thick, hi + thick)]
    for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
        segment = pymunk.Segment(space.static_body, a, b, thick)
        segment.elasticity, segment.friction = 1.0, 0.0
        space.add(segment)
    bodies = []
    for i, ball in enumerate(balls):
        body = pymunk.Body(mass=ball.radius**2, moment=float("inf"))
        body.position = ball.position
        body.velocity = tuple(initial_velocity(world, ball) if velocities is None else velocities[i])
        shape = pymunk.Circle(body, ball.radius)
        shape.elasticity, shape.friction = 1.0, 0.0
        space.add(body, shape)
        bodies.append(body)
    total = world.num_frames if num_frames is None else num_frames
    positions, speeds = np.empty((total, len(balls), 2)), np.empty((total, len(balls), 2))
    for frame in range(total):
        if frame:
            for _ in range(substeps):
                space.step(1.0 / substeps)
        positions[frame] = [tuple(b.position) for b in bodies]
        speeds[frame] = [tuple(b.velocity) for b in bodies]
    return positions, speeds


def empty_frame(world: World) -> np.ndarray:
    """The box without balls, float64 ``[H, W, 3]`` in [0, 255]."""
    edge, left = world.wall * world.scale, np.arange(world.size)
    # how much of each row and column of pixels lies inside, so that the wall is drawn where it is met
    inside = np.clip(np.minimum(left + 1, world.size - edge) - np.maximum(left, edge), 0.0, 1.0)
    cover = (inside[:, None] * inside[None, :])[..., None]
    return cover * np.array(BACKGROUND, float) + (1 - cover) * np.array(WALL, float)


def render_frame(
    world: World,
    colours: tuple[str, ...],
    positions: np.ndarray,
    radii: np.ndarray,
    *,
    canvas: np.ndarray | None = None,
) -> np.ndarray:
    """Draw one frame with exact sub-pixel positions; returns float64 ``[H, W, 3]`` in [0, 255].

    The edge of a ball is the linear ramp of one pixel about its radius, which equals the pixel's area
    coverage up to the curvature of the edge. A radius of 0 draws nothing.
    """
    frame = (empty_frame(world) if canvas is None else canvas).copy()
    grid = np.arange(world.size) + 0.5
    for colour, (x, y), radius in zip(colours, positions, radii, strict=True):
        if radius <= 0:
            continue
        distance = np.hypot(grid[None, :] - x, grid[:, None] - y)
        cover = np.clip(radius - distance + 0.5, 0.0, 1.0)[..., None]
        frame += cover * (np.array(COLOURS[colour], float) - frame)
    return frame


def render(world: World, colours: tuple[str, ...], positions: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Draw a clip: positions ``[F, N, 2]``, radii ``[F, N]`` to uint8 ``[F, H, W, 3]``."""
    canvas = empty_frame(world)
    frames = [render_frame(world, colours, p, r, canvas=canvas) for p, r in zip(positions, radii, strict=True)]
    return np.stack(frames).round().astype(np.uint8)
