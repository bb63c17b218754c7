"""Phase I, hand-over, phase II: what a phase starts from."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers import read_tensors

from vpae import recipe as recipes
from vpae.distill import distill
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.loading import load_model


def _run(plain: dict, folder, resume: bool = False) -> bool:
    return distill(recipes.from_plain(plain, "test"), folder, resume, start())


@pytest.fixture
def primed(micro_recipe, tmp_path):
    """A run of phase I alone."""
    plain = copy.deepcopy(micro_recipe) | {"equilibrium": None}
    assert _run(plain, tmp_path / "primed")
    return tmp_path / "primed"


def test_phase_two_starts_from_another_runs_phase_one(micro_recipe, primed, tmp_path):
    """As if both phases had run in one folder, bit for bit; that folder's other settings do not matter."""
    assert _run(micro_recipe, tmp_path / "both")
    plain = copy.deepcopy(micro_recipe) | {"priming": None, "priming_run": str(primed)}
    assert _run(plain, tmp_path / "second")
    both, second = (read_tensors(tmp_path / name / "equilibrium") for name in ("both", "second"))
    assert both.keys() == second.keys() and all(torch.equal(both[k], second[k]) for k in both)
    without = copy.deepcopy(micro_recipe) | {"priming": None}
    assert _run(without, tmp_path / "unprimed")
    unprimed = read_tensors(tmp_path / "unprimed" / "equilibrium")
    assert any(not torch.equal(both[k], unprimed[k]) for k in both if k.startswith("student."))


def test_phase_one_of_another_student_or_teacher_is_refused(micro_recipe, primed, tmp_path):
    plain = copy.deepcopy(micro_recipe) | {"priming": None, "priming_run": str(primed)}
    plain["student"]["kind"] = "lora"
    with pytest.raises(
        UserError, match=r"phase II cannot go on from .*primed.*student.kind is 'full' there and 'lora'"
    ):
        _run(plain, tmp_path / "lora")
    plain = copy.deepcopy(micro_recipe) | {"priming": None, "priming_run": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=r"nowhere/priming holds no checkpoint"):
        _run(plain, tmp_path / "none")


def test_phase_one_unfinished_is_refused(micro_recipe, primed, tmp_path):
    plain = copy.deepcopy(micro_recipe)
    plain["priming"]["student_steps"] += 1
    with pytest.raises(UserError, match=r"priming.student_steps is 3 there and 4 here"):
        _run(plain, primed, resume=True)


def test_priming_run_and_priming_exclude_each_other(micro_recipe):
    with pytest.raises(UserError, match="priming_run starts phase II from another run's phase I: set priming: null"):
        recipes.from_plain(copy.deepcopy(micro_recipe) | {"priming_run": "x"}, "test")


def test_the_collapse_limits_and_the_name_may_change_between_calls(micro_recipe, primed):
    plain = copy.deepcopy(micro_recipe) | {"name": "other", "equilibrium": None}
    plain["watch"]["max_logit"] = 3.0
    plain["engine"]["micro_batch"] = 4
    assert _run(plain, primed, resume=True)


@pytest.mark.parametrize("judge", ["unified", "frozen", "trainable"])
def test_every_role_of_a_run_can_be_sampled_from(micro_recipe, tmp_path, judge):
    """Each with its own weights: the ones in the checkpoint, under that role's name."""
    micro_recipe["equilibrium"]["judge"] = judge
    assert _run(micro_recipe, tmp_path)
    stored = {phase: read_tensors(tmp_path / phase) for phase in ("priming", "equilibrium")}
    teacher = dict(load_model(tmp_path, "teacher").role.named_parameters())
    for role, phase, name in (
        ("student", "equilibrium", "student"),
        ("ema", "equilibrium", "ema"),
        ("fake_score", "priming", "fake_score"),
        ("judge", "equilibrium", {"unified": "ema", "frozen": None, "trainable": "head.judge"}[judge]),
    ):
        weights = dict(load_model(tmp_path, role).role.named_parameters())
        expected = teacher if name is None else {k: stored[phase][f"{name}.{k}"] for k in weights}
        assert weights and all(torch.equal(weights[k], expected[k]) for k in weights), role
    with pytest.raises(UserError, match="phase equilibrium has no fake_score; it belongs to priming"):
        load_model(tmp_path, "fake_score", "equilibrium")
    with pytest.raises(UserError, match="has the roles student, ema, teacher, fake_score, judge"):
        load_model(tmp_path, "critic")


@pytest.mark.parametrize("role", ["ema", "fake_score", "teacher"])
def test_one_network_is_read_to_sample_from_one_role(micro_recipe, tmp_path, monkeypatch, role):
    """And not the three of training, which at 14B fill the memory; with the kernel that takes fp32."""
    from vpae import loading

    assert _run(micro_recipe, tmp_path)
    build, give = loading.unborn_transformer, loading.give_memory
    made, given = [], []
    monkeypatch.setattr(loading, "unborn_transformer", lambda config: made.append(build(config)) or made[-1])
    monkeypatch.setattr(loading, "give_memory", lambda backbone, where: given.append(backbone) or give(backbone, where))
    model = load_model(tmp_path, role)
    assert len(made) == len(given) == 1 and model.role.backbone.transformer is made[0]
    assert model.role.backbone is given[0] and not any(p.is_meta for p in made[0].parameters())


def test_phase_ones_networks_are_gone_when_phase_twos_are_built(micro_recipe, tmp_path, monkeypatch):
    """Also with checkpointing, by which a network refers to itself."""
    from vpae import distill as module

    build, before, left = module.build_phase, [], []

    def watched(*arguments):
        left.append([phase() is not None for phase in before])
        trainer = build(*arguments)
        before.extend(weakref.ref(m) for m in trainer.run.modules)
        return trainer

    monkeypatch.setattr(module, "build_phase", watched)
    micro_recipe["engine"]["checkpointing"] = True
    gc.disable()
    try:
        assert _run(micro_recipe, tmp_path)
    finally:
        gc.enable()
    assert left == [[], [False, False, False]]


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("equilibrium", {"taps": [1, 9]}, r"equilibrium.taps \[1, 9\] do not fit a transformer of 4 blocks"),
        ("teacher", {"attention": "nativ"}, "attention: 'nativ' is unknown"),
        ("teacher", {"attention": "sage", "fold_text_padding": False}, "attention: sage has no backward"),
    ],
)
def test_what_would_end_a_run_later_is_asked_before_anything_is_read(
    micro_recipe, tmp_path, monkeypatch, section, change, said
):
    from vpae import distill as module

    micro_recipe[section] |= change
    monkeypatch.setattr(module, "Encoders", None)
    with pytest.raises(UserError, match=said):
        _run(micro_recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
