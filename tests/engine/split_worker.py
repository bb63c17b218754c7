"""Run by torchrun: networks whose ranks share tokens beside the same ones whole; leaves the gaps of each case."""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import tiny_transformer
from torch import Tensor, nn

from vpae.backbone import Backbone
from vpae.conditioning import Condition, first_frame_mask
from vpae.engine.layout import placed
from vpae.engine.parallel import Processes, average_gradients, reshard, shard_backbone, shard_module, start, whole
from vpae.recipe import Engine, Lora
from vpae.roles import Role, add_lora, full_copy

ALONE = Processes(0, 1, torch.device("cpu"), None)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 24))

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.stack(
            [(f.tanh() * w).sum(-1).square().mean(1) for f, w in zip(features, self.weight, strict=True)]
        )


def build(processes: Processes, lora: bool, checkpointing: bool, fold: bool) -> tuple[Role, Role, Head, list[Backbone]]:
    """A student, a judge that trains too, and a head; the same weights at every call."""
    torch.manual_seed(0)
    teacher = Role("teacher", Backbone(tiny_transformer().requires_grad_(False), fold_text_padding=fold))
    head = Head()
    if checkpointing:
        teacher.backbone.enable_checkpointing()
    if lora:
        settings = Lora(2, 2.0, ("to_q", "to_v", "net.2"))
        student, judge = (add_lora(teacher.backbone, name, settings, 3) for name in ("student", "judge"))
        for role in (student, judge):
            for parameter in role.parameters():
                nn.init.normal_(parameter, std=0.3)
        backbones = [teacher.backbone]
    else:
        student, judge = full_copy(teacher, "student"), full_copy(teacher, "judge")
        backbones = [student.backbone, judge.backbone]
    for backbone in backbones:
        shard_backbone(backbone, processes)
    shard_module(head, processes)
    return student, judge, head, backbones


def step(processes: Processes, **case: bool) -> dict[str, Tensor]:
    """Losses and every gradient of a student turn and of a head turn in which the judge trains too."""
    student, judge, head, backbones = build(processes, **case)
    torch.manual_seed(7 + processes.data_rank)  # ranks that share a clip have the same one
    x_t, noise, latent = torch.randn(3, 1, 16, 2, 4, 4)
    condition = Condition(torch.randn(1, 6, 16), torch.randn(1, 5, 16), latent, first_frame_mask(2, 4, 4)[None])
    x_t.requires_grad_()

    def logits(x: Tensor) -> Tensor:
        return head(judge(x, torch.tensor([0.4]), condition, (0, 2), True).features)

    head.requires_grad_(False)
    student.requires_grad_(True)
    x0 = student.x0(x_t, torch.tensor([0.9]), condition)
    seen = 0.6 * x0 + 0.4 * noise
    student_loss = (x0 - noise).square().mean() - logits(seen).mean()
    student_loss.backward()
    student.requires_grad_(False)
    reshard([*(b.transformer for b in backbones), head])
    head.requires_grad_(True)
    judge.requires_grad_(True)
    seen = seen.detach()
    clean = logits(seen)
    head_loss = (clean - logits(seen + 0.3 * noise)).square().mean() + clean.mean()
    head_loss.backward()
    parameters = {f"{r.name}.{n}": p for r in (student, judge) for n, p in r.named_parameters()}
    parameters |= {f"head.{n}": p for n, p in head.named_parameters()}
    average_gradients(parameters.values(), processes)
    found = {n: whole(p.grad) for n, p in parameters.items() if p.grad is not None}
    losses = torch.stack([student_loss.detach(), head_loss.detach()])
    if processes.size > 1:
        dist.all_reduce(losses)
    return found | {"loss": losses / processes.size, "x0": x0.detach(), "x_t": x_t.grad}


def alone(processes: Processes, case: dict[str, bool]) -> dict[str, Tensor]:
    """What one rank finds for all clips together, and for this rank's own (x0, x_t)."""
    parts = [step(replace(ALONE, rank=i), **case) for i in range(processes.data_size)]
    mean = {name: torch.stack([p[name] for p in parts]).mean(0) for name in parts[0]}
    return mean | {name: parts[processes.data_rank][name] for name in ("x0", "x_t")}


def gaps(processes: Processes, **case: bool) -> dict[str, float]:
    """Largest difference, over the largest of its kind, for loss, sample, input and the weights of each player."""
    one, many = alone(processes, case), step(processes, **case)
    assert one.keys() == many.keys()
    kinds = {name.split(".")[0] for name in one}
    return {
        kind: max(float((one[n] - many[n]).abs().max()) for n in one if n.split(".")[0] == kind)
        / max(float(one[n].abs().max()) for n in one if n.split(".")[0] == kind)
        for kind in kinds
    }


def times_a_token(processes: Processes) -> float:
    """Wan2.2 TI2V gives each token a time of its own."""
    torch.manual_seed(1)
    transformer = tiny_transformer(image_dim=None, added_kv_proj_dim=None)
    inputs = dict(hidden_states=torch.randn(2, 36, 2, 4, 4), encoder_hidden_states=torch.randn(2, 512, 16))
    inputs |= dict(timestep=1000 * torch.rand(2, 8), return_dict=False)
    (expected,) = transformer(**inputs)
    Backbone(transformer).share_tokens(processes.sequence)
    return float((transformer(**inputs)[0] - expected).abs().max().detach())


def main(target: Path, degree: int, parallels: list[str], exhaustive: bool) -> None:
    joined, found = start(), {}
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("VPAE_TEST_MACHINE", os.environ["LOCAL_WORLD_SIZE"])
    for parallel in parallels:
        settings = dict.fromkeys(Engine.__annotations__) | {"parallel": parallel, "sequence_parallel": degree}
        processes = placed(joined, Engine(**settings))
        assert parallel != "hsdp" or processes.mesh.mesh.tolist() == [[0, 1], [2, 3]]
        cases = (
            itertools.product((False, True), repeat=3) if exhaustive else [(False, True, False), (True, False, True)]
        )
        for lora, checkpointing, fold in cases:
            case = dict(lora=lora, checkpointing=checkpointing, fold=fold)
            found[f"{parallel} {' '.join(k for k, v in case.items() if v)}"] = gaps(processes, **case)
    if degree > 1:
        found["times a token"] = {"velocity": times_a_token(processes)}
    (target / f"rank-{joined.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4] == "all")
