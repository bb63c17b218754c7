"""A phase as ``vpae distill`` builds it, its turns as the trainer takes them, and roles whose scores are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from vpae import distill
from vpae.conditioning import Condition, first_frame_mask
from vpae.draws import Draws, generator_of
from vpae.engine.parallel import Processes
from vpae.flow import expand_time
from vpae.methods.base import Batch
from vpae.models import distillation_cast
from vpae.peers import build_peer
from vpae.recipe import from_plain

ALONE = Processes(0, 1, torch.device("cpu"), None)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LoggedDraws(Draws):
    """Notes which purposes were asked for."""

    def __init__(self, seed, positions):
        super().__init__(seed, positions)
        self.log = []

    def normal(self, purpose, shape):
        self.log.append(purpose)
        return super().normal(purpose, shape)

    def uniform(self, purpose):
        self.log.append(purpose)
        return super().uniform(purpose)


def make_batch(size=2, first=40):
    """Positions ``first`` and on; what a sample holds depends on its position alone."""

    def rows(seed, *shape):
        return torch.stack([normal(*shape, seed=1000 * seed + p) for p in range(first, first + size)])

    mask = first_frame_mask(2, 4, 4).expand(size, -1, -1, -1, -1)
    condition = Condition(rows(1, 6, 128), rows(2, 17, 64), rows(3, 16, 2, 4, 4), mask)
    null = condition.null(normal(1, 2, 128, seed=9))
    return Batch(rows(4, 16, 2, 4, 4), condition, null, LoggedDraws(7, range(first, first + size)))


@dataclass
class Call:
    """One forward of a role."""

    role: str
    grad: bool
    x_t: torch.Tensor
    t: torch.Tensor
    condition: Condition
    taps: tuple
    stopped: bool


@dataclass
class Stage:
    """A method, every network in it by name, and a log of who was asked what."""

    method: object
    roles: dict
    calls: list[Call] = field(default_factory=list)

    def parameters(self, name):
        return dict(self.roles[name].named_parameters())

    def take_turn(self, player, batch=None):
        """As the trainer does: exactly the player's parameters require grad. Returns the outcome."""
        self.calls.clear()
        for other in self.method.players.values():
            for parameter in other.parameters.values():
                parameter.requires_grad_(other.name == player)
        outcome = self.method.loss(player, make_batch() if batch is None else batch)
        outcome.loss.backward()
        return outcome

    def gradients(self):
        """Gradients of all parameters by role, then forgotten."""
        found = {}
        for name in self.roles:
            found[name] = {key: p.grad for key, p in self.parameters(name).items()}
            for p in self.parameters(name).values():
                p.grad = None
        return found

    def shake(self, name, scale=0.05):
        with torch.no_grad():
            for key, p in self.parameters(name).items():
                p.add_(scale * torch.randn(p.shape, generator=generator_of("shake", name, key)))

    def listen(self):
        networks = {name: role for name, role in self.roles.items() if name != "head"}
        names = {(id(role.backbone), role.adapter): name for name, role in networks.items()}

        def note(backbone, args, kwargs):
            name = names[id(backbone), kwargs["adapter"]]
            self.calls.append(Call(name, torch.is_grad_enabled(), *args))

        for backbone in {id(role.backbone): role.backbone for role in networks.values()}.values():
            backbone.register_forward_pre_hook(note, with_kwargs=True)


@pytest.fixture
def build(micro_recipe):
    """``build("priming" | "equilibrium", student="full" | "lora", asleep=..., **phase settings)``.

    All networks are shaken apart (and the head's last layer is not zero) unless ``asleep``.
    """

    def make(phase, student="full", asleep=False, **changes):
        micro_recipe["student"]["kind"] = student
        micro_recipe[phase] = micro_recipe[phase] | changes
        recipe = from_plain(micro_recipe, "test")
        cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
        method, _ = distill.method_of(recipe, phase, cast, ALONE)
        roles = {"teacher": cast.teacher, "student": cast.student, "ema": cast.ema}
        if phase == "priming":
            roles["fake_score"] = method.fake_score
        else:
            roles["head"] = method.head
            if recipe.equilibrium.judge == "trainable":
                roles["judge"] = method.judge
        stage = Stage(method, roles)
        stage.listen()
        if not asleep:
            for name in roles:
                if name != "teacher":
                    stage.shake(name)
        return stage

    return make


@pytest.fixture
def build_peers(micro_peer):
    """``build_peers("dmd2" | ..., student=..., asleep=..., phase=None, **changes)``: as ``build``.

    ``changes`` are of the recipe's ``method``.
    """

    def make(kind, student="full", asleep=False, phase=None, **changes):
        plain = micro_peer(kind)
        plain["student"]["kind"] = student
        plain["method"] |= changes
        recipe = from_plain(plain, "test")
        cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
        method, _ = build_peer(recipe, phase or recipe.method.kind, cast, ALONE)
        roles = {"teacher": cast.teacher, "student": cast.student, "ema": cast.ema}
        owned = {name: getattr(method, name, None) for name in ("fake_score", "judge", "head")}
        roles |= {name: network for name, network in owned.items() if network is not None}
        stage = Stage(method, roles)
        stage.listen()
        if not asleep:
            for name in roles:
                if name != "teacher":
                    stage.shake(name)
        return stage

    return make


class GaussianRole(nn.Module):
    """A model of data N(mean, std^2) per element, whose velocity and clean prediction are exact."""

    adapter = None

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(float(mean)))
        self.log_std = nn.Parameter(torch.tensor(float(std)).log())

    @property
    def std(self):
        return self.log_std.exp()

    def x0(self, x_t, t, condition):
        t = expand_time(t, x_t)
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        return self.mean + gain * (x_t - (1 - t) * self.mean)

    def velocity(self, x_t, t, condition):
        return (x_t - self.x0(x_t, t, condition)) / expand_time(t, x_t)

    def guided_x0(self, x_t, t, condition, null, guidance_scale):
        return self.x0(x_t, t, condition)


class AffineStudent(nn.Module):
    """A one-step generator ``mean + std x_s``."""

    adapter = None

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(float(mean))), nn.Parameter(torch.tensor(float(std)))

    def x0(self, x_t, t, condition):
        return self.mean + self.std * x_t


@pytest.fixture
def gaussian():
    return GaussianRole


@pytest.fixture
def affine():
    return AffineStudent


@pytest.fixture
def batch_of():
    return make_batch
