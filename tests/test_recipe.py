from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from vpae import recipe as recipes
from vpae.errors import UserError

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
ABSENT = object()


@pytest.fixture
def plain(micro_recipe):
    return json.loads(json.dumps(micro_recipe))  # no two sections are one object


def changed(plain, key, value):
    plain = json.loads(json.dumps(plain))
    *parents, last = key.split(".")
    node = plain
    for part in parents:
        node = node[part]
    if value is ABSENT:
        del node[last]
    else:
        node[last] = value
    return plain


def complaint(plain):
    with pytest.raises(UserError) as caught:
        recipes.from_plain(plain, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ") and "\n" not in message
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_that_ship_load_and_come_back_whole(path):
    recipe = recipes.load(path)
    assert recipes.from_plain(yaml.safe_load(recipes.dump(recipe)), "dump") == recipe
    assert recipe.name == path.stem


def test_there_are_recipes():
    assert RECIPES


def test_values_arrive_with_their_types(plain):
    recipe = recipes.from_plain(plain, "my.yaml")
    assert recipe.priming.student_time == recipes.TimeLaw("uniform", 0.9, 1.0, 1.0, 0.0, 1.0)
    assert recipe.priming.student_optimiser.betas == (0.0, 0.99)
    assert recipe.student.lora == recipes.Lora(2, 2.0, ("to_q", "to_v"))
    assert recipe.equilibrium.taps is None
    assert recipes.from_plain(changed(plain, "equilibrium.taps", [0, 3]), "").equilibrium.taps == (0, 3)


def test_whole_numbers_serve_as_numbers_and_exponents_without_a_point_are_understood(plain):
    """YAML 1.1 reads 1e-4 as text."""
    assert yaml.safe_load("1e-4") == "1e-4"
    for value in ("1e-4", 1e-4):
        recipe = recipes.from_plain(changed(plain, "priming.student_optimiser.learning_rate", value), "")
        assert recipe.priming.student_optimiser.learning_rate == 1e-4
    weight = recipes.from_plain(changed(plain, "equilibrium.sds.weight", 10), "").equilibrium.sds.weight
    assert weight == 10.0 and isinstance(weight, float)


@pytest.mark.parametrize(
    "key, near",
    [
        ("seeds", "seed"),
        ("priming.studnet_steps", "priming.student_steps"),
        ("priming.student_optimiser.learning_rates", "priming.student_optimiser.learning_rate"),
        ("equilibrium.r1.spatial_sigmas", "equilibrium.r1.spatial_sigma"),
        ("equilibrium.sds.time.hihg", "equilibrium.sds.time.high"),
        ("student.lora.targts", "student.lora.targets"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(plain, key, near):
    assert complaint(changed(plain, key, 1)) == f"my.yaml: unknown key {key!r}; did you mean {near}?"


def test_an_unknown_key_like_no_other_gets_the_list(plain):
    message = complaint(changed(plain, "equilibrium.head.zzz", 1))
    assert message == "my.yaml: unknown key 'equilibrium.head.zzz'; known: kind, width, num_heads, queries"


@pytest.mark.parametrize(
    "key, wanted",
    [
        ("seed", "a whole number"),
        ("priming", "a mapping or null"),
        ("priming.normaliser", "one of dmd, score, none"),
        ("priming.student_time.high", "a number"),
        ("engine.compile", "true or false"),
        ("equilibrium.head.kind", "one of convolutional, cross_attention, semantic"),
        ("equilibrium.taps", "a list of a whole number or null"),
        ("data.source", "a mapping"),
    ],
)
def test_a_missing_key_is_named_with_what_it_takes(plain, key, wanted):
    assert complaint(changed(plain, key, ABSENT)) == f"my.yaml: missing key {key!r} ({wanted})"


def test_no_key_of_a_recipe_may_be_missing(plain):
    def paths(node, prefix=()):
        for key, value in node.items():
            yield ".".join([*prefix, key])
            if isinstance(value, dict) and key not in ("source",):
                yield from paths(value, [*prefix, key])

    keys = [key for key in paths(plain) if key != "kind"]
    assert len(keys) > 100
    for key in keys:
        assert repr(key) in complaint(changed(plain, key, ABSENT))


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", True),
        ("seed", 1.0),
        ("seed", "1"),
        ("seed", None),
        ("priming.fake_per_student", True),
        ("priming.guidance_scale", False),
        ("priming.guidance_scale", "five"),
        ("priming.guidance_scale", "nan"),
        ("priming.guidance_scale", float("nan")),
        ("priming.guidance_scale", float("inf")),
        ("priming.guidance_scale", "-inf"),
        ("priming.guidance_scale", [5.0]),
        ("engine.compile", "yes"),
        ("engine.compile", 1),
        ("teacher.path", 3),
        ("name", None),
        ("data.source", "bounce"),
        ("student.lora.targets", "to_q"),
        ("priming.student_optimiser.betas", [0.9]),
        ("priming.student_optimiser.betas", [0.9, 0.99, 0.999]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_key_and_value(plain, key, value):
    message = complaint(changed(plain, key, value))
    assert f"key {key!r} must be" in message and repr(value) in message


@pytest.mark.parametrize(
    "key, value, inner",
    [
        ("student.lora.targets", ["to_q", 3], "student.lora.targets[1]"),
        ("priming.student_optimiser.betas", [0.9, True], "priming.student_optimiser.betas[1]"),
        ("equilibrium.taps", [1, 2.5], "equilibrium.taps[1]"),
    ],
)
def test_an_element_of_a_list_is_named(plain, key, value, inner):
    assert f"key {inner!r} must be" in complaint(changed(plain, key, value))


def test_a_section_that_is_no_mapping(plain):
    assert complaint(changed(plain, "equilibrium.head", "semantic")).endswith(
        "section 'equilibrium.head' must be a mapping of keys, not text"
    )
    assert "not empty" in complaint(changed(plain, "engine", None))


def test_a_choice_that_is_none_of_the_choices_gets_the_nearest(plain):
    message = complaint(changed(plain, "equilibrium.judge", "unifed"))
    assert "one of unified, frozen, trainable" in message and message.endswith("did you mean unified?")
    assert "one of hinge, softplus" in complaint(changed(plain, "equilibrium.adversarial", ["hinge"]))


@pytest.mark.parametrize("kind", ["distil", None, 3, ["distill"], {"a": 1}])
def test_a_recipe_of_no_known_kind(plain, kind):
    assert "key 'kind' must be one of distill, peer, flow_matching, vae" in complaint(changed(plain, "kind", kind))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("priming.student_time.high", 1.5, "low <= high <= 1"),
        ("priming.score_time.low", 0.0, "the score is infinite at t = 0"),
        ("equilibrium.judge_time.high", 1.0, "judge_time.high must be below 1"),
        ("equilibrium.judge_time.high", 0.99999999, "judge_time.high must be below 1"),
        ("equilibrium.taps", [], "equilibrium.taps names no block"),
        ("equilibrium.head.num_heads", 3, "multiple of head.num_heads"),
        ("equilibrium.head.num_heads", 0, "'equilibrium.head.num_heads' must be at least 1"),
        ("engine.micro_batch", 3, "not a multiple of engine.micro_batch 3"),
        ("engine.micro_batch", 0, "'engine.micro_batch' must be at least 1"),
        ("engine.keep_checkpoints", 0, "at least 1"),
        ("priming.student_steps", 0, "set the phase to null to skip it"),
        ("priming.fake_per_student", 0, "at least 1"),
        ("equilibrium.student_steps", -1, "set the phase to null to skip it"),
        ("equilibrium.head_per_student", 0, "at least 1"),
        ("priming.student_time.kind", "normal", "uniform or logit_normal"),
    ],
)
def test_values_that_cannot_work_together(plain, key, value, says):
    assert says in complaint(changed(plain, key, value))


def test_a_lora_student_needs_its_lora_and_a_full_one_does_not(plain):
    without = changed(plain, "student.lora", None)
    assert recipes.from_plain(without, "").student.lora is None
    assert "student.lora must say" in complaint(changed(without, "student.kind", "lora"))


def test_phases_may_be_switched_off_one_at_a_time(plain):
    one = changed(plain, "priming", None)
    assert recipes.from_plain(one, "").priming is None
    assert "both phases are null" in complaint(changed(one, "equilibrium", None))


class TestFile:
    @pytest.fixture
    def path(self, plain, tmp_path):
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    def refusal(self, path, *overrides):
        with pytest.raises(UserError) as caught:
            recipes.load(path, overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_overrides_change_what_they_name_and_nothing_else(self, path):
        plain = recipes.load(path)
        recipe = recipes.load(path, ("seed=5", "equilibrium.sds.weight=1e-1", "data.source.count=7", "priming=null"))
        assert (recipe.seed, recipe.equilibrium.sds.weight, recipe.data.source["count"]) == (5, 0.1, 7)
        assert recipe.priming is None
        restored = recipes.load(path, ("seed=5", "seed=0"))
        assert restored == plain

    def test_an_override_does_not_reach_through_a_yaml_alias(self, path, plain):
        plain["student"]["lora"] = plain["priming"]["fake_lora"]
        path.write_text(yaml.safe_dump(plain))
        assert "*id001" in path.read_text()
        recipe = recipes.load(path, ("priming.fake_lora.rank=64",))
        assert recipe.priming.fake_lora.rank == 64 and recipe.student.lora.rank == 2

    def test_override_values_are_yaml(self, path):
        recipe = recipes.load(path, ("equilibrium.taps=[0, 2]", "name=a=b", "data.negative_prompt='no: balls'"))
        assert recipe.equilibrium.taps == (0, 2) and recipe.name == "a=b" and recipe.data.negative_prompt == "no: balls"

    def test_words_that_yaml_1_1_takes_for_booleans_and_dates_are_words(self, path):
        text = path.read_text()
        assert "'on': real" in text  # as PyYAML writes it
        path.write_text(text.replace("'on': real", "on: real").replace("name: micro", "name: 2026-02-30"))
        recipe = recipes.load(path, ("equilibrium.r1.on=both", "engine.compile=true"))
        assert (recipe.equilibrium.r1.on, recipe.name, recipe.engine.compile) == ("both", "2026-02-30", True)
        assert "must be true or false, not 'yes'" in self.refusal(path, "engine.compile=yes")
        path.write_text(recipes.dump(recipe))
        assert recipes.load(path) == recipe

    @pytest.mark.parametrize(
        "override, says",
        [
            ("seed", "'seed' is not of the form key.sub=value"),
            ("primng.student_steps=3", "the recipe has no section 'primng'"),
            ("seed.x=3", "the recipe has no section 'seed'"),
            ("priming.student_stepz=3", "did you mean priming.student_steps?"),
            ("seed=three", "key 'seed' must be a whole number, not 'three'"),
            ("seed=[1", "not valid YAML"),
        ],
    )
    def test_overrides_that_cannot_be(self, path, override, says):
        assert says in self.refusal(path, override)

    @pytest.mark.parametrize(
        "content, says",
        [
            (b"kind: [distill", "is not valid YAML"),
            (b"- a\n- b\n", "its top level is a list, not a mapping"),
            (b"", "its top level is empty, not a mapping"),
            (b"name: \xff\xfe", "cannot read recipe"),
            (b"seed: 1\nname: a\nseed: 2\n", "is not valid YAML: key 'seed' stands twice"),
            (b"engine: {compile: true, compile: false}", "key 'compile' stands twice"),
            (b"kind: !!python/object:os.system {}", "is not valid YAML"),
        ],
    )
    def test_files_that_are_no_recipe(self, tmp_path, content, says):
        path = tmp_path / "my.yaml"
        path.write_bytes(content)
        message = self.refusal(path)
        assert says in message and str(path) in message

    def test_a_file_that_is_not_there(self, tmp_path):
        assert "no recipe at" in self.refusal(tmp_path / "none.yaml")
        assert "cannot read recipe" in self.refusal(tmp_path)

    def test_errors_name_the_file(self, path):
        path.write_text(path.read_text().replace("seed:", "sead:", 1))
        assert self.refusal(path).startswith(f"{path}: unknown key")


def test_round_trip(plain):
    recipe = recipes.from_plain(plain, "my.yaml")
    assert recipes.to_plain(recipe) == plain
    assert recipes.from_plain(yaml.safe_load(recipes.dump(recipe)), "dump") == recipe


def test_digest_goes_by_content_and_not_by_formatting(plain):
    recipe = recipes.from_plain(plain, "")
    digest = recipes.digest(recipe)
    turned = {key: plain[key] for key in reversed(plain)}
    turned = changed(turned, "data.source", dict(reversed(plain["data"]["source"].items())))
    turned = changed(turned, "equilibrium.sds.weight", 10)  # 10 for 10.0
    turned = changed(turned, "priming.student_optimiser.learning_rate", "1e-3")
    assert recipes.digest(recipes.from_plain(turned, "elsewhere.yaml")) == digest
    assert recipes.digest(plain) == digest
    for key, value in (("seed", 1), ("equilibrium.sds.weight", 10.5), ("student.lora.targets", ["to_v", "to_q"])):
        assert recipes.digest(recipes.from_plain(changed(plain, key, value), "")) != digest
    assert len(digest) == 16 and int(digest, 16)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("seed", 1 << 63, "must be a whole number, not 9223372036854775808"),
        pytest.param("seed", 16**5000, "too large to be shown", id="digits"),
        ("priming.guidance_scale", 10**400, "must be a number, not 1000"),
        ("name", "../elsewhere", "must be one that a file can have"),
        ("name", "a" * 300, "must be one that a file can have"),
        ("name", "a\nb", "must be one that a file can have"),
        ("name", "\ud800", "must be text, not"),
        ("teacher.path", "a\0b", "teacher.path 'a\\x00b' cannot be a path"),
        ("data.cache", "a" * 300, "cannot be a path"),
        ("data.source.world", {"size": float("nan")}, "holds nan, which is no finite number"),
        ("data.source.world", {1: 2}, "holds the key 1, which is no text"),
        ("data.source.world", {"a": {1, 2}}, "a set; write numbers, text, lists and mappings"),
        ("data.source.world", {"size": 1 << 70}, "a whole number of more than 64 bits"),
        ("data.source.world", {"size": "\udc00"}, "which is not valid Unicode"),
    ],
)
def test_values_that_could_not_be_written_down_again(micro_recipe, key, value, says):
    """Found by fuzzing: each was a traceback later on, or a run folder outside of outputs/."""
    *parents, last = key.split(".")
    node = micro_recipe
    for part in parents:
        node = node[part]
    node[last] = value
    assert says in complaint(micro_recipe)


def test_a_section_that_a_yaml_alias_puts_into_itself(micro_recipe, tmp_path):
    path, text = tmp_path / "my.yaml", yaml.safe_dump(micro_recipe)
    assert "      num_frames: 5" in text
    path.write_text(text.replace("    world:", "    world: &w\n      again: *w"))
    with pytest.raises(UserError, match="holds too many values, or values in one another"):
        recipes.load(path)
    with pytest.raises(UserError, match="the value is not valid YAML"):
        recipes.load(path, ("seed=" + "[" * 5000,))


def test_a_stored_recipe_of_an_earlier_version_is_completed_and_a_new_one_is_not(plain, tmp_path):
    old = copy.deepcopy(plain)
    for key in recipes.ADDED["engine"]:
        del old["engine"][key]
    for phase in ("priming", "equilibrium"):
        for name, section in old[phase].items():
            if name.endswith("optimiser"):
                del section["eps"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(old))
    assert recipes.load_stored(path) == recipes.from_plain(plain, "")
    with pytest.raises(UserError, match=r"missing key 'priming\.student_optimiser\.eps'"):
        recipes.load(path)
    old["engine"]["sequence_parallel"] = 4  # what it does say stays
    path.write_text(yaml.safe_dump(old))
    assert recipes.load_stored(path).engine.sequence_parallel == 4
