"""One turn of each player of a phase, by the code that trains, under fake tensors on the CPU.

No weight is read, nothing is allocated and no rank is started: collectives go over torch's ``fake`` process group. (A
CPU build of torch cannot simulate CUDA itself; what CUDA does otherwise is in :func:`_as_on_cuda`.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vpae.backbone import Backbone
from vpae.distill import method_of
from vpae.engine import host
from vpae.engine.layout import placed
from vpae.engine.parallel import Processes, local
from vpae.engine.trainer import Run, Trainer
from vpae.files import write_json
from vpae.methods.base import Method, Player
from vpae.models import Cast, distillation_cast, give_shards, head_of
from vpae.plan.ledger import HOST, Ledger
from vpae.plan.shapes import Shapes
from vpae.recipe import Distill


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for.

    Attributes:
        ranks: one a GPU, over all machines.
        machines: they are spread over, evenly.
        cuda: count what CUDA's kernels keep, and not the CPU's.
    """

    ranks: int
    machines: int = 1
    cuda: bool = True


@dataclass(frozen=True)
class TurnLoad:
    """What one turn of one player takes on one rank.

    Attributes:
        segments: of the turn, in order: the most bytes on the device at once, by kind.
        flops: of all its micro-batches.
        turns: it takes in the phase.
    """

    segments: tuple[dict[str, float], ...]
    flops: float
    turns: int


@dataclass(frozen=True)
class PhaseLoad:
    """What a phase takes on one rank; bytes.

    Attributes:
        resting: on the device between turns, by kind.
        host: in the machine's memory for good, by kind.
        turns: by player.
        checkpoint: a whole checkpoint of all ranks on disk.
        checkpoint_share: of it, what one rank writes.
        parameters: of one network.
        largest_tensor: the largest slice of a weight that a rank reads.
    """

    resting: dict[str, float]
    host: dict[str, float]
    turns: dict[str, TurnLoad]
    checkpoint: float
    checkpoint_share: float
    parameters: float
    largest_tensor: float


class _Simulated(Processes):
    """Rank 0 of ranks that are not there: they agree with it."""

    def agree(self, flags):
        return [bool(flag) for flag in flags]

    def mean(self, values):
        return values

    def gather(self, value):
        return [value] * self.size

    def barrier(self) -> None:
        return None

    def together(self, action, *, main_only: bool = False):
        return action()


class Silent:
    """In the tracker's place: says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def ranks(hardware: Hardware) -> Iterator[Processes]:
    """Rank 0 of ``hardware.ranks``, the others made up.

    Raises:
        RuntimeError: this process already has a process group.
    """
    if hardware.ranks == 1:
        yield _Simulated(0, 1, torch.device("cpu"), None)
        return
    if dist.is_initialized():
        raise RuntimeError("ranks are simulated in a process of their own, and this one has joined real ranks")
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(hardware.ranks // hardware.machines)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=hardware.ranks)
    try:
        mesh = init_device_mesh("cpu", (hardware.ranks,), mesh_dim_names=("shard",))
        yield _Simulated(0, hardware.ranks, torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ["LOCAL_WORLD_SIZE"] = before


def simulate(recipe: Distill, phase: str, shapes: Shapes, hardware: Hardware, blocks: int | None = None) -> PhaseLoad:
    """Build a phase and take one turn of each of its players.

    Args:
        blocks: in place of the transformer's own number of blocks.

    Raises:
        UserError: whatever building the phase finds wrong with the recipe on these ranks.
    """
    with tempfile.TemporaryDirectory() as name, ranks(hardware) as alike:
        config = shapes.config if blocks is None else shapes.config | {"num_layers": blocks}
        write_json(Path(name) / "transformer" / "config.json", config)
        recipe = _simulable(recipe, Path(name), shapes.config["num_layers"], blocks)
        processes = placed(alike, recipe.engine)
        share = processes.share(recipe.engine.global_batch)
        with contextlib.ExitStack() as fake, _any_host(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # FSDP's, of training too
            return _simulate(recipe, phase, shapes, processes, hardware, share, fake)


@contextlib.contextmanager
def _any_host() -> Iterator[None]:
    """Let what is built not look at the memory of this machine, which is not the one that is planned for."""
    free, host.free_memory = host.free_memory, lambda: None
    try:
        yield
    finally:
        host.free_memory = free


def _simulable(recipe: Distill, folder: Path, layers: int, blocks: int | None) -> Distill:
    """The recipe with what cannot be simulated replaced by what takes as much.

    Kernels that are not installed here keep what torch's own fused one keeps; compiled blocks are planned as they are
    uncompiled, which takes more.
    """
    attention = recipe.teacher.attention if recipe.teacher.attention == "native_math" else "native"
    teacher = dataclasses.replace(recipe.teacher, path=str(folder), attention=attention)
    equilibrium = recipe.equilibrium
    if blocks is not None and equilibrium is not None and equilibrium.taps is not None:
        taps = tuple(sorted({max(0, round((tap + 1) * blocks / layers) - 1) for tap in equilibrium.taps}))
        equilibrium = dataclasses.replace(equilibrium, taps=taps)
    engine = dataclasses.replace(recipe.engine, compile=False, async_checkpoints=False)
    return dataclasses.replace(recipe, teacher=teacher, equilibrium=equilibrium, engine=engine)


def _simulate(
    recipe: Distill,
    phase: str,
    shapes: Shapes,
    processes: Processes,
    hardware: Hardware,
    share: int,
    fake: contextlib.ExitStack,
) -> PhaseLoad:
    ledger, mode = Ledger(), FakeTensorMode(allow_non_fake_inputs=True)

    def born(cast: Cast, processes: Processes, ema_on: str) -> None:
        fake.enter_context(mode)  # not before: networks that are fake on the meta device cannot be given memory
        fake.enter_context(ledger.open())
        give_shards(cast, processes, ema_on)

    def built(*args: Any, **kwargs: Any) -> nn.Module:
        with mode, ledger.open():
            return head_of(*args, **kwargs)

    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
    method, heads = method_of(recipe, phase, cast, processes, born, built)
    micro = min(recipe.engine.micro_batch, share)
    count = -(-share // micro)  # micro-batches a turn; one is simulated
    engine = dataclasses.replace(recipe.engine, global_batch=micro * (recipe.engine.global_batch // share))
    modules = [b.transformer for b in cast.backbones] + heads
    run = Run(Path("."), engine, 0, {}, "", lambda indices, draws: shapes.batch(draws), 1 << 20, modules)
    trainer = Trainer(method, run, processes)
    on_host = _name(ledger, recipe, method, heads, trainer)
    resting = ledger.kinds()
    for backbone in cast.backbones:
        _follow(backbone, ledger)
        if hardware.cuda:
            _as_on_cuda(backbone)
    ledger.truth = True
    players = {name: _turn(trainer, name, count, ledger) for name in method.players}
    tensors = trainer.tensors()
    largest = max(local(p).nbytes for b in cast.backbones for p in b.transformer.parameters())
    return PhaseLoad(
        resting,
        on_host,
        players,
        float(sum(t.numel() * t.element_size() for t in tensors.values())),
        float(sum(local(t).numel() * t.element_size() for t in tensors.values())),
        float(sum(p.numel() for p in cast.teacher.parameters())),
        float(largest),
    )


_ROLES = ("teacher", "student", "fake_score", "judge", "ema")


def _name(ledger: Ledger, recipe: Distill, method: Method, heads: list[nn.Module], trainer: Trainer) -> dict[str, int]:
    """Say whose everything is that is there before the first turn; returns what is kept in host memory, by kind."""
    engine, on_host = recipe.engine, {}
    for name in _ROLES:
        role = getattr(method, name, None)
        if role is None or role.name != name:  # the judge may be another role
            continue
        parameters = list(map(local, role.parameters()))
        ledger.name(parameters, "EMA" if name == "ema" else f"weights of {name}")
        if name == "ema" and engine.ema_on == "cpu" and isinstance(role.parameters()[0], DTensor):
            on_host["EMA"] = ledger.name(parameters, HOST)
    for head in heads:
        ledger.name(map(local, head.parameters()), "weights of head")
    for name, optimiser in trainer.optimisers.items():
        state = [x for values in optimiser.state.values() for x in values.values() if isinstance(x, Tensor)]
        kept = ledger.name(map(local, state), f"optimiser of {name}")
        if engine.optimiser_state == "cpu":
            on_host[f"optimiser of {name}"] = kept
            ledger.name(map(local, state), HOST)
    ledger.name_rest("other")
    return on_host


def _follow(backbone: Backbone, ledger: Ledger) -> None:
    """Begin a segment with each pass through the network and as its backward comes by the ends and the middle."""
    transformer = backbone.transformer

    def passing(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ledger.mark("forward")

    def leaving(module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            output.register_hook(lambda gradient: ledger.mark("backward"))

    transformer.register_forward_pre_hook(passing, with_kwargs=True)
    last = len(transformer.blocks) - 1
    for index in {0, last // 2, last}:
        transformer.blocks[index].register_forward_hook(leaving)


class _FusedRmsNorm(torch.autograd.Function):
    """What CUDA's kernel allocates: the result, a number a row, and in the backward two gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _as_on_cuda(backbone: Backbone) -> None:
    """CUDA's autocast computes RMS norms in fp32, by one kernel; the CPU's leaves bf16, by several operations."""
    for module in backbone.transformer.modules():
        if isinstance(module, nn.RMSNorm):

            def forward(x: Tensor, module: nn.RMSNorm = module) -> Tensor:
                exact = x.float() if torch.is_autocast_enabled("cpu") else x
                return _FusedRmsNorm.apply(exact, module.weight.to(exact.dtype))

            module.forward = forward


def _turn(trainer: Trainer, name: str, micro_batches: int, ledger: Ledger) -> TurnLoad:
    method, player = trainer.method, trainer.method.players[name]
    while method.player_of(trainer.turn) != name:
        trainer.turn += 1
    if micro_batches > 1:  # those of the micro-batches before this one
        for parameter in player.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        _name_gradients(player, ledger)
    step = trainer._step

    def stepping(stepped: Player, finite: Tensor) -> Tensor:
        _name_gradients(stepped, ledger)
        ledger.mark("step")
        return step(stepped, finite)

    trainer._step = stepping
    try:
        ledger.start()
        trainer._take_turn(Silent())
    finally:
        del trainer._step
    segments = tuple(segment.kinds() for segment in ledger.segments)
    return TurnLoad(segments, ledger.flops * micro_batches, player.steps)


def _name_gradients(player: Player, ledger: Ledger) -> None:
    gradients = [local(p.grad) for p in player.parameters.values() if p.grad is not None]
    ledger.name(gradients, f"gradients of {player.name}")
