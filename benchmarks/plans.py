"""Plans of the recipes for released models on 80 GB cards, for the README: nothing is measured here.

    python benchmarks/plans.py

The same as `vpae plan RECIPE --gpus N --gpu-memory 79 --set ...` for each line of CASES; 80 GB cards report 79.1 to
79.6 GiB. Writes benchmarks/results/plans_14b.json after each of them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from common import write_result

from vpae import recipe as recipes
from vpae.engine.host import GIB
from vpae.plan.account import document, make_plan
from vpae.plan.show import plan_text
from vpae.plan.simulate import Hardware

RECIPES = Path(__file__).parent.parent / "recipes"
MEMORY = 79  # GiB
CASES = [
    ("wan21_i2v_14b_480p", 8, ("engine.sequence_parallel=2",)),
    ("wan21_i2v_14b_480p_lora_1gpu", 1, ()),
    ("wan21_i2v_14b_720p", 8, ("engine.sequence_parallel=8",)),
    ("wan21_t2v_1_3b", 1, ()),
    ("wan22_ti2v_5b", 8, ()),
    ("wan21_i2v_14b_480p", 8, ("engine.sequence_parallel=1",)),
]


def main() -> None:
    plans = []
    for name, gpus, settings in CASES:
        started = time.process_time()
        recipe = recipes.load(RECIPES / f"{name}.yaml", settings)
        plan = make_plan(recipe, Hardware(gpus), MEMORY * GIB)
        print(plan_text(plan, 400.0), flush=True)
        plans.append(
            {"set": list(settings), "planning_cpu_seconds": round(time.process_time() - started, 1)}
            | document(plan, 400.0)
        )
        write_result("plans_14b", {"benchmark": "plans_14b", "plans": plans})
    print(json.dumps(plans))


if __name__ == "__main__":
    main()
