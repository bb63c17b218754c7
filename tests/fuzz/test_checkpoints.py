"""Checkpoints: cut or flipped at any byte, with a state or tensors of somebody else's making."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from fuzzing import cases, damaged, explore, mutated, outcome
from helpers import make_trainer
from hypothesis import strategies as st

from vpae.engine import checkpoint as checkpoints
from vpae.engine import integrity
from vpae.engine.parallel import start
from vpae.errors import UserError
from vpae.runs import first_difference

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5), "c": torch.zeros(0, 3)}
STATE = {"identity": {"seed": 0}, "turns": 9, "steps": {"student": 1}, "watch": {}, "seconds": 0.25}


def _read(root, everything=True):
    """What a run would go on from: None, or the state and tensors of the newest checkpoint."""
    found = checkpoints.find(root)
    if found is None:
        return None
    target = {name: torch.full_like(tensor, 7.0) for name, tensor in TENSORS.items()}
    checkpoints.load(found, target, start(), everything=everything)
    return found.state, target


def _same(target):
    return all(torch.equal(target[name], tensor) for name, tensor in TENSORS.items())


@pytest.fixture
def folder(tmp_path):
    return checkpoints.save(tmp_path / "run", 1, TENSORS, STATE, start(), 2)


def test_cut_at_any_byte_it_is_never_taken_for_whole(folder):
    """Every length of every file."""
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            with pytest.raises(UserError, match="is damaged"):
                checkpoints.find(folder.parent)
        file.write_bytes(whole)
    assert _same(_read(folder.parent)[1])


@pytest.mark.slow
def test_any_flipped_bit_is_found(folder):
    """Every bit of every file; of some in the state's JSON nothing depends (an e that becomes E)."""
    state = _read(folder.parent)[0]
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            made = outcome(lambda: _read(folder.parent))
            assert isinstance(made, UserError) or (file.suffix == ".json" and made[0] == state), (file.name, bit)
        file.write_bytes(whole)


@cases(15, 1500)
def test_damage_of_any_kind_is_found(count, folder, tmp_path):
    files, state = sorted(folder.iterdir()), _read(folder.parent)[0]
    whole = {file: file.read_bytes() for file in files}

    @explore(count, tmp_path, st.sampled_from(files).flatmap(lambda f: st.tuples(st.just(f), damaged(whole[f]))))
    def check(drawn):
        file, data = drawn
        file.write_bytes(data)
        try:
            made = outcome(lambda: _read(folder.parent))
        finally:
            file.write_bytes(whole[file])
        assert isinstance(made, UserError) or (made[0] == state and _same(made[1])), "damage was taken for a checkpoint"


@cases(8, 500)
def test_what_a_kill_leaves_is_never_taken_for_whole(count, folder, tmp_path):
    """Of the next checkpoint, as far as it was written: files in order, the last one cut, the folder not renamed."""
    second = checkpoints.save(tmp_path / "other", 2, TENSORS, STATE, start(), 2)
    files = [(f.name, f.read_bytes()) for f in sorted(second.iterdir(), key=lambda f: f.suffix, reverse=True)]
    places = st.integers(0, len(files) - 1).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, len(files[n][1])), st.booleans())
    )

    @explore(count, tmp_path, places)
    def check(drawn):
        number, length, own = drawn
        partial = folder.parent / "step-00000002.partial"
        partial.mkdir()
        for name, data in files[:number]:
            (partial / name).write_bytes(data)
        (partial / (".tmpW0yd4i" if own else files[number][0])).write_bytes(files[number][1][:length])
        state, target = _read(folder.parent)
        shutil.rmtree(partial)
        assert state["turn"] == 1 and _same(target)


@cases(12, 1000)
def test_a_state_of_any_content(count, folder, tmp_path):
    """Sealed anew, as somebody would who wants it read, or not."""
    file = folder / "state.json"
    whole = file.read_bytes()
    plain = json.loads(whole)

    @explore(count, tmp_path, st.tuples(mutated(plain), st.booleans()))
    def check(drawn):
        state, again = drawn
        if again and isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != "sha256"}
            state |= {"sha256": integrity._digest(json.loads(json.dumps(state)))}
        file.write_text(json.dumps(state), encoding="utf-8")
        try:
            made = outcome(lambda: _read(folder.parent))
        finally:
            file.write_bytes(whole)
        assert isinstance(made, UserError) or _same(made[1])
        if not again and not isinstance(made, UserError):
            assert made[0] == plain or not {"crc32", "sha256"} & set(made[0])


def test_fewer_than_no_steps_are_refused(micro_recipe, tmp_path):
    """Found by the cases below."""
    trainer = make_trainer(micro_recipe, "equilibrium", tmp_path / "run")
    file = trainer.save() / "state.json"
    state = {key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}
    state["steps"]["head"] = -1
    file.write_text(json.dumps(state | {"sha256": integrity._digest(state)}), encoding="utf-8")
    with pytest.raises(UserError, match="does not say how to go on"):
        trainer.resume()


def test_a_difference_is_told_on_one_line():
    """Found by the cases below: keys come from a file that may hold anything."""
    told = first_difference({"a\nb": "c\nd"}, {"e": 1})
    assert told == "e is None there and 1 here"
    assert first_difference({"a\nb": "c\nd"}, {}) == r"'a\nb' is 'c\nd' there and None here"


@cases(8, 1000)
def test_a_run_goes_on_from_a_state_or_says_why_not(count, micro_recipe, tmp_path):
    """Tensors right and seal right, the state of any content: turns, steps, means, counts."""
    trainer = make_trainer(micro_recipe, "equilibrium", tmp_path / "run")
    file = trainer.save() / "state.json"
    plain = json.loads(file.read_text())
    assert trainer.resume()

    @explore(count, tmp_path, mutated(plain))
    def check(state):
        state = {key: value for key, value in state.items() if key != "sha256"}
        state |= {"sha256": integrity._digest(json.loads(json.dumps(state)))}
        file.write_text(json.dumps(state), encoding="utf-8")
        made = outcome(trainer.resume)
        if not isinstance(made, UserError):
            assert made and trainer.turn == plain["turn"] and set(trainer.steps) == set(trainer.method.players)
            assert all(isinstance(step, int) and step >= 0 for step in trainer.steps.values())
