"""The same training turns by two checkouts, turn about: what a change of ``vpae`` did to them.

    git worktree add ../before COMMIT
    python benchmarks/compare_turns.py ../before recipes/quickstart.yaml --set engine.checkpointing=true

Each checkout runs in a process of its own, over the same random weights and clips (those of ``train_step.py``).
Wall clock and the process's own time, medians over paired turns; FLOPs and the loss of the first turn tell that
both compute the same. Writes benchmarks/results/compare_turns_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from measuring import Clock, Row, count_flops, interleaved, paired_ratio, spread
from train_step import Cell, build, config_of, load, phases_of, players_of, take


def serve(cell: Cell, overrides: list[str]) -> None:
    """Answer each line on stdin with a turn: seconds, processor seconds; the first answer holds its FLOPs."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as name:
        trainer, _ = build(load(cell.recipe, overrides), cell.phase, cell, Path(name))
        clock = Clock(trainer.processes.device)
        flops = count_flops(lambda: take(trainer, cell.player))
        norm = float(trainer.gathered[cell.player].sums["gradient_norm"]) if trainer.gathered[cell.player].sums else 0.0
        print(json.dumps({"flops": flops, "gradient_norm": norm}), file=answers, flush=True)
        for _ in sys.stdin:
            used = time.process_time()
            seconds = clock.time(lambda: take(trainer, cell.player))
            print(json.dumps([seconds, time.process_time() - used]), file=answers, flush=True)


class Checkout:
    """A process that takes turns with the ``vpae`` of one checkout."""

    def __init__(self, folder: Path, cell: Cell, overrides: list[str]) -> None:
        told = json.dumps([cell.recipe, cell.phase, cell.player, cell.depth, cell.frames, list(cell.size)])
        command = [sys.executable, __file__, str(folder), "--serve", told, "--set", *overrides]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
        )
        self.first = self._answer()
        self.turns: list[tuple[float, float]] = []

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of a checkout ended with status {self.process.wait()}")
        return json.loads(line)

    def turn(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.turns.append(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(cell: Cell, before: Path, after: Path, overrides: list[str], pairs: int) -> dict[str, Any]:
    """``pairs`` turns of each."""
    sides = {"before": Checkout(before, cell, overrides), "after": Checkout(after, cell, overrides)}
    interleaved([Row(name, side.turn) for name, side in sides.items()], pairs, Clock(torch.device("cpu")), warmup=2)
    for side in sides.values():
        side.close()
    wall, used = ({name: [t[i] for t in side.turns[2:]] for name, side in sides.items()} for i in (0, 1))
    return {
        "phase": cell.phase,
        "player": cell.player,
        "tokens": cell.tokens,
        "blocks": cell.depth,
        "before_seconds": spread(wall["before"]),
        "after_over_before": paired_ratio(wall["after"], wall["before"]),
        "after_over_before_processor_time": paired_ratio(used["after"], used["before"]),
        "first_turn": {name: side.first for name, side in sides.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        *told, size = json.loads(arguments.serve)
        serve(Cell(*told, tuple(size)), arguments.set)
        return 0
    recipe, rows = load(arguments.recipe, arguments.set), []
    for phase in phases_of(recipe):
        for player in players_of(recipe, phase):
            depth = arguments.depth or config_of(recipe)["num_layers"]
            cell = Cell(arguments.recipe, phase, player, depth, 17, (64, 64))
            here = Path(__file__).parents[1]
            rows.append(compare(cell, arguments.before, here, arguments.set, arguments.pairs))
            ratios = [rows[-1][f"after_over_before{kind}"]["median"] for kind in ("", "_processor_time")]
            print(
                f"{phase}, {player}: {ratios[0]:.3f} of the seconds, {ratios[1]:.3f} of the processor time", flush=True
            )
    before = ["git", "-C", str(arguments.before), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(before, capture_output=True, text=True).stdout.strip()
    document = {"benchmark": "compare_turns", "before": commit, "recipe": arguments.recipe, "set": arguments.set}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    target = write_result(f"compare_turns_{kind}", document | {"rows": rows}, arguments.output)
    print(json.dumps(json.loads(target.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
