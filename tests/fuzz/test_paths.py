"""Paths: out of the folder, absolute, through links, in loops; and names that are none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from fuzzing import WORDS, cases, explore, outcome
from hypothesis import strategies as st

from vpae import recipe as recipes
from vpae.data.listing import list_clips
from vpae.data.sources import open_source
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.files import is_path
from vpae.models import find_model
from vpae.runs import open_folder

PARTS = st.sampled_from(
    ["..", ".", "a", "b", "in", "out", "loop", "deep", "a.mp4", "b.mp4", "secret.mp4", "~", "", "a" * 300]
)
PATHS = st.one_of(
    st.lists(PARTS, min_size=1, max_size=5).map("/".join),
    st.lists(PARTS, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
    st.tuples(PARTS, WORDS).map("/".join),
    WORDS,
)
TARGETS = st.sampled_from(".. ../outside ../outside/secret.mp4 a b . in loop / nowhere /etc/passwd".split())
LINKS = st.dictionaries(st.sampled_from("a b in out loop deep a.mp4 b.mp4 a.txt".split()), TARGETS, max_size=4)


def _tree(root: Path, links: dict[str, str]) -> Path:
    """A folder of two clips and some links, beside one whose clip nobody may read."""
    shutil.rmtree(root, ignore_errors=True)
    folder, outside = root / "folder", root / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"secret")
    (outside / "secret.txt").write_text("secret")
    for name in ("a", "b", "deep/a"):
        (folder / f"{name}.mp4").write_bytes(b"clip")
        (folder / f"{name}.txt").write_text("a clip")
    for name, target in links.items():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    return folder


def _check(listing, folder: Path) -> None:
    if isinstance(listing, UserError):
        return
    for clip in listing.clips:
        if not clip.fault:
            real = clip.file.resolve()
            assert real.is_relative_to(folder.resolve()) and real.read_bytes() == b"clip"
            assert clip.caption == "a clip"


@cases(10, 1000)
def test_lists_name_files_of_their_own_folder_alone(count, tmp_path):
    drawn = st.tuples(LINKS, st.lists(PATHS, min_size=1, max_size=4), st.sampled_from(["jsonl", "csv"]))

    @explore(count, tmp_path, drawn)
    def check(value):
        links, paths, kind = value
        folder = _tree(tmp_path / "tree", links)
        file = folder / f"list.{kind}"
        if kind == "jsonl":
            text = "".join(json.dumps({"file": path, "caption": "a clip"}) + "\n" for path in paths)
        else:
            quoted = [path.replace('"', '""') for path in paths]
            text = "file,caption\n" + "".join(f'"{path}","a clip"\n' for path in quoted)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        listing = outcome(lambda: list_clips(file, "file"))
        _check(listing, folder)
        if not isinstance(listing, UserError):
            assert len(listing.clips) == len(paths)


@cases(10, 500)
def test_a_folder_gives_files_of_its_own_alone(count, tmp_path):
    @explore(count, tmp_path, LINKS)
    def check(links):
        folder = _tree(tmp_path / "tree", links)
        _check(outcome(lambda: list_clips(folder, "file")), folder)
        spec = {"kind": "videos", "path": str(folder), "size": [32, 32], "num_frames": 5, "fps": 8, "bad": "skip"}
        source = outcome(lambda: open_source(spec))
        if not isinstance(source, UserError):
            source.fingerprint()
            for item in range(len(source)):
                assert isinstance(outcome(lambda i=item: source[i]), UserError)  # none of them is a video


@cases(10, 500)
def test_recipes_that_name_such_paths(count, micro_recipe, tmp_path):
    """The teacher's folder, and a run folder that is claimed: what is there already stays."""
    recipe = recipes.from_plain(micro_recipe, "my.yaml")

    @explore(count, tmp_path, st.tuples(LINKS, PATHS))
    def check(value):
        links, path = value
        folder = _tree(tmp_path / "tree", links)
        inside = str(folder / path.lstrip("/"))
        outcome(lambda: find_model(inside))
        if is_path(inside) and inside.isprintable() and Path(os.path.realpath(inside)).is_relative_to(tmp_path):
            claimed = outcome(lambda: open_folder(Path(inside), recipe, False, start()))
            if not isinstance(claimed, UserError):
                assert yaml.safe_load((Path(inside) / "recipe.yaml").read_text())["kind"] == "distill"
        outside = folder.parent / "outside"
        assert [(outside / name).read_bytes() for name in ("secret.mp4", "secret.txt")] == [b"secret"] * 2


@pytest.mark.parametrize("name", ["a\0b", "a\x85b.mp4", "\u2028.mp4"])
def test_names_with_characters_that_end_lines_elsewhere(tmp_path, name):
    folder = _tree(tmp_path / "tree", {})
    (folder / "list.jsonl").write_text(
        json.dumps({"file": name, "caption": "a clip"}, ensure_ascii=False) + "\n", "utf-8"
    )
    made = outcome(lambda: list_clips(folder / "list.jsonl", "file"))
    if not isinstance(made, UserError):
        assert len(made.clips) == 1 and "does not exist" in made.clips[0].fault
