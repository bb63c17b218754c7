"""Checkpoints are whole or not there; damage is named; nothing is pickled."""

from __future__ import annotations

import json
import resource
import signal

import pytest
import torch

from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import start
from vpae.errors import UserError

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}


def _save(root, turn, keep=2):
    return checkpoints.save(root, turn, TENSORS, {"identity": {}}, start(), keep)


def test_round_trip_and_pruning(tmp_path):
    for turn in (3, 10, 200):
        _save(tmp_path, turn)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000200"]
    target = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    found = checkpoints.find(tmp_path)
    checkpoints.load(found, target, start())
    assert found.turn == 200 and all(torch.equal(target[k], TENSORS[k]) for k in TENSORS)


def test_only_safetensors_and_json_are_written(tmp_path):
    assert {f.suffix for f in _save(tmp_path, 1).iterdir()} == {".safetensors", ".json"}


def test_an_interrupted_checkpoint_is_never_taken_for_whole(tmp_path):
    _save(tmp_path, 1)
    half = tmp_path / "step-00000002.partial"
    half.mkdir()
    (half / "state.json").write_text('{"turn": 2, "files": {}}')
    assert checkpoints.find(tmp_path).turn == 1


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_damage_is_named_with_the_mend(tmp_path, damage):
    folder = _save(tmp_path, 1)
    file = next(folder.glob("*.safetensors"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000001 is damaged.*remove .* to go on from the one before"):
        checkpoints.find(tmp_path)


def test_tensors_of_another_architecture_are_refused(tmp_path):
    found = checkpoints.read(_save(tmp_path, 1))
    with pytest.raises(UserError, match=r"has no tensor 'c'"):
        checkpoints.load(found, {"c": torch.zeros(2)}, start())
    with pytest.raises(UserError, match=r"'b' is \(5,\), this run needs \(6,\)"):
        checkpoints.load(found, {"b": torch.zeros(6)}, start())


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """A file-size limit stands in for a full disk: the write fails with the same kind of error."""
    _save(tmp_path, 1)
    big = {"a.weight": torch.zeros(1 << 20), "b": torch.ones(5)}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        with pytest.raises(UserError, match="could not be written.*earlier checkpoints are untouched"):
            checkpoints.save(tmp_path, 2, big, {"identity": {}}, start(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.find(tmp_path).turn == 1
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["turn"] == 1


def test_a_resumed_run_refuses_a_checkpoint_with_more_in_it(tmp_path):
    found = checkpoints.read(_save(tmp_path, 1))
    part = {"b": torch.zeros(5)}
    checkpoints.load(found, part, start())
    with pytest.raises(UserError, match="holds 'a.weight', which this run has not"):
        checkpoints.load(found, part, start(), everything=True)


def test_a_checkpoint_is_removed_under_another_name(tmp_path, monkeypatch):
    """A kill while an old one, or one of the same turn, goes leaves no half of it that could be taken for whole."""
    from vpae.engine import checkpoint as module

    remove = module.shutil.rmtree

    def killed(folder, **options):
        if folder.exists():
            assert folder.name.endswith(".partial"), f"{folder} would be left in parts"
        remove(folder, **options)

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    for turn in (1, 2, 2, 3, 4):
        _save(tmp_path, turn)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_checksums_find_a_flipped_bit_inside_a_tensor_and_one_file_too_many(tmp_path):
    folder = _save(tmp_path, 1)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    target = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    whole = file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged \(shard-00001.* its checksum differs\); remove"):
        checkpoints.load(checkpoints.find(tmp_path), target, start())
    file.write_bytes(whole)
    (folder / "more.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="more.safetensors is none of its files"):
        checkpoints.find(tmp_path)


def test_a_checkpoint_of_before_there_were_checksums_is_read(tmp_path):
    folder = _save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    for key in ("crc32", "sha256"):
        part = {k: v for k, v in state.items() if k != key}
        (folder / "state.json").write_text(json.dumps(part))
        with pytest.raises(UserError, match="state.json is not as it was written"):
            checkpoints.find(tmp_path)
    (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k not in ("crc32", "sha256")}))
    target = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    checkpoints.load(checkpoints.find(tmp_path), target, start())
    assert all(torch.equal(target[k], TENSORS[k]) for k in TENSORS)
