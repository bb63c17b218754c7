"""The command line, ``vpae COMMAND`` or ``python -m vpae COMMAND``: arguments, signals, and errors in one line."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from vpae import __version__
from vpae.errors import UserError

SAMPLERS = ("renoise", "euler", "euler_even")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


_count.__name__, _rate.__name__ = "whole number", "number"  # argparse names the type in "invalid ... value"


def _override_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="change single keys of the recipe (values are YAML)",
    )


def _ranks_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--ranks", type=_count, metavar="N", help=f"processes on this machine (default: {default})")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe, see recipes/")
    _override_option(parser)
    _ranks_option(parser, "one; torchrun starts them too, and on several machines")
    parser.add_argument("--output", type=Path, help="run folder (default: outputs/NAME of the recipe)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the run folder")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        choices=range(100),
        metavar="M",
        help="with --ranks: start all ranks again, from the newest checkpoint, when one is lost, at most M times",
    )


def _kernel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attention", default="native", help="kernel: native (default), flash, flash_3, xformers, sage, ..."
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the denoiser; most other kernels need bf16"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vpae", description="One-step distillation of image-to-video diffusion.")
    parser.add_argument("--version", action="version", version=f"vpae {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    finetune = commands.add_parser("finetune", help="train a VAE or a teacher (flow matching)")
    _run_options(finetune)

    cache = commands.add_parser("cache", help="encode a recipe's clips once, or check a finished cache of them")
    cache.add_argument("recipe", type=Path)
    _override_option(cache)
    _ranks_option(cache, "one; torchrun starts them too, and on several machines")
    cache.add_argument(
        "--check", action="store_true", help="verify a finished cache; contact sheet and statistics into its folder"
    )

    preflight = commands.add_parser(
        "preflight", help="look at GPUs, versions, network, disks and limits of all ranks before a run"
    )
    preflight.add_argument("recipe", type=Path, nargs="?", help="also ask whether this recipe can run there")
    _override_option(preflight)
    _ranks_option(preflight, "one; torchrun starts them too, and on several machines")
    preflight.add_argument("--output", type=Path, default=Path("outputs"), help="where the run will be written")
    preflight.add_argument(
        "--timeout", type=_rate, default=120.0, metavar="SECONDS", help="that ranks wait for one that hangs"
    )

    plan = commands.add_parser("plan", help="memory, time and disk of a distillation, before a weight is touched")
    plan.add_argument("recipe", type=Path, help="YAML recipe, see recipes/")
    _override_option(plan)
    plan.add_argument("--gpus", type=_count, default=8, metavar="N", help="of all machines together (default: 8)")
    plan.add_argument("--machines", type=_count, default=1, metavar="N", help="they are spread over (default: 1)")
    plan.add_argument(
        "--gpu-memory", type=_rate, default=80.0, metavar="GIB", help="of each, as nvidia-smi says it (default: 80)"
    )
    plan.add_argument("--in-use", action="store_true", help="it is what a process on the GPU finds free, not all of it")
    plan.add_argument("--tflops", type=_rate, default=400.0, help="achieved a GPU, for the times (default: 400)")
    plan.add_argument("--whole", action="store_true", help="simulate every block of a deep network (takes minutes)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan here too")

    distill = commands.add_parser("distill", help="teacher to one-step student: V-PAE's phases, or a peer")
    _run_options(distill)
    distill.add_argument("--no-plan-check", action="store_true", help="begin even where the plan says it cannot fit")

    sample = commands.add_parser("sample", help="images + prompts, or prompts alone, to mp4 and a contact sheet")
    sample.add_argument("model", type=Path, help="a diffusers folder, or a run folder of vpae distill/finetune")
    sample.add_argument(
        "--role", help="of a run folder: student, ema, teacher, fake_score, judge (default: ema, which ships)"
    )
    sample.add_argument("--image", type=Path, action="append", default=[], help="first frame (repeatable)")
    sample.add_argument(
        "--prompt", action="append", default=[], help="caption of the image, in the same order; or alone"
    )
    sample.add_argument("--bounce", type=_count, metavar="N", help="first frames and captions of N Bounce test clips")
    sample.add_argument("--steps", type=_count, default=1, help="denoising steps (1 and 4: the student's own rule)")
    sample.add_argument(
        "--sampler", choices=SAMPLERS, help="default: renoise at 1 and 4 steps without guidance, else euler"
    )
    sample.add_argument("--guidance-scale", type=float, default=1.0)
    sample.add_argument("--negative-prompt", help="default: the one that its recipe trained with")
    sample.add_argument("--num-frames", type=_count, help="4k + 1; default: as its recipe says, else 17")
    sample.add_argument(
        "--size",
        type=_count,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="images are scaled and centre-cropped to it; default: as the model's recipe says, else the image's own",
    )
    _kernel_options(sample)
    sample.add_argument("--fps", type=_rate, default=8.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--output", type=Path, default=Path("outputs/samples"))

    evaluate = commands.add_parser("evaluate", help="judge a model on Bounce test clips, from the pixels")
    evaluate.add_argument("model", type=Path, help="a diffusers folder, or a run folder of vpae distill/finetune")
    evaluate.add_argument("--role", help="of a run folder: student, ema (default), teacher, fake_score or judge")
    evaluate.add_argument("--split", default="test", choices=("validation", "test"))
    evaluate.add_argument("--clips", type=_count, default=64)
    evaluate.add_argument("--batch", type=_count, default=16)
    evaluate.add_argument("--steps", type=_count, default=1)
    evaluate.add_argument("--sampler", choices=SAMPLERS)
    evaluate.add_argument("--guidance-scale", type=float, default=1.0)
    _kernel_options(evaluate)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--output", type=Path, help="write scores.json and a contact sheet here")

    export = commands.add_parser("export", help="a run's student as a proven diffusers folder or single file")
    export.add_argument("run", type=Path, help="run folder of vpae distill, finished or not")
    export.add_argument("--role", default="ema", choices=("ema", "student"))
    export.add_argument(
        "--phase", help="of the run: priming, equilibrium, or a peer's (default: the last one with a checkpoint)"
    )
    export.add_argument(
        "--format",
        default="diffusers",
        choices=("diffusers", "wan", "lora"),
        help="a diffusers folder; one file in the released layout (ComfyUI, LightX2V); a LoRA on the teacher",
    )
    export.add_argument("--rank", type=_count, help="of the LoRA of a full student (default: 64)")
    export.add_argument(
        "--dtype",
        default="fp32",
        choices=("fp32", "bf16", "fp16", "fp8"),
        help="of the stored weights; fp8: e4m3 for the blocks' matrices, bf16 for the rest",
    )
    export.add_argument("--output", type=Path, help="default: a name in RUN that says what it is")

    bounce = commands.add_parser("bounce", help="write clips of the simulated world as mp4 with captions and states")
    bounce.add_argument("--split", default="train", choices=("train", "validation", "test"))
    bounce.add_argument("--count", type=_count, default=16)
    bounce.add_argument("--start", type=int, default=0)
    bounce.add_argument("--pairs", action="store_true", help="pairs of a plausible and an impossible version instead")
    bounce.add_argument("--output", type=Path, default=Path("outputs/bounce"))

    quickstart = commands.add_parser("quickstart", help="the main job: distil the embedded teacher, compare, report")
    quickstart.add_argument("--recipe", type=Path, help="default: recipes/quickstart.yaml")
    _override_option(quickstart)
    quickstart.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    _ranks_option(quickstart, "one a GPU, or 2 on CPU, if they can share the batch")
    quickstart.add_argument("--fresh", action="store_true", help="start over instead of going on with an earlier run")
    return parser


def _dispatch(arguments: argparse.Namespace) -> bool:
    """Run a command; imports are here so that --help and mistakes answer at once. False: interrupted by a signal."""
    from vpae.engine.parallel import start

    if arguments.command in ("finetune", "distill", "quickstart"):
        return _train(arguments)
    if arguments.command == "preflight":
        return _preflight(arguments)
    if arguments.command == "cache":
        from vpae.commands import cache
        from vpae.engine.launch import launch
        from vpae.engine.parallel import leave

        if "RANK" not in os.environ and (arguments.ranks or 1) > 1:
            leave(launch(arguments.ranks, sys.argv[1:]))
        return cache(arguments, start())
    if arguments.command != "evaluate" and int(os.environ.get("RANK", "0")) > 0:
        return True  # these need one process
    if arguments.command == "sample":
        from vpae.commands import sample

        return sample(arguments)
    if arguments.command == "evaluate":
        from vpae.commands import evaluate

        return evaluate(arguments, start())
    if arguments.command == "plan":
        from vpae.plan.command import plan

        return plan(arguments)
    if arguments.command == "export":
        from vpae.commands import export

        return export(arguments)
    from vpae.commands import bounce

    return bounce(arguments)


def _preflight(arguments: argparse.Namespace) -> bool:
    from vpae import recipe as recipes
    from vpae.engine.launch import launch
    from vpae.engine.parallel import leave
    from vpae.preflight import preflight

    recipe = recipes.load(arguments.recipe, tuple(arguments.overrides)) if arguments.recipe else None
    if "RANK" not in os.environ and (arguments.ranks or 1) > 1:
        leave(launch(arguments.ranks, sys.argv[1:]))
    if not preflight(recipe, arguments.output, arguments.timeout):
        time.sleep(0 if int(os.environ.get("RANK", "0")) == 0 else _HUSH)  # rank 0 prints the report
        leave(2)
    return True


def _train(arguments: argparse.Namespace) -> bool:
    """The commands that train, here or on as many ranks of this machine as were asked for."""
    from vpae import recipe as recipes
    from vpae.engine import restarts
    from vpae.engine.launch import default_ranks, launch
    from vpae.engine.parallel import leave, start
    from vpae.quickstart import default_recipe, quickstart

    path = arguments.recipe or default_recipe()
    recipe = recipes.load(path, tuple(arguments.overrides))
    if "RANK" not in os.environ:
        otherwise = default_ranks(recipe.engine.global_batch) if arguments.command == "quickstart" else 1
        ranks = arguments.ranks or otherwise
        max_restarts = getattr(arguments, "max_restarts", 0)
        if ranks > 1 or max_restarts:
            leave(launch(ranks, sys.argv[1:], max_restarts))
    if arguments.command == "quickstart":
        return quickstart(recipe, arguments.output, arguments.fresh, start())
    folder = arguments.output or Path("outputs") / recipe.name
    processes = start()
    resume = processes.agree([arguments.resume or restarts.claimed()])[0]
    checkpoints = (*folder.glob("checkpoints/*/state.json"), *folder.glob("*/checkpoints/*/state.json"))
    if resume and processes.is_main and not checkpoints:
        print(f"nothing to resume in {folder} yet: the run begins from the start", flush=True)
    if arguments.command == "finetune":
        from vpae.finetune import finetune

        return finetune(recipe, folder, resume, processes)
    from vpae.distill import distill

    if arguments.no_plan_check:
        return distill(recipe, folder, resume, processes)
    from vpae.plan.check import check_room

    return distill(recipe, folder, resume, processes, check=check_room)


def _calm_libraries() -> None:
    """Advice of libraries to their own developers has no place among our lines."""
    for text in (
        "Cannot dispatch to fused",
        "torch.distributed is disabled",
        ".*Attention backends are an experimental.*",
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # torchao, which diffusers imports where it is installed, tells of kernels that no optimiser needs
    for library in ("diffusers", "transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _leave_at_a_known_mistake() -> None:
    """Where torchrun starts this rank again though the user must mend something first: leave with the same words.

    They are said again by the last attempt alone, where they are the last thing that is read.
    """
    from vpae.engine import restarts

    words = restarts.mistake()
    if words is not None:
        if words and restarts.is_last_attempt():
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"error: {words}", file=sys.stderr, flush=True)
            else:
                time.sleep(_HUSH)
        sys.exit(2)


# seconds: the launcher ends all ranks as soon as one has left, so the silent ones let the one that speaks go first
_HUSH = 3.0
# what a file system says when it will not: the user's to mend
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_REFUSED += (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)


def main() -> None:
    """Exit status: 0 done or interrupted with everything saved, 2 a mistake of the user, 1 a fault of ours."""
    parser = build_parser()
    arguments = parser.parse_args()
    _calm_libraries()
    _leave_at_a_known_mistake()
    try:
        from vpae.engine import restarts, signals
        from vpae.engine.launch import leave_with_the_launcher
        from vpae.engine.parallel import leave, lost_a_rank, speaks
    except ModuleNotFoundError as error:
        mend = "install with ./launch/install.sh, then: source .venv/bin/activate"
        print(f"error: {sys.executable} has no {error.name}; {mend}", file=sys.stderr)
        sys.exit(2)

    # inside the training loop a signal drops the turn at hand and saves; elsewhere the disk is whole at any moment
    signals.interrupt_on_signals()
    leave_with_the_launcher()
    saved = "everything is saved"

    def tell(error: Exception, words: str) -> NoReturn:
        signals.ignore()
        restarts.note_mistake(words if speaks(error) else "")
        if speaks(error):
            print(f"error: {words}", file=sys.stderr, flush=True)
        else:
            time.sleep(_HUSH)
        leave(2)

    try:
        finished = _dispatch(arguments)
    except KeyboardInterrupt:
        finished = False
    except UserError as error:
        tell(error, str(error))
    except BrokenPipeError:
        leave(1)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "free some space" if full else "allow it or choose another place"
        again = " with --resume" if arguments.command in ("finetune", "distill") else ""
        tell(error, f"{where}{error.strerror}; {what} and give the command again{again}")
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        if not signals.received():
            reason = str(error).strip().partition("\n")[0]
            print(f"rank {os.environ.get('RANK', '0')} lost another rank ({reason})", file=sys.stderr, flush=True)
            leave(1)
        finished, saved = False, "the last checkpoint is whole"
    signals.ignore()
    if not finished and arguments.command not in ("finetune", "distill", "quickstart"):
        leave(130)
    if not finished and int(os.environ.get("RANK", "0")) == 0:
        line = shlex.join(a for a in sys.argv[1:] if a not in ("--resume", "--fresh"))
        more = "" if arguments.command == "quickstart" else " --resume"
        print(f"interrupted, {saved}; go on with: vpae {line}{more}", flush=True)
        restarts.note_saved()
    leave(0, together=finished)


if __name__ == "__main__":
    main()
