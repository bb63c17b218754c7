"""What the documents tell people to type can be typed, and what they point to is there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from pathlib import Path

import pytest

from vpae import recipe as recipes
from vpae.__main__ import build_parser
from vpae.data import sources
from vpae.data.bounce import World

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "recipes" / "README.md")
COMMENTED = (*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "launch").iterdir()))
# placeholders in the documents, and what may stand there
STANDS_FOR = {"N": "2", "M": "2", "R": "8", "RUN": "outputs/run", "MODEL": "tiny_wan"}
STANDS_FOR["RECIPE"] = "recipes/quickstart.yaml"
LAUNCHED = r"(?:[A-Z_]+=\S+ )*(?:(?:torchrun|accelerate launch) [-\w ]+ -m |python -m )?(vpae [a-z][^`|]*?)"


def _commands(text: str) -> list[str]:
    """Every ``vpae ...``: lines of code blocks and of comments, and whole spans of inline code."""
    lines = re.findall(rf"^#? *{LAUNCHED}(?: {{2,}}.*| *)$", text, re.M)
    prose = " ".join(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).split())
    return lines + re.findall(rf"`{LAUNCHED}`", prose)


def _plain(command: str) -> list[str]:
    """A command as it would be typed: optional parts in, a choice's first one, placeholders filled."""
    command = re.sub(r" *#.*", "", command).replace("[", "").replace("]", "").replace(" ...", "")
    command = re.sub(r"(--\S+ \w+)(?:, \w+)+", r"\1", command)
    return [STANDS_FOR.get(word, word) for word in shlex.split(command)]


@pytest.mark.parametrize("document", [*DOCUMENTS, *COMMENTED], ids=lambda p: p.name)
def test_each_command_of_a_document_parses(document, capsys):
    commands = _commands(document.read_text())
    assert commands or document not in DOCUMENTS
    known = next(a for a in build_parser()._actions if a.dest == "command").choices
    for command in commands:
        words = _plain(command)
        if len(words) == 2:  # the name alone, in a sentence
            assert words[1] in known, f"{document.name}: {command}"
            continue
        try:
            arguments = build_parser().parse_args(words[1:])
        except SystemExit as ended:
            assert ended.code == 0, f"{document.name}: {command}: {capsys.readouterr().err}"
            continue
        named = getattr(arguments, "recipe", None)
        if named and str(named).startswith("recipes/"):
            assert (ROOT / named).is_file(), f"{document.name}: {command}"


def test_commands_are_found_where_they_stand():
    text = "x\n```bash\nvpae cache a.yaml --ranks 8   # now\ntorchrun --nproc-per-node 8 -m vpae distill b.yaml\n```\n"
    text += "`vpae export RUN [--format wan, lora]` and `vpae NAME`\n"
    found = [_plain(command) for command in _commands(text)]
    assert found == [
        ["vpae", "cache", "a.yaml", "--ranks", "8"],
        ["vpae", "distill", "b.yaml"],
        ["vpae", "export", "outputs/run", "--format", "wan"],
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_document_points_to_is_there(document):
    text = document.read_text()
    named = re.findall(r"(?<![\w/.])((?:launch|recipes|tests|benchmarks|vpae)/[\w./*-]*\w(?:\.\w+)?)", text)
    assert len(named) > 10
    for path in {name for name in named if "." in name}:
        assert list(ROOT.glob(path)), f"{document.name} names {path}"
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", text):
        if target.startswith("http"):
            continue
        file = document.parent / target if target else document
        assert file.exists(), target
        if not anchor:  # it may be a picture
            continue
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
        heads = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
        assert anchor[1:] in heads, f"{target}{anchor}"


def _leaves(cls: type, prefix: str = "") -> list[str]:
    found, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = [k for k in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(k)]
        name = f"{prefix}{field.name}"
        found += [leaf for kind in kinds for leaf in _leaves(kind, f"{name}.")] if kinds else [name]
    return found


def _rows() -> tuple[dict[str, str], dict[str, str]]:
    """The tables' rows by each key that stands in their first cell, and by that cell itself."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", (ROOT / "recipes" / "README.md").read_text(), re.M)
    by_key = {name: f"{cell} {meaning}" for cell, meaning in rows for name in re.findall(r"`([\w.]+)`", cell)}
    return by_key, dict(rows)


@pytest.mark.parametrize(("cls", "least"), [(recipes.Distill, 100), (recipes.Peer, 130)])
def test_every_key_of_a_recipe_is_explained(cls, least):
    """In the tables: by its own row, its section's, or that of what all sections of its kind have in common."""
    rows, cells = _rows()
    common = {"time": cells["a law of time"], "optimiser": cells["an optimiser"]}
    common |= {"head": rows["equilibrium.head"], "lora": rows["student.lora"]}

    def explained(key: str) -> bool:
        section, _, last = key.rpartition(".")
        if key in rows or f"`{last}`" in rows.get(section, ""):
            return True
        kind = section.rpartition(".")[2].rpartition("_")[2]
        return f"`{last}`" in common.get(kind, "") and explained(section)

    keys = set(_leaves(cls))
    assert len(keys) > least
    assert [key for key in sorted(keys) if not explained(key)] == []


def test_every_key_of_a_source_is_explained():
    rows, _ = _rows()
    for kind, keys in sources._KEYS.items():
        assert [key for key in keys if f"`{key}`" not in rows[kind]] == [], kind
    assert [f.name for f in dataclasses.fields(World) if f"`{f.name}`" not in rows["bounce"]] == []
