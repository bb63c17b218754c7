"""Random numbers that belong to a sample, not to a rank.

Every draw of a training turn is a function of ``(seed, purpose, position)`` where *position* is the sample's place
in the global data stream. Therefore ranks that hold different samples draw different noise, members of one
sequence-parallel group (same samples) draw the same, the number of ranks and the split into micro-batches change
nothing, and a resumed run draws what the undisturbed one would have drawn. The global generator is never used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*key: object) -> int:
    """A 63-bit seed from any printable key.

    torch's CPU generator keeps 32 bits of it: of n streams about n^2 / 2^33 pairs are the same, which no one will see.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_of(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for ``key``."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def rounding_bits(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """16 random bits, int32 ``[count]``, for the elements ``start ..`` of a tensor: a hash of ``key`` and the place.

    Computed where it is wanted, the same everywhere: Wellons' lowbias32 in arithmetic modulo 2^32.
    """
    x = torch.arange(start, start + count, device=device).to(torch.int32)  # places wrap, beyond 2^31
    x ^= (key & 0xFFFFFFFF) - (1 << 31)
    x ^= (x >> 16) & 0xFFFF  # the shift is arithmetic
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    return x.bitwise_xor_(x >> 16) & 0xFFFF


class Draws:
    """The random numbers of one micro-batch.

    Args:
        seed: the run's seed.
        positions: global stream position of each of the B samples.
        device: where the tensors go. Numbers are drawn on the CPU, so that CPU and GPU runs see the same noise.
    """

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> None:
        # plain integers: a numpy one prints, and so seeds, differently
        self.seed, self.positions, self.device = int(seed), tuple(int(p) for p in positions), device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal ``[B, *shape]``, fp32."""
        rows = [
            torch.randn(tuple(shape), generator=generator_of(self.seed, purpose, p), dtype=torch.float32)
            for p in self.positions
        ]
        return torch.stack(rows).to(self.device)

    def normal_like(self, purpose: str, x: Tensor) -> Tensor:
        """Standard normal of the shape of ``x`` ``[B, ...]``."""
        return self.normal(purpose, x.shape[1:])

    def uniform(self, purpose: str) -> Tensor:
        """Uniform on [0, 1), ``[B]``, fp64 (a law's quantile function is applied to it)."""
        rows = [
            torch.rand((), generator=generator_of(self.seed, purpose, p), dtype=torch.float64) for p in self.positions
        ]
        return torch.stack(rows).to(self.device)
