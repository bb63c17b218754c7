"""Files that appear whole or not at all, and what is said when they cannot."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from vpae.errors import UserError
from vpae.files import atomic, write_json, writing


def _onto_a_folder(folder):
    (folder / "taken").write_text("a file where a folder is wanted")
    (folder / "taken" / "below").mkdir()


def _copy_over_a_file(folder):
    for name in ("from/here", "to"):
        (folder / name).mkdir(parents=True)
    (folder / "to" / "here").write_text("a file where a folder is wanted")
    shutil.copytree(folder / "from", folder / "to", dirs_exist_ok=True)


def _safetensors_into_nowhere(folder):
    save_file({"a": torch.zeros(1)}, folder / "nowhere" / "a.safetensors")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_onto_a_folder, "Not a directory"),
        (_copy_over_a_file, "File exists"),
        (_safetensors_into_nowhere, "No such file or directory"),
    ],
)
def test_whatever_library_meets_a_file_systems_refusal_it_is_one_line(tmp_path, act, reason):
    with pytest.raises(UserError) as raised, writing(tmp_path / "here"):
        act(tmp_path)
    line = str(raised.value)
    assert line.startswith(f"{tmp_path / 'here'}: cannot be written (") and reason in line and "\n" not in line


def test_other_errors_pass():
    with pytest.raises(ValueError, match="ours"), writing("here"):
        raise ValueError("ours")


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a.json") as draft:
        draft.write_text("half")
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and "old" in (tmp_path / "a.json").read_text()
