"""VBench-I2V for a student or teacher: list what to make, make it, have VBench judge it, collect the scores.

    python benchmarks/vbench_i2v.py manifest RUN --model STUDENT --info vbench2_i2v_full_info.json --images crop/7-4
    python benchmarks/vbench_i2v.py generate RUN         # or torchrun --nproc-per-node 8 benchmarks/vbench_i2v.py ...
    python benchmarks/vbench_i2v.py evaluate RUN --python ../vbench-env/bin/python
    python benchmarks/vbench_i2v.py collect RUN [OTHER ...]

The list of prompts and the pictures are not in the `vbench` package: both are in vbench2_beta_i2v/ of
github.com/Vchitect/VBench (the pictures by its download_data.sh). That package pins transformers 4.33.2, so it lives in
an environment of its own (``evaluate --python``); its ``camera_motion`` also wants the repository's
vbench2_beta_i2v/third_party copied beside the installed package. Every video is named, seeded and drawn by its place in
the manifest, so that a killed generation goes on and any number of ranks makes the same videos. ``collect`` prints a
table for people, then one JSON document (how SA, TC and FQ come about: benchmarks/vbench_scores.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import write_result
from tqdm import tqdm
from vbench_scores import DIMENSIONS, read_results, scores

from vpae.data.encoders import Encoders
from vpae.data.pictures import open_picture
from vpae.data.videos import fit, write_video
from vpae.draws import Draws, seed_of
from vpae.engine.parallel import Processes, alone, leave, speaks, start
from vpae.errors import UserError
from vpae.files import sha256, write_json
from vpae.loading import load_model
from vpae.roles import Role
from vpae.runs import environment
from vpae.sampling import sample_latents

RATIOS = ("1-1", "8-5", "7-4", "16-9")
_CAMERA = re.compile(r", camera (pans (left|right)|tilts (up|down)|zooms (in|out)|static)$")
_PACKAGE = Path("vbench2_beta_i2v", "data", "crop")  # where VBench looks for the pictures, below its working folder


def read_suite(info: Path, dimensions: list[str]) -> list[dict[str, Any]]:
    """The prompts of the suite that any of ``dimensions`` is judged on, each with its picture's name.

    Raises:
        UserError: the file is not the suite's, or names a prompt that cannot be a file name.
    """
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
        named = {e["prompt_en"]: e["image_name"] for e in entries if "image_name" in e}
        chosen = [e for e in entries if set(dimensions) & set(e["dimension"])]
        rows: dict[str, dict[str, Any]] = {}
        for e in chosen:
            # older lists give camera prompts no picture: it is that of the prompt before the camera's part
            image = named[_base(e["prompt_en"], named)]
            row = rows.setdefault(e["prompt_en"], {"prompt": e["prompt_en"], "dimensions": [], "image": image})
            row["dimensions"] += [d for d in e["dimension"] if d not in row["dimensions"]]
    except FileNotFoundError:
        raise UserError(
            f"no file {info}; it is vbench2_beta_i2v/vbench2_i2v_full_info.json of the repository"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{info} is not VBench-I2V's list of prompts ({type(error).__name__}: {error})") from None
    for row in rows.values():
        for name in (row["prompt"], row["image"]):
            if "/" in name or "\0" in name or len(name.encode()) > 240:
                raise UserError(f"{info}: {name!r} cannot be a file name")
    return list(rows.values())


def _base(prompt: str, named: dict[str, str]) -> str:
    return prompt if prompt in named else _CAMERA.sub("", prompt)


def manifest(arguments: argparse.Namespace) -> None:
    """Write RUN/manifest.json: every video to be made, and all that its pixels depend on."""
    if (arguments.run / "manifest.json").exists():
        raise UserError(f"{arguments.run} holds a manifest already; choose another folder, or go on with generate")
    ratio = arguments.ratio or arguments.images.name
    if ratio not in RATIOS:
        raise UserError(f"--images {arguments.images}: name its ratio by --ratio {', '.join(RATIOS)}")
    model = load_model(arguments.model, arguments.role)
    frames, height, width = model.shape
    size = tuple(arguments.size or (height, width))
    suite, hashes, rows = read_suite(arguments.info, arguments.dimensions), {}, []
    for entry in suite:
        picture = arguments.images / entry["image"]
        if picture not in hashes:
            open_picture(picture)
            hashes[picture] = sha256(picture)
        for i in range(arguments.samples):
            video = f"{entry['prompt']}-{i}.mp4"
            rows.append(entry | {"video": video, "image_sha256": hashes[picture], "position": len(rows)})
    settings = {
        "model": str(arguments.model),
        "role": arguments.role,
        "source": model.source,
        "weights": _weights(model.role),
        "info": str(arguments.info.resolve()),
        "info_sha256": sha256(arguments.info),
        "images": str(arguments.images.resolve()),
        "ratio": ratio,
        "crop": "scaled to fill, cropped about the centre",
        "size": list(size),
        "num_frames": arguments.frames or frames,
        "fps": arguments.fps,
        "steps": arguments.steps,
        "sampler": arguments.sampler,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
        "samples": arguments.samples,
        "dimensions": arguments.dimensions,
        "environment": environment(),
    }
    write_json(arguments.run / "manifest.json", settings | {"videos": rows})
    print(f"{arguments.run / 'manifest.json'}: {len(rows)} videos of {len(suite)} prompts, {len(hashes)} pictures")


def _weights(role: Role) -> str:
    """Hash of the weights that answer, of up to 4,096 elements of each tensor spread over it."""
    digest = hashlib.sha256()
    for name, parameter in role.backbone.transformer.named_parameters():
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // 4096)].float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_manifest(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run} holds no manifest.json; make one with: vbench_i2v.py manifest {run} ...") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'manifest.json'} is damaged: {error}") from None


def generate(run: Path, processes: Processes) -> None:
    """Make the videos that are not there yet; every rank makes its share of the prompts."""
    plan = _read_manifest(run)
    model = load_model(Path(plan["model"]), plan["role"])
    if (weights := _weights(model.role)) != plan["weights"]:
        raise UserError(f"{plan['model']} has weights {weights} now, {plan['weights']} in the manifest; make a new one")
    videos, groups = run / "videos", {}
    for row in plan["videos"]:
        groups.setdefault(row["prompt"], []).append(row)
    mine = [rows for i, rows in enumerate(groups.values()) if i % processes.size == processes.rank]
    todo = [(rows, left) for rows in mine if (left := [r for r in rows if not (videos / r["video"]).is_file()])]
    encoders = Encoders(model.pipeline, model.role.backbone.transformer.device)
    if not encoders.has_pictures:
        raise UserError(f"{model.source} makes clips from text alone; VBench-I2V gives each a first frame")
    null_text = encoders.texts([model.negative_prompt])
    bar = tqdm(total=sum(map(len, mine)), unit="video", disable=not processes.is_main, desc="rank 0's videos")
    bar.update(bar.total - sum(len(left) for _, left in todo))
    for _, left in todo:
        condition = _condition(plan, left[0], encoders).widened(null_text.shape[1])
        for row in left:
            latents = sample_latents(
                model.role,
                condition,
                condition.null(null_text),
                Draws(seed_of(plan["seed"], "vbench"), [row["position"]], encoders.device),
                steps=plan["steps"],
                shape=encoders.latent_shape((plan["num_frames"], *plan["size"])),
                sampler=plan["sampler"],
                guidance_scale=plan["guidance_scale"],
                scheduler=encoders.pipeline.scheduler,
            )
            write_video(videos / row["video"], encoders.decode(latents)[0], plan["fps"], crf=10)  # as VBench's own
            bar.update()
    bar.close()
    processes.barrier()
    if processes.is_main:
        print(f"{videos}: {len(plan['videos'])} videos by {model.source}")


def _condition(plan: dict[str, Any], row: dict[str, Any], encoders: Encoders):
    picture = Path(plan["images"]) / row["image"]
    if not picture.is_file() or sha256(picture) != row["image_sha256"]:
        raise UserError(f"{picture} is not the picture of the manifest any more; fetch it again")
    pixels = fit(open_picture(picture), tuple(plan["size"]))
    return encoders.condition([pixels], [row["prompt"]], plan["num_frames"])


def evaluate(arguments: argparse.Namespace) -> None:
    """Run VBench on the videos, a process a dimension; finished dimensions are not judged again."""
    plan = _read_manifest(arguments.run)
    missing = [r["video"] for r in plan["videos"] if not (arguments.run / "videos" / r["video"]).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(plan['videos'])} videos are not there yet ({missing[0]!r}); generate")
    work = (arguments.run / "vbench").resolve()
    (work / _PACKAGE).mkdir(parents=True, exist_ok=True)
    link = work / _PACKAGE / plan["ratio"]
    if not link.is_symlink():
        link.symlink_to(plan["images"], target_is_directory=True)
    code = (
        "import sys; from vbench2_beta_i2v import VBenchI2V; info, out, videos, name, ratio, device = sys.argv[1:]; "
        "VBenchI2V(device, info, out).evaluate(videos_path=videos, name=name, dimension_list=[name], resolution=ratio)"
    )
    for name in plan["dimensions"]:
        if (work / f"{name}_eval_results.json").is_file():
            print(f"{name}: there already")
            continue
        paths = [plan["info"], str(work), str((arguments.run / "videos").resolve())]
        command = [str(arguments.python), "-P", "-c", code, *paths, name, plan["ratio"], arguments.device]
        if subprocess.run(command, cwd=work).returncode:
            raise UserError(f"VBench failed on {name}, see above; {arguments.python} must have the vbench package")


def collect(arguments: argparse.Namespace) -> None:
    """Table and JSON of one or more runs."""
    rows = {}
    for run in [arguments.run, *arguments.others]:
        plan = _read_manifest(run)
        found, counts = read_results(run / "vbench")
        wanted = {d: sum(d in r["dimensions"] for r in plan["videos"]) for d in DIMENSIONS}
        for name, count in counts.items():
            if count < wanted.get(name, 0):
                raise UserError(f"{run}: {name} was judged on {count} videos, the manifest has {wanted[name]}")
        keys = ("model", "weights", "size", "num_frames", "steps", "guidance_scale", "seed", "samples", "ratio")
        rows[str(run)] = {key: plan[key] for key in keys} | {"dimensions": found, "scores": scores(found)}
    names = list(next(iter(rows.values()))["scores"])
    print(f"{'':<32}" + "".join(f"{name:>16}" for name in names))
    for run, row in rows.items():
        print(f"{run[-32:]:<32}" + "".join(f"{row['scores'][name]:16.2f}" for name in names))
    document = {
        "benchmark": "vbench_i2v",
        "mapping": "SA I2V score, TC quality score, FQ imaging quality",
        "runs": rows,
    }
    if arguments.result:
        write_result(arguments.result, document)
    print(json.dumps(document))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("manifest")
    first.add_argument("run", type=Path)
    first.add_argument("--model", type=Path, required=True, help="diffusers folder or run folder")
    first.add_argument("--role", help="of a run folder; default: ema")
    first.add_argument("--info", type=Path, required=True, help="vbench2_i2v_full_info.json")
    first.add_argument("--images", type=Path, required=True, help="folder of the pictures cropped to one ratio")
    first.add_argument("--ratio", choices=RATIOS, help="default: the name of the folder")
    first.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the model's own")
    first.add_argument("--frames", type=int, help="default: the model's own")
    first.add_argument("--fps", type=float, default=16)
    first.add_argument("--steps", type=int, default=1)
    first.add_argument("--sampler", choices=("renoise", "euler", "euler_even"))
    first.add_argument("--guidance-scale", type=float, default=1.0)
    first.add_argument("--seed", type=int, default=0)
    first.add_argument("--samples", type=int, default=5, help="videos a prompt; VBench's own number is 5")
    first.add_argument("--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS), metavar="DIMENSION")
    second = steps.add_parser("generate")
    second.add_argument("run", type=Path)
    third = steps.add_parser("evaluate")
    third.add_argument("run", type=Path)
    third.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment that has vbench")
    third.add_argument("--device", default="cuda")
    last = steps.add_parser("collect")
    last.add_argument("run", type=Path)
    last.add_argument("others", type=Path, nargs="*", help="more runs for the same table")
    last.add_argument("--result", help="also write benchmarks/results/NAME.json")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        if arguments.step == "generate":
            generate(arguments.run, start() if "RANK" in os.environ else alone())
        else:
            {"manifest": manifest, "evaluate": evaluate, "collect": collect}[arguments.step](arguments)
    except UserError as error:
        if speaks(error):
            print(f"error: {error}", file=sys.stderr)
        leave(2)
    leave(0)


if __name__ == "__main__":
    main()
