"""The peers' networks and methods, from a recipe of ``kind: peer``: who is trained, and who starts from whom."""

from __future__ import annotations

from torch import nn

from vpae.engine.parallel import Processes, shard_module
from vpae.methods.apt import Apt
from vpae.methods.base import Method
from vpae.methods.dmd2 import Dmd2
from vpae.methods.ladd import Ladd
from vpae.methods.mse import Mse
from vpae.methods.pcm import Pcm
from vpae.models import Cast, choose_taps, fake_score, head_of, materialise, student_lora, trainable
from vpae.peer_recipe import taps_of
from vpae.recipe import Peer
from vpae.sections import Head


def build_peer(recipe: Peer, phase: str, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    """The method of a phase, its networks sharded and with their first weights; and the modules that are no backbone.

    All networks answer as the teacher does. What a phase takes over from the one before it comes later.
    """
    if phase == "consistency":
        materialise(cast, processes, recipe.engine.ema_on)
        networks = {"teacher": cast.teacher, "student": cast.student, "ema": cast.ema}
        return Pcm(recipe.method.consistency, None, **networks), []
    return _BUILD[phase](recipe, cast, processes)


def _head(
    recipe: Peer, settings: Head, cast: Cast, processes: Processes, *, independent: bool = False
) -> tuple[nn.Module, tuple[int, ...]]:
    """Head and taps; the cast must be complete."""
    chosen, key = taps_of(recipe.method)
    taps = choose_taps(chosen, cast.teacher.backbone.transformer.config.num_layers, key)
    head = head_of(settings, len(taps), cast, recipe.seed, processes.device, independent=independent)
    shard_module(head, processes)
    return head, taps


def _dmd2(recipe: Peer, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    settings = recipe.method
    fake = fake_score(cast, settings.fake_lora, recipe.seed)
    materialise(cast, processes, recipe.engine.ema_on)
    head, taps = _head(recipe, settings.head, cast, processes)
    method = Dmd2(
        settings, teacher=cast.teacher, student=cast.student, ema=cast.ema, fake_score=fake, head=head, taps=taps
    )
    return method, [head]


def _apt(recipe: Peer, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    settings = recipe.method
    judge = trainable(cast, "judge", student_lora(recipe.student), recipe.seed)
    materialise(cast, processes, recipe.engine.ema_on)
    head, taps = _head(recipe, settings.head, cast, processes)
    return Apt(settings, student=cast.student, ema=cast.ema, judge=judge, head=head, taps=taps), [head]


def _pcm(recipe: Peer, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    settings, adversary = recipe.method.consistency, recipe.method.adversary
    materialise(cast, processes, recipe.engine.ema_on)
    networks = {"teacher": cast.teacher, "student": cast.student, "ema": cast.ema}
    if adversary is None:
        return Pcm(settings, None, **networks), []
    head, taps = _head(recipe, adversary.head, cast, processes, independent=True)
    return Pcm(settings, adversary, **networks, head=head, taps=taps), [head]


def _ladd(recipe: Peer, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    settings = recipe.method
    materialise(cast, processes, recipe.engine.ema_on)
    head, taps = _head(recipe, settings.head, cast, processes, independent=True)
    method = Ladd(settings, teacher=cast.teacher, student=cast.student, ema=cast.ema, head=head, taps=taps)
    return method, [head]


def _mse(recipe: Peer, cast: Cast, processes: Processes) -> tuple[Method, list[nn.Module]]:
    materialise(cast, processes, recipe.engine.ema_on)
    return Mse(recipe.method, student=cast.student, ema=cast.ema), []


_BUILD = {"dmd2": _dmd2, "apt": _apt, "pcm": _pcm, "ladd": _ladd, "mse": _mse}
