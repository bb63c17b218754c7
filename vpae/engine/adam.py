"""AdamW whose two moments are kept otherwise than in fp32 on the device: in bf16, in 8 bits, or in host memory.

Each takes the arithmetic of a step from a library, in fp32: torch's own AdamW, or torchao's for 8 bits. Bytes a
parameter: 8 in fp32 or on the host, 4 in bf16, 2.05 in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.adamw import adamw

from vpae.draws import rounding_bits, seed_of
from vpae.engine.host import buckets, host_like, pass_through
from vpae.engine.parallel import local
from vpae.extras import require
from vpae.recipe import Optimiser

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Kept(torch.optim.Optimizer):
    """AdamW that unpacks its moments to fp32 bucket by bucket, lets torch take the step, and packs them again."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser) -> None:
        super().__init__(list(parameters.values()), {"lr": settings.learning_rate})
        self.settings = settings
        self.names = {parameter: name for name, parameter in parameters.items()}
        for parameter in parameters.values():
            self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32)}
            self.state[parameter] |= {moment: self.empty(parameter) for moment in MOMENTS}

    def empty(self, parameter: nn.Parameter) -> Tensor:
        """A moment at zero, as it is kept."""
        raise NotImplementedError

    def each_bucket(self, parts: list[list[nn.Parameter]], take: Callable[[int, list[Tensor]], None]) -> None:
        """Call ``take(i, fp32 moments)`` for every bucket and keep what it leaves in them."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        parts = [moving[part] for part in buckets([local(p).numel() for p in moving])]
        rate = self.param_groups[0]["lr"]

        def take(i: int, moments: list[Tensor]) -> None:
            part = parts[i]
            adamw(
                [local(p) for p in part],
                [local(p.grad) for p in part],
                moments[: len(part)],
                moments[len(part) :],
                [],
                [self.state[p]["step"] for p in part],
                foreach=True,
                amsgrad=False,
                beta1=self.settings.betas[0],
                beta2=self.settings.betas[1],
                lr=rate,
                weight_decay=self.settings.weight_decay,
                eps=self.settings.eps,
                maximize=False,
            )

        self.each_bucket(parts, take)

    def kept(self, part: Sequence[nn.Parameter]) -> list[Tensor]:
        """This rank's moments of some parameters: all first ones, then all second ones."""
        return [local(self.state[p][moment]) for moment in MOMENTS for p in part]


class HostAdamW(_Kept):
    """Moments in host memory, in fp32; the numbers are those of torch's AdamW, bit for bit.

    They stream through the device, 16 bytes a parameter and step over its link; the update of the weights then runs at
    the device's own speed. A step on the CPU would move 8 (gradients there, weights back) but compute on few cores.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser, device: torch.device) -> None:
        self.device = device
        super().__init__(parameters, settings)

    def empty(self, parameter: nn.Parameter) -> Tensor:
        return host_like(parameter, self.device)

    def each_bucket(self, parts: list[list[nn.Parameter]], take: Callable[[int, list[Tensor]], None]) -> None:
        pass_through([self.kept(part) for part in parts], self.device, take)


class HalfAdamW(_Kept):
    """Moments in bf16, rounded up or down at random so that they are right in the mean.

    Rounded to the nearest, a second moment near its level stands still: at beta2 0.999 a step changes it by 0.1 % at
    most on the way down, and neighbouring bf16 numbers lie 0.4 to 0.8 % apart, so it never falls again. (A Kahan sum
    would mend that too, at half as much memory again.) The random bits are a function of seed, parameter, step and
    element: the same when resumed, and on any number of ranks.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Optimiser, *key: object) -> None:
        self.key = key
        super().__init__(parameters, settings)

    def empty(self, parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter, dtype=torch.bfloat16, requires_grad=False)

    def each_bucket(self, parts: list[list[nn.Parameter]], take: Callable[[int, list[Tensor]], None]) -> None:
        for i, part in enumerate(parts):
            kept = self.kept(part)
            exact = [tensor.float() for tensor in kept]
            take(i, exact)
            owners = [(p, moment) for moment in MOMENTS for p in part]
            for (parameter, moment), target, value in zip(owners, kept, exact, strict=True):
                key = seed_of(*self.key, self.names[parameter], moment, int(self.state[parameter]["step"]))
                bits = rounding_bits(key, _first_element(parameter), value.numel(), value.device)
                target.copy_(round_to_bf16(value, bits.view_as(value)))


def round_to_bf16(value: Tensor, bits: Tensor) -> Tensor:
    """An fp32 tensor in bf16: up with the chance of the part that is cut off; ``bits`` uniform on 0 .. 65535, int32."""
    return ((value.contiguous().view(torch.int32) + bits) & -65536).view(torch.float32).bfloat16()


def _first_element(parameter: nn.Parameter) -> int:
    """Place of this rank's first element in the whole (it is sharded by rows)."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0] * math.prod(parameter.shape[1:]) if offset else 0


_BLOCKS = (256, 128, 64)  # elements that share a scale: the largest that divides a row
_SMALLEST = 4096  # elements; smaller tensors stay in fp32, as in torchao and bitsandbytes


def byte_adamw(parameters: dict[str, nn.Parameter], settings: Optimiser) -> torch.optim.Optimizer:
    """torchao's AdamW8bit (block-wise dynamic quantisation, arXiv 2110.02861) with its state allocated.

    Blocks lie within rows, so that any number of ranks reads a checkpoint. Where no block fits a row, and in small
    tensors, moments stay in fp32.

    Raises:
        UserError: torchao is not installed.
    """
    library = require("torchao", "engine.optimiser_state: int8")

    class ByteAdamW(library.AdamW8bit):
        def step(self, closure: None = None) -> None:
            # compiled, it would need a compiler at hand and minutes for the shapes of a model
            with torch.compiler.set_stance("force_eager"):
                super().step()

    optimiser = ByteAdamW(
        list(parameters.values()),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    for parameter in parameters.values():
        optimiser.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": _in_bytes(parameter, signed=True),
            "exp_avg_sq": _in_bytes(parameter, signed=False),
        }
    return optimiser


def _block(parameter: nn.Parameter) -> int | None:
    """Elements that share a scale; None where the moments stay in fp32. The same on every rank, and for any number."""
    row = math.prod(parameter.shape[1:])
    if parameter.dim() < 2 or parameter.numel() < _SMALLEST:
        return None
    return next((block for block in _BLOCKS if row % block == 0), None)


def _in_bytes(parameter: nn.Parameter, *, signed: bool) -> Tensor:
    block, mine = _block(parameter), local(parameter)
    if block is None or mine.numel() == 0:
        return torch.zeros_like(parameter, requires_grad=False)
    from torchao.optim.subclass_8bit import OptimState8bit

    return _as(parameter, OptimState8bit.zeros(mine.shape, signed, block, mine.device, dtype=mine.dtype))


def _as(parameter: Tensor, mine: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """This rank's part as a tensor that is sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return mine
    shape = torch.Size(parameter.shape if shape is None else shape)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        mine, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def stored(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's moments as plain tensors, by the names they have in a checkpoint (themselves, not copies)."""
    state = optimiser.state[parameter]
    block = _block(parameter) if getattr(optimiser, "block_size", None) else None
    if block is None:
        return {moment: state[moment] for moment in MOMENTS}
    found, scales = {}, (parameter.shape[0], math.prod(parameter.shape[1:]) // block)
    for moment in MOMENTS:
        mine = local(state[moment])
        if mine.numel():
            codes, scale = mine.codes, mine.scale.view(mine.shape[0], -1)
        else:
            codes, scale = mine.to(torch.uint8), mine.new_zeros(0, scales[1])
        found[f"{moment}.codes"], found[f"{moment}.scale"] = _as(parameter, codes), _as(parameter, scale, scales)
    return found
