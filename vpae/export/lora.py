"""A student as the difference to its teacher: low-rank pairs for linear layers, whole differences for the rest.

Keys are ``diffusion_model.`` + the released name + what is added: ``.lora_A.weight`` ``[R, in]`` and ``.lora_B.weight``
``[out, R]`` (their product goes onto the weight), ``.diff`` (onto a weight or a parameter), ``.diff_b`` (onto a bias).
There is no ``.alpha``: readers then scale by one, and strength 1.0 is the student. ComfyUI takes all of them; diffusers
has a place for pairs and the biases beside them, and passes over the differences of norms, modulation and patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vpae.draws import seed_of
from vpae.export.keys import LORA_PREFIX, to_diffusers, to_original
from vpae.roles import Role

_DOWN, _UP, _DIFF, _DIFF_BIAS = ".lora_A.weight", ".lora_B.weight", ".diff", ".diff_b"
_EXACT_BELOW = 1025  # rows or columns up to which a whole SVD takes at most a second
_OVERSAMPLE, _ITERATIONS = 32, 4  # of the randomised one


@dataclass(frozen=True)
class Truncation:
    """What a rank leaves out of the linear layers.

    Attributes:
        rank: R.
        total: Frobenius norm of all that is left out, over that of all differences.
        layers: the same of each layer, by its released name.
    """

    rank: int
    total: float
    layers: dict[str, float]


def adapter_entries(role: Role) -> dict[str, Tensor]:
    """The role's own LoRA as it was trained, fp32 on the CPU; alpha over rank is multiplied into B."""
    scaling = {
        name: module.scaling[role.adapter]
        for name, module in role.backbone.transformer.named_modules()
        if role.adapter in getattr(module, "scaling", {})
    }
    entries = {}
    for name, weight in role.named_parameters():
        for ending in (_DOWN, _UP):
            if name.endswith(ending):
                module = name.removesuffix(ending)
                scale = scaling[module] if ending == _UP else 1.0
                key = f"{LORA_PREFIX}{to_original(module)}{ending}"
                entries[key] = (weight.detach().float() * scale).cpu().contiguous()
    return entries


def difference_entries(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], Truncation]:
    """Entries that lead from ``teacher`` to ``student`` as near as R lets them.

    Args:
        student: weights in fp32, under diffusers' names.
        teacher: the same keys.
        rank: R of every pair; where a layer has fewer rows or columns the pair is filled with zeros, because releases
            of diffusers differ in how they scale pairs of several ranks.
        dtype: of the entries; the errors are theirs.
        device: where the decompositions run.
    """
    entries: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    left, whole = 0.0, 0.0
    for name, weight in student.items():
        difference = weight.float() - teacher[name].float().to(weight.device)
        module, _, leaf = name.rpartition(".")
        if weight.ndim == 2:
            down, up = (x.to(dtype).cpu() for x in low_rank(difference.to(device), rank, name))
            key = to_original(module)
            entries[f"{LORA_PREFIX}{key}{_DOWN}"], entries[f"{LORA_PREFIX}{key}{_UP}"] = down, up
            missing = float((difference.cpu() - up.float() @ down.float()).square().sum())
            size = float(difference.square().sum())
            errors[key] = (missing / size) ** 0.5 if size else 0.0
            left, whole = left + missing, whole + size
        elif leaf == "bias":
            if difference.any() or student[f"{module}.weight"].ndim == 2:  # one pair with a bias asks it of all pairs
                entries[f"{LORA_PREFIX}{to_original(module)}{_DIFF_BIAS}"] = difference.to(dtype).cpu()
        elif difference.any():
            target = module if leaf == "weight" else name
            entries[f"{LORA_PREFIX}{to_original(target)}{_DIFF}"] = difference.to(dtype).cpu()
    return entries, Truncation(rank, (left / whole) ** 0.5 if whole else 0.0, errors)


def low_rank(matrix: Tensor, rank: int, name: str = "") -> tuple[Tensor, Tensor]:
    """The nearest product of ``[R, in]`` and ``[out, R]`` to ``[out, in]``, both of one size in norm.

    Large matrices are decomposed by a randomised method, whose draws belong to ``name``.
    """
    kept = min(rank, *matrix.shape)
    if min(matrix.shape) < _EXACT_BELOW or kept + _OVERSAMPLE >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.mT
    else:
        # torch draws the test matrix from the global generator; fork it so that it is as it was, and seed the fork
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(seed_of("low rank", name))
            u, s, v = torch.svd_lowrank(matrix, kept + _OVERSAMPLE, niter=_ITERATIONS)
    root = s[:kept].sqrt()
    down, up = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    down[:kept], up[:, :kept] = root[:, None] * v[:, :kept].mT, u[:, :kept] * root
    return down, up


def passed_over(entries: Iterable[str]) -> list[str]:
    """Those entries that diffusers does not read: all but the pairs and the biases beside a pair."""
    entries = set(entries)
    paired = {key.removesuffix(_UP) for key in entries if key.endswith(_UP)}
    return sorted(
        key
        for key in entries
        if not key.endswith((_DOWN, _UP)) and not (key.endswith(_DIFF_BIAS) and key.removesuffix(_DIFF_BIAS) in paired)
    )


def applied(weights: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` (diffusers' names, fp32) with the entries added at strength 1.0, as ComfyUI adds them.

    Raises:
        ValueError: an entry belongs to no weight.
    """
    result = dict(weights)
    for key, entry in entries.items():
        for ending in (_DOWN, _UP, _DIFF_BIAS, _DIFF):
            if key.startswith(LORA_PREFIX) and key.endswith(ending):
                break
        else:
            raise ValueError(f"{key} is no entry of a Wan LoRA")
        path = key.removeprefix(LORA_PREFIX).removesuffix(ending)
        own = to_diffusers(path)
        if ending == _DOWN:
            continue  # comes with its B
        if ending == _UP:
            name, change = f"{own}.weight", entry.float() @ entries[f"{LORA_PREFIX}{path}{_DOWN}"].float()
        elif ending == _DIFF_BIAS:
            name, change = f"{own}.bias", entry.float()
        else:
            name, change = f"{own}.weight" if f"{own}.weight" in weights else own, entry.float()
        if name not in weights:
            raise ValueError(f"{key} belongs to no weight of the transformer")
        result[name] = result[name] + change.to(result[name].device)
    return result
