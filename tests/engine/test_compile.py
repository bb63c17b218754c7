"""Compiled blocks: with gradient checkpointing, adapters and shards, the gradients of blocks that are not compiled."""

from __future__ import annotations

import shutil

import pytest
from helpers import differing, make_trainer, read_tensors, snapshot, write_recipe

PLAYERS = {"priming": ("student", "fake_score"), "equilibrium": ("student", "head")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
]


@pytest.fixture
def still_recipe(micro_recipe):
    """Nothing moves, so that round-off is not magnified by Adam from turn to turn."""
    for phase in PLAYERS:
        micro_recipe[phase]["student_steps"] = 1
        for settings in micro_recipe[phase].values():
            if isinstance(settings, dict) and "learning_rate" in settings:
                settings |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    return micro_recipe


def _same_gradients(plain, compiled, phase):
    for player in PLAYERS[phase]:
        a, b = (
            {k: v for k, v in found.items() if k.startswith(f"optimiser.{player}.") and k.endswith("exp_avg")}
            for found in (plain, compiled)
        )
        scale = max(float(v.abs().max()) for v in a.values())
        assert scale > 0 and differing(a, b, tolerance=1e-4 * scale) == [], (phase, player)


@pytest.mark.parametrize(("kind", "checkpointing"), [("full", False), ("full", True), ("lora", True)])
@pytest.mark.parametrize("phase", PLAYERS)
def test_compiled_blocks_give_the_same_gradients(still_recipe, tmp_path, phase, kind, checkpointing):
    still_recipe["student"]["kind"], still_recipe["engine"]["checkpointing"] = kind, checkpointing
    found = []
    for compiled in (False, True):
        still_recipe["engine"]["compile"] = compiled
        trainer = make_trainer(still_recipe, phase, tmp_path / str(compiled))
        trainer.train(until=trainer.method.turns)
        found.append(snapshot(trainer))
    _same_gradients(*found, phase)


@pytest.mark.parametrize(("kind", "place"), [("full", "device"), ("full", "cpu"), ("lora", "device")])
def test_two_ranks_with_compiled_blocks(vpae, still_recipe, tmp_path, kind, place):
    """Shards, checkpointing, and the EMA in host memory."""
    still_recipe["student"]["kind"] = kind
    still_recipe["engine"] |= {"checkpointing": True, "ema_on": place}
    for compiled in (False, True):
        still_recipe["engine"]["compile"] = compiled
        recipe = write_recipe(still_recipe, tmp_path / f"{compiled}.yaml")
        done = vpae("distill", recipe, "--output", tmp_path / str(compiled), ranks=2, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
    for phase in PLAYERS:
        _same_gradients(*(read_tensors(tmp_path / name / phase) for name in ("False", "True")), phase)
