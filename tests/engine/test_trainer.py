"""The loop: exact resume, accumulation, finite check, who moves when."""

from __future__ import annotations

import copy
import io
import os
import signal

import pytest
import torch
from helpers import differing, make_trainer, snapshot

from vpae.engine.tracking import read_log
from vpae.errors import UserError

PHASES = ("priming", "equilibrium")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_train_save_resume_train_equals_training_through(micro_recipe, tmp_path, phase, kind, stop):
    """Stops lie between a fake-score or head turn and a student turn, and inside an epoch (20 clips, 4 a turn)."""
    micro_recipe["student"]["kind"] = kind
    through = make_trainer(micro_recipe, phase, tmp_path / "through")
    through.train(until=6)
    make_trainer(micro_recipe, phase, tmp_path / "halves").train(until=stop)
    second = make_trainer(micro_recipe, phase, tmp_path / "halves")
    assert second.resume() and second.turn == stop and second.seconds > 0
    second.train(until=6)
    assert differing(snapshot(through), snapshot(second)) == []
    turns = [record["turn"] for record in read_log(tmp_path / "halves" / phase / "log.jsonl")]
    assert turns == sorted(set(turns)) == list(range(6))


@pytest.mark.parametrize("phase", PHASES)
def test_resume_is_exact_under_bf16_and_checkpointing(micro_recipe, tmp_path, phase):
    micro_recipe["engine"] |= {"precision": "bf16", "checkpointing": True}
    through = make_trainer(micro_recipe, phase, tmp_path / "through")
    through.train(until=4)
    make_trainer(micro_recipe, phase, tmp_path / "halves").train(until=1)
    second = make_trainer(micro_recipe, phase, tmp_path / "halves")
    assert second.resume()
    second.train(until=4)
    assert differing(snapshot(through), snapshot(second)) == []


def test_bf16_computes_in_bf16_and_checkpointing_changes_nothing(micro_recipe, tmp_path):
    states = {}
    for precision, checkpointing in (("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)):
        micro_recipe["engine"] |= {"precision": precision, "checkpointing": checkpointing}
        trainer = make_trainer(micro_recipe, "equilibrium", tmp_path / f"{precision}{checkpointing}")
        trainer.train(until=2)
        moments = {k: v for k, v in snapshot(trainer).items() if k.startswith("optimiser.") and k.endswith("exp_avg")}
        states[precision, checkpointing] = torch.cat([v.flatten() for v in moments.values()])
    scale = states["fp32", False].abs().max()
    for precision in ("fp32", "bf16"):
        gap = (states[precision, True] - states[precision, False]).abs().max()
        assert gap < 1e-3 * scale
    gap = (states["bf16", False] - states["fp32", False]).abs().max()
    assert 1e-4 * scale < gap < 0.2 * scale


def test_an_interrupted_run_logs_what_an_undisturbed_one_logs(micro_recipe, tmp_path):
    """Means over turns that lie on both sides of a checkpoint are those of all of them."""
    micro_recipe["engine"]["log_every"] = 2
    make_trainer(micro_recipe, "priming", tmp_path / "through").train(until=8)
    make_trainer(micro_recipe, "priming", tmp_path / "halves").train(until=3)
    second = make_trainer(micro_recipe, "priming", tmp_path / "halves")
    second.resume()
    second.train(until=8)
    through, halves = (read_log(tmp_path / name / "priming" / "log.jsonl") for name in ("through", "halves"))
    assert len(through) > 2
    for one, two in zip(through, halves, strict=True):
        assert one.keys() == two.keys()
        timings = {"seconds", "student/seconds", "fake_score/seconds"}
        assert {k: v for k, v in one.items() if k not in timings} == {k: v for k, v in two.items() if k not in timings}


@pytest.mark.parametrize(("phase", "turn"), [("priming", 0), ("priming", 3), ("equilibrium", 4), ("equilibrium", 5)])
def test_a_signal_inside_a_turn_drops_it_and_the_resumed_run_is_an_undisturbed_one(micro_recipe, tmp_path, phase, turn):
    """It comes while the second of four micro-batches is fetched, of a turn of either player."""
    micro_recipe["engine"] |= {"log_every": 3, "micro_batch": 1}
    through = make_trainer(micro_recipe, phase, tmp_path / "through")
    states = [snapshot(through)]
    for end in range(1, 7):
        through.train(until=end)
        states.append(snapshot(through))
    stopped = make_trainer(micro_recipe, phase, tmp_path / "halves")
    fetch, fetched = stopped.run.fetch, []

    def fetch_and_stop(indices, draws):
        fetched.append(indices)
        if len(fetched) == 4 * turn + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(indices, draws)

    stopped.run.fetch = fetch_and_stop
    assert not stopped.train(until=6) and stopped.stopped
    assert len(fetched) == 4 * turn + 2 and stopped.turn == turn == sum(stopped.steps.values())
    assert differing(states[turn], snapshot(stopped)) == []
    assert all(p.grad is None for player in stopped.method.players.values() for p in player.parameters.values())
    second = make_trainer(micro_recipe, phase, tmp_path / "halves")
    assert second.resume() and second.turn == turn
    second.train(until=6)
    assert differing(states[6], snapshot(second)) == []
    one, two = (read_log(tmp_path / name / phase / "log.jsonl") for name in ("through", "halves"))
    assert one and [_timeless(record) for record in one] == [_timeless(record) for record in two]


def _timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if not key.endswith("seconds")}


def test_training_moves_exactly_the_player_whose_turn_it_is(micro_recipe, tmp_path):
    trainer = make_trainer(micro_recipe, "priming", tmp_path)
    for turn in range(6):
        before, player = snapshot(trainer), trainer.method.player_of(turn)
        trainer.train(until=turn + 1)
        moved = {name.removeprefix("optimiser.").split(".")[0] for name in differing(before, snapshot(trainer))}
        assert moved == ({"student", "ema"} if player == "student" else {"fake_score"})


@pytest.mark.parametrize("phase", PHASES)
def test_accumulated_micro_batches_equal_the_large_batch_for_each_player(micro_recipe, tmp_path, phase):
    results = []
    for micro in (1, 4):
        micro_recipe["engine"]["micro_batch"] = micro
        trainer = make_trainer(micro_recipe, phase, tmp_path / str(micro))
        trainer.train(until=6)
        results.append(snapshot(trainer))
    # Adam at beta1 = 0 turns round-off in gradients near zero into steps of the size of the learning rate
    for player in trainer.method.players:
        mine = f"optimiser.{player}."
        moments = [{k: v for k, v in r.items() if k.endswith("exp_avg") and k.startswith(mine)} for r in results]
        scale = max(float(v.abs().max()) for v in moments[0].values())
        assert scale > 0 and differing(*moments, tolerance=1e-3 * scale) == []
    weights = [torch.cat([v.flatten() for k, v in r.items() if k.startswith("ema.")]) for r in results]
    assert float((weights[0] - weights[1]).abs().mean()) < 1e-6


def test_a_nan_stops_the_run_before_anything_moves(micro_recipe, tmp_path):
    trainer = make_trainer(micro_recipe, "priming", tmp_path)
    trainer.train(until=2)
    before, fetch = snapshot(trainer), trainer.run.fetch

    def poisoned(indices, draws):
        batch = fetch(indices, draws)
        batch.x0[0, 0, 0, 0, 0] = float("nan")
        return batch

    trainer.run.fetch = poisoned
    with pytest.raises(UserError, match=r"turn 2 \(student\).*not finite.*--resume"):
        trainer.train(until=3)
    assert differing(before, snapshot(trainer)) == []


def test_a_collapse_is_checkpointed_and_stops_the_resumed_run_too(micro_recipe, tmp_path):
    micro_recipe["watch"] |= {"action": "stop", "patience": 2, "min_motion_ratio": 1e5}
    trainer = make_trainer(micro_recipe, "equilibrium", tmp_path)
    with pytest.raises(UserError, match="motion is dying"):
        trainer.train()
    assert 0 < trainer.turn < trainer.method.turns
    resumed = make_trainer(micro_recipe, "equilibrium", tmp_path)
    assert resumed.resume() and resumed.turn == trainer.turn and differing(snapshot(trainer), snapshot(resumed)) == []
    with pytest.raises(UserError, match="motion is dying"):
        resumed.train()
    micro_recipe["watch"]["action"] = "warn"
    warned = make_trainer(micro_recipe, "equilibrium", tmp_path)
    assert warned.resume() and warned.train()


def test_the_gallery_shows_pictures_and_videos_and_feeds_the_watch(micro_recipe, tmp_path):
    """In TensorBoard and as PNG, at turn 0 and every ``sample_every`` student steps, student first."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from vpae import recipe as recipes
    from vpae.distill import distill
    from vpae.engine.parallel import start

    micro_recipe["engine"]["sample_every"], micro_recipe["priming"] = 2, None
    assert distill(recipes.from_plain(micro_recipe, "test"), tmp_path, False, start())
    names = sorted(p.name for p in (tmp_path / "equilibrium" / "samples").iterdir())
    assert names == [f"turn-{turn:08d}.png" for turn in (0, 3, 7)]
    events = EventAccumulator(str(tmp_path / "equilibrium" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples/0", "samples/1", "samples/strip"}
    assert [event.step for event in events.Images("samples/strip")] == [0, 3, 7]
    (film, *_) = events.Images("samples/0")
    film = Image.open(io.BytesIO(film.encoded_image_string))
    assert film.format == "GIF" and film.n_frames == 5 and film.width > 3 * 2 * 32  # student, real, teacher at scale 2
    ratios = [r["samples/motion_ratio_to_reference"] for r in read_log(tmp_path / "equilibrium" / "log.jsonl")
              if "samples/motion_ratio_to_reference" in r]  # fmt: skip
    assert len(ratios) == 3 and all(ratio > 0 for ratio in ratios)


def test_resuming_with_another_recipe_or_batch_is_refused(micro_recipe, tmp_path):
    make_trainer(micro_recipe, "priming", tmp_path).train(until=1)
    for section, key, value in (("priming", "guidance_scale", 3.0), ("engine", "global_batch", 8)):
        other = copy.deepcopy(micro_recipe)
        other[section][key] = value
        with pytest.raises(UserError, match=rf"of another run \({section}.{key} is .* there and {value} here\)"):
            make_trainer(other, "priming", tmp_path).resume()


def test_the_log_of_turns_that_run_again_is_replaced(micro_recipe, tmp_path):
    trainer = make_trainer(micro_recipe, "equilibrium", tmp_path)
    trainer.train(until=3)
    log = tmp_path / "equilibrium" / "log.jsonl"
    log.write_text(log.read_text() + '{"turn": 3, "stale": 1}\n{"turn": 4, "cut')
    second = make_trainer(micro_recipe, "equilibrium", tmp_path)
    second.resume()
    second.train(until=5)
    records = read_log(log)
    assert [r["turn"] for r in records] == [0, 1, 2, 3, 4] and not any("stale" in r for r in records)


def test_a_resumed_run_takes_lazy_r1_in_the_same_turns(micro_recipe, tmp_path):
    micro_recipe["equilibrium"]["r1"]["every"] = 2
    micro_recipe["equilibrium"]["student_steps"] = 5
    first = make_trainer(micro_recipe, "equilibrium", tmp_path)
    first.train(until=3)  # within a period: head, student, head
    first.save()
    second = make_trainer(micro_recipe, "equilibrium", tmp_path)
    second.resume()
    second.train()
    records = read_log(tmp_path / "equilibrium" / "log.jsonl")
    heads = [r for r in records if "head/adversarial" in r]
    assert [r["turn"] for r in heads if "head/st_r1" in r] == [0, 4, 8]
    assert [r["turn"] for r in heads] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("decay", "steps", "warned"), [(0.995, 1000, False), (0.98, 60, True), (0.9, 60, False)])
def test_an_ema_that_would_ship_the_weights_it_starts_from_is_told_of(
    micro_recipe, tmp_path, capsys, decay, steps, warned
):
    micro_recipe["priming"] |= {"ema_decay": decay, "student_steps": steps}
    trainer = make_trainer(micro_recipe, "priming", tmp_path)
    trainer.train(until=1)
    told = capsys.readouterr().out
    assert ("warning: priming: ema_decay 0.98 over 60 student steps leaves 30% of the weights" in told) == warned
    if warned:
        assert "; 0.9166 would leave under 1 %" in told
        again = make_trainer(micro_recipe, "priming", tmp_path)
        assert again.resume()
        again.train(until=2)
        assert "warning" not in capsys.readouterr().out


def test_tensorboard_holds_the_same_scalars_as_the_log(micro_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(micro_recipe, "equilibrium", tmp_path).train()
    events = EventAccumulator(str(tmp_path / "equilibrium" / "tensorboard"))
    events.Reload()
    logged: dict[str, dict[int, float]] = {}
    for record in read_log(tmp_path / "equilibrium" / "log.jsonl"):
        for key in record.keys() - {"turn", "seconds"}:
            logged.setdefault(key, {})[record["turn"]] = record[key]
    assert set(events.Tags()["scalars"]) == set(logged)
    for tag, values in logged.items():
        for event in events.Scalars(tag):
            assert event.value == pytest.approx(values[event.step], rel=1e-4, nan_ok=True)
    expected = {"head/adversarial", "head/st_r1", "head/logit_real", "head/logit_fake", "head/gradient_norm"}
    expected |= {"student/adversarial", "student/c_sds", "student/gradient_norm"}
    expected |= {"watch/motion_ratio", "watch/frame0_likeness", "watch/channel_drift"}
    assert expected <= set(logged)


def test_an_impossible_split_of_the_batch_is_named(micro_recipe, tmp_path):
    from vpae.engine.parallel import Processes
    from vpae.engine.trainer import Trainer

    trainer = make_trainer(micro_recipe, "priming", tmp_path)
    with pytest.raises(UserError, match="cannot be split over 3 ranks: make it a multiple of 3"):
        Trainer(trainer.method, trainer.run, Processes(0, 3, torch.device("cpu"), None))
