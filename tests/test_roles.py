from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import tiny_transformer

from vpae.backbone import Backbone
from vpae.conditioning import Condition, first_frame_mask
from vpae.draws import generator_of
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.models import distillation_cast, fake_score, materialise
from vpae.recipe import Lora, from_plain
from vpae.roles import Role, add_lora, copy_weights, full_copy, merge_adapter

LORA = Lora(2, 4.0, ("to_q", "to_v", "proj_out"))
ALONE = Processes(0, 1, torch.device("cpu"), None)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_teacher():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Role("teacher", Backbone(tiny_transformer().requires_grad_(False), fold_text_padding=True))


def awaken(role, scale=0.5):
    with torch.no_grad():
        for name, p in role.named_parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator_of(role.name, name)))
    return role


def inputs(text=16, image=16):
    mask = first_frame_mask(2, 4, 4).expand(2, -1, -1, -1, -1)
    latent = normal(2, 16, 2, 4, 4, seed=3)
    condition = Condition(normal(2, 6, text), normal(2, 5, image, seed=2), latent, mask)
    return normal(2, 16, 2, 4, 4, seed=1), torch.tensor([0.4, 1.0]), condition


@pytest.fixture(params=["full", "lora"])
def cast(request, micro_recipe):
    micro_recipe["student"]["kind"] = request.param
    recipe = from_plain(micro_recipe, "test")
    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
    fake = fake_score(cast, recipe.priming.fake_lora, recipe.seed)
    materialise(cast, ALONE)
    return cast, fake


def test_all_roles_start_as_the_teacher_bit_for_bit(cast):
    cast, fake = cast
    x_t, t, condition = inputs(128, 64)
    teacher = cast.teacher.velocity(x_t, t, condition)
    for role in (fake, cast.student, cast.ema):
        assert torch.equal(role.velocity(x_t, t, condition), teacher), role.name
    for name, p in dict(cast.student.named_parameters()).items():
        assert torch.equal(dict(cast.ema.named_parameters())[name], p), name


def test_each_role_moves_without_the_others(cast):
    cast, fake = cast
    x_t, t, condition = inputs(128, 64)
    roles = [cast.student, cast.ema, fake]
    before = {r.name: r.velocity(x_t, t, condition) for r in [cast.teacher, *roles]}
    for role in roles:
        awaken(role, 0.1)
        now = {r.name: r.velocity(x_t, t, condition) for r in [cast.teacher, *roles]}
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed == {role.name}
        before = now


def test_every_parameter_belongs_to_exactly_one_role_and_none_requires_grad(cast):
    cast, fake = cast
    owned = [id(p) for role in (cast.teacher, cast.student, cast.ema, fake) for p in role.parameters()]
    there = [id(p) for backbone in cast.backbones for p in backbone.transformer.parameters()]
    assert len(owned) == len(set(owned)) and set(owned) == set(there)
    assert not any(p.requires_grad for b in cast.backbones for p in b.transformer.parameters())


def test_full_roles_own_everything_and_lora_roles_share_one_base(cast):
    cast, fake = cast
    if cast.student.adapter is None:
        assert len({id(b.transformer) for b in cast.backbones}) == 3 and fake.backbone is cast.teacher.backbone
    else:
        assert len(cast.backbones) == 1
        assert all("lora_" in name for name, _ in cast.student.named_parameters())


def test_names_of_a_roles_weights_do_not_tell_the_role():
    teacher = make_teacher()
    roles = [add_lora(teacher.backbone, name, LORA, 0) for name in ("student", "ema")]
    names = [[name for name, _ in role.named_parameters()] for role in roles]
    assert names[0] == names[1] and "blocks.0.attn1.to_q.lora_A.weight" in names[0]
    assert len(names[0]) == 2 * (4 * 4 + 1)  # A and B of to_q and to_v in two attentions of four blocks, and proj_out


def test_x0_and_guidance():
    teacher, (x_t, t, condition) = make_teacher(), inputs()
    null = condition.null(normal(1, 3, 16, seed=8))
    cond, uncond = teacher.velocity(x_t, t, condition), teacher.velocity(x_t, t, null)
    assert not torch.equal(cond, uncond)
    step = t.reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(teacher.x0(x_t, t, condition), x_t - step * cond)
    guided = uncond + 5 * (cond - uncond)
    torch.testing.assert_close(teacher.guided_velocity(x_t, t, condition, null, 5.0), guided)
    torch.testing.assert_close(teacher.guided_x0(x_t, t, condition, null, 5.0), x_t - step * guided)


def test_guidance_of_1_costs_one_forward():
    teacher, (x_t, t, condition) = make_teacher(), inputs()
    calls = []
    teacher.backbone.register_forward_pre_hook(lambda m, args: calls.append(args[2]))
    null = condition.null(normal(1, 3, 16, seed=8))
    assert torch.equal(teacher.guided_x0(x_t, t, condition, null, 1.0), teacher.x0(x_t, t, condition))
    assert [c is condition for c in calls] == [True, True]


def test_a_lora_is_a_function_of_seed_and_name_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    weights = {}
    for seed, name in ((0, "student"), (0, "fake_score"), (1, "student")):
        weights[seed, name] = [p.clone() for p in add_lora(make_teacher().backbone, name, LORA, seed).parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        again = add_lora(make_teacher().backbone, "student", LORA, 0).parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights[0, "student"], again, strict=True))
    assert not torch.equal(weights[0, "student"][0], weights[0, "fake_score"][0])
    assert not torch.equal(weights[0, "student"][0], weights[1, "student"][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lora_target_that_names_nothing_is_a_users_mistake():
    with pytest.raises(UserError, match="'to_querry' names no linear layer .* to_q"):
        add_lora(make_teacher().backbone, "student", Lora(2, 2.0, ("to_querry",)), 0)


def test_rank_and_alpha_scale_the_update():
    x_t, t, condition = inputs()
    moves = []
    for alpha in (2.0, 4.0):
        teacher = make_teacher()
        role = awaken(add_lora(teacher.backbone, "student", Lora(2, alpha, ("proj_out",)), 0))
        moves.append(role.velocity(x_t, t, condition) - teacher.velocity(x_t, t, condition))
    torch.testing.assert_close(moves[1], 2 * moves[0], atol=1e-5, rtol=1e-4)


def test_a_full_copy_is_equal_apart_and_frozen():
    teacher, (x_t, t, condition) = make_teacher(), inputs()
    twin = full_copy(teacher, "student")
    before = teacher.velocity(x_t, t, condition)
    assert torch.equal(twin.velocity(x_t, t, condition), before)
    awaken(twin, 0.1)
    assert torch.equal(teacher.velocity(x_t, t, condition), before)
    assert not torch.equal(twin.velocity(x_t, t, condition), before)
    assert not any(p.requires_grad for p in twin.parameters())
    fake = add_lora(teacher.backbone, "fake_score", LORA, 0)
    for role in (teacher, fake):
        with pytest.raises(ValueError, match="plain weights"):
            full_copy(role, "student")


def test_copying_weights():
    teacher, (x_t, t, condition) = make_teacher(), inputs()
    twin = full_copy(teacher, "student")
    live, ema = (add_lora(teacher.backbone, name, LORA, 0) for name in ("student", "ema"))
    awaken(live)
    copy_weights(live, ema)
    assert torch.equal(live.velocity(x_t, t, condition), ema.velocity(x_t, t, condition))
    assert all(a is not b for a, b in zip(live.parameters(), ema.parameters(), strict=True))
    with pytest.raises(ValueError, match="not the same kind"):
        copy_weights(twin, ema)


@pytest.mark.parametrize("name", ["teacher", "student", "ema"])
def test_a_merged_role_answers_as_the_role_from_plain_weights(name):
    teacher, (x_t, t, condition) = make_teacher(), inputs()
    roles = {"teacher": teacher}
    roles |= {name: awaken(add_lora(teacher.backbone, name, LORA, 0), 0.2) for name in ("student", "ema")}
    said = {key: role.velocity(x_t, t, condition) for key, role in roles.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns when it has to guess which adapter is meant
        merged = merge_adapter(roles[name])
    assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key]
    assert merged.state_dict().keys() == make_teacher().backbone.transformer.state_dict().keys()
    for fold in (True, False):  # also through diffusers' own attention
        backbone = Backbone(copy.deepcopy(merged), fold_text_padding=fold)
        torch.testing.assert_close(backbone(x_t, t, condition).velocity, said[name], atol=1e-5, rtol=1e-5)
    for key, role in roles.items():  # and nothing happened to the roles
        assert torch.equal(role.velocity(x_t, t, condition), said[key])
