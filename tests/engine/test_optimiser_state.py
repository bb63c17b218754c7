"""Adam's moments kept in bf16, in 8 bits or in host memory, against torch's AdamW with its own in fp32."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
from helpers import differing, make_trainer, snapshot
from torch import nn

from vpae.draws import rounding_bits
from vpae.engine import host, optim
from vpae.engine.adam import MOMENTS, round_to_bf16, stored
from vpae.errors import UserError
from vpae.methods.base import Ema, Player
from vpae.recipe import Optimiser

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is an extra: int8")
STATES = ["fp32", "bf16", pytest.param("int8", marks=needs_torchao), "cpu"]
NARROW = STATES[1:]
SETTINGS = Optimiser(1e-2, (0.9, 0.99), 1e-8, 0.1, 0, "constant", None)


def _player(settings: Optimiser = SETTINGS) -> Player:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (40, 128), "adapter": (80, 64), "odd": (70, 60), "bias": (40,), "idle": (64, 64)}
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    return Player("student", weights, settings, 100)


def _gradients(player: Player, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, parameter in player.parameters.items():
        if name != "idle" or step > 2:  # Adam's clock starts with the first gradient
            scale = 10 ** -float(torch.rand(1, generator=generator))
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def _steps(state: str, count: int, settings: Optimiser = SETTINGS) -> tuple[Player, torch.optim.Optimizer]:
    player = _player(settings)
    optimiser = optim.build_optimiser(player, state)
    for step in range(count):
        _gradients(player, step)
        optim.set_rate(optimiser, settings.learning_rate / (1 + step))
        optimiser.step()
        optimiser.zero_grad()
    return player, optimiser


@pytest.mark.parametrize("state", STATES)
def test_the_first_step_in_closed_form(state):
    """w <- w (1 - lr wd) - lr g / (|g| + eps sqrt(1 - beta2))-like: at step one both corrections cancel both betas."""
    player, _ = _steps(state, 1)
    before = _player()
    _gradients(before, 0)
    for name, parameter in player.parameters.items():
        start, gradient = before.parameters[name].detach(), before.parameters[name].grad
        wanted = start
        if gradient is not None:
            wanted = start * (1 - SETTINGS.learning_rate * SETTINGS.weight_decay)
            wanted = wanted - SETTINGS.learning_rate * gradient / (gradient.abs() + SETTINGS.eps)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-6)


# parts of the distance that fp32 has gone in 30 steps
TOLERANCE = {"fp32": 0.0, "cpu": 0.0, "bf16": 0.005, "int8": 0.025}


@pytest.mark.parametrize("state", NARROW)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.999)])
def test_the_weights_follow_those_of_fp32(state, betas, monkeypatch):
    """Under a falling learning rate, with a parameter that gets its first gradient late, over several buckets."""
    monkeypatch.setattr(host, "BUCKET", 6000)
    settings = Optimiser(1e-2, betas, 1e-8, 0.1, 0, "constant", None)
    reference, player = (_steps(kind, 30, settings)[0] for kind in ("fp32", state))
    start = _player(settings)
    for name, parameter in player.parameters.items():
        gone = (reference.parameters[name] - start.parameters[name]).norm()
        apart = (parameter - reference.parameters[name]).detach().norm() / gone
        assert gone > 0 and apart <= TOLERANCE[state], (name, float(apart))


def test_host_memory_changes_no_bit_of_the_moments():
    (one, there), (two, here) = _steps("fp32", 5), _steps("cpu", 5)
    for a, b in zip(one.parameters.values(), two.parameters.values(), strict=True):
        assert torch.equal(a, b) and there.state[a]["step"] == here.state[b]["step"]
        assert all(torch.equal(there.state[a][moment], here.state[b][moment]) for moment in MOMENTS)


@pytest.mark.parametrize("beta2", [0.99, 0.999])
def test_a_second_moment_in_bf16_falls_as_it_should(beta2):
    """From a first large gradient down to the small ones after it; rounded to the nearest it would stay up."""
    settings = Optimiser(1e-4, (0.0, beta2), 1e-8, 0.0, 0, "constant", None)
    levels = {}
    for state in ("fp32", "bf16"):
        player = Player("student", {"w": nn.Parameter(torch.zeros(64, 64))}, settings, 10)
        optimiser = optim.build_optimiser(player, state)
        (w,) = player.parameters.values()
        for step in range(600):
            w.grad = torch.full_like(w, 1.0 if step == 0 else 1e-3)
            optimiser.step()
        levels[state] = optimiser.state[w]["exp_avg_sq"].double().mean()
    assert levels["bf16"] == pytest.approx(float(levels["fp32"]), rel=0.02)
    nearest = torch.tensor(1 - beta2, dtype=torch.bfloat16)
    for _ in range(599):
        nearest = (nearest.float() * beta2 + (1 - beta2) * 1e-6).bfloat16()
    assert float(nearest) > 1.3 * float(levels["fp32"])


def test_rounding_is_right_in_the_mean_and_hits_neighbours_only():
    exact = torch.tensor([1.0 + 2**-9, -(1.0 + 3 * 2**-9), 3e-30, 0.0, 1.0]).repeat_interleave(1 << 14)
    rounded = round_to_bf16(exact, rounding_bits(7, 0, exact.numel())).float().view(5, -1)
    exact = exact.view(5, -1)
    assert ((rounded - exact).abs() <= exact.abs() * 2**-7).all()
    errors = ((rounded - exact).mean(1) / exact[:, 0].abs().clamp(min=1e-38)).abs()
    assert errors.max() < 4 * 2**-8 / math.sqrt(1 << 14) and torch.equal(rounded[3:], exact[3:])
    assert (rounded[0] != rounded[0, 0]).any()


def test_random_bits_belong_to_the_element():
    whole = rounding_bits(123456789, 0, 4096)
    assert torch.equal(whole[1000:3000], rounding_bits(123456789, 1000, 2000))
    assert whole.min() >= 0 and whole.max() < 1 << 16 and abs(float(whole.double().mean()) / 32767.5 - 1) < 0.03
    assert (whole == rounding_bits(123456790, 0, 4096)).float().mean() < 0.01


@pytest.mark.parametrize(("state", "bytes_each"), [("fp32", 8), ("bf16", 4), ("cpu", 8)])
def test_bytes_of_the_moments(state, bytes_each):
    player, optimiser = _steps(state, 1)
    tensors = [t for p in player.parameters.values() for t in stored(optimiser, p).values()]
    assert host.local_bytes(tensors) == bytes_each * sum(p.numel() for p in player.parameters.values())


@needs_torchao
def test_bytes_of_the_moments_in_8_bits():
    player, optimiser = _steps("int8", 1)
    tensors = {name: stored(optimiser, p) for name, p in player.parameters.items()}
    assert set(tensors["matrix"]) == {f"{moment}.{part}" for moment in MOMENTS for part in ("codes", "scale")}
    for name, block in {"matrix": 128, "adapter": 64, "idle": 64}.items():
        assert host.local_bytes(tensors[name].values()) == player.parameters[name].numel() * (2 + 8 / block)
    for name in ("odd", "bias"):  # no block fits a row; too small
        assert host.local_bytes(tensors[name].values()) == player.parameters[name].numel() * 8


def test_without_torchao_the_line_that_installs_it(monkeypatch):
    from vpae import extras

    def version(name):
        raise extras.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.importlib.metadata, "version", version)
    with pytest.raises(
        UserError, match=r"engine.optimiser_state: int8 needs torchao.*pip install 'torchao>=0.18,<0.19'"
    ):
        optim.build_optimiser(_player(), "int8")


@pytest.mark.parametrize(
    ("state", "phase"),
    [("bf16", "equilibrium"), pytest.param("int8", "priming", marks=needs_torchao), ("cpu", "priming")],
)
def test_resume_is_exact(micro_recipe, tmp_path, state, phase):
    micro_recipe["engine"]["optimiser_state"] = state
    micro_recipe["priming"]["fake_lora"]["rank"] = 256  # rows long enough for 8-bit blocks
    for settings in (micro_recipe[phase][k] for k in micro_recipe[phase] if k.endswith("optimiser")):
        settings |= {"warmup_steps": 2, "schedule": "cosine", "betas": [0.5, 0.99], "clip_norm": 0.1}
    through = make_trainer(micro_recipe, phase, tmp_path / "through")
    through.train(until=4)
    assert state != "int8" or any(name.endswith(".codes") for name in through.tensors())
    make_trainer(micro_recipe, phase, tmp_path / "halves").train(until=2)
    second = make_trainer(micro_recipe, phase, tmp_path / "halves")
    assert second.resume()
    second.train(until=4)
    assert differing(snapshot(through), snapshot(second)) == []


def test_fp32_moments_may_move_between_device_and_host_and_others_may_not(micro_recipe, tmp_path):
    through = make_trainer(micro_recipe, "priming", tmp_path / "through")
    through.train(until=4)
    make_trainer(micro_recipe, "priming", tmp_path / "run").train(until=2)
    hosted, half = copy.deepcopy(micro_recipe), copy.deepcopy(micro_recipe)
    hosted["engine"]["optimiser_state"], half["engine"]["optimiser_state"] = "cpu", "bf16"
    second = make_trainer(hosted, "priming", tmp_path / "run")
    assert second.resume()
    second.train(until=4)
    assert differing(snapshot(through), snapshot(second)) == []
    with pytest.raises(UserError, match=r"engine.optimiser_state is 'fp32' there and 'bf16' here"):
        make_trainer(half, "priming", tmp_path / "run").resume()


def test_more_host_memory_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(host, "free_memory", lambda: 3 * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    host.require_memory({"engine.optimiser_state: cpu": 2**30})
    with pytest.raises(
        UserError, match=r"3.0 GiB of memory free and its 2 ranks would keep 4.0 GiB.*optimiser_state: cpu 4.0"
    ):
        host.require_memory({"engine.optimiser_state: cpu": 2 * 2**30})


def test_the_ema_in_host_memory_follows_bit_for_bit(monkeypatch):
    """What passes through the device in buckets is what is followed where it lies."""
    monkeypatch.setattr(host, "BUCKET", 6000)
    player = _player()
    first = {name: torch.randn_like(p) for name, p in player.parameters.items()}
    one, two = ({name: nn.Parameter(w.clone()) for name, w in first.items()} for _ in range(2))
    optim.follow(Ema("ema", one, 0.9), player)
    sources = [p.detach() for p in player.parameters.values()]
    parts = list(host.buckets([s.numel() for s in sources]))
    assert len(parts) > 1
    targets = [p.data for p in two.values()]
    host.pass_through(
        [targets[part] for part in parts],
        torch.device("cpu"),
        lambda i, copies: torch._foreach_lerp_(copies, sources[parts[i]], 1 - 0.9),
    )
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], first[name]) for name in first)
