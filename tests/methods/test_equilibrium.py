from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from vpae.draws import Draws
from vpae.flow import TimeLaw
from vpae.methods.base import Batch

BOTH = pytest.mark.parametrize("student", ["full", "lora"])
JUDGES = pytest.mark.parametrize("judge", ["unified", "frozen", "trainable"])
PLAYERS = pytest.mark.parametrize("player", ["head", "student"])
JUDGE_ROLE = {"unified": "ema", "frozen": "teacher", "trainable": "judge"}
UNREAD = {"proj_out.weight", "proj_out.bias", "scale_shift_table"}  # past the last tap


def column(t):
    return t.reshape(-1, 1, 1, 1, 1)


def settle(stage, **changes):
    """Change the phase's settings past the recipe's checks."""
    stage.method.settings = dataclasses.replace(stage.method.settings, **changes)
    return stage


def without_sds(stage):
    return settle(stage, sds=dataclasses.replace(stage.method.settings.sds, weight=0.0))


def leaf(stage, batch):
    """Let the student's sample be a leaf, so that its gradient can be read."""
    x0_hat = stage.method.generate(batch).detach().requires_grad_()
    stage.method.generate = lambda batch: x0_hat
    stage.calls.clear()
    return x0_hat


@BOTH
@JUDGES
@PLAYERS
def test_gradient_table(build, player, judge, student):
    stage = build("equilibrium", student, judge=judge)
    stage.take_turn(player)
    movers = {player} if player == "student" or judge != "trainable" else {"head", "judge"}
    for role, gradients in stage.gradients().items():
        missing = {name for name, g in gradients.items() if g is None}
        dead = {name for name, g in gradients.items() if g is not None and g.abs().max() == 0}
        if role not in movers:
            assert missing == set(gradients), role
        else:
            assert missing == (UNREAD & set(gradients) if role == "judge" else set()), role
            assert dead <= {"to_logit.1.bias"}, role  # inside the margin the hinge's two pulls on it cancel


@BOTH
def test_first_turns_of_a_run_move_their_players(build, student):
    stage = build("equilibrium", student, asleep=True)
    for player in ("head", "student"):
        stage.take_turn(player)
        gradients = stage.gradients()
        assert any(g.abs().max() > 0 for g in gradients.pop(player).values())
        assert all(g is None for role in gradients.values() for g in role.values())


@JUDGES
def test_who_is_asked_in_a_turn_and_who_leaves_a_graph(build, judge):
    stage = build("equilibrium", judge=judge)
    judge = JUDGE_ROLE[judge]
    stage.take_turn("head")
    asked = [(c.role, c.grad) for c in stage.calls]
    assert asked == [("student", False)] + [(judge, True)] * 4  # real, fake, two perturbed
    assert all(c.stopped and c.taps == (1, 2, 3) for c in stage.calls[1:])
    stage.take_turn("student")
    asked = [(c.role, c.grad) for c in stage.calls]
    assert asked == [("student", True), (judge, True), ("teacher", False), ("teacher", False)]
    assert stage.calls[1].x_t.requires_grad and not stage.calls[2].x_t.requires_grad


@BOTH
@JUDGES
def test_whose_weights_a_turn_depends_on(build, judge, student):
    stage = build("equilibrium", student, judge=judge)
    always = {"student", "head", JUDGE_ROLE[judge]} | ({"teacher"} if student == "lora" else set())
    for player in ("head", "student"):
        expected = always | ({"teacher"} if player == "student" else set())  # C-SDS
        for role in stage.roles:
            before = stage.take_turn(player).loss.detach()
            stage.shake(role, 0.02)
            moved = not torch.equal(stage.take_turn(player).loss.detach(), before)
            assert moved == (role in expected), (player, role)


def test_student_generates_from_pure_noise_in_one_step(build, batch_of):
    stage, batch = build("equilibrium"), batch_of(4)
    outcome = stage.take_turn("student", batch)
    student = stage.calls[0]
    assert (student.t == 1).all()
    table = torch.corrcoef(torch.stack([student.x_t, batch.x0]).flatten(1))
    assert abs(student.x_t.std() - 1) < 0.05 and abs(table[0, 1]) < 0.06
    expected = student.x_t - stage.roles["student"].velocity(student.x_t, student.t, batch.condition)
    torch.testing.assert_close(outcome.student_x0, expected.detach())


@pytest.mark.parametrize("share", [False, True])
def test_real_and_generated_are_noised_to_the_same_time(build, batch_of, share):
    stage, batch = build("equilibrium", share_noise=share, judge_time=law(0.3, 0.98)), batch_of(8)
    x0_hat = leaf(stage, batch).detach()
    stage.take_turn("head", batch)
    real, fake = stage.calls[:2]
    assert torch.equal(real.t, fake.t) and len(real.t.unique()) == 8
    t = column(real.t)
    on_real, on_fake = (real.x_t - (1 - t) * batch.x0) / t, (fake.x_t - (1 - t) * x0_hat) / t
    table = torch.corrcoef(torch.stack([on_real, on_fake, batch.x0, x0_hat]).flatten(1))
    assert abs(on_real.std() - 1) < 0.05 and abs(on_fake.std() - 1) < 0.05
    assert table[0, 2:].abs().max() < 0.06 and table[1, 2:].abs().max() < 0.06
    assert table[0, 1] > 0.999 if share else abs(table[0, 1]) < 0.06


def test_a_judge_of_clean_clips_still_hears_the_time(build, batch_of):
    stage, batch = build("equilibrium", judge_input="clean", judge_time=law(0.3, 0.98)), batch_of(8)
    x0_hat = leaf(stage, batch).detach()
    stage.take_turn("head", batch)
    real, fake = stage.calls[:2]
    assert torch.equal(real.x_t, batch.x0) and torch.equal(fake.x_t, x0_hat)
    assert torch.equal(real.t, fake.t) and len(real.t.unique()) == 8
    assert not any(purpose.startswith("judge noise") for purpose in batch.draws.log)
    stage.take_turn("student", batch)
    assert torch.equal(stage.calls[0].x_t, x0_hat) and stage.calls[0].x_t.requires_grad


def law(low, high):
    return {"kind": "uniform", "low": low, "high": high, "shift": 1.0, "mean": 0.0, "std": 1.0}


def test_no_purpose_serves_twice_in_a_turn(build, batch_of):
    r1 = {
        "weight": 1.0,
        "spatial_sigma": 0.1,
        "temporal_sigma": 0.1,
        "form": "separate",
        "on": "both",
        "precision": "engine",
        "every": 1,
    }
    stage = build("equilibrium", r1=r1)
    for player, count in (("head", 8), ("student", 5)):
        batch = batch_of()
        stage.take_turn(player, batch)
        assert len(batch.draws.log) == len(set(batch.draws.log)) == count, batch.draws.log


def test_conditional_sds_reaches_the_sample_alone_and_is_analytic(build, batch_of):
    stage, batch = build("equilibrium"), batch_of()
    for p in stage.roles["head"].to_logit[-1].parameters():
        p.data.zero_()  # silences the adversarial term
    x0_hat = leaf(stage, batch)
    outcome = stage.take_turn("student", batch)
    _, teacher, unguided = stage.calls
    assert torch.equal(teacher.x_t, unguided.x_t) and torch.equal(teacher.t, unguided.t)
    assert teacher.condition is batch.condition and unguided.condition is batch.null
    x_t, t = teacher.x_t, column(teacher.t)
    noise = (x_t - (1 - t) * x0_hat.detach()) / t
    assert not x_t.requires_grad and 0.8 < noise.std() < 1.2
    cond, uncond = (stage.roles["teacher"].velocity(x_t, teacher.t, c) for c in (batch.condition, batch.null))
    target = (x_t - t * (uncond + 2.0 * (cond - uncond))).detach()
    expected = 10.0 * 2 * (x0_hat.detach() - target) / x0_hat.numel()
    torch.testing.assert_close(x0_hat.grad, expected, atol=1e-7, rtol=1e-4)
    c_sds = float((x0_hat.detach() - target).square().mean())
    assert float(outcome.scalars["c_sds"]) == pytest.approx(c_sds, rel=1e-4)
    assert float(outcome.loss.detach()) == pytest.approx(10.0 * c_sds, rel=1e-4)


def test_adversarial_gradient_passes_through_the_judge_and_shrinks_with_the_noise(build, batch_of):
    stage, batch = without_sds(build("equilibrium")), batch_of()
    x0_hat = leaf(stage, batch)
    stage.take_turn("student", batch)
    (judge,) = stage.calls
    x_t = judge.x_t.detach().requires_grad_()
    stage.method.logits(x_t, judge.t, batch.condition).mean().backward()
    assert x0_hat.grad.abs().sum() > 0
    torch.testing.assert_close(x0_hat.grad, -(1 - column(judge.t)) * x_t.grad, atol=1e-8, rtol=1e-4)


@BOTH
@JUDGES
def test_student_turn_reaches_the_student_through_the_judge_unless_its_time_is_1(build, judge, student):
    stage = without_sds(build("equilibrium", student, judge=judge))
    stage.take_turn("student")
    assert all(g.abs().max() > 0 for g in stage.gradients()["student"].values())
    settle(stage, judge_time=TimeLaw(low=1.0, high=1.0))
    stage.take_turn("student")
    assert all((g == 0).all() for g in stage.gradients()["student"].values())


def linear(stage, w):
    """Put a linear head D(x) = <w, x> in the place of judge and head; returns what it is shown."""
    seen = []

    def logits(x_t, t, condition):
        seen.append((x_t, t))
        return (x_t * w).flatten(1).sum(1)

    stage.method.logits = logits
    return seen


@pytest.mark.parametrize("adversarial", ["hinge", "softplus"])
def test_real_is_pushed_up_and_generated_down_and_the_student_wants_up(build, batch_of, adversarial):
    stage, batch = without_sds(build("equilibrium", adversarial=adversarial)), batch_of(4)
    settle(stage, judge_time=TimeLaw(high=0.0), r1=dataclasses.replace(stage.method.settings.r1, weight=0.0))
    x0_hat = leaf(stage, batch)
    w = (batch.x0[:1] / 500).requires_grad_()
    seen = linear(stage, w)
    head = stage.take_turn("head", batch)
    assert torch.equal(seen[0][0], batch.x0) and torch.equal(seen[1][0], x0_hat)  # t = 0: nothing is added
    real, fake = ((x * w).flatten(1).sum(1).detach() for x in (batch.x0, x0_hat))
    assert 0.1 < (real - fake).abs().mean()
    if adversarial == "hinge":
        expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(), -fake.mean()
    else:
        expected = -real.sigmoid().log().mean() - (-fake).sigmoid().log().mean(), -fake.sigmoid().log().mean()
    assert float(head.loss.detach()) == pytest.approx(float(expected[0]), rel=1e-4)
    assert float(head.scalars["logit_real"]) == pytest.approx(float(real.mean()), rel=1e-4)
    assert float(head.scalars["logit_fake"]) == pytest.approx(float(fake.mean()), rel=1e-4)
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    assert float(head.scalars["accuracy"]) == pytest.approx(float(accuracy))
    x0_hat.grad = None
    student = stage.take_turn("student", batch)
    assert float(student.loss.detach()) == pytest.approx(float(expected[1]), rel=1e-4)
    assert float(student.scalars["logit_fake"]) == pytest.approx(float(fake.mean()), rel=1e-4)


@pytest.mark.parametrize("on", ["real", "both"])
@pytest.mark.parametrize("form", ["separate", "joint", "differences"])
def test_st_r1_against_its_closed_form_for_a_linear_head(build, form, on):
    count, weight, spatial_sigma, temporal_sigma = 3000, 0.5, 0.3, 0.7
    r1 = {
        "weight": weight,
        "spatial_sigma": spatial_sigma,
        "temporal_sigma": temporal_sigma,
        "form": form,
        "on": on,
        "precision": "engine",
        "every": 1,
    }
    stage = build("equilibrium", r1=r1)
    draws = Draws(0, range(count))
    x0, x0_hat = draws.normal("real", (2, 3, 2, 2)), draws.normal("fake", (2, 3, 2, 2))
    stage.method.generate = lambda batch: x0_hat
    w = Draws(1, [0]).normal("w", (2, 3, 2, 2))[0].requires_grad_()
    seen = linear(stage, w)
    outcome = stage.take_turn("head", Batch(x0, None, None, draws))
    spatial = spatial_sigma**2 * w.detach().sum(1).square().sum()
    temporal = temporal_sigma**2 * w.detach().sum((2, 3)).square().sum()
    if form == "differences":  # a step before frame k moves it and all later ones
        later = w.detach().flip(1).cumsum(1).flip(1)[:, 1:]
        temporal = temporal_sigma**2 * later.square().sum()
    expected = float(spatial + temporal) * (2 if on == "both" else 1)
    # <w, n> is normal, so its square has a standard deviation of sqrt(2) times its mean
    assert float(outcome.scalars["st_r1"]) == pytest.approx(expected, rel=4 * math.sqrt(2 / count))
    loss = outcome.scalars["adversarial"] + weight * outcome.scalars["st_r1"]
    assert float(outcome.loss.detach()) == pytest.approx(float(loss), rel=1e-5)

    real, fake, *moved = seen
    terms = 1 if form == "joint" else 2
    assert len(moved) == terms * (2 if on == "both" else 1)
    again = w.detach().clone().requires_grad_()
    clean, fooled, *others = ((x * again).flatten(1).sum(1) for x, _ in seen)
    by_hand = (1 - clean).clamp(min=0).mean() + (1 + fooled).clamp(min=0).mean()
    for i, logits in enumerate(others):
        by_hand = by_hand + weight * ((clean if i < terms else fooled) - logits).square().mean()
    by_hand.backward()
    torch.testing.assert_close(w.grad, again.grad, atol=1e-4, rtol=1e-4)
    for i, (x, t) in enumerate(moved):
        base = real if i < terms else fake
        noise = x - base[0]
        assert torch.equal(t, base[1])  # the difference is taken at one noise level, after noising
        if form != "joint" and i % 2 == 0:
            torch.testing.assert_close(noise, noise[:, :, :1].expand_as(noise), atol=1e-5, rtol=0)
            assert abs(float(noise.std()) - spatial_sigma) < 0.02
        if form == "differences" and i % 2 == 1:
            assert (noise[:, :, 0] == 0).all() and abs(float(noise.diff(dim=2).std()) - temporal_sigma) < 0.02
        if form == "separate" and i % 2 == 1:
            torch.testing.assert_close(noise, noise[..., :1, :1].expand_as(noise), atol=1e-5, rtol=0)
            assert abs(float(noise.std()) - temporal_sigma) < 0.03


@pytest.mark.parametrize("precision", ["engine", "fp32"])
def test_st_r1_in_fp32_under_bf16(build, batch_of, precision):
    """Its value and gradient are those of an fp32 run; in bf16 a difference at sigma 0.01 is rounding."""
    results = {}
    for autocast in (False, True):
        r1 = {
            "weight": 1.0,
            "spatial_sigma": 0.01,
            "temporal_sigma": 0.01,
            "form": "separate",
            "on": "real",
            "every": 1,
        }
        stage, batch = build("equilibrium", r1=r1 | {"precision": precision}), batch_of(4)
        method = stage.method
        t = method._judge_time(batch)
        x_t = method._shown(batch.x0, t, batch, "real")
        stage.calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = method.logits(x_t, t, batch.condition)
            term = method._st_r1(logits, x_t, t, batch, "real")
        assert len(stage.calls) == (4 if autocast and precision == "fp32" else 3)
        weights = [p for p in stage.roles["head"].parameters() if p.requires_grad]
        gradients = torch.autograd.grad(term, weights, allow_unused=True)
        results[autocast] = float(term.detach()), torch.cat([g.flatten() for g in gradients if g is not None])
    (exact, wanted), (value, found) = results[False], results[True]
    gap = float((found - wanted).norm() / wanted.norm())
    if precision == "fp32":
        assert value == pytest.approx(exact, rel=1e-4) and gap < 1e-3
    else:
        assert gap > 0.05


def test_st_r1_switched_off_costs_no_forward(build):
    r1 = {
        "weight": 0.0,
        "spatial_sigma": 0.1,
        "temporal_sigma": 0.1,
        "form": "separate",
        "on": "both",
        "precision": "engine",
        "every": 1,
    }
    stage = build("equilibrium", r1=r1)
    outcome = stage.take_turn("head")
    assert "st_r1" not in outcome.scalars and len(stage.calls) == 3


def test_lazy_st_r1_comes_on_every_third_turn_of_the_head_with_three_times_the_weight(build, batch_of):
    """Which turns: those of the head are counted, warm-up and all; and a resumed run counts as an undisturbed one."""
    r1 = {"weight": 0.5, "spatial_sigma": 0.1, "temporal_sigma": 0.1, "form": "separate", "on": "real"}
    stage = build(
        "equilibrium",
        head_warmup_turns=2,
        head_per_student=2,
        student_steps=4,
        r1=r1 | {"precision": "engine", "every": 3},
    )
    method, batch, heads = stage.method, batch_of(4), 0
    for turn in range(method.turns):
        if method.player_of(turn) == "student":
            continue
        outcome = stage.take_turn("head", dataclasses.replace(batch, turn=turn))
        terms = outcome.scalars
        assert ("st_r1" in terms) == (heads % 3 == 0)
        expected = terms["adversarial"] + 3 * 0.5 * terms.get("st_r1", 0)
        assert float(outcome.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
        heads += 1
    assert heads == 2 + 2 * 4


def test_sds_switched_off_asks_no_teacher(build):
    stage = without_sds(build("equilibrium"))
    outcome = stage.take_turn("student")
    assert "c_sds" not in outcome.scalars and [c.role for c in stage.calls] == ["student", "ema"]


def test_head_is_told_the_condition(build, batch_of):
    stage, batch, given = build("equilibrium"), batch_of(), []
    stage.roles["head"].register_forward_pre_hook(lambda module, args: given.append(args))
    batch.condition.text[1, 3:] = 0
    stage.take_turn("student", batch)
    features, grid, image, text, keep = given[0]
    assert len(features) == 3 and grid == (2, 2, 2) and features[0].shape == (2, 8, 24)
    assert image is batch.condition.image and text is batch.condition.text
    assert keep.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


def test_taps_of_the_recipe_are_the_ones_read(build):
    stage = build("equilibrium", taps=[0, 2])
    stage.take_turn("student")
    assert stage.calls[1].taps == (0, 2) and len(stage.roles["head"].queries) == 2


@BOTH
@PLAYERS
def test_micro_batches_add_up_to_the_batch(build, batch_of, player, student):
    stage = build("equilibrium", student)
    stage.take_turn(player, batch_of(4))
    whole = stage.gradients()[player]
    for first in (40, 42):
        stage.take_turn(player, batch_of(2, first))
    for name, gradient in stage.gradients()[player].items():
        torch.testing.assert_close(gradient / 2, whole[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("ratio", [1, 3])
def test_order_of_turns(build, ratio):
    method = build("equilibrium", head_per_student=ratio, student_steps=2).method
    assert [method.player_of(turn) for turn in range(method.turns)] == (["head"] * ratio + ["student"]) * 2
    assert {name: player.steps for name, player in method.players.items()} == {"head": 2 * ratio, "student": 2}


def test_the_head_may_learn_before_the_students_first_turn(build):
    method = build("equilibrium", head_per_student=2, student_steps=2, head_warmup_turns=4).method
    order = [method.player_of(turn) for turn in range(method.turns)]
    assert order == ["head"] * 4 + (["head"] * 2 + ["student"]) * 2
    assert {name: player.steps for name, player in method.players.items()} == {"head": 8, "student": 2}


@JUDGES
def test_players_and_their_followers(build, judge):
    stage = build("equilibrium", judge=judge)
    student, head = stage.method.players["student"], stage.method.players["head"]
    mine, follower = stage.parameters("student"), stage.parameters("ema")
    assert student.ema.decay == 0.9 and all(student.ema.parameters[k] is follower[k] for k in mine)
    assert head.ema is None and stage.method.ema is stage.roles["ema"]
    owned = {f"head.{k}": p for k, p in stage.parameters("head").items()}
    if judge == "trainable":
        owned |= {f"judge.{k}": p for k, p in stage.parameters("judge").items()}
    assert head.parameters.keys() == owned.keys() and all(head.parameters[k] is owned[k] for k in owned)


@PLAYERS
def test_scalars_leave_no_graph(build, player):
    outcome = build("equilibrium").take_turn(player)
    assert not any(v.requires_grad for v in outcome.scalars.values())
    assert (outcome.student_x0 is None) == (player == "head")
