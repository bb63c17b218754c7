"""What the networks look like while they train: student, teacher and real clips, in TensorBoard and as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from vpae.data.cache import Cache
from vpae.data.encoders import Encoders
from vpae.data.look import contact_sheet, sheet_scale, side_by_side
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import Processes, autocast, reshard
from vpae.engine.tracking import Tracker
from vpae.engine.watch import motion_energy
from vpae.recipe import Evaluate
from vpae.roles import Role
from vpae.sampling import sample_latents


class Gallery:
    """Samples a few fixed conditions of the cache with fixed noise.

    Every rank takes part in the forward passes (sharded networks need all of them); rank 0 shows.

    Args:
        teacher: sampled once, with the recipe's steps and guidance; None where the run makes the teacher itself.
        student: the role that is sampled each time.
        precision: the engine's, in which the attention kernel of the recipe is known to work.
        steps: of the student's sampler; more than 4 means Euler with ``settings``' guidance.
    """

    def __init__(
        self,
        folder: Path,
        cache: Cache,
        encoders: Encoders,
        settings: Evaluate,
        count: int,
        precision: str,
        processes: Processes,
        *,
        student: Role,
        teacher: Role | None,
        steps: int = 1,
    ) -> None:
        self.folder, self.encoders, self.settings, self.processes = folder, encoders, settings, processes
        self.student, self.teacher, self.steps, self.precision = student, teacher, steps, precision
        count = min(count, len(cache))
        draws = Draws(seed_of(settings.seed, "gallery"), range(count), processes.device)
        self.batch = cache.fetch(list(range(count)), draws)
        self._references: dict[str, Tensor] | None = None
        self._shown: dict[str, list[np.ndarray]] | None = None  # the references decoded, on rank 0

    def _sample(self, role: Role, steps: int, guided: bool) -> Tensor:
        try:
            with autocast(self.processes, self.precision):
                return sample_latents(
                    role,
                    self.batch.condition,
                    self.batch.null,
                    self.batch.draws,
                    steps=steps,
                    shape=self.batch.x0.shape[1:],
                    guidance_scale=self.settings.teacher_guidance if guided else 1.0,
                    scheduler=self.encoders.pipeline.scheduler,
                )
        finally:
            reshard([role.backbone.transformer])

    def __call__(self, turn: int, tracker: Tracker) -> dict[str, float]:
        """Sample, show, and return what the watch may look at (the same on every rank)."""
        if self._references is None:
            self._references = {"real": self.batch.x0}
            if self.teacher is not None:
                self._references["teacher"] = self._sample(self.teacher, self.settings.teacher_steps, True)
        student = self._sample(self.student, self.steps, self.steps > 4)
        reference = self._references.get("teacher", self._references["real"])
        ratio = float(motion_energy(student).mean() / motion_energy(reference).mean())
        # ranks that differ in a bit must not differ in the verdict of the watch
        ratio = self.processes.mean({"ratio": ratio})["ratio"]
        self.processes.together(lambda: self._show(student, turn, tracker, ratio), main_only=True)
        return {"motion_ratio_to_reference": ratio}

    def _show(self, student: Tensor, turn: int, tracker: Tracker, ratio: float) -> None:
        tracker.scalars(turn, {"samples/motion_ratio_to_reference": ratio})
        if self._shown is None:
            self._shown = {name: self.encoders.decode(latents) for name, latents in self._references.items()}
        frames = {"student": self.encoders.decode(student), **self._shown}
        scale = sheet_scale(frames["student"][0].shape[2])
        for i in range(len(student)):
            tracker.video(turn, f"samples/{i}", side_by_side([(name, f[i]) for name, f in frames.items()], scale=scale))
        rows = [(f"{name} {i}", f[i]) for i in range(len(student)) for name, f in frames.items()]
        path = self.folder / "samples" / f"turn-{turn:08d}.png"
        tracker.picture(turn, "samples/strip", contact_sheet(rows, path, scale=scale))
