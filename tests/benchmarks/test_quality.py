"""The comparison of methods, on recipes too small to be good at anything: budgets, jobs, tables."""

from __future__ import annotations

import argparse
import fcntl
import functools
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
def jobs(contest):
    import jobs

    return jobs


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
    short = ("priming.student_steps=1", "equilibrium.student_steps=1", "priming.ema_decay=0.0")
    assert contest.on_budget(entry, cost, "clips", 6.8) == (*short, "equilibrium.ema_decay=0.0")
    alone = contest.Entry("priming", folder / "vpae.yaml", ("equilibrium=null",))
    few = contest.on_budget(alone, contest.Cost([2.0], [12.0]), "seconds", 16)
    assert few == ("priming.student_steps=8", "priming.ema_decay=0.375"), "an EMA of 0.9 would keep 43 % of the teacher"


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
        "priming.ema_decay=0.8333",
        "equilibrium.ema_decay=0.875",
    )


def test_what_a_step_costs_is_measured_once_for_recipes_that_differ_in_rates_alone(contest, folder, monkeypatch):
    trained = []

    def train(entry, *_):
        trained.append(entry.name)

    monkeypatch.setattr(contest, "train", train)
    times = iter([9.0, 2.0, 3.0, 8.0, 7.0, 7.0])  # of rate, ratio, and again: the least of each counts
    monkeypatch.setattr(contest, "_phase_cost", lambda *_: (next(times), 12.0))
    monkeypatch.setattr(contest, "phases_of", lambda *_: ["priming"])
    base = contest.Entry("base", folder / "vpae.yaml")
    rate = contest.Entry("rate", folder / "vpae.yaml", ("priming.student_optimiser.learning_rate=0.01",))
    ratio = contest.Entry("ratio", folder / "vpae.yaml", ("priming.fake_per_student=7",))
    costs = contest.measure_costs([base, rate, ratio], folder / "root", 1)
    assert sorted(trained) == ["rate", "rate", "ratio", "ratio"]
    assert costs["base"] == costs["rate"] and costs["rate"].seconds == [3.0] and costs["ratio"].seconds == [2.0]
    assert costs["rate"].key.split("-")[1].startswith("1x")
    assert contest.measure_costs([rate], folder / "root", 1) == {"rate": costs["rate"]} and len(trained) == 4
    contest.measure_costs([rate], folder / "root", 2)
    assert len(trained) == 6, "another number of ranks costs something else"
    known = {costs["rate"].key: {"seconds": [5.0], "clips": [1.0]}}
    assert contest.measure_costs([rate], folder / "elsewhere", 1, known)["rate"].seconds == [5.0]
    assert len(trained) == 6, "taken from an earlier day"


def test_processes_of_one_folder_share_the_tasks_and_each_is_done_by_one(jobs, tmp_path):
    """Two of them, each task a second: they must overlap, and whoever comes second waits for what the first has."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import functools, os, sys, time\nfrom pathlib import Path\nimport jobs\n"
        "root = Path(sys.argv[1])\n"
        "def task(name):\n"
        "    file = root / name\n"
        "    if not file.exists():\n"
        "        time.sleep(1)\n"
        "        with file.open('x') as out:\n"
        "            out.write(str(os.getpid()))\n"
        "names = ['a', 'b', 'c', 'd']\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "done = jobs.share({n: functools.partial(task, n) for n in names}, root / 'locks')\n"
        "assert done == names and all((root / n).exists() for n in names)\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(BENCHMARKS)}, **pipes) for _ in range(2)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    assert len({(tmp_path / name).read_text() for name in "abcd"}) == 2


def test_what_another_process_has_under_way_is_left_out_where_none_waits(jobs, tmp_path, monkeypatch, capsys):
    jobs._warn_of_threads.cache_clear()
    monkeypatch.setattr(jobs.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: False)
    did = []
    tasks = {name: lambda name=name: did.append(name) for name in ("a", "b")}
    with (tmp_path / "a.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert jobs.share(tasks, tmp_path, wait=False) == ["b"] and did == ["b"]
    assert "each computes on 2 threads" in capsys.readouterr().err
    assert jobs.share(tasks, tmp_path) == ["a", "b"] and did == ["b", "a", "b"]


def test_a_job_of_another_recipe_is_set_aside_and_one_of_the_same_stays(contest, jobs, folder):
    entry, job = contest.Entry("vpae", folder / "vpae.yaml"), folder / "root" / "vpae-seed0"
    jobs.set_aside(job, "one")
    job.mkdir()
    (job / "recipe.yaml").write_text(contest.recipes.dump(entry.load()))
    jobs.set_aside(job, "one")
    assert job.is_dir()
    jobs.set_aside(job, "two")
    assert not job.exists() and (folder / "root" / "of-one-vpae-seed0" / "recipe.yaml").is_file()
    jobs.set_aside(job, "two")

    # phase II of another phase I is another job, though its own recipe says the same
    start = folder / "start"
    start.mkdir()
    (start / "recipe.yaml").write_text(contest.recipes.dump(entry.load()))
    later = contest.Entry("vpae", folder / "vpae.yaml", ("priming=null", f"priming_run={start}"))
    before = jobs.job_digest(later.load())
    assert before == jobs.job_digest(later.load())
    (start / "recipe.yaml").write_text(contest.recipes.dump(entry.load("priming.guidance_scale=3.0")))
    assert before != jobs.job_digest(later.load())


def test_a_job_of_an_earlier_day_is_taken_where_it_is_the_same(jobs, one_job, folder):
    done = one_job("trained", 0, 9)
    assert (done["name"], done["split"], done["clips"], done["seed"]) == ("vpae", "validation", 2, 0)
    shutil.rmtree(folder / "root")
    earlier = done | {"seconds_training": 7.0}
    assert one_job("not run", 1, 0, known=[earlier | {"recipe": "another"}, earlier])["seconds_training"] == 7
    for other in ({"recipe": "another"}, {"split": "test"}, {"clips": 64}):
        shutil.rmtree(folder / "root")
        assert one_job("trained", 0, 9, known=[earlier | other])["seconds_training"] == 60
    # what is here is of another recipe: it is set aside with its videos, and the earlier job takes its place
    (folder / "root" / "vpae-seed0.digest").write_text("old")
    result = folder / "root" / "vpae-seed0.validation-2.json"
    result.write_text(json.dumps(done | {"recipe": "old"}))
    assert one_job("not run", 1, 0, known=[earlier])["seconds_training"] == 7
    assert not result.with_suffix(".npz").exists()
    assert json.loads((folder / "root" / f"of-old-{result.name}").read_text())["recipe"] == "old"


def test_what_is_stored_only_grows(contest, tmp_path):
    job = {"recipe": "a", "split": "test", "clips": 64, "seed": 0}
    costs = {"vpae": contest.Cost([1.0], [2.0], "key")}
    contest.store("x_jobs", costs, [job], tmp_path, tmp_path)
    contest.store("x_jobs", {"lcm": contest.Cost([3.0], [4.0], "other")}, [job | {"recipe": "b"}], tmp_path, tmp_path)
    kept = contest.stored("x_jobs", tmp_path)
    assert [j["recipe"] for j in kept["jobs"]] == ["a", "b"] and set(kept["costs"]) == {"key", "other"}
    assert kept["costs"]["key"] == {"of": "vpae", "seconds": [1.0], "clips": [2.0]}
    assert contest.stored("y_jobs", tmp_path) == {"costs": {}, "jobs": []}


def test_a_training_keeps_its_lock_when_its_benchmark_is_killed(jobs, tmp_path):
    script = tmp_path / "benchmark.py"
    script.write_text(
        "import subprocess, sys, time\nfrom pathlib import Path\nimport jobs\n"
        "with jobs.claimed(Path(sys.argv[1])) as mine:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=jobs._held, stdout=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "lock")]
    where = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    benchmark = subprocess.Popen(command, env=where, stdout=subprocess.PIPE, text=True)
    child = int(benchmark.stdout.readline())
    benchmark.kill()
    benchmark.wait()
    with jobs.claimed(tmp_path / "lock") as mine:
        assert not mine
    os.kill(child, 9)
    with jobs.claimed(tmp_path / "lock", wait=True) as mine:
        assert mine


@pytest.fixture
def one_job(contest, jobs, folder, monkeypatch):
    """Run a job whose training says ``words``, ends with ``status`` and leaves its phase at ``turn`` of 9."""
    entry, script = contest.Entry("vpae", folder / "vpae.yaml", ("equilibrium=null",)), folder / "vpae.sh"

    def run(words: str, status: int, turn: int, steps: tuple[int, ...] = (1,), **more) -> dict:
        script.write_text(f"#!/bin/sh\necho '{words}' >&2\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setattr(jobs.sys, "executable", str(script))
        found = argparse.Namespace(turn=turn, part=lambda name, kind: {"turns": 9}[name])
        monkeypatch.setattr(jobs.checkpoints, "find", lambda root: found)
        monkeypatch.setattr(jobs, "judge", lambda *a: (dict.fromkeys(a[4], {}), [np.zeros(3)]))
        monkeypatch.setattr(jobs, "seconds_training", lambda *_: 60.0)
        (folder / "root" / "vpae-seed0").mkdir(parents=True, exist_ok=True)
        options = {"ranks": 1, "split": "validation", "clips": 2, "steps": steps} | more
        settings = {"vpae": ("priming.student_steps=3",)}
        return jobs.run_jobs([entry], [0], folder / "root", settings, **options)["vpae"][0]

    return run


def test_a_run_that_was_interrupted_is_no_result(jobs, one_job, folder, capfd):
    with pytest.raises(jobs.UserError, match="was stopped in .*priming; give the same command again to go on"):
        one_job("interrupted, everything is saved", 0, 8)  # with status 0
    with pytest.raises(jobs.UserError, match="failed with status 2"):
        one_job("error: the disk is full", 2, 8)
    assert "error: the disk is full" in capfd.readouterr().err
    assert not (folder / "root" / "vpae-seed0.validation-2.json").exists()
    assert one_job("done", 0, 9)["seconds_training"] == 60
    assert one_job("not run again", 1, 0)["seconds_training"] == 60
    both = one_job("trained, not yet judged so", 0, 9, (4,))["rows"]
    assert list(both) == ["1 NFE", "4 NFE"], "what an earlier call asked for stays, and the videos are of the first"
    assert list(one_job("not run again", 1, 0, (1, 4))["rows"]) == ["1 NFE", "4 NFE"]


def test_what_is_done_can_be_set_side_by_side_without_training(contest, jobs, one_job, folder):
    entry = contest.Entry("vpae", folder / "vpae.yaml", ("equilibrium=null",))
    settings = {"vpae": ("priming.student_steps=3",)}
    asked = {"ranks": 1, "split": "validation", "clips": 2, "steps": (1,), "begin": False}

    def found(**more) -> dict:
        return jobs.run_jobs([entry], [0, 1], folder / "root", settings, **asked, **more)

    assert found() == {"vpae": []}
    done = one_job("done", 0, 9)
    assert found() == {"vpae": [done]}
    for file in (folder / "root").glob("*.json"):
        file.unlink()
    assert found(known=[done]) == {"vpae": [done]} and not list((folder / "root").glob("*.json"))


@pytest.mark.parametrize(
    "options, says",
    [
        (["--final"], "--final and --done exclude each other"),
        (["--chosen-on", "-5"], "--chosen-on is -5; write how many"),
        (["--ranks", "77"], "vpae was not yet run with --ranks 77 and "),
    ],
)
def test_tables_of_what_is_done_train_nothing_and_look_at_no_test_split(monkeypatch, capsys, folder, options, says):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    monkeypatch.setattr(quality, "RESULTS", folder / "results")
    own = ["--world", "own", "--recipe", str(folder / "vpae.yaml"), "--peers", str(folder / "peers")]
    monkeypatch.setattr("sys.argv", ["quality.py", "--done", *own, "--root", str(folder / "root"), *options])
    with pytest.raises(SystemExit):
        quality.main()
    said = capsys.readouterr().err
    assert says in said and ("--ranks" not in options or "threads (OMP_NUM_THREADS)" in said)
    assert not (folder / "root").exists() and not (folder / "results").exists()


def test_no_table_is_made_of_nothing(monkeypatch, capsys, contest, folder):
    import quality

    entry = contest.Entry("vpae", folder / "vpae.yaml")
    known = {contest.cost_key(entry, 1): {"seconds": [1.0, 1.0], "clips": [8.0, 8.0]}}
    monkeypatch.setattr(quality, "RESULTS", folder / "results")
    monkeypatch.setattr(quality, "stored", lambda name: {"costs": known, "jobs": []})
    monkeypatch.setattr(quality, "reference", lambda *_: ({}, []))
    own = ["--world", "own", "--recipe", str(folder / "vpae.yaml"), "--peers", str(folder / "peers")]
    own += ["--methods", "vpae", "--root", str(folder / "root"), "--ranks", "1", "--minutes", "7"]
    monkeypatch.setattr("sys.argv", ["quality.py", "--done", *own])
    with pytest.raises(SystemExit):
        quality.main()
    assert "no job of --equal seconds is done with --minutes 7.0, --clips 64" in capsys.readouterr().err
    assert not (folder / "results").exists()


def test_a_run_that_diverged_is_kept_as_that_and_is_in_no_mean(contest, one_job):
    lost = one_job("error: turn 5: loss or gradient is not finite on at least one rank", 2, 4)
    assert "failed with status 2" in lost["failed"] and lost == one_job("not run again", 1, 0)
    row = {"values": {"mean": 70.0}, "frechet": 1.0, "diversity": 2.0, "seconds_per_clip": 0.1}
    whole = {"rows": {"1 NFE": row}, "seconds_training": 90.0, "peak_bytes": 2**30}
    found = contest.summary([whole, lost], "1 NFE", budget=100.0)
    assert found["diverged"]["mean"] == 1 and found["mean"]["mean"] == 70 and found["percent_of_budget"]["mean"] == 90
    assert set(contest.summary([lost], "1 NFE")) == {"diverged"}


def test_each_world_has_teacher_clips_of_its_own(contest):
    peers = BENCHMARKS.parent / "recipes" / "peers"
    assert contest.in_world("own", peers / "ladd.yaml") == ()
    assert not any("teacher_samples" in o for o in contest.in_world("open", peers / "dmd2.yaml"))
    found = {}
    for world in ("closed", "open", "own"):
        entry = contest.Entry("ladd", peers / "ladd.yaml", contest.in_world(world, peers / "ladd.yaml"))
        recipe = entry.load()
        found[world] = (recipe.teacher.path, entry.world().unsaid, recipe.method.teacher_samples.folder)
    assert found["closed"] == ("tiny_wan", 0.0, "outputs/cache/bounce-train-closed-teacher")
    assert found["open"] == found["own"] == ("tiny_wan_open", 0.6, "outputs/cache/bounce-train-open-teacher")


def test_recipes_of_different_worlds_are_not_compared(contest):
    recipes = BENCHMARKS.parent / "recipes"
    entries = [contest.Entry(path, recipes / path) for path in ("quickstart.yaml", "peers/dmd2.yaml")]
    with pytest.raises(contest.UserError, match="peers/dmd2.yaml and quickstart.yaml differ in teacher.path"):
        contest.check_one_world(entries)
    moved = [contest.Entry(e.name, e.recipe, contest.in_world("closed", e.recipe)) for e in entries]
    contest.check_one_world(moved)


def test_every_method_has_as_many_trials_as_any_other(monkeypatch):
    """The issue's fairness: the same number of trial runs, each a recipe that loads."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality
    import tuning

    asked = argparse.Namespace(recipe=None, peers=quality.RECIPES / "peers", world="open", overrides=[])
    every = quality.entries(asked)
    tried = {e.name: tuning.trials(e) for e in every if e.name in tuning.SPACES}
    assert set(tried) == {e.name for e in every} - {"priming", "equilibrium"}
    assert {len(each) for each in tried.values()} == {6}
    for each in tried.values():
        assert len({repr(trial.load()) for trial in each}) == 6


@pytest.fixture
def explore(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import explore

    return explore


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "trials").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_listed_trial_is_a_recipe_of_its_own(explore, file, tmp_path):
    import quality

    asked = argparse.Namespace(recipe=None, peers=quality.RECIPES / "peers", world="open", overrides=[])
    trials = explore.read_trials(file)
    tried = explore.as_entries(trials, quality.entries(asked), tmp_path, 3)
    explore.check_one_world(list(tried.values()))
    assert len({repr((entry.load(), trials[name]["minutes"])) for name, entry in tried.items()}) == len(trials)


@pytest.mark.parametrize(
    "words, says",
    [
        ("[", "can't be read as a list of trials"),
        ("", "holds no trials"),
        ("a: {of: dmd2, minutes: 4}", "trial a is .*write {of: METHOD"),
        ("a: {of: dmd2, minutes: 4, set: [], more: 1}", "trial a is .*'more': 1"),
        ("a: 4", "trial a is 4; write"),
        ("a/b: {of: dmd2, minutes: 4, set: []}", "trial a/b: a name is a word without a slash"),
        ("a: {of: 1, minutes: 4, set: []}", "trial a: of is 1; write a method"),
        ("a: {of: dmd2, minutes: soon, set: []}", "minutes is 'soon'; write a number above 0"),
        ("a: {of: dmd2, minutes: 0, set: []}", "minutes is 0; write"),
        ("a: {of: dmd2, minutes: .nan, set: []}", "minutes is nan; write"),
        ("a: {of: dmd2, minutes: 4, set: [seed: 1]}", "set is .*; write overrides"),
    ],
)
def test_a_list_of_trials_says_what_is_wrong_with_it(explore, tmp_path, words, says):
    (tmp_path / "trials.yaml").write_text(words)
    with pytest.raises(explore.UserError, match=says):
        explore.read_trials(tmp_path / "trials.yaml")


def test_a_trial_starts_from_one_before_it(explore, tmp_path):
    entry = explore.Entry("vpae", explore.RECIPES / "tiny_open.yaml")
    first = {"of": "vpae", "minutes": 4, "set": []}
    second = first | {"set": ["priming=null", "priming_run={root}/first-seed{seed}"]}
    found = explore.as_entries({"first": first, "second": second}, [entry], tmp_path, 7)
    assert found["second"].overrides[-1] == f"priming_run={tmp_path}/first-seed7"
    with pytest.raises(
        explore.UserError, match="trial second: priming_run=.*first-seed7 is the run of no trial before"
    ):
        explore.as_entries({"second": second, "first": first}, [entry], tmp_path, 7)
    with pytest.raises(explore.UserError, match="trial odd: of: no method 'vpea'; there are vpae"):
        explore.as_entries({"odd": first | {"of": "vpea"}}, [entry], tmp_path, 7)


def test_trials_of_several_seeds_start_each_from_its_own(explore, tmp_path, monkeypatch, capsys):
    """Runs are made up: a job scores its seed."""
    trials = {"first": [], "second": ["priming=null", "priming_run={root}/first-seed{seed}"]}
    listed = {name: {"of": "vpae", "minutes": 1, "set": own} for name, own in trials.items()}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(listed))
    asked: list[tuple[str, int, str, bool]] = []
    written: dict = {}
    lost: set[str] = set()

    def run_jobs(entries, seeds, root, settings, wait=True, **options):
        ((entry,), (seed,)) = entries, seeds
        start = [o for o in entry.overrides if o.startswith("priming_run")]
        assert options["steps"] == steps and options["clips"] == 128
        asked.append((entry.name, seed, *start, wait))
        if entry.name in lost:
            return {entry.name: [{"failed": "a loss was not finite", "commit": "c"}]}
        return {entry.name: [_runs(float(seed))[0] | {"commit": "c"}]}

    monkeypatch.setattr(explore, "run_jobs", run_jobs)
    monkeypatch.setattr(explore, "measure_costs", lambda es, *_: {e.name: None for e in es})
    monkeypatch.setattr(explore, "on_budget", lambda *_: ())
    monkeypatch.setattr(explore, "write_result", lambda name, document: written.update({name: document}))
    words, steps = [str(tmp_path / "two.yaml"), "--root", str(tmp_path), "--seeds", "3", "5"], [1, 4]
    monkeypatch.setattr("sys.argv", ["explore.py", *words, "--steps", "4", "1"])
    explore.main()
    start = f"priming_run={tmp_path}/first-seed"
    first = [("first", 3, False), ("first", 5, False), ("first", 3, True), ("first", 5, True)]
    assert asked[:6] == [*first, ("second", 3, f"{start}3", False), ("second", 5, f"{start}5", False)]
    found = written["exploration_two"]
    second = found["trials"]["second"]
    assert found["seeds"] == [3, 5] and second["rows"]["1 NFE"]["tc"] == {"mean": 4, "standard_error": 1}
    assert second["means"] == {"1 NFE": [13, 15], "4 NFE": [6.5, 7.5]} and second["commits"] == ["c"]
    lost.add("second")
    explore.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["means"] == {"1 NFE": {"first": 14}, "4 NFE": {"first": 7}}, "a mean of none is none"
    lost_one = written["exploration_two"]["trials"]["second"]
    assert lost_one["means"] == {"1 NFE": [None, None], "4 NFE": [None, None]}
    steps = [1]  # the default
    monkeypatch.setattr("sys.argv", ["explore.py", *words])
    explore.main()
    assert list(written["exploration_two"]["trials"]["first"]["rows"]) == ["1 NFE"]
    lost.add("first")
    with pytest.raises(SystemExit):
        explore.main()
    assert "first diverged with seed 3" in capsys.readouterr().err


def test_an_ablation_trains_what_its_studies_share_once(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    recipe, studies = ablation.RECIPES / "tiny_open.yaml", ("priming", *ablation.STUDIES)
    first, own, variants = ablation.plan(studies, recipe, (), "open")
    assert [e.name for e in first] == ["VSD alone", "consistency alone"] and list(own) == ["VSD", "both phases"]
    every = [e.name for entries in variants.values() for e in entries.values()]
    # the recipe as it stands is in seven studies of phase II, and twice with a phase I of its own
    assert every.count("VSD") == 7 and every.count("both phases") == 2 and len(every) - len(set(every)) == 7
    assert variants["r1"]["both"] is variants["judge"]["unified"] is variants["lambda"]["lambda 10"] is own["VSD"]
    assert variants["student time"]["from 0.99"] is variants["student"]["full"] is own["both phases"]
    assert {ablation.start_of("priming", n) for n in variants["priming"]} == {"VSD alone", "consistency alone", None}
    for study in studies:  # the folder of a job is the same in every call
        alone, needed, found = ablation.plan((study,), recipe, (), "open")
        assert found == {study: variants[study]} and list(needed) == [ablation.as_it_stands(study)]
        assert len(alone) == (2 if study == "priming" else 0 if ablation.STUDIES[study].whole else 1)


def test_a_study_of_a_moved_recipe_still_has_its_variants_and_its_base(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    recipe = ablation.RECIPES / "tiny_open.yaml"
    moved = (
        "equilibrium.sds.weight=5",
        "equilibrium.r1.weight=0",
        "student.kind=lora",
        "student.lora={rank: 4, alpha: 4, targets: [to_q]}",
    )
    _, own, variants = ablation.plan(("lambda", "r1", "student"), recipe, moved, "open")
    assert own["VSD"].name not in {e.name for e in variants["lambda"].values()}
    assert variants["r1"]["off"] is own["VSD"] and variants["r1"]["both"].load().equilibrium.r1.weight == 1
    assert variants["student"]["full"].load().student.kind == "full"


def _runs(*values: float) -> list[dict]:
    rows = [{"tc": value, "mean": value + 10} for value in values]
    more = {"frechet": 0.1, "diversity": 1.0, "seconds_per_clip": 1.0}
    about = {"seconds_training": 60.0, "peak_bytes": 2**30, "split": "validation", "clips": 8}
    half = [{"values": {k: v / 2 for k, v in row.items()}} | more | {"frechet": row["tc"]} for row in rows]
    both = zip(rows, half, strict=True)
    return [{"rows": {"1 NFE": {"values": a} | more, "4 NFE": b}, "seed": i} | about for i, (a, b) in enumerate(both)]


def test_the_verdict_of_a_study_pairs_seeds_and_knows_what_is_no_difference(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ablation import leads, verdict

    jobs = {"a": _runs(60, 70, 80), "b": _runs(58, 68.3, 77.5), "c": _runs(59, 68, 78)}
    assert verdict(jobs, ("a", "b"), "tc") == "tc: a over b: agree (+2.07 \u00b1 0.23)", "though seeds differ by 20"
    assert verdict(jobs, ("b", "a"), "tc") == "tc: b over a: disagree (-2.07 \u00b1 0.23)"
    assert verdict(jobs, ("a", "b", "c"), "tc").endswith("b over c: no difference (-0.40 \u00b1 0.38)")
    assert leads(jobs["a"], jobs["b"]) == leads(jobs["a"], jobs["b"], "tc") == pytest.approx([2, 1.7, 2.5])
    # three and a half standard errors, of three seeds, are within chance
    assert "no difference (+2.00 \u00b1 0.58)" in verdict(
        {"a": _runs(60, 70, 80), "b": _runs(58, 69, 77)}, ("a", "b"), "tc"
    )
    assert "no difference (+0.00 \u00b1 0.00)" in verdict({"a": _runs(60, 70), "b": _runs(60, 70)}, ("a", "b"), "tc")
    assert verdict({k: v[:1] for k, v in jobs.items()}, ("a", "b"), "tc") == "tc: a over b: too few seeds to tell"
    jobs["b"][1] = {"failed": "a loss was not finite"}
    assert leads(jobs["a"], jobs["b"]) == pytest.approx([2, 2.5])
    assert verdict(jobs, (), "tc") == "the paper has no such figures"


def test_an_ablation_sets_variants_beside_the_recipe_and_the_phase_they_went_on_from(monkeypatch, tmp_path, capsys):
    """Runs are made up: a job's TC is its name's length, and a seed's number is added."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation
    import contest

    asked: dict[str, tuple[str, ...]] = {}
    lost: set[str] = set()

    def run_jobs(entries, seeds, root, settings, **options):
        asked.update({e.name: settings[e.name] for e in entries})
        runs = {e.name: _runs(*(len(e.name) + seed for seed in seeds)) for e in entries}
        for name, js in runs.items():
            for job in js:
                job["recipe"] = f"{name}-{job['seed']}"
            if name in lost:
                js[1] = {
                    "failed": "a loss was not finite",
                    "recipe": f"{name}-1",
                    "split": "validation",
                    "clips": 8,
                    "seed": 1,
                }
        return runs

    results = tmp_path / "results"
    monkeypatch.setattr(ablation, "run_jobs", run_jobs)
    for name in ("write_part", "store"):
        monkeypatch.setattr(ablation, name, functools.partial(getattr(contest, name), folder=results))

    def call(*words: str) -> dict:
        monkeypatch.setattr("sys.argv", ["ablation.py", "--root", str(tmp_path), "--clips", "8", *words])
        ablation.main()
        return json.loads((results / "ablation.json").read_text())

    study = call("--studies", "judge")["studies"]["judge"]
    assert asked["judge frozen"] == asked["VSD"] == (f"priming_run={tmp_path}/VSD alone-seed{{seed}}",)
    assert asked["VSD alone"] == () and "consistency alone" not in asked
    rows, four = study["rows"]["1 NFE"], study["rows"]["4 NFE"]
    assert set(rows) == set(four) == {"frozen", "unified", "trainable", "phase I alone"}
    assert study["jobs"]["unified"] == {"name": "VSD", "recipes": ["VSD-0", "VSD-1", "VSD-2"]}
    assert rows["frozen"]["mean_against_recipe"]["mean"] == len("judge frozen") - len("VSD")
    assert rows["frozen"]["mean_against_phase_1"]["mean"] == len("judge frozen") - len("VSD alone")
    assert rows["unified"]["mean_against_recipe"]["mean"] == 0 and "mean_against_phase_1" not in rows["phase I alone"]
    assert rows["frozen"]["frechet_against_recipe"]["mean"] == 0
    assert four["frozen"]["frechet_against_recipe"]["mean"] == 2 * four["frozen"]["mean_against_recipe"]["mean"] == 9
    assert study["verdict"] == "tc: unified over frozen: disagree (-9.00 \u00b1 0.00)"
    kept = {job["recipe"] for job in json.loads((results / "ablation_jobs.json").read_text())["jobs"]}
    assert {"VSD alone-0", "VSD-2", "judge frozen-1"} <= kept
    asked.clear()
    found = call("--studies", "student")["studies"]
    assert set(found) == {"judge", "student"}, "on the same terms"
    assert set(asked) == {"both phases", "student lora"} and asked["both phases"] == ()
    assert "mean_against_phase_1" not in found["student"]["rows"]["1 NFE"]["lora"]
    assert set(call("--studies", "student", "--set", "equilibrium.sds.weight=5")["studies"]) == {"student"}
    lost.add("judge frozen")
    row = call("--studies", "judge")["studies"]["judge"]["rows"]["1 NFE"]["frozen"]
    assert row["diverged"]["mean"] == 1 and row["mean_against_recipe"]["mean"] == 9
    lost.add("VSD alone")
    with pytest.raises(SystemExit):
        call("--studies", "judge")
    assert "VSD alone diverged with seed 1" in capsys.readouterr().err


def test_bars_are_paired_over_clips_and_leave_diverged_runs_out(monkeypatch):
    """V-PAE is 2 ahead on every clip, and clips differ by 60: only pairs tell."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from quality import bars

    def run(*means: float) -> dict:
        row = {"clip_means": list(means), "values": {"dynamic_degree": 0.5}}
        return {"rows": {"1 NFE": row, "4 NFE": row}}

    clips = np.linspace(20, 80, 16)
    jobs = {"vpae": [run(*clips + 2)] * 2, "priming": [run(*clips + 9)], "lcm": [run(*clips), {"failed": "why"}]}
    found = bars({"clip_means": clips.tolist(), "values": {"dynamic_degree": 1.0}}, jobs | {"mse": [{"failed": "why"}]})
    assert found["best_peer"] == "lcm" and found["dynamic_degree_percent"] == 50
    ahead = found["percent_ahead_of_best_peer"]
    assert ahead["value"] == pytest.approx(4) and 3 < ahead["low"] < 4 < ahead["high"] < 5.5
    assert found["percent_of_teacher_at_1_nfe"]["value"] == pytest.approx(104)


def test_clips_that_settings_were_chosen_on_are_left_out_of_a_second_look(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from quality import on_other_clips

    def run(*means: float) -> dict:
        row = {"clip_means": list(means), "values": {"dynamic_degree": 0.5}}
        return {"rows": {"1 NFE": row, "4 NFE": row}}

    jobs = {"vpae": [run(90, 60), run(90, 64)], "lcm": [run(50, 50), {"failed": "why"}]}
    found = on_other_clips({"clip_means": [70, 80], "values": {"dynamic_degree": 1.0}}, jobs, 1)
    assert found["teacher"] == 80 and found["means"]["vpae"]["1 NFE"] == {"mean": 62, "standard_error": 2}
    assert found["means"]["lcm"]["4 NFE"]["mean"] == 50
    assert found["bars"]["percent_of_teacher_at_1_nfe"]["value"] == pytest.approx(77.5)
    assert found["bars"]["percent_ahead_of_best_peer"]["value"] == pytest.approx(24)
    assert "dynamic_degree_percent" not in found["bars"], "that is known of all clips together alone"


def test_a_look_at_the_test_split_is_recorded_before_and_needs_a_reason_the_second_time(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from quality import guard

    from vpae.errors import UserError

    file = tmp_path / "looks.json"
    first = {"recipes": {"vpae": "a"}, "seeds": [0], "minutes": None}
    assert guard(file, first, None) == [{"asked": first, "because": "first"}] == guard(file, first, None)
    with pytest.raises(UserError, match="say --because"):
        guard(file, first | {"minutes": 4.0}, None)
    assert [look["because"] for look in guard(file, first | {"minutes": 4.0}, "a bug")] == ["first", "a bug"]
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.slow
def test_methods_are_trained_judged_and_set_beside_the_teacher_and_not_twice(folder):
    checkout = folder / "checkout"  # results are written beside the script
    shutil.copytree(BENCHMARKS, checkout, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (checkout / "results").mkdir()
    command = [sys.executable, str(checkout / "quality.py"), "--recipe", str(folder / "vpae.yaml"), "--peers"]
    command += [str(folder / "peers"), "--methods", "vpae", "lcm", "--world", "own", "--seeds", "0"]
    command += ["--clips", "2", "--ranks", "1"]
    command += ["--root", str(folder / "jobs"), "--equal", "clips"]
    where = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads((checkout / "results" / "quality_own_validation.json").read_text())
    table = document["tables"]["clips"]
    consistency = ["method.consistency.student_steps=17", "method.consistency.ema_decay=0.7058"]
    # (1 + 2) turns x 3 steps + (1 + 1) turns x 4 steps, four clips each; a consistency step is one turn
    assert table["budget"] == 68 and table["settings"]["lcm"] == consistency
    assert set(table["rows"]) == {"vpae 1 NFE", "vpae 4 NFE", "lcm 1 NFE", "lcm 4 NFE"}
    assert document["bars"]["clips"]["best_peer"] == "lcm"
    stored = json.loads((checkout / "results" / "quality_own_validation_jobs.json").read_text())
    assert [job["name"] for job in stored["jobs"]] == ["vpae", "lcm"] and len(stored["costs"]) == 2
    row = stored["jobs"][0]
    assert row["peak_bytes"] > 1e8 and row["seconds_training"] > 0 and row["rows"]["1 NFE"]["diversity"] > 0
    assert np.isfinite(row["rows"]["1 NFE"]["values"]["mean"])
    assert "<svg" in (checkout / "results" / "quality_own_validation_clips.svg").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=900, **where)
    assert again.returncode == 0 and "== vpae" not in again.stdout
    shutil.rmtree(folder / "jobs")  # another day: costs, so steps, and jobs are in the result
    sheet = (checkout / "results" / "quality_own_validation_clips.png").stat().st_mtime_ns
    later = subprocess.run(command, capture_output=True, text=True, timeout=900, **where)
    assert (
        later.returncode == 0 and "2 of 2 jobs are of an earlier day" in later.stdout and "== vpae" not in later.stdout
    )
    kept = json.loads((checkout / "results" / "quality_own_validation.json").read_text())
    assert kept["tables"] == document["tables"] and kept["costs"] == document["costs"]
    assert sheet == (checkout / "results" / "quality_own_validation_clips.png").stat().st_mtime_ns
    assert "stays as it is: no videos here of vpae, lcm" in later.stdout
    final = subprocess.run([*command, "--final"], capture_output=True, text=True, timeout=900, **where)
    assert final.returncode == 0, final.stderr[-3000:]
    other = [*command, "--final", "--set", "evaluate.seed=1"]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=900, **where)
    assert refused.returncode == 2 and "say --because why it is used again" in refused.stderr


def test_parts_of_earlier_calls_are_kept_on_the_same_terms_alone(contest, tmp_path):
    from common import parts_before, write_result

    about = {"benchmark": "tuning", "minutes": 3.0}
    assert parts_before("tuning", about, "methods", tmp_path) == {}
    write_result("tuning", about | {"methods": {"lcm": 1}}, tmp_path)
    assert parts_before("tuning", about, "methods", tmp_path) == {"lcm": 1}
    assert parts_before("tuning", about | {"minutes": 4.0}, "methods", tmp_path) == {}
