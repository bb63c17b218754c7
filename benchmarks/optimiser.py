"""What each way of keeping Adam's moments takes and does: bytes, distance from fp32, and the stall of bf16.

    python benchmarks/optimiser.py            # writes results/optimiser.json; int8 where torchao is installed

Gradients are noise whose size falls by a factor of 30 after the first tenth of the steps, so that second moments must
come down: what is rounded to the nearest bf16 number stays up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json

import torch
from common import write_result
from torch import Tensor, nn

from vpae.draws import generator_of
from vpae.engine import adam, optim
from vpae.engine.host import local_bytes
from vpae.methods.base import Player
from vpae.recipe import Optimiser

SHAPES = {"attention": (256, 256), "feed_forward": (512, 256), "adapter": (256, 64), "bias": (256,)}


def player(beta2: float) -> Player:
    settings = Optimiser(1e-4, (0.0, beta2), 1e-8, 0.0, 0, "constant", None)
    weights = {name: nn.Parameter(torch.randn(s, generator=generator_of("w", name))) for name, s in SHAPES.items()}
    return Player("student", weights, settings, 1)


def run(state: str, beta2: float, steps: int) -> dict[str, object]:
    """Weights, second moments and bytes a parameter after ``steps`` steps."""
    who = player(beta2)
    optimiser = optim.build_optimiser(who, state)
    for step in range(steps):
        for name, parameter in who.parameters.items():
            size = 1.0 if step < steps // 10 else 1 / 30
            parameter.grad = size * torch.randn(parameter.shape, generator=generator_of("g", name, step))
        optimiser.step()
    kept = [t for p in who.parameters.values() for t in adam.stored(optimiser, p).values()]
    seconds = [optimiser.state[p]["exp_avg_sq"] for p in who.parameters.values()]
    seconds = [m.dequantize() if hasattr(m, "codes") else m for m in seconds]
    return {
        "weights": torch.cat([p.detach().flatten() for p in who.parameters.values()]),
        "second": torch.cat([m.float().flatten() for m in seconds]),
        "bytes": local_bytes(kept) / sum(p.numel() for p in who.parameters.values()),
    }


def to_nearest(value: Tensor, bits: Tensor) -> Tensor:
    return value.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    states = ["fp32", "cpu", "bf16", "bf16 to the nearest"] + (["int8"] if importlib.util.find_spec("torchao") else [])
    start = torch.cat([p.detach().flatten() for p in player(0.99).parameters.values()])
    rows, at_random = [], adam.round_to_bf16
    for beta2 in (0.99, 0.999):
        for state in states:
            adam.round_to_bf16 = to_nearest if state.endswith("nearest") else at_random
            found = run(state.split()[0], beta2, arguments.steps)
            if state == "fp32":
                reference = found
            row = {
                "state": state,
                "beta2": beta2,
                "bytes_a_parameter": round(found["bytes"], 3),
                "second_moment_to_fp32": round(float(found["second"].mean() / reference["second"].mean()), 4),
                "distance_from_fp32": round(
                    float((found["weights"] - reference["weights"]).norm() / (reference["weights"] - start).norm()), 6
                ),
            }
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
    print(json.dumps({"result": str(write_result("optimiser", {"steps": arguments.steps, "rows": rows}))}))


if __name__ == "__main__":
    main()
