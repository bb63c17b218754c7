"""What storing a student in fewer bits, or as a LoRA, does to its latents and its motion.

    python benchmarks/exports.py outputs/quickstart

RUN is a run of a full student, finished or not. Bounce test clips, one step, the same noise, beside the student in
fp32: root mean square of the difference over that of its latents (mean and worst clip), and motion energy over its own
(all clips, and the two clips furthest off). A dtype is computed in what its users compute in; a LoRA in fp32, once with
every entry (as ComfyUI reads it) and once with those that diffusers reads. Writes benchmarks/results/exports.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import write_result
from torch import Tensor

from vpae import recipe as recipes
from vpae.backbone import Backbone
from vpae.data.encoders import Encoders, load_transformer
from vpae.draws import Draws, seed_of
from vpae.engine.watch import motion_energy
from vpae.evaluation import clips_of
from vpae.export.folder import transformer_of
from vpae.export.lora import applied, difference_entries, passed_over
from vpae.export.precision import PRECISIONS, stored, widened
from vpae.loading import load_model
from vpae.roles import Role
from vpae.sampling import sample_latents


def beside(latents: Tensor, student: Tensor) -> dict[str, float]:
    """Distance and motion of latents ``[B, 16, T, h, w]``."""
    power = [x.square().flatten(1).mean(1) for x in (latents - student, student)]
    distance, motion = (power[0] / power[1]).sqrt(), motion_energy(latents) / motion_energy(student)
    row = {
        "distance": distance.mean(),
        "distance_worst": distance.max(),
        "motion": motion_energy(latents).mean() / motion_energy(student).mean(),
        "motion_least": motion.min(),
        "motion_most": motion.max(),
    }
    return {name: float(f"{float(value):.4g}") for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16, 64, 192])
    arguments = parser.parse_args()
    model = load_model(arguments.run)
    encoders, clips = Encoders(model.pipeline), clips_of(model.world, "test", arguments.clips)
    condition = encoders.condition([c.frames[0] for c in clips], [c.caption for c in clips], model.shape[0])
    draws = Draws(seed_of("exports"), list(range(len(clips))))
    config = model.role.backbone.transformer.config
    weights = dict(model.role.backbone.transformer.state_dict())
    teacher = load_transformer(model.pipeline).state_dict()

    def latents(changed: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        transformer = transformer_of(config, changed).to(dtype)
        return sample_latents(Role("export", Backbone(transformer)), condition, None, draws, steps=1)

    student, rows = latents(weights), []

    def show(name: str, answer: Tensor, **more: float) -> None:
        rows.append({"export": name} | beside(answer, student) | more)
        print(
            "  ".join(f"{v:<26}" if isinstance(v, str) else f"{k} {v:<9.4g}" for k, v in rows[-1].items()), flush=True
        )

    show("teacher", latents(teacher))
    for name, precision in PRECISIONS.items():
        show(name, latents(widened(stored(weights, precision)), precision.compute))
    for rank in arguments.ranks:
        entries, truncation = difference_entries(weights, teacher, rank, torch.float32, torch.device("cpu"))
        ignored = passed_over(entries)
        heard = {key: entry for key, entry in entries.items() if key not in ignored}
        for reader, read in (("every entry", entries), ("diffusers", heard)):
            left_out = float(f"{truncation.total:.4g}")
            show(f"LoRA {rank}, {reader}", latents(applied(teacher, read)), left_out=left_out)
    document = {
        "benchmark": "exports",
        "run": None if model.recipe is None else recipes.digest(model.recipe),
        "weights": model.source.partition(", /")[0],
        "clips": len(clips),
        "rows": rows,
    }
    write_result("exports", document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
