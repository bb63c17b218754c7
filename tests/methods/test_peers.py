"""What the peers have in common with V-PAE: who moves, who is asked, what is detached."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vpae.methods.apt import Apt
from vpae.methods.dmd2 import Dmd2
from vpae.methods.ladd import Ladd
from vpae.methods.mse import Mse
from vpae.methods.pcm import Pcm
from vpae.recipe import from_plain

BOTH = pytest.mark.parametrize("student", ["full", "lora"])
FAKE_LORA = {"rank": 2, "alpha": 2.0, "targets": ["to_q", "to_v"]}
# (method, player) -> the networks that move, and everybody who is asked in the order of asking ("+": with a graph)
TURNS = {
    ("dmd2", "critic"): ({"fake_score", "head"}, "student fake_score+ fake_score+ fake_score+"),
    ("dmd2", "student"): ({"student"}, "student+ fake_score teacher teacher fake_score+"),
    ("apt", "head"): ({"judge", "head"}, "student judge+ judge+ judge+"),
    ("apt", "student"): ({"student"}, "student+ judge+"),
    ("pcm", "head"): ({"head"}, "teacher teacher student student teacher+ teacher+"),
    ("pcm", "student"): ({"student"}, "teacher teacher student student+ teacher+"),
    ("lcm", "student"): ({"student"}, "teacher teacher ema student+"),
    ("ladd", "head"): ({"head"}, "student teacher+ teacher+"),
    ("ladd", "student"): ({"student"}, "student+ teacher+"),
    ("mse", "student"): ({"student"}, "student+"),
}
TURN = pytest.mark.parametrize(("name", "player"), TURNS, ids=lambda x: x)


def options(name, student):
    return {"fake_lora": FAKE_LORA} if (name, student) == ("dmd2", "lora") else {}


def given(batch):
    """The batch as the teacher's samples are fetched: with their noise."""
    return dataclasses.replace(batch, noise=batch.draws.normal_like("a sample's noise", batch.x0))


def check_gradients(stage, name, player):
    movers, gradients = TURNS[name, player][0], stage.gradients()
    for role, found in gradients.items():
        if role in movers:
            assert found and any(g is not None and g.abs().max() > 0 for g in found.values()), role
            unread = {key for key, g in found.items() if g is None}
            assert unread <= {"proj_out.weight", "proj_out.bias", "scale_shift_table"}, role
        else:
            assert all(g is None for g in found.values()), role
    return {role: gradients[role] for role in movers}


@TURN
def test_a_turn(build_peers, batch_of, name, player):
    """Who is asked, who leaves a graph, who gets gradients; no draw serves twice; micro-batches add up."""
    stage, batch = build_peers(name), given(batch_of(4))
    batch.draws.log.clear()
    outcome = stage.take_turn(player, batch)
    assert " ".join(call.role + "+" * call.grad for call in stage.calls) == TURNS[name, player][1]
    whole = check_gradients(stage, name, player)
    assert outcome.loss.requires_grad and not any(v.requires_grad for v in outcome.scalars.values())
    assert outcome.student_x0 is None or not outcome.student_x0.requires_grad
    repeated = {p for p in batch.draws.log if batch.draws.log.count(p) > 1}
    assert repeated <= {"judge time"}  # that two clips are judged at one time is meant
    for first in (40, 42):
        stage.take_turn(player, given(batch_of(2, first)))
    for role, gradients in stage.gradients().items():
        for key, gradient in gradients.items() if role in whole else ():
            if gradient is not None:
                torch.testing.assert_close(gradient / 2, whole[role][key], atol=1e-5, rtol=2e-3)


@pytest.mark.parametrize(("name", "player"), [t for t in TURNS if t[0] in ("dmd2", "apt", "pcm")], ids=lambda x: x)
def test_a_turn_on_adapters(build_peers, batch_of, name, player):
    """All roles on one frozen base, which gets no gradient."""
    stage = build_peers(name, "lora", **options(name, "lora"))
    stage.take_turn(player, given(batch_of()))
    check_gradients(stage, name, player)


@pytest.mark.parametrize(
    ("name", "change", "order"),
    [
        ("dmd2", {"critic_per_student": 5}, (["critic"] * 5 + ["student"]) * 2),
        ("apt", {"head_per_student": 1}, ["head", "student"] * 2),
        ("ladd", {"head_per_student": 2}, ["head", "head", "student"] * 2),
        ("pcm", {}, ["head", "student"] * 2),
        ("lcm", {}, ["student"] * 2),
        ("mse", {}, ["student"] * 3),
    ],
)
def test_order_of_turns_and_who_is_followed(micro_peer, affine, name, change, order):
    plain = micro_peer(name)
    plain["method"] |= change
    settings = from_plain(plain, "test").method
    cast = {role: affine(0.0, 1.0) for role in ("teacher", "student", "ema", "fake_score", "judge", "head")}
    made = {
        "dmd2": lambda: Dmd2(settings, **{k: v for k, v in cast.items() if k != "judge"}, taps=(0,)),
        "apt": lambda: Apt(settings, **{k: cast[k] for k in ("student", "ema", "judge", "head")}, taps=(0,)),
        "ladd": lambda: Ladd(settings, **{k: cast[k] for k in ("teacher", "student", "ema", "head")}, taps=(0,)),
        "mse": lambda: Mse(settings, **{k: cast[k] for k in ("student", "ema")}),
    }
    roles = {k: cast[k] for k in ("teacher", "student", "ema", "head")}
    pcm = lambda: Pcm(settings.consistency, settings.adversary, **roles)  # noqa: E731
    method = made.get(name, pcm)()
    assert [method.player_of(turn) for turn in range(method.turns)] == order
    assert {player: p.steps for player, p in method.players.items()} == {p: order.count(p) for p in set(order)}
    follow = {p.name: p.ema for p in method.players.values() if p.ema is not None}
    assert list(follow) == ["student"] and follow["student"].decay == 0.9
    assert follow["student"].parameters["mean"] is cast["ema"].mean


@BOTH
@pytest.mark.parametrize(("name", "role"), [("dmd2", "fake_score"), ("apt", "judge")])
def test_trained_networks_start_as_the_teacher(build_peers, batch_of, name, role, student):
    stage, batch = build_peers(name, student, asleep=True, **options(name, student)), batch_of()
    t = torch.tensor([0.3, 0.7])
    expected = stage.roles["teacher"].velocity(batch.x0, t, batch.condition)
    torch.testing.assert_close(stage.roles[role].velocity(batch.x0, t, batch.condition), expected)
    shared = stage.roles[role].backbone is stage.roles["teacher"].backbone
    assert shared == (student == "lora")


def test_apts_first_stage_is_consistency_distillation_without_an_adversary(build_peers, batch_of):
    stage = build_peers("apt", phase="consistency")
    assert list(stage.method.players) == ["student"] and stage.method.turns == 2
    stage.take_turn("student", batch_of())
    assert [call.role for call in stage.calls] == ["teacher", "teacher", "ema", "student"]
