"""What a training turn costs: seconds, FLOPs and peak memory, per player and method, against tokens and depth.

    python benchmarks/train_step.py                                    # the tiny teacher's widths, on a CPU
    python benchmarks/train_step.py recipes/quickstart.yaml --depth 6 12 24 --size 64 64 --size 96 96 --size 128 128
    python benchmarks/train_step.py recipes/wan21_i2v_14b_480p_lora_1gpu.yaml --depth 4 8 40 --size 480 832 --frames 81

Networks have the recipe's widths and random weights, clips are random tensors: time and memory do not depend on the
values. Every cell (recipe, phase, player, tokens, depth) is a process of its own, so that its peak is its own: resident
memory on a CPU, allocated memory on a GPU. Beside it stands what ``vpae plan`` foresees for the cell: to be compared on
a GPU; on a CPU the peak also holds the libraries' code and buffers, which plan.py takes off. Turns are the trainer's,
whole: data, noise, loss, backward, clipping, AdamW, EMA; the head's is one with ST-R1 (under ``r1.every: 4`` three of
four turns go without and cost less). For the two phases of V-PAE (full student) the same turn is
also taken by a bare loop over diffusers (``bare_step.py``), turn about in one process; both compute all 512 text rows
there, and the FLOPs of both are counted.
Writes benchmarks/results/train_step_DEVICE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bare_step import BareStep
from common import RESULTS, write_result
from measuring import Clock, Row, count_flops, interleaved, paired_ratio, peak_bytes, reset_peak, spread
from subjects import draw_weights
from torch import Tensor

from vpae import models, runs
from vpae import recipe as recipes
from vpae.conditioning import Condition, first_frame_mask
from vpae.data.encoders import transformer_config
from vpae.distill import build_phase
from vpae.draws import Draws, generator_of
from vpae.engine.parallel import alone
from vpae.engine.trainer import Trainer
from vpae.errors import UserError
from vpae.files import write_json
from vpae.methods.base import Batch
from vpae.plan.account import phase_load
from vpae.plan.shapes import shapes_of
from vpae.plan.simulate import Hardware, Silent
from vpae.released import TRANSFORMERS

TEXT_ROWS = 24  # a prompt of usual length


class RandomClips:
    """Random tensors with the surface of a cache: what a turn reads, without a disk."""

    fingerprint, folder, kind, manifest = "random", Path(), "i2v", {"temporal_stride": 4}

    def __init__(self, config: dict[str, Any], latent_shape: tuple[int, ...], count: int, device: torch.device) -> None:
        def draw(name: str, *shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator_of(0, name)).to(device)

        self.latent_shape, self.count = latent_shape, count
        self.x0, latent = draw("x0", *latent_shape), draw("latent", *latent_shape)
        mask = first_frame_mask(*latent_shape[1:]).to(device).expand(count, -1, -1, -1, -1)
        text, image = (
            draw("text", TEXT_ROWS, config["text_dim"]),
            draw("image", config["image_rows"], config["image_dim"]),
        )
        self.condition = Condition(text, image, latent, mask)
        self.null = self.condition.null(torch.zeros_like(text[:1]))
        self.noise = draw("noise", *latent_shape)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, name: str) -> Tensor:
        return getattr(self.condition, name)[index]

    def fetch(self, indices: list[int], draws: Draws) -> Batch:
        """As a cache answers; with the noise of the clips where a method learns from the teacher's own."""
        rows = torch.tensor([i % self.count for i in indices], device=self.x0.device)
        return Batch(self.x0[rows], self.condition[rows], self.null[rows], draws, noise=self.noise[rows])


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing to measure: a player's turn at one size."""

    recipe: str
    phase: str
    player: str
    depth: int
    frames: int
    size: tuple[int, int]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return 16, (self.frames - 1) // 4 + 1, self.size[0] // 8, self.size[1] // 8

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latent_shape
        return frames * (height // 2) * (width // 2)


def phases_of(recipe: recipes.Recipe) -> list[str]:
    """The phases that a distillation holds, in order."""
    return [phase for phase in runs.PHASES if getattr(recipe, phase) is not None]


def config_of(recipe: recipes.Distill) -> dict[str, Any]:
    """The transformer's config: of the released model that the recipe names, or of its folder."""
    name = Path(recipe.teacher.path).name
    if name in TRANSFORMERS:
        return dict(TRANSFORMERS[name])
    return transformer_config(models.find_model(recipe.teacher.path))


def image_rows(recipe: recipes.Distill) -> int:
    """CLIP tokens of a first frame."""
    if Path(recipe.teacher.path).name in TRANSFORMERS:
        return 257
    clip = json.loads((models.find_model(recipe.teacher.path) / "image_encoder" / "config.json").read_text())
    return (clip["image_size"] // clip["patch_size"]) ** 2 + 1


def build(recipe: recipes.Distill, phase: str, cell: Cell, folder: Path) -> tuple[Trainer, RandomClips]:
    """The trainer of a phase over random weights and clips, at its first turn."""
    config = config_of(recipe) | {"num_layers": cell.depth}
    rows = {"image_rows": image_rows(recipe)}
    write_json(folder / "transformer" / "config.json", config)
    recipe = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, path=str(folder)))
    if phase == "equilibrium":  # the recipe's blocks may not be there
        recipe = dataclasses.replace(recipe, equilibrium=dataclasses.replace(recipe.equilibrium, taps=None))
    processes = alone()
    batch = recipe.engine.global_batch
    clips = RandomClips(config | rows, cell.latent_shape, batch, processes.device)
    with mock.patch.object(models, "read_weights", lambda backbone, *_: draw_weights(backbone.transformer)):
        trainer = build_phase(recipe, phase, folder, clips, None, processes)
    trainer.run.gallery = None
    return trainer, clips


def turn_of(trainer: Trainer, player: str) -> int:
    """A turn at which ``player`` moves."""
    return next(turn for turn in range(trainer.method.turns) if trainer.method.player_of(turn) == player)


def take(trainer: Trainer, player: str) -> None:
    """One turn of ``player``, whoever's turn it is."""
    trainer.turn = turn_of(trainer, player)
    trainer._take_turn(Silent())


def load(path: str, overrides: list[str]) -> recipes.Distill:
    return recipes.load(Path(path), tuple(overrides))


def measure(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, FLOPs and peak of one cell; this process is nobody else's."""
    with tempfile.TemporaryDirectory() as name:
        clock = Clock(alone().device)
        before = peak_bytes(clock.device)
        trainer, _ = build(load(cell.recipe, arguments.set), cell.phase, cell, Path(name))
        take(trainer, cell.player)
        reset_peak(clock.device)
        seconds = interleaved([Row("turn", lambda: take(trainer, cell.player))], arguments.repeats, clock, warmup=1)
        peak = peak_bytes(clock.device)
        flops = count_flops(lambda: take(trainer, cell.player))
    return {
        "seconds": spread(seconds["turn"]),
        "peak_bytes": peak,
        "bytes_before": before,
        "flops": flops,
        "trained_parameters": sum(p.numel() for p in trainer.method.players[cell.player].parameters.values()),
    }


def planned(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``vpae plan`` foresees for the cell: the most bytes at once in its player's turn."""
    recipe = load(cell.recipe, arguments.set)
    if recipe.equilibrium is not None:
        recipe = dataclasses.replace(recipe, equilibrium=dataclasses.replace(recipe.equilibrium, taps=None))
    config = config_of(recipe) | {"num_layers": cell.depth}
    found = shapes_of(recipe)
    shapes = dataclasses.replace(found, config=config, latent=cell.latent_shape, text_rows=TEXT_ROWS)
    load_of_phase = phase_load(recipe, cell.phase, shapes, Hardware(1, cuda=torch.cuda.is_available()))
    return {"planned_bytes": round(max(sum(part.values()) for part in load_of_phase.turns[cell.player].segments))}


def against_bare(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """The trainer's turn and the bare loop's, turn about."""
    overrides = [*arguments.set, "teacher.fold_text_padding=false"]
    recipe = load(cell.recipe, overrides)
    with tempfile.TemporaryDirectory() as name:
        trainer, clips = build(recipe, cell.phase, cell, Path(name))
        clock = Clock(trainer.processes.device)
        method: Any = trainer.method
        bare = BareStep(
            recipe,
            cell.phase,
            config_of(recipe) | {"num_layers": cell.depth},
            clock.device,
            getattr(method, "head", None),
            getattr(method, "taps", ()),
        )
        indices = list(range(recipe.engine.global_batch))
        batch = clips.fetch(indices, Draws(0, indices, clock.device))
        used: dict[str, list[float]] = {"vpae": [], "bare": []}

        def noted(label: str, run: Any) -> Any:
            def call() -> None:
                started = time.process_time()
                run()
                used[label].append(time.process_time() - started)

            return call

        turns = {"vpae": lambda: take(trainer, cell.player), "bare": lambda: bare.step(cell.player, batch)}
        flops = {label: count_flops(run) for label, run in turns.items()}
        rows = [Row(label, noted(label, run)) for label, run in turns.items()]
        seconds = interleaved(rows, arguments.pairs, clock)
    found = {
        "phase": cell.phase,
        "player": cell.player,
        "bare_seconds": spread(seconds["bare"]),
        "vpae_over_bare": paired_ratio(seconds["vpae"], seconds["bare"]),
        "flops": flops,
    }
    if not clock.cuda:
        found["vpae_over_bare_processor_time"] = paired_ratio(used["vpae"][1:], used["bare"][1:])
    return found


def _child(pipe: Any, function: Any, cell: Cell, arguments: argparse.Namespace) -> None:
    try:
        pipe.send(function(cell, arguments))
    except UserError as error:
        pipe.send(str(error))
    except Exception:  # told by the parent, which goes on with the other cells
        pipe.send(traceback.format_exc())


def in_own_process(function: Any, cell: Cell, arguments: argparse.Namespace) -> dict[str, Any] | str:
    """The function's answer from a fresh process, or what went wrong there.

    Forked from one that has imported everything, computed nothing and touched no GPU.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, function, cell, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return "the process was ended (memory may have run out)"
    finally:
        process.join()


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Of each recipe, phase and player: depths at the first size, sizes at the first depth."""
    for path in arguments.recipes:
        recipe = load(path, arguments.set)
        depths = arguments.depth or [config_of(recipe)["num_layers"]]
        sizes = [tuple(size) for size in arguments.size]
        grid = [(depth, sizes[0]) for depth in depths] + [(depths[0], size) for size in sizes[1:]]
        for phase in phases_of(recipe):
            for player in players_of(recipe, phase):
                for depth, size in grid:
                    yield Cell(path, phase, player, depth, arguments.frames, size)


def players_of(recipe: recipes.Distill, phase: str) -> tuple[str, ...]:
    """Who takes turns in a phase."""
    return ("fake_score", "student") if phase == "priming" else ("head", "student")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["recipes/quickstart.yaml"])
    parser.add_argument("--depth", type=int, nargs="+", help="numbers of blocks; default: the teacher's own")
    parser.add_argument(
        "--size", type=int, nargs=2, action="append", metavar=("HEIGHT", "WIDTH"), help="may be repeated"
    )
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--repeats", type=int, default=5, help="of a cell; 0: the bare loop alone")
    parser.add_argument("--pairs", type=int, default=12, help="turns of vpae and of the bare loop; 0: none")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as for vpae distill")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    warnings.filterwarnings("ignore", message=".*Mismatch dtype between input and weight.*")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    arguments.size = arguments.size or [[64, 64]]
    rows, bare, failed = [], [], {}
    columns = f"{'blocks':>7}{'tokens':>8}{'s a turn':>10}{'GFLOP':>9}{'peak MiB':>10}{'planned':>9}"
    print(f"{'recipe, phase, player':<44}{columns}")
    try:
        for cell in cells(arguments) if arguments.repeats else ():
            label = f"{Path(cell.recipe).stem}, {cell.phase}, {cell.player}"
            found = in_own_process(measure, cell, arguments)
            if isinstance(found, str):
                failed[f"{label}, {cell.depth} blocks, {cell.tokens} tokens"] = found
                print(f"{label:<44}{cell.depth:>7}{cell.tokens:>8}  failed: {found.strip().splitlines()[-1]}")
                continue
            plan = in_own_process(planned, cell, arguments)
            if isinstance(plan, str):
                failed[f"plan of {label}, {cell.depth} blocks, {cell.tokens} tokens"], plan = plan, {}
            rows.append({**dataclasses.asdict(cell), "tokens": cell.tokens, **found, **plan})
            print(
                f"{label:<44}{cell.depth:>7}{cell.tokens:>8}{found['seconds']['median']:>10.3f}"
                f"{found['flops'] / 1e9:>9.1f}{found['peak_bytes'] / 2**20:>10.0f}"
                f"{plan.get('planned_bytes', float('nan')) / 2**20:>9.0f}",
                flush=True,
            )
        first = {(c.recipe, c.phase, c.player): c for c in reversed(list(cells(arguments)))}
        for cell in first.values() if arguments.pairs else ():
            if cell.phase not in runs.PHASES or load(cell.recipe, arguments.set).student.kind != "full":
                continue
            found = in_own_process(against_bare, cell, arguments)
            if isinstance(found, str):
                failed[f"bare loop, {cell.phase}, {cell.player}"] = found
                print(f"bare loop, {cell.phase}, {cell.player}: failed: {found.strip().splitlines()[-1]}")
                continue
            bare.append(found)
            by_clock = found["vpae_over_bare"]["median"]
            used = found.get("vpae_over_bare_processor_time", {}).get("median", float("nan"))
            same = found["flops"]["vpae"] / found["flops"]["bare"]
            print(
                f"{cell.phase}, {cell.player}: {by_clock:.3f} of the bare loop's seconds ({used:.3f} of its processor "
                f"time), {same:.4f} of its FLOPs",
                flush=True,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    document = {"benchmark": "train_step", "command": "train_step.py " + " ".join(sys.argv[1:]), "set": arguments.set}
    document |= {"weights": "random", "rows": rows, "against_bare_loop": bare, "failed": failed}
    name = f"train_step_{kind}" if arguments.repeats else f"train_step_bare_{kind}"
    target = write_result(name, document, arguments.output)
    print(json.dumps(json.loads(target.read_text())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
