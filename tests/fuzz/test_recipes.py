"""Recipes: their structure, types, YAML text and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from fuzzing import SCALARS, VALUES, WORDS, cases, damaged, explore, mutated, outcome, places
from hypothesis import strategies as st

from vpae import recipe as recipes
from vpae.data.sources import open_source
from vpae.distill import preflight_distill
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.recipe import Distill
from vpae.strict import read_yaml

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
YAML = b"&a |*a |<<: |? |!!python/object/apply:os.system [id]|!!binary |!!set |- |: |{|}|[|]|'|\"|\t|#|---|\n|\r".split(
    b"|"
)
YAML += [b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"\x00", b"1e999", b"0x", b"1:2:3", b"2026-13-45", b"\n  ", b"="]


def _check(made: object) -> None:
    """A recipe that is accepted comes back whole from its own text, and its digest from its content."""
    if isinstance(made, UserError):
        return
    again = recipes.from_plain(read_yaml(recipes.dump(made)), "again")
    assert again == made and recipes.digest(again) == recipes.digest(made)


@cases(25, 1500)
def test_structure_and_types(count, micro_recipe, tmp_path):
    """Of the micro recipe, whose teacher is there: what is accepted is looked at as a run would before its start."""

    @explore(count, tmp_path, mutated(micro_recipe))
    def check(plain):
        made = outcome(lambda: recipes.from_plain(plain, "my.yaml"))
        _check(made)
        if isinstance(made, Distill) and len(str(made.data.source.get("path", ""))) == 0:
            outcome(lambda: preflight_distill(made, start()))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
@cases(2, 60)
def test_structure_of_those_that_ship(count, path, tmp_path):
    @explore(count, tmp_path, mutated(read_yaml(path.read_text(encoding="utf-8"))))
    def check(plain):
        _check(outcome(lambda: recipes.from_plain(plain, "my.yaml")))


@cases(15, 1000)
def test_text(count, micro_recipe, tmp_path):
    file, text = tmp_path / "my.yaml", yaml.safe_dump(micro_recipe).encode()

    @explore(count, tmp_path, damaged(text, tuple(YAML)))
    def check(data):
        file.write_bytes(data)
        _check(outcome(lambda: recipes.load(file)))


@cases(10, 500)
def test_any_text(count, tmp_path):
    file = tmp_path / "my.yaml"
    tokens = st.sampled_from([*YAML, b"kind", b"distill", b"seed", b" ", b"a", b"1", b", "])

    @explore(count, tmp_path, st.lists(tokens, max_size=30).map(b"".join) | st.binary(max_size=60))
    def check(data):
        file.write_bytes(data)
        assert isinstance(outcome(lambda: recipes.load(file)), UserError)


@cases(15, 800)
def test_overrides(count, micro_recipe, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(micro_recipe))
    keys = st.sampled_from([".".join(map(str, place)) for place in places(micro_recipe)]) | WORDS
    values = SCALARS.map(str) | st.sampled_from([y.decode("latin-1") for y in YAML]) | VALUES.map(repr)
    texts = st.tuples(keys, st.sampled_from(["=", "", "==", " = ", ".="]), values).map("".join)

    @explore(count, tmp_path, st.lists(texts, min_size=1, max_size=3))
    def check(overrides):
        _check(outcome(lambda: recipes.load(file, tuple(overrides))))


SOURCES = (
    {"kind": "bounce", "split": "train", "count": 4, "start": 0, "world": {"size": 32, "num_frames": 5, "wall": 2.0}},
    {"kind": "videos", "path": "PATH", "size": [32, 32], "num_frames": 5, "fps": 8.0, "short": "error", "bad": "skip"},
    {"kind": "generate", "path": "PATH", "size": [32, 32], "num_frames": 5, "steps": 2, "guidance_scale": 2.0}
    | {"negative_prompt": "", "seed": 0, "columns": ["image", "caption"]},
)


@cases(15, 800)
def test_sources(count, tmp_path):
    """A source that opens says what it is, and gives a clip or names what is wrong with it."""
    (tmp_path / "captions.jsonl").write_text('{"file": "a.mp4", "image": "a.png", "caption": "a"}\n')

    def placed(spec):
        # the paths that fuzzing thinks of lie on this machine
        return spec | {"path": str(tmp_path)} if isinstance(spec.get("path"), str) else spec

    @explore(count, tmp_path, st.sampled_from(SOURCES).flatmap(mutated))
    def check(spec):
        source = outcome(lambda: open_source(placed(spec)))
        if not isinstance(source, UserError):
            assert len(source) > 0 and source.fingerprint()["kind"] == spec["kind"]
            if source.shape[0] * source.shape[1] * source.shape[2] < 1 << 16:
                outcome(lambda: source[0])
