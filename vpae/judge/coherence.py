"""Temporal coherence (TC): does one thing follow from the other, by the captioned law?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from vpae.data.bounce import Clip, initial_velocity, read_caption
from vpae.judge.detect import Blob
from vpae.judge.scales import owed, ramp
from vpae.judge.tracks import Flight, Track, claim_tracks, contacts, count_agreement, flights, simulated_flights

COUNT_BUDGET = 0.5  # share of its balls that a clip may lose or gain over its frames before nothing is left
STEP_BUDGET = 4.0  # impossible steps of a ball that leave nothing: one teleport costs its ball a quarter
STEP_FULL = 1.0  # px at size 64 by which a step may exceed the largest possible: position error of a good model
STEP_ZERO = 3.0  # px at size 64: more than the fastest ball's whole step beyond what is possible
OVERLAP_FULL = 1.5  # px at size 64 that two balls, or ball and wall, may overlap: soft edges of a good model
OVERLAP_ZERO = 4.0  # px at size 64: most of a ball's radius
KINK_FULL = 0.6  # px/frame^2 at size 64 off the law in one step: jitter of a quarter of a pixel
KINK_ZERO = 2.0  # px/frame^2 at size 64: a slow ball reverses in mid-air
LAW_FULL = 0.35  # of gravity, error of a whole flight's acceleration: a quarter-pixel jitter over six frames
LAW_ZERO = 1.25  # of gravity: beyond the other law
ENERGY_FULL = np.log(1.12)  # log ratio of speeds: 1 px short of an 8 px path
ENERGY_ZERO = np.log(2.0)  # log ratio of speeds: half or twice the captioned speed, the next speed word


class _Motion:
    """The claimed tracks of a clip with what the caption allows them: shared by the sub-scores.

    Attributes:
        positions: ``[F, N, 2]``, NaN where missing; radii ``[N]``; mass ``[N]``, the balls' areas up to pi.
        speed2: captioned squared speed ``[N]``; pull: captioned downward acceleration.
        meeting: bool ``[F-1, N]``, contact with another ball; touching: with anything.
    """

    def __init__(self, tracks: Sequence[Track | None], clip: Clip) -> None:
        motions, pulled = read_caption(clip.caption)
        kept = [i for i, t in enumerate(tracks) if t is not None]
        self.world = clip.world
        self.pull = clip.world.gravity * clip.world.scale * pulled
        self.positions = np.stack([tracks[i].positions for i in kept], axis=1)
        self.radii = np.array([tracks[i].radius for i in kept])
        self.mass = clip.radii[0, kept] ** 2
        self.speed2 = np.array([np.sum(initial_velocity(clip.world, motions[i]) ** 2) for i in kept])
        walls, meetings = contacts(clip.world, self.positions, self.radii)
        self.meeting = meetings.any(-1)
        self.touching = walls | self.meeting
        first = np.isfinite(self.positions).all(-1).argmax(0)
        self.start = self.positions[first, np.arange(len(kept)), 1]

    def flights(self) -> list[Flight]:
        pairs = zip(self.positions.swapaxes(0, 1), self.touching.T, strict=True)
        return [f for places, touching in pairs for f in flights(places, touching)]

    def allowed2(self) -> np.ndarray:
        """Squared speed ``[F-1, N]`` of each ball alone, from the captioned one and the height it has fallen."""
        height = (self.positions[:-1, :, 1] + self.positions[1:, :, 1]) / 2
        return self.speed2 + 2 * self.pull * (height - self.start)


def _steps(motion: _Motion) -> float:
    """1 less the impossible steps: teleports, and balls inside each other or inside the wall."""
    scale = motion.world.scale
    # before its first meeting a ball has its own energy, afterwards at most everybody's
    unseen = motion.speed2 + 2 * motion.pull * np.maximum(motion.world.size - motion.start, 0)  # it may have been low
    own = np.maximum(motion.allowed2(), 0)
    own = np.where(np.isnan(own), unseen, own)
    pooled = (own * motion.mass).sum(1, keepdims=True) / motion.mass
    limit = np.sqrt(np.where(np.maximum.accumulate(motion.meeting, axis=0), pooled, own))
    bad = np.zeros(motion.positions.shape[:2])
    for i in range(len(motion.mass)):
        seen = np.flatnonzero(np.isfinite(motion.positions[:, i, 0]))
        gap = np.diff(seen)
        step = np.linalg.norm(np.diff(motion.positions[seen, i], axis=0), axis=-1)
        reach = np.array([limit[a:b, i].max() for a, b in pairwise(seen)])
        bad[seen[1:], i] += 1 - ramp(step - reach * gap, STEP_FULL * scale, STEP_ZERO * scale)
    bad += 1 - ramp(_overlap(motion), OVERLAP_FULL * scale, OVERLAP_ZERO * scale)
    return float(np.maximum(1 - np.minimum(bad, 1).sum(0) / STEP_BUDGET, 0).mean())


def _overlap(motion: _Motion) -> np.ndarray:
    """Depth ``[F, N]``, px, to which each ball is inside another ball or the wall; 0 where missing."""
    edge = motion.world.wall * motion.world.scale
    reach = motion.radii[:, None]
    inside = np.minimum(motion.positions - reach - edge, motion.world.size - edge - motion.positions - reach).min(-1)
    apart = np.linalg.norm(motion.positions[:, :, None] - motion.positions[:, None], axis=-1) - (reach + reach.T)
    apart[:, np.arange(len(reach)), np.arange(len(reach))] = np.inf
    return np.nan_to_num(np.maximum(-np.fmin(inside, np.nanmin(apart, axis=-1, initial=np.inf)), 0))


def _law(motion: _Motion, runs: Sequence[Flight], promised: bool) -> float:
    """Each flight's fitted acceleration against the captioned one, weighted by how well it is known."""
    unit = abs(motion.world.gravity) * motion.world.scale
    if not unit:  # a world in which both laws are the same
        return float("nan")
    found = [f for f in runs if f.information]
    missing = owed(found, promised)
    if missing is not None:
        return missing
    errors = [np.linalg.norm(f.acceleration - [0.0, motion.pull]) / unit for f in found]
    # lengths, not information: a short flight that bends is as wrong as a long one
    lengths = [f.frames.stop - f.frames.start for f in found]
    return float(np.average(ramp(np.array(errors), LAW_FULL, LAW_ZERO), weights=lengths))


def _smoothness(motion: _Motion, promised: bool) -> float:
    """Single steps of contact-free motion against the law: a reversal in mid-air is seen here."""
    free = ~motion.touching[:-1] & ~motion.touching[1:]
    kinks = np.linalg.norm(np.diff(motion.positions, n=2, axis=0) - [0.0, motion.pull], axis=-1)
    found = list(kinks[free & np.isfinite(kinks)])
    missing = owed(found, promised)
    if missing is not None:
        return missing
    scale = motion.world.scale
    return float(ramp(np.array(found), KINK_FULL * scale, KINK_ZERO * scale).mean())


def _energy(motion: _Motion, promised: bool) -> float:
    """Measured speeds against the ones that conserve the captioned energy.

    Walls and balls are elastic, so a ball keeps its energy until it meets another, and all balls together keep
    theirs for ever. The clip is cut at its meetings; in each phase the mass-weighted mean squared step over
    contact-free intervals is compared with the captioned squared speed plus what the height gives.
    """
    step2 = np.sum(np.diff(motion.positions, axis=0) ** 2, axis=-1)
    allowed2 = motion.allowed2()
    usable = np.isfinite(step2) & ~motion.touching
    phase = np.cumsum(motion.meeting.any(1))
    scores, lengths = [], []
    for number in np.unique(phase):
        inside = usable & (phase == number)[:, None]
        if not inside.any(0).all():
            continue
        count = inside.sum(0)
        moved = motion.mass @ (np.where(inside, step2, 0).sum(0) / count)
        expected = motion.mass @ (np.where(inside, allowed2, 0).sum(0) / count)
        ratio = 0.5 * np.log(max(moved, 1e-9) / max(expected, 1e-9))
        scores.append(float(ramp(abs(ratio), ENERGY_FULL, ENERGY_ZERO)))
        lengths.append(int(count.sum()))
    missing = owed(scores, promised)
    return float(np.average(scores, weights=lengths)) if missing is None else missing


def temporal_coherence(
    blobs: Sequence[Sequence[Blob]], tracks: Sequence[Track], clip: Clip
) -> tuple[float, dict[str, float]]:
    """Score that nothing vanishes, appears or jumps and that the motion obeys the captioned law.

    Contacts, where velocities may change, are those of the generated clip's own trajectories.

    - ``permanence``: the balls of every frame against those of the clip's own frame 0.
    - ``steps``: no step beyond what the captioned energy allows (a teleport), no ball inside another or the wall.
    - ``energy``: the measured speeds against the ones the captioned energy gives at that height.
    - ``law``: the acceleration of each contact-free flight: none, or gravity's, as captioned.
    - ``smoothness``: the same step by step, coarsely: no reversal but at a contact.

    TC is permanence x steps x energy x mean(law, smoothness): each is necessary. The caption says that the balls
    move, and elastic balls never come to rest together, so in a frozen clip every interval from frame 0 on
    violates the captioned law: ``energy`` is 0 and TC with it, although nothing vanishes, jumps or bends.

    Args:
        blobs: the detected balls of each frame.
        tracks: all tracks linked from them.
        clip: the simulator's clip with the caption.

    Returns:
        TC in 0..100, and the sub-scores in 0..1 (NaN where neither clip shows a free flight to judge).
    """
    claimed = claim_tracks(tracks, clip)
    names = ("permanence", "steps", "energy", "law", "smoothness")
    if not blobs[0] or all(t is None for t in claimed):
        return 0.0, dict.fromkeys(names, 0.0)
    motion = _Motion(claimed, clip)
    promised = [f for ball in simulated_flights(clip) for f in ball]
    runs = motion.flights()
    lost = 1 - count_agreement(blobs, [b.colour for b in blobs[0]])
    parts = {
        "permanence": max(1 - lost / COUNT_BUDGET, 0.0),
        "steps": _steps(motion),
        "energy": _energy(motion, bool(promised)),
        "law": _law(motion, runs, any(f.information for f in promised)),
        "smoothness": _smoothness(motion, any(f.frames.stop - f.frames.start > 2 for f in promised)),
    }
    known = {name: 1.0 if np.isnan(value) else value for name, value in parts.items()}
    obedience = (known["law"] + known["smoothness"]) / 2
    return 100 * known["permanence"] * known["steps"] * known["energy"] * obedience, parts
