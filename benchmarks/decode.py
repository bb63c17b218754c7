"""The ways to decode, as rows of ``latency.py``: each is the whole VAE decode, held against fp32 on one device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from measuring import Clock, Row, interleaved, paired_ratio, peak_bytes, reset_peak, spread
from torch import Tensor

from vpae.decoding import decode_in_bands
from vpae.engine.parallel import Processes

_FORMAT = {5: torch.channels_last_3d, 4: torch.channels_last}


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Store the kernels of all convolutions with their channels innermost (activations follow)."""
    for parameter in vae.decoder.parameters():
        if parameter.ndim in _FORMAT:
            parameter.data = parameter.data.contiguous(memory_format=_FORMAT[parameter.ndim])
    return vae


def compiled(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let torch.compile fuse the decoder."""
    vae.decoder.compile(dynamic=False)
    return vae


def tiled(vae: AutoencoderKLWan, latents: Tensor) -> AutoencoderKLWan:
    """diffusers' tiling at its own tile of 256 pixels, or at half the picture where that is no larger."""
    stride = vae.config.scale_factor_spatial
    shorter = stride * min(latents.shape[-2:])
    if shorter > 256:
        vae.enable_tiling()
    else:
        tile = max(2 * stride, shorter // 2)
        vae.enable_tiling(tile, tile, 3 * tile // 4 // stride * stride, 3 * tile // 4 // stride * stride)
    return vae


@contextlib.contextmanager
def true_fp32(enabled: bool = True) -> Iterator[None]:
    """Convolutions in fp32, where a GPU would by torch's default round their factors to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not enabled
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def variants(vae: AutoencoderKLWan, latents: Tensor, with_compile: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name of each way, and the call that decodes to pixels ``[B, 3, F, H, W]`` on [-1, 1]."""

    def exactly(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with true_fp32():
                return run()

        return call

    def row(name: str, change: Callable[[AutoencoderKLWan], Any], dtype: torch.dtype = torch.float32):
        twin = copy.deepcopy(vae).to(dtype)
        change(twin)
        return name, exactly(lambda: twin.decode(latents.to(dtype)).sample)

    yield "fp32", exactly(lambda: vae.decode(latents).sample)
    if latents.is_cuda:
        yield "TF32 convolutions, torch's default", lambda: vae.decode(latents).sample
    yield row("fp32, channels last", channels_last)
    yield row("bf16", lambda twin: twin, torch.bfloat16)
    yield row("bf16, channels last", channels_last, torch.bfloat16)
    yield row("fp32, tiled", lambda twin: tiled(twin, latents))
    if with_compile:
        yield row("fp32, compiled", compiled)
        yield row("bf16, compiled", compiled, torch.bfloat16)


def error_against(exact: Tensor, found: Tensor) -> dict[str, float]:
    """How far pixels on [-1, 1] are from those of the fp32 decode."""
    gap = found.float() - exact
    mse = float(gap.square().mean())
    psnr = float(10 * torch.log10(torch.tensor(4 / mse))) if mse else float("inf")
    figures = {"max": float(gap.abs().max()), "rms": mse**0.5, "psnr_db": psnr}
    return {key: float(f"{value:.4g}") if value != float("inf") else None for key, value in figures.items()}


def _row(seconds: list[float], base: list[float], error: dict, peak: int | None, first: float) -> dict[str, Any]:
    return {
        "seconds": spread(seconds),
        "speedup": paired_ratio(base, seconds),
        "error": error,
        "peak_bytes": peak,
        "first_call_seconds": round(first, 3),
    }


@torch.no_grad()
def decode_rows(
    vae: AutoencoderKLWan, latents: Tensor, clock: Clock, repeats: int, with_compile: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time, peak memory and error of every way, and why a way was left out."""
    with true_fp32():
        exact = vae.decode(latents).sample
    rows, left_out, notes = [], {}, {}
    for name, run in variants(vae, latents, with_compile):
        reset_peak(clock.device)
        try:
            first = clock.time(run)
            found = run()
        except Exception as error:  # compilers and kernels fail in many ways; the row says so
            left_out[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        rows.append(Row(name, run))
        notes[name] = error_against(exact, found), peak_bytes(clock.device), first
    seconds = interleaved(rows, repeats, clock, warmup=0)
    return {name: _row(seconds[name], seconds["fp32"], *notes[name]) for name in notes}, left_out


@torch.no_grad()
def banded_rows(vae: AutoencoderKLWan, latents: Tensor, clock: Clock, repeats: int, processes: Processes):
    """The decode in bands over all ranks beside that of rank 0 alone, fp32 and bf16, in the same rounds.

    Seconds are rank 0's, from a barrier to its whole video; the other ranks wait while it decodes by itself.
    """
    torch.backends.cudnn.allow_tf32 = False
    exact, found = vae.decode(latents).sample, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        twin = copy.deepcopy(vae).to(dtype)
        x = latents.to(dtype)

        def whole(twin=twin, x=x) -> Tensor | None:
            return twin.decode(x).sample if processes.is_main else None

        def banded(twin=twin, x=x) -> Tensor:
            return decode_in_bands(twin, x, processes)

        memory = {}
        for label, call in (("whole", whole), ("banded", banded)):
            processes.barrier()
            reset_peak(clock.device)
            first = clock.time(call)
            memory[label] = peak_bytes(clock.device), first
        rows = [Row("whole", whole, processes.barrier), Row("banded", banded, processes.barrier)]
        seconds = interleaved(rows, repeats, clock, warmup=1)
        error = error_against(exact, banded())
        alone = error_against(exact, twin.decode(x).sample)
        found[f"{name}, whole, rank 0 alone"] = _row(seconds["whole"], seconds["whole"], alone, *memory["whole"])
        found[f"{name}, in bands over {processes.size} ranks"] = _row(
            seconds["banded"], seconds["whole"], error, *memory["banded"]
        )
    return found
