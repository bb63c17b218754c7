"""From request to frames, stage by stage: the teacher at 100 NFE, the student at 1 and 4, and what the device could do.

    python benchmarks/latency.py                                 # the shipped tiny teacher's shapes, also on a CPU
    python benchmarks/latency.py --shape 480p --random-weights   # Wan2.1-I2V-14B's shapes on one GPU, without weights
    python benchmarks/latency.py --shape 480p --random-weights --layers 1 --size 64 96 --frames 5   # its widths, CPU
    torchrun --nproc-per-node 8 benchmarks/latency.py --shape 480p --random-weights --layers 1   # decode, all ranks

A request is a first frame and a prompt, batch 1. One network answers as teacher and as student, since time does not
depend on the weights' values; "as stored" or "random" says whose they are. Teacher, students, products and copies take
turns, round by round, and ratios are medians over rounds; a teacher too slow to be run whole (``--teacher-timed``) is
timed for some of its steps, multiplied, and marked so. Stages are told apart by device events on a GPU. FLOPs of the
denoiser are counted analytically, those of the other stages by torch's FlopCounterMode. Writes
benchmarks/results/latency_SHAPE_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from decode import banded_rows, decode_rows
from measuring import (
    Clock,
    Row,
    ceiling_rows,
    ceilings,
    count_flops,
    interleaved,
    paired_ratio,
    peak_bytes,
    reset_peak,
    spread,
    transformer_flops,
)
from subjects import DTYPES, SHAPES, Subject, build, text_rows
from torch import Tensor

from vpae.conditioning import Condition, first_frame_mask
from vpae.draws import Draws
from vpae.engine.parallel import Processes, leave, start
from vpae.errors import UserError
from vpae.extras import ATTENTION_BACKENDS, check_attention_backend
from vpae.flow import euler_sample
from vpae.models import compile_blocks
from vpae.sampling import euler_sigmas, sample_latents

STAGES = ("text", "image", "condition", "denoise", "decode")
PAIRS = 100  # of sampler and bare forward on a CPU: their difference is far smaller than the machine's unrest


class Request:
    """One request, in stages.

    Args:
        steps: of the sampler.
        guided: whether each step asks the network twice, with the prompt and without.
        timed_steps: how many of them are taken.
    """

    def __init__(self, subject: Subject, steps: int, guided: bool, timed_steps: int | None = None) -> None:
        self.subject, self.steps, self.guided = subject, steps, guided
        self.timed_steps = timed_steps or steps
        self.nfe = steps * (2 if guided else 1)
        self.draws = Draws(0, [0], subject.device)
        self.marks: list[list[Any]] = []
        self.said: dict[str, Any] = {}

    @property
    def extrapolation(self) -> float:
        return self.steps / self.timed_steps

    def stages(self) -> list[tuple[str, Callable[[], Any]]]:
        """Name and work of each stage; each leaves its result in ``said`` for the next."""
        encoders, (picture, prompt) = self.subject.encoders, self.subject.request
        frames, said = self.subject.shape.frames, self.said

        def text() -> None:
            said["text"] = encoders.texts([prompt, ""] if self.guided else [prompt])

        def image() -> None:
            said["image"] = encoders.images([picture])

        def condition() -> None:
            latent = encoders.first_frame([picture], frames)
            stride = encoders.vae.config.scale_factor_temporal
            mask = first_frame_mask(*latent.shape[2:], stride=stride).to(latent.device)[None]
            said["condition"] = Condition(said["text"][:1], said["image"], latent, mask)

        def denoise() -> None:
            said["latents"] = self.denoise(said["condition"], said["text"][1:] if self.guided else None)

        def decode() -> None:
            said["frames"] = encoders.decode(said["latents"])

        return list(zip(STAGES, (text, image, condition, denoise, decode), strict=True))

    @torch.no_grad()
    def denoise(self, condition: Condition, null_text: Tensor | None) -> Tensor:
        """The sampler of the product; of a teacher that is not run whole, the same loop over its first steps."""
        subject = self.subject
        scheduler = subject.encoders.pipeline.scheduler
        if not self.guided:
            return sample_latents(subject.role, condition, None, self.draws, steps=self.steps, scheduler=scheduler)
        null, scale = condition.null(null_text), subject.shape.guidance
        if self.timed_steps == self.steps:
            options = {"steps": self.steps, "guidance_scale": scale, "scheduler": scheduler}
            return sample_latents(subject.role, condition, null, self.draws, **options)
        sigmas = euler_sigmas(scheduler, self.steps)[: self.timed_steps + 1]
        noise = self.draws.normal_like("sample noise", condition.latent)
        return euler_sample(lambda x, t: subject.role.guided_velocity(x, t, condition, null, scale), noise, sigmas)

    def __call__(self, clock: Clock) -> None:
        """The whole request, its moments noted."""
        marks = [clock.mark()]
        for _, work in self.stages():
            work()
            marks.append(clock.mark())
        self.marks.append(marks)

    def flops(self) -> dict[str, float]:
        """Of each stage once."""
        counted = {name: count_flops(work) for name, work in self.stages() if name != "denoise"}
        one = transformer_flops(
            self.subject.transformer.config,
            self.subject.tokens,
            text_rows(self.subject, self.said["text"].shape[1]),
            self.said["image"].shape[1],
        )
        return {name: counted.get(name, one * self.nfe) for name in STAGES}

    def seconds(self, clock: Clock) -> dict[str, list[float]]:
        """Of each stage in each round, ``denoise`` as if all steps had been taken, and ``request`` their sum."""
        rounds = [[clock.between(a, b) for a, b in zip(m[:-1], m[1:], strict=True)] for m in self.marks]
        found = {name: [r[i] for r in rounds] for i, name in enumerate(STAGES)}
        found["denoise"] = [s * self.extrapolation for s in found["denoise"]]
        found["request"] = [sum(values) for values in zip(*found.values(), strict=True)]
        return found


def _share(work: float, seconds: list[float], ceiling: list[float]) -> list[float]:
    """Of the ceiling of the same round."""
    return [work / s / c for s, c in zip(seconds, ceiling, strict=True)]


def measure_requests(
    subject: Subject, requests: dict[str, Request], clock: Clock, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All requests and the device's ceilings, in the same rounds."""
    work, peaks = {}, {}
    for name, request in requests.items():
        full, request.timed_steps = request.timed_steps, min(request.timed_steps, 2 if request.guided else 4)
        reset_peak(clock.device)
        request(clock)  # kernels are chosen, memory is taken; a few steps are enough for that
        peaks[name] = peak_bytes(clock.device)
        request.timed_steps = full
        work[name] = request.flops()
        request.marks.clear()
    limits = ceiling_rows(subject.device, DTYPES[arguments.precision])
    rows = [row for row, _ in limits.values()]
    rows += [Row(name, lambda r=request: r(clock)) for name, request in requests.items()]
    seconds = interleaved(rows, arguments.repeats, clock, warmup=0)
    found = ceilings({name: seconds[name] for name in limits}, limits)
    per_round = found.pop("per_round")
    weights = sum(p.nbytes for p in subject.transformer.parameters())
    models, timed = {}, {}
    for name, request in requests.items():
        timed[name] = request.seconds(clock)
        denoise = timed[name]["denoise"]
        models[name] = {
            "nfe": request.nfe,
            "steps": request.steps,
            "steps_timed": request.timed_steps,
            "stages": {stage: spread(timed[name][stage]) for stage in STAGES},
            "denoise_per_step": spread([s / request.steps for s in denoise]),
            "dit_only": spread(denoise),
            "request_to_frames": spread(timed[name]["request"]),
            "peak_bytes": peaks[name],
            "flops": work[name],
            "share_of_matmul_ceiling": {
                stage: spread(
                    [work[name][stage] / s / c for s, c in zip(timed[name][stage], per_round["matmul"], strict=True)]
                )
                for stage in STAGES
            },
            # every forward reads all weights at least once
            "denoise_share_of_copy_ceiling": spread(_share(weights * request.nfe, denoise, per_round["copy"])),
        }
    teacher = next(iter(requests))
    ratios = {
        name: {
            "dit_only": paired_ratio(timed[teacher]["denoise"], timed[name]["denoise"]),
            "request_to_frames": paired_ratio(timed[teacher]["request"], timed[name]["request"]),
        }
        for name in requests
        if name != teacher
    }
    return {"ceilings": found, "models": models, "teacher_over_student": ratios}


def _bare(subject: Subject, condition: Condition) -> Callable[[], Any]:
    """The transformer by itself, given the very tensors that the one-step sampler gives it."""
    given: dict[str, Any] = {}
    backbone = subject.role.backbone
    hook = backbone.transformer.register_forward_pre_hook(lambda m, a, kw: given.update(kw), with_kwargs=True)
    sample_latents(subject.role, condition, None, Draws(0, [0], subject.device), steps=1)
    hook.remove()
    rows = given["encoder_hidden_states"].shape[1] if text_rows(subject, condition.text.shape[1]) != 512 else 0

    @torch.no_grad()
    def forward() -> Any:
        return backbone.transformer(**given)

    def inside() -> Any:
        with backbone._reading(rows):
            return forward()

    return inside


def overhead(subject: Subject, condition: Condition, clock: Clock, pairs: int) -> dict[str, Any]:
    """What our one-step sampler takes beyond a bare forward, over many short alternating pairs.

    On a CPU also by the processor time of this process alone, which others' work disturbs less than the wall clock.
    """
    bare, draws = _bare(subject, condition), Draws(0, [0], subject.device)

    def sampler() -> Any:
        return sample_latents(subject.role, condition, None, draws, steps=1)

    used: dict[str, list[float]] = {"bare": [], "sampler": []}

    def noted(name: str, run: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            before = time.process_time()
            run()
            used[name].append(time.process_time() - before)

        return call

    rows = [Row("bare", noted("bare", bare)), Row("sampler", noted("sampler", sampler))]
    seconds = interleaved(rows, pairs, clock)
    found = {
        "bare_forward": spread(seconds["bare"]),
        "sampler_over_bare": paired_ratio(seconds["sampler"], seconds["bare"]),
    }
    if not clock.cuda:
        found["sampler_over_bare_processor_time"] = paired_ratio(used["sampler"][1:], used["bare"][1:])
    return found


def forward_rows(
    subject: Subject, condition: Condition, clock: Clock, arguments
) -> tuple[dict[str, Any], dict[str, str]]:
    """One denoiser forward under each attention kernel, with and without folded text, eager and compiled."""
    backbone, chosen, left_out = subject.role.backbone, [], {}
    noise = Draws(0, [0], subject.device).normal_like("sample noise", condition.latent)
    t = noise.new_ones(1)

    @torch.no_grad()
    def forward() -> Any:
        return subject.role.velocity(noise, t, condition)

    def attend(dispatcher: str, fold: bool, compiled: bool) -> None:
        backbone.transformer.set_attention_backend(dispatcher)
        backbone.fold_text_padding = fold
        for block, call in zip(backbone.transformer.blocks, calls, strict=True):
            block._compiled_call_impl = call if compiled else None

    calls = [None] * len(backbone.transformer.blocks)
    if arguments.compile:
        compile_blocks([backbone])
        calls = [block._compiled_call_impl for block in backbone.transformer.blocks]
    for name in ATTENTION_BACKENDS:
        for fold in (True, False) if subject.fold else (False,):
            label = f"{name}, folded text" if fold else name
            exact = "--precision fp32" if arguments.precision == "fp32" else ""
            try:
                dispatcher = check_attention_backend(name, training=False, masks=fold, fp32=exact)
            except UserError as error:
                left_out[label] = str(error)
                continue
            chosen.append((label, dispatcher, fold, False))
            if arguments.compile and name == "native":
                chosen.append((f"{label}, compiled blocks", dispatcher, fold, True))
    rows, firsts, peaks = [], {}, {}
    for label, *choice in chosen:
        row = Row(label, forward, lambda c=choice: attend(*c))
        row.prepare()
        reset_peak(clock.device)
        try:
            firsts[label] = clock.time(forward)
        except Exception as error:  # kernels and compilers fail in many ways; the row says so
            left_out[label] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        peaks[label] = peak_bytes(clock.device)
        rows.append(row)
    seconds = interleaved(rows, arguments.repeats, clock)
    attend(ATTENTION_BACKENDS[arguments.attention].dispatcher, subject.fold, False)
    base = seconds[next(iter(seconds))]
    return {
        label: {
            "seconds": spread(values),
            "speedup": paired_ratio(base, values),
            "peak_bytes": peaks[label],
            "first_call_seconds": round(firsts[label], 3),
        }
        for label, values in seconds.items()
    }, left_out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", help="a diffusers folder; default: the shape's own")
    parser.add_argument("--random-weights", action="store_true", help="true shapes without weights")
    parser.add_argument("--layers", type=int, help="with --random-weights: so many blocks (and encoder layers)")
    parser.add_argument("--frames", type=int, help="pixel frames in place of the shape's")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--precision", choices=DTYPES, help="of the denoiser and, in bf16, of text and image encoder")
    parser.add_argument("--attention", choices=ATTENTION_BACKENDS, default="native", help="of the requests")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--teacher-steps", type=int, default=50, help="twice as many NFE")
    parser.add_argument("--teacher-timed", type=int, help="steps that are really taken; default: all at tiny, else 2")
    parser.add_argument("--pairs", type=int, help=f"sampler against bare forward; default: {PAIRS} on a CPU, else 20")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="rows of torch.compile; default: on a GPU"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON document")
    return parser.parse_args(argv)


def settle(arguments: argparse.Namespace, device: torch.device) -> None:
    """Defaults that depend on device and shape.

    Raises:
        UserError: options that contradict each other, or a kernel that cannot run here.
    """
    cuda = device.type == "cuda"
    arguments.precision = arguments.precision or ("bf16" if cuda else "fp32")
    arguments.compile = cuda if arguments.compile is None else arguments.compile
    arguments.pairs = arguments.pairs or (20 if cuda else PAIRS)
    whole = arguments.shape == "tiny"
    arguments.teacher_timed = arguments.teacher_timed or (arguments.teacher_steps if whole else 2)
    if not 1 <= arguments.teacher_timed <= arguments.teacher_steps:
        raise UserError(f"--teacher-timed {arguments.teacher_timed} is not within the {arguments.teacher_steps} steps")
    exact = "--precision fp32" if arguments.precision == "fp32" else ""
    check_attention_backend(arguments.attention, training=False, masks=whole, fp32=exact)


def show(document: dict[str, Any]) -> None:
    """The table for people."""

    def ms(values: dict[str, float]) -> str:
        return f"{1e3 * values['median']:11.2f} [{1e3 * values['q25']:.2f}, {1e3 * values['q75']:.2f}]"

    limits = document.get("ceilings")
    if limits:
        product, copied = limits["matmul_flops_per_s"]["median"] / 1e12, limits["copy_bytes_per_s"]["median"] / 1e9
        print(f"ceilings measured in the same rounds: {limits['matmul']} {product:.3f} TFLOP/s, copy {copied:.1f} GB/s")
        for name, model in document["models"].items():
            part = "" if model["steps_timed"] == model["steps"] else f", {model['steps_timed']} steps timed, multiplied"
            print(f"\n{name} ({model['nfe']} NFE{part}), peak {model['peak_bytes'] / 2**20:.0f} MiB")
            for stage in STAGES:
                share = 100 * model["share_of_matmul_ceiling"][stage]["median"]
                print(f"  {stage:<22}{ms(model['stages'][stage])} ms, {share:.1f} % of the matmul ceiling")
            for label in ("denoise_per_step", "dit_only", "request_to_frames"):
                print(f"  {label:<22}{ms(model[label])} ms")
        for name, ratio in document["teacher_over_student"].items():
            dit, whole = ratio["dit_only"]["median"], ratio["request_to_frames"]["median"]
            print(f"\nteacher over {name}: {dit:.1f} x DiT only, {whole:.1f} x request to frames", end="")
        found = document["sampler"]
        print(f"\n\none-step sampler over a bare forward: {found['sampler_over_bare']['median']:.4f}", end="")
        if "sampler_over_bare_processor_time" in found:
            print(f" (by processor time {found['sampler_over_bare_processor_time']['median']:.4f})", end="")
        print()
    for section, title in (("forward", "one denoiser forward"), ("decode", "VAE decode")):
        if section not in document["rows"]:
            continue
        print(f"\n{title:<42}{'ms':>11}  [quartiles]      speed   peak MiB   error against fp32")
        for name, row in document["rows"][section].items():
            error = row.get("error")
            told = f"   max {error['max']:.1e}, rms {error['rms']:.1e}" if error else ""
            told = f"{row['speedup']['median']:.2f} x{row['peak_bytes'] / 2**20:10.0f}{told}"
            print(f"{name:<42}{ms(row['seconds'])}   {told}")
    if document["left_out"]:
        names = sorted({name.partition(",")[0] for name in document["left_out"]})
        print(f"\nleft out, wholly or in part (why: in the document): {', '.join(names)}")


def run(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Measure everything that the command line asks for."""
    settle(arguments, processes.device)
    subject = build(arguments, processes.device)
    clock = Clock(processes.device)
    document: dict[str, Any] = {
        "benchmark": "latency",
        "command": "latency.py " + " ".join(sys.argv[1:]),
        "shape": arguments.shape,
        "frames": subject.shape.frames,
        "size": list(subject.shape.size),
        "tokens": subject.tokens,
        "weights": subject.weights,
        "blocks": subject.transformer.config.num_layers,
        "precision": arguments.precision,
        "encoders": "umT5 and CLIP in the denoiser's precision, VAE fp32 with torch's own defaults (TF32 on a GPU)",
        "attention": arguments.attention,
        "folded_text": subject.fold,
        "batch": 1,
        "ranks": processes.size,
        "flops_counted": "denoiser analytically, other stages by torch's FlopCounterMode",
    }
    subject.transformer.set_attention_backend(ATTENTION_BACKENDS[arguments.attention].dispatcher)
    if processes.size > 1:
        latents = torch.randn(1, *subject.latent_shape, generator=torch.Generator().manual_seed(0)).to(processes.device)
        rows = banded_rows(subject.encoders.vae, latents, clock, arguments.repeats, processes)
        return document | {"rows": {"decode": rows}, "left_out": {}}
    one = Request(subject, 1, False)
    steps, timed = arguments.teacher_steps, arguments.teacher_timed
    requests = {"teacher": Request(subject, steps, True, timed), "student, 1 step": one}
    requests["student, 4 steps"] = Request(subject, 4, False)
    document |= measure_requests(subject, requests, clock, arguments)
    condition, latents = one.said["condition"], one.said["latents"]
    document["sampler"] = overhead(subject, condition, clock, arguments.pairs)
    forwards, absent = forward_rows(subject, condition, clock, arguments)
    mean, std = subject.encoders._moments()
    decodes, failed = decode_rows(
        subject.encoders.vae, latents.float() * std + mean, clock, arguments.repeats, arguments.compile
    )
    return document | {"rows": {"forward": forwards, "decode": decodes}, "left_out": absent | failed}


def main(argv: list[str] | None = None) -> int:
    arguments, processes = parse(argv), start()
    started = time.perf_counter()
    try:
        document = run(arguments, processes) | {"seconds_in_all": round(time.perf_counter() - started, 1)}
    except UserError as error:
        if processes.is_main:
            print(f"error: {error}", file=sys.stderr)
        return 1
    if processes.is_main:
        show(document)
        name = f"latency_{arguments.shape}_{processes.device.type}"
        if processes.size > 1:
            name += f"_decode_{processes.size}ranks"
        target = write_result(name, document, arguments.output)
        print(json.dumps(json.loads(target.read_text())))
    return 0


if __name__ == "__main__":
    leave(main())
