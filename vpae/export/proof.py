"""The proof of an export: read again in a fresh process, called on fixed noise, compared with the training graph.

Two comparisons are made of every way to read it. *Reading*: what the fresh process answers in fp32 must be what the
training graph answers with the numbers that were stored, to fp32 round-off; a wrong name, a wrong scale or a damaged
tensor is found here. *Fidelity*, where storing lost something: the answers in the dtype that the file will be used
in must keep to the student's within what that dtype is allowed, and must move as much.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vpae
from vpae import recipe as recipes
from vpae.backbone import Backbone
from vpae.data.bounce import make_clip
from vpae.data.encoders import Encoders
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import reshard
from vpae.engine.watch import motion_energy
from vpae.errors import UserError
from vpae.export.folder import transformer_of
from vpae.export.precision import MOTION, PRECISIONS, ROUND_OFF, Precision, stored, widened
from vpae.files import sha256
from vpae.loading import Model
from vpae.recipe import FinetuneFlow
from vpae.roles import Role, merge_adapter
from vpae.runs import environment
from vpae.sampling import sample_latents

_CLIPS = 4  # fixed first frames, prompts and noise that every export is asked


@dataclass(frozen=True)
class Reading:
    """One way of reading an export, beside the training graph.

    Attributes:
        reader: how it was read.
        max_error: largest absolute difference of the normalised latents to the graph with the numbers as stored.
        distance: root mean square of the difference to the student as it was trained, over that of its latents; in
            ``dtype``.
        motion_ratio: motion energy over that student's, in ``dtype``.
        dtype: in which fidelity was measured.
    """

    reader: str
    max_error: float
    distance: float
    motion_ratio: float
    dtype: str


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        readings: by reader.
        rms: root mean square of the student's latents, for scale.
        called: the pipeline's call, as far as it is the model's.
    """

    readings: list[Reading]
    rms: float
    called: str

    @property
    def max_error(self) -> float:
        """The largest difference of any reading."""
        return max(reading.max_error for reading in self.readings)

    def plain(self) -> dict[str, Any]:
        """As proof files hold it."""
        return {
            "what": f"{self.called}, num_inference_steps=1, guidance_scale=1.0) in a fresh process against the "
            "student's own sampler on the same noise, normalised latents",
            "clips": _CLIPS,
            "max_error": self.max_error,
            "tolerance": ROUND_OFF,
            "rms": self.rms,
            "readings": [vars(reading) for reading in self.readings],
        }


def check_student(model: Model) -> None:
    """Exports are of students.

    Raises:
        UserError: it is a teacher in the making.
    """
    if isinstance(model.recipe, FinetuneFlow):
        raise UserError("a flow-matching run makes a teacher, which its folder pipeline/ holds; export is for students")


class Examination:
    """The fixed questions, and the student's answers to them, one clip at a time: a 14B model fills its card."""

    def __init__(self, model: Model) -> None:
        self.model, self.encoders = model, Encoders(model.pipeline)  # on the CPU: umT5-XXL has no room beside it either
        self.device = model.role.backbone.transformer.device
        num_frames, height, width = model.shape
        self.latent_shape = self.encoders.latent_shape(model.shape)
        clips = [make_clip(model.world, "test", i) for i in range(_CLIPS)]
        self.prompts = [clip.caption for clip in clips]
        self.pictures = [np.array(Image.fromarray(clip.frames[0]).resize((width, height))) for clip in clips]
        self.conditions = [
            self.encoders.condition([picture], [prompt], num_frames)
            for picture, prompt in zip(self.pictures, self.prompts, strict=True)
        ]
        self.student = self._answer(model.role)

    def _draws(self, clip: int) -> Draws:
        return Draws(seed_of("proof"), [clip], self.device)

    def _answer(self, role: Role) -> Tensor:
        # cuDNN's convolutions round to TF32 unless told not to, which is more than what is looked for
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            rows = [
                sample_latents(
                    role, condition.to(self.device), None, self._draws(clip), steps=1, shape=self.latent_shape
                ).cpu()
                for clip, condition in enumerate(self.conditions)
            ]
        return torch.cat(rows)

    def expected(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The training graph's answers with other weights (diffusers' names, fp32): latents ``[B, 16, T, h, w]``."""
        own = self.model.role.backbone
        transformer = transformer_of(own.transformer.config, weights)
        transformer.set_attention_backend("native")
        double = Role("stored", Backbone(transformer, fold_text_padding=own.fold_text_padding))
        with self._set_aside():
            transformer.to(self.device)
            return self._answer(double)

    @contextlib.contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Free the student's GPU memory for its double, merged or not: two 14B models in fp32 fit no card."""
        transformer, device = self.model.role.backbone.transformer, self.device
        if device.type == "cuda":
            transformer.to("cpu")
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            transformer.to(device)

    def kept(self, dtype: str) -> tuple[dict[str, Tensor], Tensor]:
        """The student's weights as ``dtype`` stores them (diffusers' names, on the CPU), and its answers with these.

        Raises:
            UserError: a weight lies outside of what the dtype can hold.
        """
        own, precision = self.model.role, PRECISIONS[dtype]
        reshard([own.backbone.transformer])
        with self._set_aside():  # merging makes a double, too
            merged = merge_adapter(own).state_dict()
            kept = stored({name: w.detach().cpu().contiguous() for name, w in merged.items()}, precision)
            del merged  # in fp32 it may be a copy of 66 GB
        return kept, self.student if precision.is_exact else self.expected(widened(kept))

    def prove(
        self,
        path: Path,
        expected: Mapping[str, Tensor],
        dtype: str,
        *,
        truncated: bool = False,
        incomplete: Collection[str] = (),
    ) -> Proof:
        """Read ``path`` again and compare.

        Args:
            expected: by reader (a key of :data:`vpae.export.reload.READERS`), what the training graph says.
            dtype: a key of :data:`vpae.export.precision.PRECISIONS`.
            truncated: the export is the student cut to a rank: how near that is, is reported and not judged; that it
                moves, is.
            incomplete: readers that do not read all of it: what they are told must be right, how near that is to the
                student, is reported and not judged.

        Raises:
            UserError: the export cannot be read, does not reproduce the student, or does not move as it does.
        """
        precision = PRECISIONS[dtype]
        dtypes = list(dict.fromkeys(_name(d) for d in (torch.float32, precision.compute)))
        answers = self._reread(path, list(expected), dtypes)
        readings = []
        for reader, wanted in expected.items():
            used = answers[f"{reader}, {dtypes[-1]}"]
            readings.append(
                Reading(
                    reader,
                    float((answers[f"{reader}, float32"] - wanted).abs().max()),
                    float((used - self.student).square().mean().sqrt() / self.student.square().mean().sqrt()),
                    float(motion_energy(used).mean() / motion_energy(self.student).mean()),
                    dtypes[-1],
                )
            )
            _judge_reading(readings[-1])
            if reader not in incomplete and (truncated or not precision.is_exact):
                _judge_fidelity(readings[-1], precision, truncated)
        call = "WanImageToVideoPipeline(image, prompt" if self.encoders.has_pictures else "WanPipeline(prompt"
        return Proof(readings, float(self.student.square().mean().sqrt()), call)

    def _reread(self, path: Path, readers: Sequence[str], dtypes: Sequence[str]) -> dict[str, Tensor]:
        request = {
            "path": str(path.resolve()),
            "base": str(self.model.pipeline.resolve()),
            "readers": readers,
            "dtypes": dtypes,
            "prompts": self.prompts,
            "shape": self.model.shape,
            "device": str(self.device),
        }
        noise = [self._draws(i).normal("sample noise", self.latent_shape).cpu() for i in range(_CLIPS)]
        tensors = {"noise": torch.cat(noise), "pictures": torch.from_numpy(np.stack(self.pictures))}
        with tempfile.TemporaryDirectory(prefix="vpae-proof-") as name, self._set_aside():
            folder = Path(name)
            (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
            save_file(tensors, folder / "request.safetensors")
            _answer_in_fresh_process(folder)
            return load_file(folder / "answers.safetensors")


def _answer_in_fresh_process(folder: Path) -> None:
    # the vpae that asks is the vpae that answers, wherever it was imported from
    where = [str(Path(vpae.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vpae.export.reload", str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(where)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"the export could not be read again in a fresh process: {said[-1]}; it was removed")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _judge_reading(reading: Reading) -> None:
    if not reading.max_error <= ROUND_OFF:  # NaN is no pass
        raise UserError(
            f"the export read by {reading.reader} does not reproduce the student (latents differ by "
            f"{reading.max_error:.2e}, {ROUND_OFF:.0e} allowed); the export was removed"
        )


def _judge_fidelity(reading: Reading, precision: Precision, truncated: bool) -> None:
    mend = "a higher --rank" if truncated else "another --dtype"
    if not truncated and not reading.distance <= precision.tolerance:
        raise UserError(
            f"the export read by {reading.reader} strays from the student (relative difference {reading.distance:.2g} "
            f"in {reading.dtype}, {precision.tolerance} allowed); the export was removed, try {mend}"
        )
    if not MOTION[0] <= reading.motion_ratio <= MOTION[1]:
        raise UserError(
            f"the export read by {reading.reader} moves {reading.motion_ratio:.3g} times as much as the student "
            f"({MOTION[0]} to {MOTION[1]} allowed); the export was removed, try {mend}"
        )


def proof_record(model: Model, proof: Proof, dtype: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """What the file beside an export holds; ``files``: names and what is hashed under them."""
    precision = PRECISIONS[dtype]
    return {
        **proof.plain(),
        "dtype": dtype,
        "distance_tolerance": precision.tolerance,
        "motion_limits": MOTION,
        "source": model.source,
        "recipe": None if model.recipe is None else recipes.digest(model.recipe),
        "sha256": {name: sha256(path) for name, path in files.items()},
        "environment": environment(),
    }
