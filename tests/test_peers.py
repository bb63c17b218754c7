"""Peers from the recipe to a student that loads, resumed bit for bit; the teacher's clips that some train on."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import differing, make_trainer, read_tensors, snapshot, write_recipe
from safetensors.torch import load_file

from vpae import recipe as recipes
from vpae.data.encoders import Encoders
from vpae.distill import distill, open_data
from vpae.draws import Draws
from vpae.engine.parallel import alone, start
from vpae.errors import UserError
from vpae.export.card import model_card
from vpae.loading import load_model
from vpae.preflight.disk import samples_bytes
from vpae.roles import Role
from vpae.runs import phases_of
from vpae.sampling import sample_latents

PAPERS = {  # what a student's card names
    "dmd2": "arXiv 2405.14867",
    "apt": "arXiv 2501.08316",
    "pcm": "arXiv 2405.18407",
    "lcm": "arXiv 2310.04378",
    "ladd": "arXiv 2403.12015",
    "mse": "regression of the teacher's samples",
}
NAMES = tuple(PAPERS)


def _run(plain, folder, resume=False):
    return distill(recipes.from_plain(plain, "test"), folder, resume, start())


def _data(plain):
    recipe = recipes.from_plain(plain, "test")
    return open_data(recipe, Encoders(recipe.teacher.path), alone())


@pytest.mark.parametrize("name", NAMES)
def test_from_the_recipe_to_a_student_that_loads(micro_peer, tmp_path, name):
    plain = micro_peer(name)
    assert _run(plain, tmp_path)
    phases = phases_of(recipes.from_plain(plain, "test"))
    assert phases[-1] == plain["method"]["kind"] and all((tmp_path / p / "checkpoints").is_dir() for p in phases)
    stored, model = read_tensors(tmp_path / phases[-1]), load_model(tmp_path)
    weights, teacher = (dict(role.named_parameters()) for role in (model.role, load_model(tmp_path, "teacher").role))
    assert all(torch.equal(weights[key], stored[f"ema.{key}"]) for key in weights)
    assert any(not torch.equal(weights[key], teacher[key]) for key in weights)
    batch = _data(plain).fetch([0, 1], Draws(0, [0, 1]))
    latents = sample_latents(model.role, batch.condition, None, batch.draws, steps=1)
    assert latents.shape == batch.x0.shape and latents.isfinite().all()
    card = model_card(model, None)
    assert PAPERS[name] in card and "V-PAE" not in card


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dmd2", "lora"), ("apt", "full"), ("pcm", "full"), ("lcm", "lora"), ("ladd", "full"), ("mse", "full")],
)
def test_train_save_resume_train_equals_training_through(micro_peer, tmp_path, name, kind):
    plain = micro_peer(name)
    plain["student"]["kind"] = kind
    if name == "dmd2" and kind == "lora":
        plain["method"]["fake_lora"] = plain["student"]["lora"]
    phase = plain["method"]["kind"]
    through = make_trainer(plain, phase, tmp_path / "through")
    through.train(until=3)
    make_trainer(plain, phase, tmp_path / "halves").train(until=2)
    second = make_trainer(plain, phase, tmp_path / "halves")
    assert second.resume() and second.turn == 2
    second.train(until=3)
    assert differing(snapshot(through), snapshot(second)) == []


def test_apts_gan_starts_from_the_distilled_student_and_its_judge_from_the_teacher(micro_peer, tmp_path):
    plain = micro_peer("apt")
    for optimiser in ("student_optimiser", "head_optimiser"):
        plain["method"][optimiser] |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    assert _run(plain, tmp_path)
    first, second = (read_tensors(tmp_path / phase) for phase in ("consistency", "apt"))
    teacher = dict(load_model(tmp_path, "teacher").role.named_parameters())
    for key, weight in teacher.items():
        torch.testing.assert_close(second[f"student.{key}"], first[f"ema.{key}"], atol=1e-9, rtol=0)
        torch.testing.assert_close(second[f"head.judge.{key}"], weight, atol=1e-9, rtol=0)
    assert any(not torch.equal(first[f"ema.{key}"], teacher[key]) for key in teacher)
    judge = dict(load_model(tmp_path, "judge").role.named_parameters())
    assert all(torch.equal(judge[key], second[f"head.judge.{key}"]) for key in judge)
    with pytest.raises(UserError, match="the method of this run, apt, has no fake_score"):
        load_model(tmp_path, "fake_score")
    with pytest.raises(UserError, match="has no phase priming; it has consistency, apt"):
        load_model(tmp_path, phase="priming")


def test_phase_two_of_vpae_may_start_from_a_consistency_distillation(micro_recipe, micro_peer, tmp_path):
    """The paper's ablation of priming."""
    assert _run(micro_peer("lcm"), tmp_path / "lcm")
    plain = micro_recipe | {"priming": None, "priming_run": str(tmp_path / "lcm")}
    plain["equilibrium"] |= {"student_steps": 1}
    plain["equilibrium"]["student_optimiser"] |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    assert _run(plain, tmp_path / "second")
    first, second = read_tensors(tmp_path / "lcm" / "pcm"), read_tensors(tmp_path / "second" / "equilibrium")
    mine = [key for key in first if key.startswith("ema.")]
    assert differing({k: first[k] for k in mine}, {k: second[k] for k in mine}, 1e-9) == []


@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("replicate", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(vpae, micro_peer, tmp_path, parallel):
    plain = micro_peer("dmd2")
    plain["engine"]["parallel"] = parallel
    plain["method"] |= {"student_steps": 1, "critic_per_student": 1}
    for settings in ("student_optimiser", "critic_optimiser"):
        plain["method"][settings] |= {"learning_rate": 1e-12, "weight_decay": 0.0}
    for ranks in (1, 2):
        recipe = write_recipe(plain, tmp_path / f"{ranks}.yaml")
        done = vpae("distill", recipe, "--output", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_tensors(tmp_path / ranks / "dmd2") for ranks in ("1", "2"))
    for player in ("student", "critic"):
        moments = [{k: v for k, v in t.items() if k.startswith(f"optimiser.{player}.")} for t in (one, two)]
        moments = [{k: v for k, v in m.items() if k.endswith("exp_avg")} for m in moments]
        scale = max(float(v.abs().max()) for v in moments[0].values())
        assert scale > 0 and differing(*moments, tolerance=1e-5 * scale) == [], player


class TestTeacherSamples:
    @pytest.fixture
    def plain(self, micro_peer, tmp_path):
        plain = micro_peer("mse")
        plain["method"]["teacher_samples"]["folder"] = str(tmp_path / "samples")
        return plain

    def test_they_are_what_the_teacher_makes_of_their_noise(self, plain):
        data = _data(plain)
        assert len(data) == 6
        batch = data.fetch([1, 5], Draws(0, [0, 1]))
        recipe = recipes.from_plain(plain, "test")
        teacher: Role = load_model(recipes.Path(recipe.teacher.path)).role
        scheduler = Encoders(recipe.teacher.path).pipeline.scheduler

        class Given(Draws):
            def normal(self, purpose, shape):
                return batch.noise

        options = {"steps": 2, "guidance_scale": 2.0, "sampler": "euler", "scheduler": scheduler}
        expected = sample_latents(teacher, batch.condition, batch.null, Given(0, [0, 1]), **options)
        torch.testing.assert_close(batch.x0, expected, atol=1e-4, rtol=1e-3)
        assert abs(float(batch.noise.std()) - 1) < 0.1 and not torch.equal(batch.noise[0], batch.noise[1])

    def test_what_is_there_is_taken_up_and_a_lost_file_comes_back_the_same(self, plain, tmp_path, monkeypatch):
        from vpae.data import samples

        first = _data(plain)
        folder = tmp_path / "samples"
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert sorted(before) == ["lock", "manifest.json", "samples-00000.safetensors", "samples-00001.safetensors"]
        (folder / "samples-00001.safetensors").unlink()
        (folder / ".samples-00001.safetensors.7.tmp").write_bytes(b"half")
        (folder / "manifest.json").unlink()
        asked = []
        sample = samples.sample_latents
        monkeypatch.setattr(samples, "sample_latents", lambda *a, **k: asked.append(len(a[1])) or sample(*a, **k))
        second = _data(plain)
        assert asked == [2] and second.fingerprint == first.fingerprint
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    def test_a_flipped_bit_and_other_settings_are_refused(self, plain, tmp_path):
        first, folder = _data(plain), tmp_path / "samples"
        moved = folder.rename(tmp_path / "elsewhere")
        plain["method"]["teacher_samples"]["folder"] = str(moved)
        assert _data(plain).fingerprint == first.fingerprint
        plain["method"]["teacher_samples"]["steps"] = 3
        with pytest.raises(UserError, match="do not fit this recipe: steps is 2 there and 3 in the recipe; remove"):
            _data(plain)
        plain["method"]["teacher_samples"]["steps"] = 2
        file = moved / "samples-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"samples-00000.safetensors is damaged; remove it"):
            _data(plain)

    def test_a_folder_of_something_else_is_left_alone(self, plain, tmp_path):
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="holds thesis.txt and no clips of the teacher"):
            _data(plain)
        assert {file.name: file.read_text() for file in (tmp_path / "samples").iterdir()} == {"thesis.txt": "mine"}

    def test_preflight_asks_for_the_room_that_they_take(self, plain, tmp_path):
        recipe = recipes.from_plain(plain, "test")
        room = samples_bytes(recipe)
        data = _data(plain)
        files = (tmp_path / "samples").glob("*.safetensors")
        made = [tensor for file in files for tensor in load_file(file).values()]
        assert len(data) == 6 and room == sum(tensor.numel() * tensor.element_size() for tensor in made) > 0
        assert samples_bytes(recipe) == 0  # they are there

    def test_more_clips_than_the_cache_has(self, plain):
        plain["method"]["teacher_samples"]["count"] = 21
        with pytest.raises(UserError, match=r"teacher_samples.count is 21, and the cache .* has 20 clips"):
            _data(plain)

    def test_where_they_lie_is_free_when_a_run_is_resumed(self, plain, tmp_path):
        assert _run(plain, tmp_path / "run")
        shutil.move(tmp_path / "samples", tmp_path / "elsewhere")
        plain["method"]["teacher_samples"]["folder"] = str(tmp_path / "elsewhere")
        assert _run(plain, tmp_path / "run", resume=True)


class TestRecipe:
    def refusal(self, plain):
        with pytest.raises(UserError) as caught:
            recipes.from_plain(plain, "my.yaml")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("name", NAMES)
    def test_no_key_may_be_missing_and_the_whole_comes_back(self, micro_peer, name):
        plain = micro_peer(name)
        assert recipes.to_plain(recipes.from_plain(plain, "")) == plain
        for key in plain["method"]:
            lacking = plain | {"method": {k: v for k, v in plain["method"].items() if k != key}}
            assert f"'method.{key}'" in self.refusal(lacking)

    def test_a_method_is_told_by_its_kind(self, micro_peer):
        plain = micro_peer("dmd2")
        plain["method"]["kind"] = "dmd"
        assert self.refusal(plain) == (
            "my.yaml: key 'method.kind' must be one of dmd2, apt, pcm, ladd, mse, not 'dmd'; did you mean dmd2?"
        )
        assert "and section 'method' is text" in self.refusal(plain | {"method": "dmd2"})
        assert "missing key 'method' (a mapping)" in self.refusal({k: v for k, v in plain.items() if k != "method"})
        plain = micro_peer("apt")
        plain["method"]["critic_per_student"] = 5
        assert "unknown key 'method.critic_per_student'; did you mean method.head_per_student?" in self.refusal(plain)

    @pytest.mark.parametrize(
        ("name", "key", "value", "says"),
        [
            ("dmd2", "score_time", {"low": 0.0}, "method.score_time.low must be above 0"),
            ("dmd2", "judge_time", {"low": 1.0, "high": 1.0}, "method.judge_time.low must be below 1"),
            ("dmd2", "critic_per_student", 0, "'method.critic_per_student' must be at least 1"),
            ("dmd2", "head", {"num_heads": 3}, "method.head.width must be a multiple"),
            ("pcm", "adversary", {"taps": []}, "method.adversary.taps names no block"),
            ("lcm", "consistency", {"guidance_range": [3.0, 2.0]}, "the smaller number first"),
            ("lcm", "consistency", {"grid_steps": 0}, "'method.consistency.grid_steps' must be at least 1"),
            ("apt", "r1_sigma", 0.0, "'method.r1_sigma' must be above 0"),
            ("ladd", "student_weights", [0.0], "one of them is above 0"),
            ("ladd", "student_weights", [1.0, 1.0], "each with a number in student_weights"),
            ("ladd", "student_times", [0.0], "times above 0"),
            ("mse", "teacher_samples", {"count": 0}, "'method.teacher_samples.count' must be at least 1"),
            ("mse", "teacher_samples", None, "section 'method.teacher_samples' must be a mapping"),
        ],
    )
    def test_what_cannot_be(self, micro_peer, name, key, value, says):
        plain = micro_peer(name)
        old = plain["method"][key]
        plain["method"][key] = old | value if isinstance(value, dict) else value
        assert says in self.refusal(plain)

    def test_a_lora_student_of_dmd2_needs_a_lora_fake_score(self, micro_peer):
        plain = micro_peer("dmd2")
        plain["student"]["kind"] = "lora"
        assert "so method.fake_lora must be given too" in self.refusal(plain)

    def test_taps_are_asked_before_anything_is_read(self, micro_peer, tmp_path, monkeypatch):
        from vpae import distill as module

        plain = micro_peer("pcm")
        plain["method"]["adversary"]["taps"] = [1, 9]
        monkeypatch.setattr(module, "Encoders", None)
        with pytest.raises(UserError, match=r"method.adversary.taps \[1, 9\] do not fit a transformer of 4 blocks"):
            _run(plain, tmp_path / "run")
