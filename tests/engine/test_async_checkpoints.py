"""Checkpoints written beside training: the bytes of those written at once, failures told on all ranks, none half."""

from __future__ import annotations

import resource
import signal
import threading
import time

import pytest
from helpers import differing, make_trainer, read_tensors, snapshot, write_recipe
from safetensors.torch import load_file

from vpae.engine import checkpoint as checkpoints
from vpae.engine.tracking import Tracker
from vpae.errors import UserError


@pytest.fixture
def beside(micro_recipe):
    micro_recipe["engine"] |= {"async_checkpoints": True, "checkpoint_every": 2, "keep_checkpoints": 9}
    return micro_recipe


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits for a word; the list tells the turns whose writing has begun."""
    write, begun, go = checkpoints.dcp.save, [], threading.Event()

    def late(*arguments, **options):
        begun.append(threading.current_thread() is not threading.main_thread())
        assert go.wait(60)
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoints.dcp, "save", late)
    yield begun, go
    go.set()


def _files(run):
    folders = sorted(f for f in (run / "priming" / "checkpoints").iterdir())
    return {folder.name: load_file(next(folder.glob("*.safetensors"))) for folder in folders}


def test_the_same_bits_as_written_at_once(beside, tmp_path):
    for name in ("beside", "at_once"):
        beside["engine"]["async_checkpoints"] = name == "beside"
        make_trainer(beside, "priming", tmp_path / name).train(until=5)
    one, two = _files(tmp_path / "beside"), _files(tmp_path / "at_once")
    assert list(one) == list(two) == ["step-00000002", "step-00000004", "step-00000005"]
    for folder in one:
        assert differing(one[folder], two[folder]) == []
    assert differing(one["step-00000002"], one["step-00000004"]) != []


def test_training_goes_on_meanwhile_and_what_is_written_is_the_moment_of_the_call(beside, tmp_path, slow_disk):
    begun, go = slow_disk
    trainer = make_trainer(beside, "priming", tmp_path)
    tracker = Tracker(tmp_path / "log", 9, 0, "priming", True)
    trainer._take_turn(tracker)
    before, folder = snapshot(trainer), trainer.save()
    for _ in range(2):  # while the writer waits
        trainer._take_turn(tracker)
    tracker.close()
    assert not folder.exists() and differing(before, snapshot(trainer)) != []
    go.set()
    trainer.writer.wait()
    found = checkpoints.read(folder)
    assert found.state["steps"] == {"student": 0, "fake_score": 1} and found.turn == 1 and begun == [True]
    assert differing(before, load_file(next(folder.glob("*.safetensors")))) == []


def test_the_next_checkpoint_waits_for_the_one_before(beside, tmp_path, slow_disk):
    begun, go = slow_disk
    trainer = make_trainer(beside, "priming", tmp_path)
    trainer.save()
    threading.Timer(1.0, go.set).start()
    started = time.monotonic()
    trainer.turn = 2
    trainer.save()
    assert time.monotonic() - started > 0.8
    trainer.writer.wait()
    assert len(begun) == 2 and len(list(trainer.checkpoint_root.iterdir())) == 2


def test_a_full_disk_stops_the_run_at_the_next_turn(beside, tmp_path, monkeypatch):
    """A file-size limit stands in for a full disk."""
    trainer = make_trainer(beside, "priming", tmp_path)
    write = checkpoints.dcp.save

    def full(*arguments, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
        try:
            return write(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        trainer.train(until=2)
        monkeypatch.setattr(checkpoints.dcp, "save", full)
        limit = trainer.method.turns
        with pytest.raises(UserError, match="step-0000000. could not be written.*earlier checkpoints are untouched"):
            trainer.train(until=limit)
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert trainer.turn < limit
    assert [f.name for f in trainer.checkpoint_root.iterdir()] == ["step-00000002"]


def test_an_error_of_the_run_leaves_the_checkpoint_under_way_whole(beside, tmp_path, monkeypatch):
    trainer = make_trainer(beside, "priming", tmp_path)
    fetch, write = trainer.run.fetch, checkpoints.dcp.save

    def late(*arguments, **options):
        time.sleep(1)
        return write(*arguments, **options)

    def poisoned(indices, draws):
        batch = fetch(indices, draws)
        if trainer.turn == 2:
            batch.x0[0, 0, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(checkpoints.dcp, "save", late)
    trainer.run.fetch = poisoned
    with pytest.raises(UserError, match="not finite"):
        trainer.train()
    assert [f.name for f in trainer.checkpoint_root.iterdir()] == ["step-00000002"]
    resumed = make_trainer(beside, "priming", tmp_path)
    assert resumed.resume() and resumed.turn == 2


def test_large_checkpoints_are_split_into_files(beside, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_FILE", 1 << 14)
    trainer = make_trainer(beside, "priming", tmp_path)
    trainer.train(until=2)
    files = list((tmp_path / "priming/checkpoints/step-00000002").glob("*.safetensors"))
    assert len(files) > 3
    resumed = make_trainer(beside, "priming", tmp_path)
    assert resumed.resume() and differing(snapshot(trainer), snapshot(resumed)) == []


@pytest.mark.slow
def test_two_ranks_that_write_beside_training_leave_what_they_leave_otherwise(vpae, beside, tmp_path):
    """Their messages do not meet those of training; every turn begins a checkpoint."""
    beside["engine"] |= {"checkpoint_every": 1, "keep_checkpoints": 2}
    beside["priming"]["student_steps"], beside["equilibrium"] = 2, None
    for name in ("beside", "at_once"):
        beside["engine"]["async_checkpoints"] = name == "beside"
        done = vpae("distill", write_recipe(beside, tmp_path / f"{name}.yaml"), "--output", tmp_path / name, ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_tensors(tmp_path / name / "priming") for name in ("beside", "at_once"))
    assert differing(one, two) == []
    assert len(list((tmp_path / "beside/priming/checkpoints").iterdir())) == 2
