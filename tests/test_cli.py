"""What a user meets on the command line: the whole path at micro size, and one clear line for each mistake."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import weakref

import numpy as np
import pytest
import torch
from helpers import write_recipe
from PIL import Image


@pytest.fixture(scope="module")
def finished(tmp_path_factory, micro_pipeline, request):
    """A finished distillation of the micro pipeline, made once for this file."""
    return tmp_path_factory.mktemp("finished") / "run"


def _run(vpae, micro_recipe, finished):
    if not (finished / "recipe.yaml").is_file():
        recipe = write_recipe(micro_recipe, finished.with_suffix(".yaml"))
        done = vpae("distill", recipe, "--output", finished)
        assert done.returncode == 0, done.stderr[-2000:]
    return finished


def _refused(done, *parts):
    """Exit status 2, one line, no traceback, all parts named."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def test_export_is_proven_and_samples_with_stock_diffusers(vpae, micro_recipe, finished):
    run = _run(vpae, micro_recipe, finished)
    done = vpae("export", run)
    assert done.returncode == 0, done.stderr[-2000:]
    proof = json.loads((run / "student" / "proof.json").read_text())
    assert proof["max_error"] < 1e-4 < proof["rms"] and "equilibrium" in proof["source"]
    assert "_name_or_path" not in (run / "student" / "transformer" / "config.json").read_text()
    assert not list((run / "student").rglob("*.bin")) and (run / "student" / "README.md").is_file()
    done = vpae("evaluate", run / "student", "--clips", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    done = vpae("sample", run / "student", "--bounce", 1, "--negative-prompt", "much longer than the prompt " * 9,
                "--guidance-scale", 2.0, "--num-frames", 5, "--output", run / "samples")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unfinished_run_becomes_one_file_in_the_released_layout(vpae, micro_recipe, finished, tmp_path):
    run = _run(vpae, micro_recipe, finished)
    chosen = ("--format", "wan", "--dtype", "bf16", "--phase", "priming")
    done = vpae("export", run, *chosen, "--output", tmp_path / "s.safetensors")
    assert done.returncode == 0, done.stderr[-2000:]
    proof = json.loads((tmp_path / "s.proof.json").read_text())
    assert proof["max_error"] < 1e-4 and "priming" in proof["source"] and proof["header"]["recipe"] == proof["recipe"]
    assert "diffusers from_single_file" in done.stdout and "bfloat16" in done.stdout


@pytest.mark.slow
def test_full_and_lora_students_become_loras(vpae, micro_recipe, finished, tmp_path):
    run = _run(vpae, micro_recipe, finished)
    done = vpae("export", run, "--format", "lora", "--rank", 24)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "blocks.3.ffn.2" in done.stdout and "rank 24: 0." in done.stdout and "passes over" in done.stdout
    assert (run / "micro-lora-r24-1step-fp32.safetensors").is_file()
    micro_recipe["student"]["kind"], micro_recipe["equilibrium"] = "lora", None
    recipe = write_recipe(micro_recipe, tmp_path / "lora.yaml")
    assert vpae("distill", recipe, "--output", tmp_path / "lora").returncode == 0
    _refused(vpae("export", tmp_path / "lora", "--format", "lora", "--rank", 2), "--rank 2", "full students")
    done = vpae("export", tmp_path / "lora", "--format", "lora", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left out" not in done.stdout and "passes over" not in done.stdout


def test_a_broken_export_is_removed(micro_recipe, tmp_path, micro_pipeline, monkeypatch):
    import torch

    from vpae.errors import UserError
    from vpae.export import diffusers as export
    from vpae.loading import load_model

    write = export.write_transformer

    def damaged(config, weights, folder):
        weights["proj_out.weight"] = weights["proj_out.weight"] + 0.1 * torch.ones_like(weights["proj_out.weight"])
        write(config, weights, folder)

    monkeypatch.setattr(export, "write_transformer", damaged)
    with pytest.raises(UserError, match="does not reproduce the student"):
        export.export_student(load_model(micro_pipeline), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_export_of_a_lora_student_merges_the_adapter(vpae, micro_recipe, tmp_path):
    micro_recipe["student"]["kind"], micro_recipe["equilibrium"] = "lora", None
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    assert vpae("distill", recipe, "--output", tmp_path / "run").returncode == 0
    done = vpae("export", tmp_path / "run", "--output", tmp_path / "student")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lora" not in (tmp_path / "student" / "transformer" / "config.json").read_text()


def test_sample_from_a_picture_and_a_prompt(vpae, micro_recipe, finished, tmp_path):
    run = _run(vpae, micro_recipe, finished)
    Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    for more in (["--steps", 4], ["--steps", 3, "--sampler", "euler", "--guidance-scale", 2.0], ["--role", "teacher"]):
        done = vpae(
            "sample", run, "--image", tmp_path / "photo.jpg", "--prompt", "something never seen",
            "--size", 32, 48, "--num-frames", 5, "--output", tmp_path / "out", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "000-photo.mp4").stat().st_size > 0
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


@pytest.mark.parametrize(("kind", "precision"), [("full", "fp32"), ("full", "bf16"), ("lora", "bf16")])
def test_sample_lets_the_encoders_go_before_it_reads_the_transformer(
    micro_recipe, tmp_path, monkeypatch, kind, precision
):
    """And holding matrices in bf16 gives bit for bit what autocast over fp32 gives."""
    from vpae import commands, loading
    from vpae import recipe as recipes
    from vpae.__main__ import build_parser
    from vpae.distill import distill
    from vpae.engine.parallel import start
    from vpae.extras import sample_with
    from vpae.sampling import sample_latents

    micro_recipe["student"]["kind"], micro_recipe["equilibrium"] = kind, None
    micro_recipe["priming"]["student_steps"] = 1
    assert distill(recipes.from_plain(micro_recipe, "test"), tmp_path / "run", False, start())
    encoders, order, made = [], [], []

    class Seen(commands.Encoders):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            encoders.extend(weakref.ref(p) for p in (self.pipeline.text_encoder, self.pipeline.image_encoder))

    def give_memory(backbone, processes):
        gc.collect()
        order.append([encoder() is None for encoder in encoders])
        return born(backbone, processes)

    def sampled(role, *arguments, **options):
        matrices = {p.dtype for n, p in role.backbone.transformer.named_parameters() if ".to_q" in n and p.ndim == 2}
        made.append((matrices, arguments, options, sample_latents(role, *arguments, **options)))
        return made[-1][-1]

    born = loading.give_memory
    monkeypatch.setattr(commands, "Encoders", Seen)
    monkeypatch.setattr(loading, "give_memory", give_memory)
    monkeypatch.setattr(commands, "sample_latents", sampled)
    options = ["--precision", precision, "--guidance-scale", "2.0", "--output", str(tmp_path / "out")]
    assert commands.sample(build_parser().parse_args(["sample", str(tmp_path / "run"), "--bounce", "2", *options]))
    assert order == [[True, True]] and len(made) == 2
    plain = loading.load_model(tmp_path / "run").role
    sample_with(plain.backbone, "native", precision)
    for matrices, arguments, options, latents in made:
        assert matrices == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert torch.equal(sample_latents(plain, *arguments, **options), latents)


def test_evaluate_writes_scores(vpae, micro_recipe, finished, tmp_path):
    run = _run(vpae, micro_recipe, finished)
    done = vpae("evaluate", run, "--clips", 3, "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["nfe"] == 1 and scores["clips"] == 3 and 0 <= scores["values"]["sa"] <= 100


def test_the_main_job_at_micro_size(vpae, micro_recipe, tmp_path):
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    done = vpae("quickstart", "--recipe", recipe, "--output", tmp_path / "job")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "job" / "results.json").read_text())
    students = {"student 1 NFE", "student 4 NFE", "phase I 1 NFE"}
    assert set(results["rows"]) == {"teacher 4 NFE", "teacher 1 NFE"} | students
    assert results["rows"]["phase I 1 NFE"]["values"] != results["rows"]["student 1 NFE"]["values"]
    card = (tmp_path / "job" / "student" / "README.md").read_text()
    assert "2 Bounce test clips" in card and "student 1 NFE" in card and "height=32, width=32, num_frames=5" in card
    for name in ("report.html", "comparison.mp4", "comparison.png", "student/proof.json"):
        assert (tmp_path / "job" / name).is_file(), name
    assert "teacher 4 NFE" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["distill", "no.yaml"], ["no recipe at no.yaml"]),
        (["sample", "nowhere"], ["nowhere", "tiny_wan"]),
        (["export", "."], ["ema", "not one"]),
    ],
)
def test_mistaken_paths(vpae, arguments, parts):
    _refused(vpae(*arguments), *parts)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "tiny_wan", "--batch", "0"],
        ["evaluate", "tiny_wan", "--steps", "-1"],
        ["sample", "tiny_wan", "--num-frames", "-3"],
        ["sample", "tiny_wan", "--fps", "0"],
        ["quickstart", "--ranks", "0"],
        ["bounce", "--count", "0"],
    ],
)
def test_impossible_numbers_are_refused_where_they_stand(arguments, capsys, monkeypatch):
    from vpae.__main__ import build_parser

    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and arguments[-2] in said and "must be" in said


def test_a_folder_whose_run_failed_before_it_trained_may_be_used_again(vpae, micro_recipe, tmp_path):
    micro_recipe["equilibrium"] = None
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    command = ["distill", recipe, "--output", tmp_path / "run"]
    _refused(vpae(*command, "--set", "priming.fake_lora.targets=[no_such_layer]"), "no_such_layer")
    done = vpae(*command)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_was_made_stays_when_its_checkpoints_are_gone(vpae, micro_recipe, finished, tmp_path):
    """A pipeline, an export and a record are no failed runs, though no checkpoint lies beside them."""
    recipe = write_recipe(micro_recipe | {"seed": 1}, tmp_path / "r.yaml")
    run = shutil.copytree(_run(vpae, micro_recipe, finished), tmp_path / "run")
    for phase in ("priming", "equilibrium"):
        shutil.rmtree(run / phase / "checkpoints")
    for name in ("model_index.json", "evaluation.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        shutil.copy(run / "recipe.yaml", folder)
        (folder / name).write_text("{}")
        _refused(vpae("distill", recipe, "--output", folder), "different run (seed is 0 there and 1 here)")
    _refused(vpae("distill", recipe, "--output", run), "different run (seed is 0 there and 1 here)")


def test_a_folder_of_something_else_is_left_alone(vpae, micro_recipe, tmp_path):
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    _refused(vpae("distill", recipe, "--output", tmp_path / "mine"), "is not empty and holds no vpae run", "--output")
    _refused(vpae("distill", recipe, "--output", tmp_path / "mine" / "thesis.tex" / "run"), "thesis.tex", "written")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_disk_that_fills_during_an_export_is_one_line(vpae, micro_recipe, finished, tmp_path):
    """A limit on the size of files stands for the full disk: the same calls fail in the same libraries."""
    import subprocess
    import sys

    run = _run(vpae, micro_recipe, finished)
    command = f"ulimit -f 40; exec {sys.executable} -m vpae export {run} --output {tmp_path / 'student'}"
    # a limited interpreter would leave cut .pyc files behind
    calm = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300, env=calm)
    _refused(done, "student.partial", "cannot be written", "File too large")
    assert not (tmp_path / "student").exists()


def test_a_transformer_that_the_cache_does_not_fit_is_named(micro_recipe, micro_pipeline, tmp_path):
    """Same encoders, so the cache's fingerprint agrees; the transformer is of another architecture."""
    from conftest import MICRO_TRANSFORMER

    from vpae import recipe as recipes
    from vpae.distill import distill
    from vpae.engine.parallel import start
    from vpae.errors import UserError
    from vpae.export.folder import write_transformer
    from vpae.models import fresh_transformer

    for key, value, words in (("out_channels", 8, "latent channels is 16"), ("text_dim", 32, "text width is 128")):
        other = shutil.copytree(micro_pipeline, tmp_path / key)
        transformer = fresh_transformer(MICRO_TRANSFORMER | {key: value}, 0)
        write_transformer(transformer.config, dict(transformer.state_dict()), other)
        micro_recipe["teacher"]["path"] = str(other)
        with pytest.raises(UserError, match=rf"cache .* and the transformer in .*{key} do not fit: {words}"):
            distill(recipes.from_plain(micro_recipe, "test"), tmp_path / f"run-{key}", False, start())


def test_an_exported_student_is_sampled_at_the_shape_it_was_trained_on(vpae, micro_recipe, finished, tmp_path):
    from vpae.data.videos import read_video

    run = _run(vpae, micro_recipe, finished)
    Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    done = vpae("sample", run, "--image", tmp_path / "photo.jpg", "--prompt", "p", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_video(tmp_path / "out" / "000-photo.mp4").shape == (5, 32, 32, 3)


def test_a_fault_after_a_signal_is_hidden_only_where_another_rank_left(monkeypatch, capsys):
    from vpae import __main__ as program
    from vpae.engine import signals

    monkeypatch.setattr(signals, "received", lambda: True)
    monkeypatch.setattr(signals, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(signals, "ignore", lambda: None)
    monkeypatch.setattr("sys.argv", ["vpae", "distill", "r.yaml"])
    for words, hidden in (("[gloo/tcp/pair.cc:553] Connection closed by peer", True), ("out of memory", False)):

        def fails(arguments, words=words):
            raise RuntimeError(words)

        monkeypatch.setattr(program, "_dispatch", fails)
        with pytest.raises(SystemExit if hidden else RuntimeError) as ended:
            program.main()
        if hidden:
            assert ended.value.code == 0 and "the last checkpoint is whole" in capsys.readouterr().out


def test_mistakes_in_a_recipe(vpae, micro_recipe, tmp_path):
    micro_recipe["priming"]["guidence_scale"] = micro_recipe["priming"].pop("guidance_scale")
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    _refused(vpae("distill", recipe), str(recipe), "priming.guidence_scale", "did you mean priming.guidance_scale?")


def test_a_folder_with_another_run_is_left_alone(vpae, micro_recipe, finished, tmp_path):
    run = _run(vpae, micro_recipe, finished)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    micro_recipe["priming"]["guidance_scale"] = 3.0
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    _refused(vpae("distill", recipe, "--output", run), "priming.guidance_scale is 2.0 there and 3.0 here", "--output")
    _refused(vpae("distill", finished.with_suffix(".yaml"), "--output", run), "--resume")
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}


def test_a_cache_of_another_teacher_is_refused(vpae, micro_recipe, micro_pipeline, tmp_path):
    other = shutil.copytree(micro_pipeline, tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text())
    config["latents_std"] = [2.0] * 16
    (other / "vae" / "config.json").write_text(json.dumps(config))
    micro_recipe["data"]["cache"] = str(tmp_path / "cache")
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    assert vpae("cache", recipe).returncode == 0
    _refused(
        vpae("distill", recipe, "--output", tmp_path / "run", "--set", f"teacher.path={other}"),
        "does not fit this recipe",
        "encoders.vae is",
    )


def test_damaged_shards_and_weights_are_named(vpae, micro_recipe, micro_pipeline, tmp_path):
    micro_recipe["data"]["cache"] = str(tmp_path / "cache")
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    assert vpae("cache", recipe).returncode == 0
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    _refused(vpae("distill", recipe, "--output", tmp_path / "run"), "shard-00000.safetensors is missing or damaged")
    other = shutil.copytree(micro_pipeline, tmp_path / "other")
    (other / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    _refused(vpae("evaluate", other, "--clips", 2), "cannot load the transformer", "other")


def test_pickled_weights_are_never_read(vpae, micro_pipeline, tmp_path):
    import torch

    other = shutil.copytree(micro_pipeline, tmp_path / "other")
    (other / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, other / "transformer" / "diffusion_pytorch_model.bin")
    _refused(vpae("evaluate", other, "--clips", 2), "cannot load the transformer")


def test_bad_clips_are_named(vpae, micro_recipe, tmp_path):
    from vpae.data.bounce import World
    from vpae.data.publish import export_bounce

    folder = tmp_path / "clips"
    export_bounce(World(size=32, num_frames=5), "train", 3, folder)
    lines = (folder / "captions.jsonl").read_text().splitlines()
    micro_recipe["data"] |= {
        "source": {"kind": "videos", "path": str(folder), "size": [32, 32], "num_frames": 5, "fps": 8.0},
        "cache": str(tmp_path / "cache"),
    }
    recipe = write_recipe(micro_recipe, tmp_path / "r.yaml")
    (folder / "captions.jsonl").write_text("\n".join([lines[0], '{"file": "' + json.loads(lines[1])["file"] + '"}']))
    _refused(vpae("cache", recipe), "captions.jsonl", "caption")
    (folder / "captions.jsonl").write_text("\n".join(lines))
    second = folder / json.loads(lines[1])["file"]
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    _refused(vpae("cache", recipe), second.name)


def test_a_mistake_that_all_ranks_find_is_told_once(vpae, tmp_path):
    done = vpae("distill", tmp_path / "no.yaml", ranks=2)
    assert done.returncode != 0
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == 1, done.stderr[-2000:]


def test_without_an_install_one_line_says_what_to_do(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, "-m", "vpae", "evaluate", "folder"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "has no torch" in done.stderr and "install.sh" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(number, monkeypatch, capsys):
    from vpae import __main__ as program

    def full(arguments):
        raise OSError(number, "no room", "outputs/log.jsonl")

    monkeypatch.setattr(program, "_dispatch", full)
    monkeypatch.setattr("sys.argv", ["vpae", "evaluate", "folder"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1
    assert "no room" in said and "outputs/log.jsonl" in said and "free some space" in said and "--resume" not in said


def test_another_fault_of_the_disk_is_not_taken_for_a_full_one(monkeypatch):
    from vpae import __main__ as program

    def broken(arguments):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(program, "_dispatch", broken)
    monkeypatch.setattr("sys.argv", ["vpae", "evaluate", "folder"])
    with pytest.raises(OSError, match="broken"):
        program.main()


def test_a_student_is_not_sampled_beside_another_teacher(micro_recipe, micro_pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    from vpae import recipe as recipes
    from vpae.distill import distill
    from vpae.engine.parallel import start
    from vpae.errors import UserError
    from vpae.loading import load_model

    teacher = shutil.copytree(micro_pipeline, tmp_path / "teacher")
    micro_recipe["teacher"]["path"], micro_recipe["equilibrium"] = str(teacher), None
    micro_recipe["priming"]["student_steps"] = 1
    assert distill(recipes.from_plain(micro_recipe, "test"), tmp_path / "run", False, start())
    assert load_model(tmp_path / "run").role.name == "ema"
    (file,) = (teacher / "transformer").glob("*.safetensors")
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, file)
    with pytest.raises(UserError, match="distilled from a teacher of other weights"):
        load_model(tmp_path / "run")


def test_a_teachers_run_is_not_exported_as_a_student(micro_recipe, micro_pipeline, tmp_path):
    from vpae.errors import UserError
    from vpae.export.diffusers import export_student
    from vpae.loading import Model, load_model
    from vpae.recipe import FinetuneFlow

    plain = load_model(micro_pipeline)
    made = Model(plain.role, plain.pipeline, object.__new__(FinetuneFlow), "a teacher")
    with pytest.raises(UserError, match="export is for students"):
        export_student(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_phones_picture_is_turned_the_way_it_was_taken(tmp_path):
    from vpae.commands import read_picture

    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "phone.png", None, 16), upright)


def test_fresh_removes_an_earlier_run_and_nothing_else(tmp_path):
    from vpae.quickstart import _forget

    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run / "priming", run / "student", run / "mine", other / "priming"):
        folder.mkdir(parents=True)
    for file in (run / "recipe.yaml", run / "results.json", run / "thesis.tex"):
        file.write_text("")
    for folder in (run, other, tmp_path / "nowhere"):
        _forget(folder)
    assert sorted(path.name for path in run.iterdir()) == ["mine", "recipe.yaml", "thesis.tex"]
    assert (other / "priming").is_dir()


def test_fresh_leaves_the_earlier_run_where_the_new_one_cannot_start(vpae, micro_recipe, tmp_path):
    recipe, folder = write_recipe(micro_recipe, tmp_path / "recipe.yaml"), tmp_path / "run"
    (folder / "priming" / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.read_text())
    run = ("quickstart", "--recipe", recipe, "--output", folder, "--fresh", "--set")
    _refused(vpae(*run, "teacher.path=nowhere"), "nowhere")
    _refused(vpae(*run, "equilibrium.taps=[0,9]"), "equilibrium.taps")
    assert (folder / "priming" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("priming.fake_lora.targets=[to_querry]", "LoRA target 'to_querry'"),  # all ranks find it
        ("data.source.path={folder}/gone", "gone"),  # rank 0 finds it
    ],
)
def test_a_mistake_is_one_line_on_two_ranks_too(vpae, micro_recipe, tmp_path, override, words):
    if "path" in override:
        micro_recipe["data"]["source"] = {"kind": "videos", "path": "", "size": [32, 32], "num_frames": 5, "fps": 8}
    recipe = write_recipe(micro_recipe, tmp_path / "recipe.yaml")
    settings = ("--set", override.format(folder=tmp_path))
    done = vpae("distill", recipe, "--output", tmp_path / "run", "--ranks", 2, *settings)
    lines = [line for line in done.stderr.splitlines() if line and "encoding clips" not in line]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines


def test_a_rank_that_is_killed_is_told(monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    from vpae.engine.launch import launch

    def killed(*arguments):
        raise ChildFailedError("vpae", {1: ProcessFailure(1, 123, -9, "/nowhere")})

    monkeypatch.setattr(api, "elastic_launch", lambda *a: killed)
    assert launch(2, ["distill"]) == 1
    assert "error: rank 1 was ended by SIGKILL" in capsys.readouterr().err
