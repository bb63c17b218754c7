"""Find the balls of a Bounce picture from its pixels alone, with no learned model.

The world is known: a pixel is the empty box at that place, mixed with at most a few palette colours. So a
pixel is un-mixed by linear algebra, and a ball's centre and area follow from the coverages with sub-pixel
precision. Nothing here knows what the picture should show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from vpae.data.bounce import COLOURS, World, empty_frame

SOLID = 0.5  # coverage from which a pixel belongs to a ball: the contour at one half is the true edge, blurred or not
OFF_PALETTE = 60.0  # levels (L2) a pixel may lie off its mixing line: half the distance of the nearest palette pair
SPECK = 0.25  # a component of fewer pixels than this share of the smallest ball's area is a speck, not a ball
EDGE_REACH = 2  # px around the solid pixels where the rest of a soft edge is looked for
RIDGE = 1e-3  # keeps un-mixing of nearly collinear colours finite; biases a coverage by 0.1 %

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)
_IN_FRAME = np.zeros((3, 3, 3), bool)  # 4-neighbours inside a frame, never across frames
_IN_FRAME[1] = ndimage.generate_binary_structure(2, 1)
_GROW = np.hypot(*np.mgrid[-EDGE_REACH : EDGE_REACH + 1, -EDGE_REACH : EDGE_REACH + 1]) < EDGE_REACH + 0.5


@dataclass(frozen=True)
class Blob:
    """One detected ball.

    Attributes:
        colour: name in :data:`vpae.data.bounce.COLOURS`.
        position: centre (x, y), px, in the simulator's coordinates (a pixel's middle is at .5).
        radius: px, of the disc whose area is ``mass``.
        mass: sum of the coverages, px^2.
    """

    colour: str
    position: tuple[float, float]
    radius: float
    mass: float


@dataclass(frozen=True)
class _Component:
    """A connected patch of solid pixels: its colour, its window and, in the window, its pixels and its reach."""

    colour: int
    window: tuple[slice, slice]
    solid: np.ndarray
    reach: np.ndarray


@lru_cache(maxsize=8)
def _canvas(size: int, wall: float) -> np.ndarray:
    return empty_frame(World(size=size, wall=wall)).astype(np.float32)


def _label_pixels(excess: np.ndarray, canvas: np.ndarray) -> np.ndarray:
    """Name of the colour each pixel is mostly made of: ``[F, H, W, 3]`` to uint8 ``[F, H, W]``, 0 for none."""
    labels = np.zeros(excess.shape[:3], np.uint8)
    # a wall pixel half covered by the nearest colour still differs from the wall by 60 levels or more
    frame, row, column = np.nonzero(np.einsum("fhwc,fhwc->fhw", excess, excess) > 40.0**2)
    if not frame.size:
        return labels
    pixels = excess[frame, row, column]
    towards = _PALETTE[None] - canvas[row, column][:, None]  # [P, K, 3]
    cover = np.einsum("pc,pkc->pk", pixels, towards) / np.einsum("pkc,pkc->pk", towards, towards)
    off = pixels[:, None] - np.minimum(cover, 1.0)[..., None] * towards
    off = np.einsum("pkc,pkc->pk", off, off)
    best = off.argmin(1)
    each = np.arange(len(best))
    keep = (cover[each, best] > SOLID) & (off[each, best] < OFF_PALETTE**2)
    labels[frame[keep], row[keep], column[keep]] = best[keep] + 1
    return labels


def _components(labels: np.ndarray, smallest: float) -> list[list[_Component]]:
    """Connected patches of at least ``smallest`` pixels, frame by frame."""
    found: list[list[_Component]] = [[] for _ in labels]
    _, height, width = labels.shape
    for colour in np.flatnonzero(np.bincount(labels.ravel(), minlength=len(_NAMES) + 1)[1:] >= smallest):
        patches, _ = ndimage.label(labels == colour + 1, _IN_FRAME)
        areas = np.bincount(patches.ravel())
        for number, box in enumerate(ndimage.find_objects(patches), start=1):
            if areas[number] < smallest:
                continue
            rows = slice(max(box[1].start - EDGE_REACH, 0), min(box[1].stop + EDGE_REACH, height))
            columns = slice(max(box[2].start - EDGE_REACH, 0), min(box[2].stop + EDGE_REACH, width))
            solid = patches[box[0].start, rows, columns] == number
            reach = ndimage.binary_dilation(solid, _GROW)
            found[box[0].start].append(_Component(int(colour), (rows, columns), solid, reach))
    return found


def _unmix(excess: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Least-squares coverages of the first of ``n`` colours: ``[P, 3]`` and ``[P, n, 3]`` to ``[P]``."""
    gram = np.einsum("pnc,pmc->pnm", towards, towards)
    trace = np.einsum("pnn->pn", gram).mean(1)
    gram = gram + RIDGE * trace[:, None, None] * np.eye(gram.shape[1], dtype=gram.dtype)
    return np.linalg.solve(gram, np.einsum("pnc,pc->pn", towards, excess)[..., None])[:, 0, 0]


def _measure(excess: np.ndarray, canvas: np.ndarray, part: _Component, all_parts: list[_Component]) -> Blob | None:
    """Coverage-weighted area and centroid of one component of a frame."""
    here, base = excess[part.window], canvas[part.window]
    towards = _PALETTE[part.colour] - base
    cover = np.einsum("hwc,hwc->hw", here, towards) / np.einsum("hwc,hwc->hw", towards, towards)
    share = part.reach.astype(np.float32)
    rivals: dict[int, np.ndarray] = {}
    for other in all_parts:
        if other is part:
            continue
        near = part.reach & _paste(other.reach, other.window, part.window)
        if not near.any():
            continue
        if other.colour == part.colour:  # the soft pixels between two patches of one colour belong half to each
            share[near] *= 0.5
            share[_paste(other.solid, other.window, part.window)] = 0.0
            share[part.solid] = 1.0
        else:
            rivals[other.colour] = rivals.get(other.colour, False) | near
    if rivals:
        contested = np.any(list(rivals.values()), axis=0)
        mixed = np.stack([_PALETTE[k] - base[contested] for k in (part.colour, *rivals)], axis=1)
        cover[contested] = _unmix(here[contested], mixed)
    weight = cover * share
    mass = float(weight.sum())
    if mass <= 0:
        return None
    rows, columns = part.window
    x = float((weight.sum(0) * (np.arange(columns.start, columns.stop) + 0.5)).sum()) / mass
    y = float((weight.sum(1) * (np.arange(rows.start, rows.stop) + 0.5)).sum()) / mass
    return Blob(_NAMES[part.colour], (x, y), float(np.sqrt(mass / np.pi)), mass)


def _paste(mask: np.ndarray, source: tuple[slice, slice], target: tuple[slice, slice]) -> np.ndarray:
    """The part of a window's mask that falls into another window, in the other's coordinates."""
    out = np.zeros([s.stop - s.start for s in target], bool)
    common = [slice(max(s.start, t.start), min(s.stop, t.stop)) for s, t in zip(source, target, strict=True)]
    if all(c.start < c.stop for c in common):
        into = tuple(slice(c.start - t.start, c.stop - t.start) for c, t in zip(common, target, strict=True))
        outof = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(common, source, strict=True))
        out[into] = mask[outof]
    return out


def detect_balls(frames: np.ndarray, world: World) -> list[list[Blob]]:
    """Detect the balls of every frame.

    A pixel is solid if at least half of it is one palette colour (:data:`SOLID`, :data:`OFF_PALETTE`); solid
    pixels of one colour that touch side by side are one component; components of fewer pixels than a quarter
    of the smallest ball's area are specks and are dropped (:data:`SPECK`). Around each component the coverages
    of the soft edge are un-mixed, against every colour of the components that reach the same pixel, and give
    area and centroid. Two patches of one colour are two blobs, unless they touch.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        world: gives the walls, the palette's scale and the smallest radius.

    Returns:
        for each frame its blobs, heaviest first; an empty list where there is no ball.

    Raises:
        ValueError: the frames are not uint8 pictures of the world's size.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (world.size, world.size, 3):
        raise ValueError(
            f"frames must be uint8 [F, {world.size}, {world.size}, 3], not {frames.dtype} {list(frames.shape)}"
        )
    canvas = _canvas(world.size, world.wall)
    excess = frames.astype(np.float32) - canvas
    smallest = SPECK * np.pi * (world.radius[0] * world.scale) ** 2
    found = []
    for picture, parts in zip(excess, _components(_label_pixels(excess, canvas), smallest), strict=True):
        blobs = [_measure(picture, canvas, part, parts) for part in parts]
        found.append(sorted((b for b in blobs if b is not None), key=lambda b: -b.mass))
    return found
