"""Clocks, repeats, peaks, ceilings and counts that the benchmarks of speed share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class Clock:
    """Moments on a device: events on a GPU (the host is not waited for between them), the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def mark(self) -> Any:
        """The moment at which all work given to the device so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def between(self, first: Any, second: Any) -> float:
        """Seconds between two moments; after :meth:`finish`."""
        return first.elapsed_time(second) / 1e3 if self.cuda else second - first

    def time(self, action: Callable[[], Any]) -> float:
        """Seconds that one call takes by itself."""
        self.finish()
        first = self.mark()
        action()
        second = self.mark()
        self.finish()
        return self.between(first, second)


@dataclass(frozen=True)
class Row:
    """Something to be timed; ``prepare`` comes before each call and is not timed."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def interleaved(rows: Sequence[Row], repeats: int, clock: Clock, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each row in each of ``repeats`` rounds.

    A round calls every row once, every other round in reverse, so that whatever else the machine does falls on all rows
    alike and two of them can be compared round by round.
    """
    for row in rows:
        for _ in range(warmup):
            row.prepare()
            row.run()
    found: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(repeats):
        for row in rows if number % 2 == 0 else reversed(rows):
            row.prepare()
            found[row.name].append(clock.time(row.run))
    return found


def _short(x: float) -> float:
    return float(f"{x:.5g}")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and ends of repeated measurements."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    found = {"median": middle, "q25": low, "q75": high, "min": min(values), "max": max(values)}
    return {key: _short(value) for key, value in found.items()} | {"repeats": len(values)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of ``above / below`` round by round; both were measured in the same rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def reset_peak(device: torch.device) -> None:
    """Forget the peak of memory so far (on a CPU: of the process's resident memory, by Linux's own means)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a kernel or container without it: peaks are then those of the whole process
        pass


def peak_bytes(device: torch.device) -> int:
    """Peak of allocated device memory, or of resident memory on a CPU, since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def matmul_row(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Row, float]:
    """Square products of ``size`` for some milliseconds, and their FLOPs.

    A shorter call would slip between what else a busy CPU does, and its ceiling be higher than what is held against it.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    count = max(1, round(2e9 / (2 * size**3)))

    def products() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return Row(f"matmul {size}", products), count * 2.0 * size**3


def copy_row(device: torch.device, count: int) -> tuple[Row, float]:
    """A copy of ``count`` bytes within the device, and the bytes it moves (read and written)."""
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return Row("copy", lambda: target.copy_(source)), 2.0 * count


def ceiling_rows(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Row, float]]:
    """What the device can do: products of several sizes (the best one counts) and a copy larger than its caches."""
    cuda = device.type == "cuda"
    rows = [matmul_row(device, dtype, size) for size in ((4096, 8192) if cuda else (256, 512, 1024))]
    rows.append(copy_row(device, (1 << 30) if cuda else (1 << 26)))
    return {row.name: (row, work) for row, work in rows}


def ceilings(seconds: dict[str, list[float]], rows: dict[str, tuple[Row, float]]) -> dict[str, Any]:
    """The device's measured ceilings: FLOP/s of the best product and bytes/s of the copy, each with its spread."""
    products = {name: [work / s for s in seconds[name]] for name, (_, work) in rows.items() if name != "copy"}
    best = max(products, key=lambda name: np.median(products[name]))
    copied = [rows["copy"][1] / s for s in seconds["copy"]]
    return {
        "matmul_flops_per_s": spread(products[best]),
        "matmul": best,
        "copy_bytes_per_s": spread(copied),
        "per_round": {"matmul": products[best], "copy": copied},
    }


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter passes over


def count_flops(action: Callable[[], Any]) -> float:
    """FLOPs of one call as torch's FlopCounterMode counts them (products, convolutions, attention)."""

    def attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: attention}) as counter:
        action()
    return float(counter.get_total_flops())


def transformer_flops(config: Any, tokens: int, text_rows: int, image_rows: int) -> float:
    """FLOPs of one forward of a Wan transformer for one clip, a multiply and an add counted as two.

    Args:
        config: of the transformer.
        tokens: of the video, ``T (h / 2) (w / 2)``.
        text_rows: that cross-attention reads; 512 where padding is not folded.
        image_rows: CLIP tokens; 0 for a text-to-video model.
    """
    width, inner = config.num_attention_heads * config.attention_head_dim, config.ffn_dim
    patch = int(np.prod(config.patch_size))
    image = image_rows * (config.image_dim**2 + config.image_dim * width) if image_rows else 0
    outside = tokens * patch * width * (config.in_channels + config.out_channels)
    outside += config.freq_dim * width + 7 * width**2 + text_rows * (config.text_dim * width + width**2) + image
    linear = tokens * (6 * width**2 + 2 * width * inner) + 2 * text_rows * width**2
    linear += 2 * image_rows * (config.added_kv_proj_dim or 0) * width
    attention = 2 * tokens * (tokens + text_rows + image_rows) * width
    return 2.0 * (outside + config.num_layers * (linear + attention))
