"""What bf16 and the attention kernels do to each loss and its gradient, beside fp32 with torch's plain attention.

    python benchmarks/numerics.py outputs/quickstart

RUN is a finished run of both phases: its trained networks are asked, since a fresh head or adapter (zero last layer)
would show nothing. For every loss the gradient with respect to the player's own weights is compared, on the same
batches and noise: the relative difference of the loss, the gradient's cosine with the fp32 one, and the norm of the
difference over the norm. Kernels that are not installed or need a GPU that is not there are left out and named.
Writes benchmarks/results/numerics_DEVICE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import write_result
from torch import Tensor

from vpae import losses
from vpae import recipe as recipes
from vpae.data.cache import prepare
from vpae.data.encoders import Encoders
from vpae.distill import build_phase
from vpae.draws import Draws
from vpae.engine.parallel import autocast, start
from vpae.engine.trainer import Trainer
from vpae.errors import UserError
from vpae.extras import ATTENTION_BACKENDS, check_attention_backend
from vpae.methods.base import Batch
from vpae.models import find_model
from vpae.runs import RECIPE


def losses_of(trainer: Trainer, phase: str) -> Iterator[tuple[str, str, Callable[[Batch], Tensor]]]:
    """Each loss of a phase by itself: (name, player, batch -> loss)."""
    method = trainer.method
    if phase == "priming":
        yield "VSD", "student", lambda batch: method.loss("student", batch).loss
        yield "fake score", "fake_score", lambda batch: method.loss("fake_score", batch).loss
        return

    def hinge(player: str, **silenced) -> Callable[[Batch], Tensor]:
        settings = method.settings

        def loss(batch: Batch) -> Tensor:
            method.settings = dataclasses.replace(settings, **silenced)
            try:
                return method.loss(player, batch).loss
            finally:
                method.settings = settings

        return loss

    def r1(perturb: Callable[[Tensor, float], Tensor], sigma: float) -> Callable[[Batch], Tensor]:
        def loss(batch: Batch) -> Tensor:
            t = method._judge_time(batch)
            x_t = method._shown(batch.x0, t, batch, "real")
            noise = perturb(batch.draws.normal_like("perturbation", x_t), sigma)
            logits = [method.logits(x, t, batch.condition) for x in (x_t, x_t + noise)]
            return losses.finite_difference_r1(*logits)

        return loss

    settings = method.settings
    yield "hinge, head", "head", hinge("head", r1=dataclasses.replace(settings.r1, weight=0.0))
    yield "ST-R1, spatial", "head", r1(losses.spatial_perturbation, settings.r1.spatial_sigma)
    yield "ST-R1, temporal", "head", r1(losses.temporal_perturbation, settings.r1.temporal_sigma)
    yield "hinge, student", "student", hinge("student", sds=dataclasses.replace(settings.sds, weight=0.0))
    yield "C-SDS", "student", lambda batch: method._conditional_sds(method.generate(batch), batch)


def asked(trainer: Trainer, player: str, loss: Callable[[Batch], Tensor], indices: list[int], precision: str):
    """Loss and gradient (one flat tensor) of one batch."""
    for other in trainer.method.players.values():
        for parameter in other.parameters.values():
            parameter.requires_grad_(other.name == player)
    batch = trainer.run.fetch(indices, Draws(7, indices, trainer.processes.device))
    with autocast(trainer.processes, precision):
        value = loss(batch)
    mine = list(trainer.method.players[player].parameters.values())
    gradients = torch.autograd.grad(value, mine, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, mine, strict=True)]
    return float(value.detach()), torch.cat([g.flatten().double() for g in whole])


def choices() -> tuple[list[tuple[str, str]], list[str]]:
    """(precision, attention) to compare with (fp32, native_math), and what cannot run here."""
    usable, absent = [], []
    for name, backend in ATTENTION_BACKENDS.items():
        if backend.trains:
            try:
                check_attention_backend(name)
                usable.append(name)
            except UserError:
                absent.append(name)
    half_only = {"native_flash", "native_cudnn", "flash", "flash_hub", "flash_3_hub"}
    pairs = [("fp32", name) for name in usable if name not in half_only | {"native_math"}]
    return pairs + [("bf16", name) for name in usable], absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    trained = recipes.load(arguments.run / RECIPE)
    # without folding no kernel needs a mask, so all can be compared
    recipe = recipes.load(arguments.run / RECIPE, ("teacher.fold_text_padding=false", "engine.samples=1"))
    processes, size = start(), recipe.engine.micro_batch
    encoders = Encoders(find_model(recipe.teacher.path), processes.device)
    cache = prepare(recipe.data, encoders, processes)
    pairs, absent = choices()
    rows: list[dict] = []
    for phase in ("priming", "equilibrium"):
        trainer = build_phase(recipe, phase, arguments.run, cache, encoders, processes)
        trainer.run.identity["teacher"]["fold_text_padding"] = trained.teacher.fold_text_padding
        if not trainer.resume():
            raise UserError(f"{arguments.run} holds no checkpoint of {phase}; finish it first")
        roles = {id(m): m for m in trainer.run.modules if hasattr(m, "set_attention_backend")}.values()

        def attend(name: str, roles=roles) -> None:
            for transformer in roles:
                transformer.set_attention_backend(ATTENTION_BACKENDS[name].dispatcher)

        for name, player, loss in losses_of(trainer, phase):
            batches = [list(range(k * size, (k + 1) * size)) for k in range(arguments.batches)]
            attend("native_math")
            exact = [asked(trainer, player, loss, indices, "fp32") for indices in batches]
            for precision, attention in pairs:
                attend(attention)
                found = [asked(trainer, player, loss, indices, precision) for indices in batches]
                both = list(zip(found, exact, strict=True))
                gaps = [abs(a - b) / max(abs(b), 1e-12) for (a, _), (b, _) in both]
                cosines = [
                    float(torch.cosine_similarity(a, b, dim=0)) for (_, a), (_, b) in zip(found, exact, strict=True)
                ]
                errors = [float((a - b).norm() / b.norm()) for (_, a), (_, b) in both]
                row = {"loss": name, "precision": precision, "attention": attention}
                row |= {"loss_difference": gaps, "gradient_cosine": cosines, "gradient_error": errors}
                rows.append({k: [float(f"{x:.4g}") for x in v] if isinstance(v, list) else v for k, v in row.items()})
                medians = [float(np.median(v)) for v in (gaps, cosines, errors)]
                print(f"{name:<16}{precision:<6}{attention:<18}loss {medians[0]:9.2e}  cosine {medians[1]:8.5f}"
                      f"  gradient {medians[2]:9.2e}", flush=True)  # fmt: skip
    device = "cuda" if processes.device.type == "cuda" else "cpu"
    document = {
        "benchmark": "numerics",
        "run": recipes.digest(recipe),
        "against": "fp32, native_math",
        "batches": arguments.batches,
        "batch": size,
        "rows": rows,
        "left_out": absent,
    }
    write_result(f"numerics_{device}", document)
    print(json.dumps({"benchmark": "numerics", "rows": len(rows), "left_out": absent}))


if __name__ == "__main__":
    main()
