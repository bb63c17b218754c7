"""Plans against arithmetic, against themselves, and against what they advise."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from vpae import recipe as recipes
from vpae.draws import Draws
from vpae.engine.host import GIB
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.plan import check as checking
from vpae.plan.account import FITS, TIGHT, TOO_LARGE, PhasePlan, Plan, TurnPlan, load_of, make_plan, phase_load
from vpae.plan.account import _further as further
from vpae.plan.advise import advise
from vpae.plan.ledger import ACTIVATIONS
from vpae.plan.shapes import shapes_of
from vpae.plan.show import plan_text
from vpae.plan.simulate import Hardware, simulate
from vpae.weights import unborn_transformer

RECIPES = Path(__file__).parents[2] / "recipes"
ONE = Hardware(1, cuda=False)


def _recipe(plain, **engine):
    plain = copy.deepcopy(plain)
    plain["engine"] |= engine
    return recipes.from_plain(plain, "test")


@pytest.fixture
def long_clips(micro_recipe):
    """The micro recipe with clips of 272 tokens: activations outweigh weights."""
    micro_recipe["data"]["source"]["world"] = {"size": 64, "num_frames": 65}
    return micro_recipe


def _kept(load, player="student"):
    """What the forward of a player's turn keeps for the backward."""
    return max(kinds.get(ACTIVATIONS, 0) for kinds in load.turns[player].segments)


def _load(plain, phase="priming", hardware=ONE, blocks=None, **engine):
    recipe = _recipe(plain, **engine)
    return load_of(recipe, phase, shapes_of(recipe), hardware, blocks)


def _peak(load, player="student"):
    return max(sum(kinds.values()) for kinds in load.turns[player].segments)


def _tensors(recipe):
    return [p.shape for p in unborn_transformer(shapes_of(recipe).config).parameters()]


def test_weights_gradients_and_moments_are_what_arithmetic_says(micro_recipe):
    load, shapes = _load(micro_recipe, micro_batch=1), _tensors(_recipe(micro_recipe))
    numel = sum(map(math.prod, shapes))
    assert load.parameters == numel
    for kind in ("weights of teacher", "weights of student", "EMA"):
        assert load.resting[kind] == 4 * numel
    assert load.resting["optimiser of student"] == 8 * numel + 4 * len(shapes)  # a count of steps a tensor
    fullest = max(load.turns["student"].segments, key=lambda kinds: sum(kinds.values()))
    assert fullest["gradients of student"] == 4 * numel
    lora = sum(2 * (shape[0] + shape[1]) for shape in _targets(_recipe(micro_recipe)))
    assert load.resting["weights of fake_score"] == 4 * lora
    assert load.checkpoint == 4 * (4 * numel + 3 * lora)  # student, EMA and moments; LoRA and moments


def _targets(recipe):
    """Shapes of the linear layers that the micro recipe's LoRA of rank 2 is put on."""
    named = unborn_transformer(shapes_of(recipe).config).named_parameters()
    return [p.shape for name, p in named if name.endswith(("to_q.weight", "to_v.weight"))]


def test_eight_ranks_hold_an_eighth(micro_recipe):
    load = _load(micro_recipe, hardware=Hardware(8, cuda=False), global_batch=8, micro_batch=1)
    mine = sum(math.ceil(shape[0] / 8) * math.prod(shape[1:]) for shape in _tensors(_recipe(micro_recipe)))
    for kind in ("weights of teacher", "weights of student", "EMA"):
        assert load.resting[kind] == 4 * mine
    assert load.turns["student"].flops == _load(micro_recipe, global_batch=1, micro_batch=1).turns["student"].flops


def test_machines_hold_the_same_shards(micro_recipe):
    """hsdp over two machines of two: each rank has a half, as on one machine of two."""
    two, machines = Hardware(2, cuda=False), Hardware(4, 2, cuda=False)
    alone = _load(micro_recipe, hardware=two, global_batch=2, micro_batch=1)
    both = _load(micro_recipe, hardware=machines, global_batch=4, micro_batch=1, parallel="hsdp")
    assert both.resting["weights of student"] == alone.resting["weights of student"]
    assert both.checkpoint == alone.checkpoint


def test_a_teacher_in_bf16_takes_half(micro_recipe):
    micro_recipe["teacher"]["dtype"] = "bf16"
    load = _load(micro_recipe, precision="bf16")
    numel = sum(map(math.prod, _tensors(_recipe(micro_recipe, precision="bf16"))))
    assert 2 * numel < load.resting["weights of teacher"] < 2.5 * numel  # norms stay in fp32
    assert load.resting["weights of student"] == 4 * numel


def test_checkpointing_spares_activations_and_costs_a_forward(long_clips):
    plain, spared = (_load(long_clips, checkpointing=value, micro_batch=1) for value in (False, True))
    assert _kept(spared) < 0.5 * _kept(plain) and _peak(spared) < 0.9 * _peak(plain)
    assert spared.turns["student"].flops > plain.turns["student"].flops


def test_a_larger_micro_batch_takes_more_memory_and_the_same_work(long_clips):
    small, large = (_load(long_clips, micro_batch=size) for size in (1, 4))
    assert 3 * _kept(small) < _kept(large) < 5 * _kept(small) and _peak(large) > 2 * _peak(small)
    assert small.turns["student"].flops == pytest.approx(large.turns["student"].flops, rel=1e-3)


@pytest.mark.parametrize("state", ["bf16", "int8", "cpu"])
def test_moments_are_counted_where_and_as_they_are_kept(micro_recipe, state):
    if state == "int8":
        pytest.importorskip("torchao")
    numel = sum(map(math.prod, _tensors(_recipe(micro_recipe))))
    load = _load(micro_recipe, optimiser_state=state)
    kept = load.resting.get("optimiser of student", 0)
    if state == "cpu":
        assert kept == 0 and 8 * numel <= load.host["optimiser of student"] < 8.5 * numel
    else:
        assert kept < (4.2 if state == "bf16" else 8) * numel and not load.host
        assert kept >= (4 if state == "bf16" else 2) * numel


def test_an_ema_in_host_memory_leaves_the_device(micro_recipe):
    two = Hardware(2, cuda=False)
    device, host = (_load(micro_recipe, hardware=two, ema_on=where) for where in ("device", "cpu"))
    assert "EMA" not in host.resting and host.host["EMA"] == device.resting["EMA"]


def test_ranks_that_share_tokens_keep_fewer_activations(long_clips):
    two = Hardware(2, cuda=False)
    own, shared = (
        _load(long_clips, hardware=two, global_batch=batch, micro_batch=1, sequence_parallel=degree)
        for batch, degree in ((2, 1), (1, 2))
    )
    assert 0.4 * _kept(own) < _kept(shared) < 0.75 * _kept(own)
    assert 0.4 * own.turns["student"].flops < shared.turns["student"].flops < 0.75 * own.turns["student"].flops


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "phase"), [("full", "priming"), ("lora", "equilibrium")])
def test_a_deeper_network_follows_from_two_shallow_ones(micro_recipe, phase, kind):
    micro_recipe["student"]["kind"] = kind
    hardware = Hardware(2, cuda=True) if kind == "full" else ONE
    few, more, whole = (
        _load(micro_recipe, phase, hardware, blocks, checkpointing=True, micro_batch=1) for blocks in (6, 8, 12)
    )
    guess = further(few, more, 3)
    for player, turn in whole.turns.items():
        assert _peak(guess, player) == pytest.approx(_peak(whole, player), rel=0.01)
        assert guess.turns[player].flops == pytest.approx(turn.flops, rel=1e-6)
    assert sum(guess.resting.values()) == pytest.approx(sum(whole.resting.values()), rel=1e-6)
    assert guess.checkpoint == pytest.approx(whole.checkpoint, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["priming", "equilibrium"])
@pytest.mark.parametrize("name", ["wan21_i2v_14b_480p", "wan21_i2v_14b_480p_lora_1gpu"])
def test_a_14b_plan_is_that_of_all_its_blocks(name, phase):
    recipe = recipes.load(RECIPES / f"{name}.yaml")
    hardware, shapes = Hardware(8 if recipe.student.kind == "full" else 1), shapes_of(recipe)
    guess, whole = (phase_load(recipe, phase, shapes, hardware, whole=value) for value in (False, True))
    assert guess.parameters == whole.parameters == 16_394_878_784
    for player, turn in whole.turns.items():
        assert _peak(guess, player) == pytest.approx(_peak(whole, player), rel=0.01)
        assert guess.turns[player].flops == pytest.approx(turn.flops, rel=1e-6)


def _made_up(recipe, peak, ranks=8, in_use=False):
    turn = TurnPlan({"weights of student": peak}, 1e15, 10)
    phase = PhasePlan({"student": turn}, {"process": GIB}, {"process": GIB}, 1e9, 1e6)
    return Plan(recipe, Hardware(ranks), 100 * GIB, shapes_of(recipe), {"priming": phase}, in_use)


@pytest.mark.parametrize(("peak", "verdict"), [(89, FITS), (91, TIGHT), (95, TIGHT), (97, TOO_LARGE), (200, TOO_LARGE)])
def test_verdict(micro_recipe, peak, verdict):
    plan = _made_up(_recipe(micro_recipe), peak * GIB)
    assert plan.verdict("priming") == verdict
    assert plan.failing == (["priming"] if verdict == TOO_LARGE else [])
    assert f"priming: {verdict}" in plan_text(plan, 400.0)


def test_what_is_kept_free_is_what_may_be_wanted(micro_recipe):
    """A single GPU has no NCCL, and what is free in a process with a context holds no context."""
    recipe = _recipe(micro_recipe)
    assert _made_up(recipe, 93 * GIB).verdict("priming") == TIGHT
    assert _made_up(recipe, 93 * GIB, ranks=1).verdict("priming") == FITS
    assert _made_up(recipe, 97 * GIB, in_use=True).verdict("priming") == TIGHT
    assert _made_up(recipe, 99 * GIB, in_use=True).verdict("priming") == TOO_LARGE


def test_the_vae_stays_and_checkpoints_are_kept_but_for_one(micro_recipe):
    recipe = _recipe(micro_recipe)
    plan = make_plan(recipe, ONE, GIB)
    file = Path(recipe.teacher.path) / "vae" / "diffusion_pytorch_model.safetensors"
    load = phase_load(recipe, "priming", plan.shapes, ONE)
    for player, turn in plan.phases["priming"].turns.items():
        assert turn.kinds["VAE, for samples"] == file.stat().st_size
        assert turn.peak == pytest.approx(_peak(load, player) + file.stat().st_size, rel=1e-9)
    first, second = (phase.checkpoint for phase in plan.phases.values())
    assert plan.disk == recipe.engine.keep_checkpoints * (first + second) + max(first, second)


def test_a_model_is_planned_with_the_condition_it_has(micro_recipe, micro_t2v, micro_ti2v):
    """Wan2.2-TI2V holds its first frame and is told a time a token, which takes more; text-to-video has no CLIP."""
    shapes = {"i2v": shapes_of(_recipe(micro_recipe))}
    for kind, folder in (("t2v", micro_t2v), ("ti2v", micro_ti2v)):
        micro_recipe["teacher"]["path"] = str(folder)
        shapes[kind] = shapes_of(_recipe(micro_recipe))
        assert not list(folder.glob("image_encoder/*.safetensors"))
        parts = ("vae", "text_encoder")
        sizes = [sum(f.stat().st_size for f in (folder / part).glob("*.safetensors")) for part in parts]
        assert (shapes[kind].vae, shapes[kind].encoders) == (sizes[0], sum(sizes))
    assert {kind: of.kind for kind, of in shapes.items()} == {kind: kind for kind in shapes}
    condition = shapes["ti2v"].batch(Draws(0, [0, 1], torch.device("cpu"))).condition
    assert condition.given == 1 and condition.latent.shape == (
        2,
        shapes["ti2v"].latent[0],
        1,
        *shapes["ti2v"].latent[2:],
    )
    recipe = _recipe(micro_recipe, micro_batch=1)
    held = load_of(recipe, "priming", shapes["ti2v"], ONE)
    alike = load_of(recipe, "priming", dataclasses.replace(shapes["ti2v"], kind="t2v"), ONE)
    assert _kept(held) > _kept(alike)


@pytest.mark.parametrize(
    ("name", "kind"), [("wan21_i2v_14b_480p", "i2v"), ("wan21_t2v_1_3b", "t2v"), ("wan22_ti2v_5b", "ti2v")]
)
def test_released_models_are_known_before_they_are_there(name, kind):
    shapes = shapes_of(recipes.load(RECIPES / f"{name}.yaml"))
    assert shapes.kind == kind
    assert shapes.encoders - shapes.vae == 4 * (5_680_910_336 + (632_076_800 if kind == "i2v" else 0))


def test_the_advice_is_the_cheapest_change_that_was_planned_to_fit(long_clips):
    recipe = _recipe(long_clips, micro_batch=1)
    spared = _recipe(long_clips, micro_batch=1, checkpointing=True)
    peaks = [max(p.peak for p in make_plan(r, ONE, GIB).phases.values()) for r in (recipe, spared)]
    plan = make_plan(recipe, ONE, peaks[0])
    assert plan.failing
    advice = advise(plan)
    assert advice.settings == "engine.checkpointing=true" and not advice.plan.failing
    assert max(phase.peak for phase in advice.plan.phases.values()) == peaks[1]


def test_nothing_is_advised_where_nothing_helps(micro_recipe):
    assert advise(make_plan(_recipe(micro_recipe, micro_batch=1), ONE, 1e5)) is None


def test_other_kinds_of_recipes_and_uneven_machines_are_told():
    teacher = recipes.load(RECIPES / "tiny_teacher.yaml")
    with pytest.raises(UserError, match="vpae plan plans those of kind distill"):
        make_plan(teacher, ONE, GIB)
    student = recipes.load(RECIPES / "wan21_i2v_14b_480p.yaml")
    with pytest.raises(UserError, match="8 GPUs cannot be spread evenly over 3 machines"):
        make_plan(student, Hardware(8, 3), GIB)


def test_a_batch_that_the_ranks_cannot_share_is_told(micro_recipe):
    recipe = _recipe(micro_recipe)
    with pytest.raises(UserError, match="engine.global_batch 4 cannot be split over 3 ranks"):
        simulate(recipe, "priming", shapes_of(recipe), Hardware(3))


def test_the_command_writes_the_plan(vpae, micro_recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipes.dump(_recipe(micro_recipe)))
    done = vpae("plan", tmp_path / "recipe.yaml", "--gpus", 1, "--gpu-memory", 1, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {name: phase["verdict"] for name, phase in plan["phases"].items()} == {"priming": FITS, "equilibrium": FITS}
    assert plan["phases"]["priming"]["players"]["student"]["turns"] == 3
    assert "priming: fits" in done.stdout and "Kept free: 6 %" in done.stdout


def test_a_run_that_does_not_fit_is_refused_with_the_plans_words(micro_recipe):
    said = checking.planned_refusal(_recipe(micro_recipe), 1, 1, int(2e5))
    assert said.startswith("micro does not fit: a GPU would need 0.0") and "\n" not in said


def test_on_cpus_only_what_is_clearly_impossible_is_refused(micro_recipe, monkeypatch):
    recipe, alone = _recipe(micro_recipe), Processes(0, 1, torch.device("cpu"), None)
    checking.check_room(recipe, alone)
    least = checking.least_bytes(recipe, sum(map(math.prod, _tensors(recipe))))
    monkeypatch.setattr(checking, "free_memory", lambda: least)
    checking.check_room(recipe, alone)
    monkeypatch.setattr(checking, "free_memory", lambda: least - 1)
    with pytest.raises(UserError, match="micro does not fit: 1 ranks .*--no-plan-check"):
        checking.check_room(recipe, alone)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_bounds_hold_the_plan_between_them(micro_recipe, kind):
    micro_recipe["student"]["kind"] = kind
    recipe = _recipe(micro_recipe)
    shapes, numel = shapes_of(recipe), sum(map(math.prod, _tensors(recipe)))
    peak = max(phase.peak for phase in make_plan(recipe, ONE, GIB).phases.values())
    bound = checking.most_bytes(recipe, numel, shapes)
    assert checking.least_bytes(recipe, numel) < peak < bound - GIB  # of which a GiB is for what no shape tells
    assert dataclasses.replace(shapes, latent=(16, 4, 8, 8)).tokens == 64
