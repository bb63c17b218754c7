"""The main job: distil the embedded teacher into a one-step student, export it, and show how good it is."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from vpae import recipe as recipes
from vpae.data.bounce import Clip
from vpae.data.encoders import Encoders
from vpae.distill import distill, preflight_distill
from vpae.engine import checkpoint as checkpoints
from vpae.engine.parallel import Processes
from vpae.engine.tracking import read_log
from vpae.errors import UserError
from vpae.evaluation import Sampled, clips_of, sample_clips
from vpae.export.diffusers import export_student
from vpae.files import write_json
from vpae.judge.judge import SetScores, judge_set
from vpae.loading import Model, load_model
from vpae.recipe import Distill, Distillation
from vpae.report import Variant, format_headline, format_table, write_comparison, write_report
from vpae.runs import PEER_PHASES, PHASES, RECIPE, environment, phases_of

_SHOWN = 8  # clips on the page
_TABLE_ONLY = ("student 4 NFE", "phase I 1 NFE")


def default_recipe() -> Path:
    """recipes/quickstart.yaml, in a checkout or in the current folder.

    Raises:
        UserError: neither is there.
    """
    for root in (Path.cwd(), Path(__file__).parent.parent):
        if (root / "recipes" / "quickstart.yaml").is_file():
            return root / "recipes" / "quickstart.yaml"
    raise UserError("recipes/quickstart.yaml is not here; start in a checkout of vpae, or name a --recipe")


def quickstart(recipe: recipes.Recipe, folder: Path, fresh: bool, processes: Processes) -> bool:
    """Distil (going on where an earlier call stopped), export, compare, report; False when interrupted.

    Raises:
        UserError: the recipe does not distil, or anything the run finds wrong.
    """
    started = time.monotonic()
    if not isinstance(recipe, Distillation):
        raise UserError(f"recipe {recipe.name!r} is of kind {recipe.kind}; the main job distils")
    if fresh:
        preflight_distill(recipe, processes)
        processes.together(lambda: _forget(folder), main_only=True)
    if not distill(recipe, folder, True, processes):
        return False
    compare(recipe, folder, started, processes)
    return True


_MADE = (
    *PHASES,
    *PEER_PHASES,
    "student",
    "student.partial",
    "student.before",
    "results.json",
    "report.html",
    "comparison.mp4",
    "comparison.png",
)


def _forget(folder: Path) -> None:
    """Remove what an earlier run made; whatever else lies in its folder is left alone."""
    if not (folder / RECIPE).is_file():
        return
    for path in (folder / name for name in _MADE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def seconds_training(folder: Path, recipe: Distillation) -> float:
    """Seconds spent in turns of all phases, over all calls that it took to finish them."""
    found = (checkpoints.find(folder / phase / "checkpoints") for phase in phases_of(recipe))
    return sum(checkpoint.part("seconds", (int, float)) for checkpoint in found if checkpoint is not None)


def compare(recipe: Distillation, folder: Path, started: float, processes: Processes) -> None:
    """Judge the student beside its teacher (all ranks), export it, write results, comparison and report (rank 0)."""
    student, teacher = load_model(folder), load_model(folder, "teacher")
    encoders = Encoders(student.pipeline, student.role.backbone.transformer.device)
    clips = clips_of(student.world, "test", recipe.evaluate.clips)
    both = isinstance(recipe, Distill) and recipe.priming and recipe.equilibrium
    primed = load_model(folder, phase="priming") if both else None
    rows = judge_rows(recipe, student, teacher, primed, encoders, clips, processes)
    processes.together(lambda: _write(recipe, folder, started, student, clips, rows, processes), main_only=True)


def _write(
    recipe: Distillation,
    folder: Path,
    started: float,
    student: Model,
    clips: list[Clip],
    rows: dict[str, Sampled],
    processes: Processes,
) -> None:
    real = judge_set([c.frames for c in clips], clips)
    summary, variants = summarise(rows), variants_of(rows)
    table = f"{format_table(variants, _scores(real))}\n{format_headline(variants)}"
    proof = export_student(student, folder / "student", f"{len(clips)} Bounce test clips:\n\n```\n{table}\n```")
    results = {
        "recipe": recipes.digest(recipe),
        "seed": recipe.seed,
        "clips": len(clips),
        "seconds_training": round(seconds_training(folder, recipe), 1),
        "seconds_this_call": round(time.monotonic() - started, 1),
        "summary": {k: round(v, 4) for k, v in summary.items()},
        "real": Sampled([], real, 0.0, 0).plain(),
        "rows": {name: sampled.plain() for name, sampled in rows.items()},
        "proof_max_error": proof.max_error,
        # what the seconds a clip were taken with: the student's own sampler, one process
        "sampler": {"dtype": "fp32", "attention": "native", "fold_text_padding": recipe.teacher.fold_text_padding},
        "environment": environment() | {"ranks": processes.size},
    }
    write_json(folder / "results.json", results)
    page = show(recipe, folder, clips, real, variants, results)
    print(table)
    print(f"{folder / 'student'}: exported, proven (latents differ by at most {proof.max_error:.1e})")
    print(f"{page}, {folder / 'comparison.mp4'}, {folder / 'comparison.png'}")


def judge_rows(
    recipe: Distillation,
    student: Model,
    teacher: Model,
    primed: Model | None,
    encoders: Encoders,
    clips: list[Clip],
    processes: Processes,
) -> dict[str, Sampled]:
    """Teacher at full and at one step, student at one and four, on the same clips and the same noise.

    Args:
        primed: the student as phase I left it, to see what phase II is good for; None where one phase was run.
    """
    settings = recipe.evaluate
    full = {"steps": settings.teacher_steps, "guidance_scale": settings.teacher_guidance, "sampler": "euler"}
    evaluations = settings.teacher_steps * (1 if settings.teacher_guidance == 1.0 else 2)
    plans = {
        f"teacher {evaluations} NFE": (teacher, full),
        "teacher 1 NFE": (teacher, {"steps": 1, "sampler": "euler"}),
        "student 1 NFE": (student, {"steps": 1}),
        "student 4 NFE": (student, {"steps": 4}),
    }
    if primed is not None:
        plans["phase I 1 NFE"] = (primed, {"steps": 1})
    return {
        name: sample_clips(
            model.role,
            encoders,
            clips,
            seed=settings.seed,
            batch=settings.batch,
            negative_prompt=recipe.data.negative_prompt,
            label=name,
            processes=processes,
            **options,
        )
        for name, (model, options) in plans.items()
    }


def summarise(rows: dict[str, Sampled]) -> dict[str, float]:
    """The three bars of the job: how near, how lively, how much faster; and how near one step was before it."""
    teacher, student = next(iter(rows.values())), rows["student 1 NFE"]

    def percent(row: str, key: str) -> float:
        mine, theirs = rows[row].scores.values[key], teacher.scores.values[key]
        return 100 * mine / theirs if theirs > 0 else math.nan

    summary = {
        "student_mean_percent_of_teacher": percent("student 1 NFE", "mean"),
        "student_dynamic_degree_percent_of_teacher": percent("student 1 NFE", "dynamic_degree"),
        "denoiser_speedup": teacher.seconds_per_clip / student.seconds_per_clip,
        "undistilled_mean_percent_of_teacher": percent("teacher 1 NFE", "mean"),
    }
    if "phase I 1 NFE" in rows:
        summary["phase_one_mean_percent_of_teacher"] = percent("phase I 1 NFE", "mean")
    return summary


def _scores(scores: SetScores) -> dict[str, float]:
    return {**scores.values, "frechet": scores.frechet}


def variants_of(rows: dict[str, Sampled]) -> list[Variant]:
    """The rows as the report takes them."""
    return [
        Variant(name, s.nfe, [] if name in _TABLE_ONLY else s.frames[:_SHOWN], _scores(s.scores), s.seconds_per_clip)
        for name, s in rows.items()
    ]


def show(
    recipe: Distillation,
    folder: Path,
    clips: list[Clip],
    real: SetScores,
    variants: list[Variant],
    results: dict[str, Any],
) -> Path:
    """comparison.mp4, comparison.png, report.html (whose path comes back)."""
    captions, frames = [c.caption for c in clips[:_SHOWN]], [c.frames for c in clips[:_SHOWN]]
    side_by_side = [v for v in variants if v.frames]
    write_comparison(folder, captions, [("real", frames), *((v.label, v.frames) for v in side_by_side)])
    facts = {
        "Recipe": f"{recipe.name}, seed {recipe.seed}, {results['recipe']}",
        "Training": f"{results['seconds_training'] / 60:.1f} min",
        "This call": f"{results['seconds_this_call'] / 60:.1f} min, encoding and comparison included",
        **{k: str(v) for k, v in results["environment"].items()},
        "Resolved recipe": recipes.dump(recipe),
    }
    return write_report(
        folder,
        title="One step: student beside teacher",
        clips=captions,
        real=frames,
        variants=variants,
        logs={p: read_log(folder / p / "log.jsonl") for p in phases_of(recipe) if (folder / p / "log.jsonl").is_file()},
        facts=facts,
        real_scores=_scores(real),
    )
