"""The comparison of methods, on recipes too small to be good at anything: budgets, jobs, tables."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def contest(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import contest

    return contest


@pytest.fixture
def folder(micro_recipe, micro_peer, tmp_path):
    (tmp_path / "peers").mkdir()
    for path, plain in (("vpae.yaml", micro_recipe), ("peers/lcm.yaml", micro_peer("lcm"))):
        (tmp_path / path).write_text(yaml.safe_dump(plain))
    return tmp_path


def test_a_budget_is_met_with_the_phases_in_their_own_proportions(contest, folder):
    entry = contest.Entry("vpae", folder / "vpae.yaml")
    assert entry.steps() == {"priming.student_steps": 3, "equilibrium.student_steps": 4}
    cost = contest.Cost(seconds=[2.0, 1.0], clips=[12.0, 8.0])
    assert contest.whole_cost(entry, cost, "seconds") == 10 and contest.whole_cost(entry, cost, "clips") == 68
    assert contest.on_budget(entry, cost, "seconds", 1000) == (
        "priming.student_steps=300",
        "equilibrium.student_steps=400",
    )
    assert contest.on_budget(entry, cost, "clips", 6.8) == ("priming.student_steps=1", "equilibrium.student_steps=1")
    alone = contest.Entry("priming", folder / "vpae.yaml", ("equilibrium=null",))
    assert contest.on_budget(alone, contest.Cost([2.0], [12.0]), "seconds", 10) == ("priming.student_steps=5",)


def test_a_warm_up_of_the_head_is_scaled_and_paid_for_like_student_steps(contest, folder):
    """Three players' turns of 2 and 1 s, four clips each; four student steps after eight turns of the head alone."""
    entry = contest.Entry("vpae", folder / "vpae.yaml", ("equilibrium.head_warmup_turns=8",))
    assert entry.warm_up() == {"equilibrium.head_warmup_turns": 8}
    log = folder / "equilibrium" / "log.jsonl"
    log.parent.mkdir()
    turns = [{"turn": 2 * i, "head/seconds": 1.0} | {"student/seconds": 2.0} for i in range(4)]
    log.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    assert contest._phase_cost(log.parent, entry) == (2.0 + 1.0 * (1 + 8 / 4), 4 * (1 + 1 + 8 / 4))
    assert contest._phase_cost(log.parent, contest.Entry("plain", folder / "vpae.yaml")) == (3.0, 8.0)
    cost = contest.Cost(seconds=[2.0, 5.0], clips=[12.0, 16.0])
    assert contest.on_budget(entry, cost, "seconds", 260) == (
        "priming.student_steps=30",
        "equilibrium.student_steps=40",
        "equilibrium.head_warmup_turns=80",
    )


def test_what_a_step_costs_is_measured_once_for_recipes_that_differ_in_rates_alone(contest, folder, monkeypatch):
    trained = []

    def train(entry, *_):
        trained.append(entry.name)

    monkeypatch.setattr(contest, "train", train)
    monkeypatch.setattr(contest, "_phase_cost", lambda *_: (float(len(trained)), 12.0))
    base = contest.Entry("base", folder / "vpae.yaml")
    rate = contest.Entry("rate", folder / "vpae.yaml", ("priming.student_optimiser.learning_rate=0.01",))
    ratio = contest.Entry("ratio", folder / "vpae.yaml", ("priming.fake_per_student=7",))
    costs = contest.measure_costs([base, rate, ratio], folder / "root", 1)
    assert len(trained) == 6 and len(set(trained)) == 2
    assert costs["base"] == costs["rate"] != costs["ratio"]
    assert contest.measure_costs([rate], folder / "root", 1) == {"rate": costs["rate"]} and len(trained) == 6
    contest.measure_costs([rate], folder / "root", 2)
    assert len(trained) == 9, "another number of ranks costs something else"


def test_a_job_of_another_recipe_is_set_aside_and_one_of_the_same_stays(contest, folder):
    entry, job = contest.Entry("vpae", folder / "vpae.yaml"), folder / "jobs" / "vpae-seed0"
    contest.set_aside(job, "one")
    job.mkdir()
    (job / "recipe.yaml").write_text(contest.recipes.dump(entry.load()))
    contest.set_aside(job, "one")
    assert job.is_dir()
    contest.set_aside(job, "two")
    assert not job.exists() and (folder / "jobs" / "vpae-seed0-of-one" / "recipe.yaml").is_file()
    contest.set_aside(job, "two")

    # phase II of another phase I is another job, though its own recipe says the same
    start = folder / "start"
    start.mkdir()
    (start / "recipe.yaml").write_text(contest.recipes.dump(entry.load()))
    later = contest.Entry("vpae", folder / "vpae.yaml", ("priming=null", f"priming_run={start}"))
    before = contest.job_digest(later.load())
    assert before == contest.job_digest(later.load())
    (start / "recipe.yaml").write_text(contest.recipes.dump(entry.load("priming.guidance_scale=3.0")))
    assert before != contest.job_digest(later.load())


def test_the_open_world_has_teacher_clips_of_its_own(contest):
    peers = BENCHMARKS.parent / "recipes" / "peers"
    assert contest.in_world("closed", peers / "ladd.yaml") == ()
    assert not any("teacher_samples" in o for o in contest.in_world("open", peers / "dmd2.yaml"))
    folders = [
        contest.Entry("ladd", peers / "ladd.yaml", contest.in_world(w, peers / "ladd.yaml")).load()
        for w in ("closed", "open")
    ]
    closed, open_ = (recipe.method.teacher_samples.folder for recipe in folders)
    assert closed != open_ and {r.data.source["world"].get("unsaid") for r in folders} == {None, 0.6}


def test_every_method_has_as_many_trials_as_any_other(monkeypatch):
    """The issue's fairness: the same number of trial runs, each a recipe that loads."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality
    import tuning

    asked = argparse.Namespace(
        recipe=quality.RECIPES / "quickstart.yaml", peers=quality.RECIPES / "peers", world="open", overrides=[]
    )
    every = quality.entries(asked)
    tried = {e.name: tuning.trials(e) for e in every if e.name in tuning.SPACES}
    assert set(tried) == {e.name for e in every} - {"priming", "equilibrium"}
    assert {len(each) for each in tried.values()} == {6}
    for each in tried.values():
        assert len({repr(trial.load()) for trial in each}) == 6


def test_the_verdict_of_a_study_knows_what_is_no_difference(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ablation import verdict

    rows = {k: {"mean": {"mean": m, "standard_error": 1.0}} for k, m in (("a", 90.0), ("b", 80.0), ("c", 80.5))}
    assert verdict(rows, ("a", "b")) == "a over b: agree" and verdict(rows, ("b", "a")) == "b over a: disagree"
    assert verdict(rows, ("a", "b", "c")) == "a over b: agree; b over c: no difference"
    assert (verdict(rows, ("a",)), verdict(rows, ("b",)), verdict(rows, ())) == (
        "agree",
        "disagree",
        "the paper gives no figure",
    )


@pytest.mark.slow
def test_methods_are_trained_judged_and_set_beside_the_teacher_and_not_twice(folder):
    checkout = folder / "checkout"  # results are written beside the script
    shutil.copytree(BENCHMARKS, checkout, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (checkout / "results").mkdir()
    command = [sys.executable, str(checkout / "quality.py"), "--recipe", str(folder / "vpae.yaml"), "--peers"]
    command += [str(folder / "peers"), "--methods", "vpae", "lcm", "--world", "closed", "--seeds", "0"]
    command += ["--clips", "2", "--ranks", "1"]
    command += ["--root", str(folder / "jobs"), "--equal", "clips"]
    where = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((checkout / "results" / "quality_validation.json").read_text())
    table = document["tables"]["clips"]
    # (1 + 2) turns x 3 steps + (1 + 1) turns x 4 steps, four clips each; a consistency step is one turn
    assert table["budget"] == 68 and table["settings"]["lcm"] == ["method.consistency.student_steps=17"]
    assert set(table["rows"]) == {"vpae 1 NFE", "vpae 4 NFE", "lcm 1 NFE", "lcm 4 NFE"}
    assert document["bars"]["clips"]["best_peer"] == "lcm 1 NFE"
    row = table["jobs"]["vpae"][0]
    assert row["peak_bytes"] > 1e8 and row["seconds_training"] > 0 and row["rows"]["1 NFE"]["diversity"] > 0
    assert np.isfinite(row["rows"]["1 NFE"]["values"]["mean"])
    assert "<svg" in (checkout / "results" / "quality_validation.svg").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, **where)
    assert again.returncode == 0 and "== vpae" not in again.stdout
    final = subprocess.run([*command, "--final"], capture_output=True, text=True, timeout=900, **where)
    assert final.returncode == 0, final.stderr[-3000:]
    other = [*command, "--final", "--set", "evaluate.seed=1"]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=900, **where)
    assert refused.returncode == 2 and "say --because why the test split is used again" in refused.stderr
