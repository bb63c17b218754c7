"""In which numbers an export is stored, and how far that may lead it from the student as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vpae.errors import UserError


@dataclass(frozen=True)
class Precision:
    """A way of storing weights.

    Attributes:
        matrices: dtype of the linear layers' weights in the blocks, 99 % of a 14B model.
        others: dtype of everything else.
        compute: dtype in which those who store so also compute.
        tolerance: allowed distance of latents computed so to the student's, root mean square over root mean square.
    """

    matrices: torch.dtype
    others: torch.dtype
    compute: torch.dtype
    tolerance: float

    @property
    def is_exact(self) -> bool:
        return self.matrices == torch.float32


# What a dtype may cost is about twice what it cost 16 test clips of a tiny_full student in the mean (EMA, phase I, turn
# 2000; one step, stored and computed in these dtypes; benchmarks/results/exports.json): 0.015, 0.002 and 0.038 on that
# noise, 0.016, 0.004 and 0.039 on another. Its teacher lies 0.16 away from it. No 14B student has been measured. fp32
# is compared under :data:`ROUND_OFF` alone.
PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, torch.float32, 0.0),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, 0.03),
    "fp16": Precision(torch.float16, torch.float16, torch.float16, 0.01),
    "fp8": Precision(torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16, 0.08),
}
# Motion energy over the unrounded student's. The same clips kept it within 0.5 % in sum and 4 % each, in all dtypes;
# the teacher in one step moves 0.78 times as much as that student.
MOTION = (0.95, 1.05)
# Largest difference of latents of unit variance, both sides holding the same stored numbers and computing in fp32:
# fp32 round-off over all blocks is about 1e-5. Swapping the q and k norms of one block costs 0.45, which fp8's own
# rounding (up to 1.0) would hide; therefore a rounded export is compared with the student rounded alike, too.
ROUND_OFF = 1e-3


def stored(weights: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Weights as an export holds them, under diffusers' names.

    Raises:
        UserError: a weight lies outside of what the dtype can hold.
    """
    result = {}
    for name, weight in weights.items():
        dtype = precision.matrices if name.startswith("blocks.") and weight.ndim == 2 else precision.others
        largest = float(weight.abs().max())
        if not largest <= torch.finfo(dtype).max:  # some casts saturate, others make infinities
            raise UserError(
                f"{name} holds {largest:.3g}, which {str(dtype).removeprefix('torch.')} cannot hold; "
                "choose another --dtype (bf16 has the range of fp32)"
            )
        result[name] = weight.to(dtype)
    return result


def widened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in fp32."""
    return {name: weight.float() for name, weight in weights.items()}
