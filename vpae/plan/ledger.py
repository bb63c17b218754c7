"""Every byte that is alive while code runs under fake tensors: how many at the most, when, and whose.

Storages are counted from the operation that makes them until Python lets go of the last tensor on them, in program
order. CUDA's allocator hands out memory in that order too, whatever the streams do later.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_FLOPS = dict(flop_registry)  # the CPU's fused attention is missing from it
_FLOPS[aten._scaled_dot_product_flash_attention_for_cpu] = _FLOPS[aten._scaled_dot_product_flash_attention]
_FLOPS[aten._scaled_dot_product_flash_attention_for_cpu_backward] = _FLOPS[
    aten._scaled_dot_product_flash_attention_backward
]
_PLAIN = (Tensor, FakeTensor, torch.nn.Parameter)
_GROWTH = 1.02  # a segment's holdings are written down again when they have grown by this

GATHERED, ACTIVATIONS, TEMPORARY, HOST = "gathered weights", "activations", "temporary", "host"


@dataclass(eq=False, slots=True)
class Held:
    """A storage that is alive; ``kind`` may become known later."""

    size: int
    kind: str = ""


@dataclass
class Segment:
    """A stretch of a turn: the most bytes on the device at once, and what they were (to within two percent)."""

    name: str
    peak: int
    noted: float = 0.0
    held: list[tuple[Held, int]] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """Bytes by kind at the peak; what nobody has named is temporary."""
        found: dict[str, int] = defaultdict(int)
        for held, size in self.held:
            if held.kind != HOST:
                found[held.kind or TEMPORARY] += size
        found[TEMPORARY] += self.peak - sum(found.values())
        return dict(found)


class Ledger(TorchDispatchMode):
    """Counts storages and floating-point operations of all that runs inside ``with ledger.open():``.

    Attributes:
        live: bytes on the device now.
        flops: operations since :meth:`start`.
        truth: what a fake tensor answers that is asked for its truth; its number is always 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.flops = self.paused = 0
        self.truth = False
        self.held: dict[int, Held] = {}
        self._refs: dict[int, weakref.ref] = {}
        self.segments: list[Segment] = []
        self._in_backward = False
        self.start()

    @contextlib.contextmanager
    def open(self) -> Iterator[Ledger]:
        """Count.

        FSDP frees and regains the memory of gathered weights by a call that no dispatch mode sees. And what operations
        on sharded tensors would make is found by torch with whole tensors that are fake in earnest: they do not count.
        """
        resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            held = self.held.get(storage._cdata)
            if held is not None:
                held.kind = held.kind or GATHERED
                self._grow(storage.nbytes() - held.size)
                held.size = storage.nbytes()

        def propagated(*args: Any, **kwargs: Any) -> Any:
            self.paused += 1
            try:
                return propagate(*args, **kwargs)
            finally:
                self.paused -= 1

        torch.UntypedStorage.resize_ = resized
        ShardingPropagator._propagate_tensor_meta_non_cached = propagated
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize
            ShardingPropagator._propagate_tensor_meta_non_cached = propagate

    def start(self) -> None:
        """Begin a turn: no segments, no operations."""
        self.segments, self.flops, self._in_backward = [], 0, False
        self.mark("start")

    def mark(self, name: str) -> None:
        """Begin a segment."""
        self.segments.append(Segment(name, self.live))
        self._grow(0)

    def name(self, tensors: Iterable[Tensor], kind: str) -> int:
        """Say what the storages of plain tensors are; returns their bytes. ``HOST`` takes them off the device."""
        total = 0
        for tensor in tensors:
            for storage in _storages(tensor):
                held = self.held.get(storage._cdata)
                if held is None:
                    continue
                if kind == HOST and held.kind != HOST:
                    self.live -= held.size
                held.kind = kind
                total += held.size
        return total

    def name_rest(self, kind: str) -> None:
        """Say what everything alive is that has no name."""
        for held in self.held.values():
            held.kind = held.kind or kind

    def kinds(self) -> dict[str, int]:
        """Bytes on the device now, by kind."""
        found: dict[str, int] = defaultdict(int)
        for held in self.held.values():
            if held.kind != HOST:
                found[held.kind] += held.size
        return dict(found)

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = Held(storage.nbytes())
            self._refs[key] = weakref.ref(storage, lambda _, key=key: self._drop(key))
            self._grow(self.held[key].size)

    def _drop(self, key: int) -> None:
        held = self.held.pop(key)
        del self._refs[key]
        if held.kind != HOST:
            self.live -= held.size

    def _grow(self, more: int) -> None:
        self.live += more
        segment = self.segments[-1]
        segment.peak = max(segment.peak, self.live)
        if self.live > segment.noted * _GROWTH:
            segment.noted = self.live
            segment.held = [(held, held.size) for held in self.held.values()]

    def _watch_backward(self) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if backward and not self._in_backward:
            self.name_rest(ACTIVATIONS)  # what the forward has kept
            self.mark("backward")
        self._in_backward = backward

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a sharded tensor's own parts come by again
        if func is aten._local_scalar_dense.default:
            return self.truth if args[0].dtype == torch.bool else 1.0
        if self.paused:
            return func(*args, **(kwargs or {}))
        self._watch_backward()
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor, through whatever wraps it."""
    if hasattr(tensor, "to_local") or (type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__")):
        names = tensor.__tensor_flatten__()[0]
        return [storage for name in names for storage in _storages(getattr(tensor, name))]
    return [tensor.untyped_storage()]
