"""``vpae plan``."""

from __future__ import annotations

import argparse
import sys

from vpae import recipe as recipes
from vpae.engine.host import GIB
from vpae.errors import UserError
from vpae.files import write_json
from vpae.plan.account import document, make_plan
from vpae.plan.advise import advise
from vpae.plan.show import advice_text, plan_text
from vpae.plan.simulate import Hardware


def plan(arguments: argparse.Namespace) -> bool:
    """Plan a recipe, print it, and where it does not fit say what would.

    Raises:
        UserError: it does not fit, or cannot run on these GPUs.
    """
    recipe = recipes.load(arguments.recipe, tuple(arguments.overrides))
    hardware = Hardware(arguments.gpus, arguments.machines)
    made = make_plan(recipe, hardware, arguments.gpu_memory * GIB, whole=arguments.whole, in_use=arguments.in_use)
    print(plan_text(made, arguments.tflops), flush=True)
    written = document(made, arguments.tflops)
    advice = None
    if made.failing:
        print("It does not fit. Planning what would ...", file=sys.stderr, flush=True)
        advice = advise(made, lambda settings: print(f"  {settings}", file=sys.stderr, flush=True))
        print(advice_text(made, advice), flush=True)
        written["advice"] = None
        if advice is not None:
            written["advice"] = {"set": advice.settings, **document(advice.plan, arguments.tflops)["phases"]}
    if arguments.json is not None:
        write_json(arguments.json, written)
    if made.failing:
        wanted = max(made.phases[phase].peak for phase in made.failing) / GIB
        mend = f"; --set {advice.settings} makes it fit" if advice is not None else ""
        raise UserError(
            f"{recipe.name} does not fit: a GPU would need {wanted:.1f} GiB of its {made.memory / GIB:.1f}{mend}"
        )
    return True
