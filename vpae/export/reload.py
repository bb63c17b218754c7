"""``python -m vpae.export.reload FOLDER``: an export read in a process that has seen nothing else, as its user would.

FOLDER holds ``request.json`` and ``request.safetensors``; ``answers.safetensors`` is left beside them. See
:mod:`vpae.export.proof` for who asks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpae.data.encoders import load_pipeline, load_transformer, quiet
from vpae.export.folder import transformer_of
from vpae.export.lora import applied
from vpae.sampling import euler_scheduler

Pipeline = WanImageToVideoPipeline | WanPipeline
Reader = Callable[[Path, Path, torch.dtype], Pipeline]


def _around(base: Path, transformer: WanTransformer3DModel) -> Pipeline:
    """The teacher's pipeline with another transformer and the scheduler that one step needs."""
    pipeline = load_pipeline(base, transformer=False)
    pipeline.register_modules(transformer=transformer, scheduler=euler_scheduler(pipeline.scheduler))
    return pipeline


def read_folder(path: Path, base: Path, dtype: torch.dtype) -> Pipeline:
    """A diffusers folder by ``from_pretrained``."""
    pipeline = load_pipeline(path, transformer=True)
    if dtype != torch.float32:
        with quiet():
            transformer = WanTransformer3DModel.from_pretrained(
                path, subfolder="transformer", use_safetensors=True, local_files_only=True, torch_dtype=dtype
            )
        pipeline.register_modules(transformer=transformer)
    return pipeline


def read_single_file(path: Path, base: Path, dtype: torch.dtype) -> Pipeline:
    """A file in the released layout by ``from_single_file``."""
    with quiet():
        transformer = WanTransformer3DModel.from_single_file(
            str(path), config=str(base), subfolder="transformer", local_files_only=True, torch_dtype=dtype
        )
    return _around(base, transformer)


def read_lora(path: Path, base: Path, dtype: torch.dtype) -> Pipeline:
    """The teacher with a LoRA by ``load_lora_weights``."""
    pipeline = _around(base, load_transformer(base).to(dtype))
    with quiet():
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    return pipeline


def read_lora_whole(path: Path, base: Path, dtype: torch.dtype) -> Pipeline:
    """The teacher with every entry of a LoRA file added to its weights, by ComfyUI's rule."""
    transformer = load_transformer(base)
    weights = applied(transformer.state_dict(), load_file(path))
    return _around(base, transformer_of(transformer.config, weights).to(dtype))


READERS: dict[str, Reader] = {
    "diffusers from_pretrained": read_folder,
    "diffusers from_single_file": read_single_file,
    "diffusers load_lora_weights": read_lora,
    "every entry": read_lora_whole,
}


@torch.no_grad()
def answer(pipeline: Pipeline, request: dict, tensors: dict[str, Tensor]) -> Tensor:
    """Normalised latents ``[B, C, T, h, w]`` of the request's first frames, prompts and noise, in one step."""
    num_frames, height, width = request["shape"]
    pipeline.set_progress_bar_config(disable=True)
    if request["device"] != "cpu":  # umT5-XXL and a 14B transformer in fp32 do not fit one card together
        pipeline.enable_model_cpu_offload(device=request["device"])
    rows = []
    for picture, prompt, noise in zip(tensors["pictures"], request["prompts"], tensors["noise"], strict=True):
        given = {} if isinstance(pipeline, WanPipeline) else {"image": Image.fromarray(picture.numpy())}
        made = pipeline(
            **given,
            prompt=prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=1,
            guidance_scale=1.0,
            latents=noise[None],
            output_type="latent",
        )
        rows.append(made.frames.float().cpu())
    return torch.cat(rows)


def main(folder: Path) -> None:
    """Answer the request in ``folder``."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "request.safetensors")
    path, base = Path(request["path"]), Path(request["base"])
    torch.backends.cudnn.allow_tf32 = False  # the asking side has it so
    answers = {
        f"{reader}, {dtype}": answer(READERS[reader](path, base, getattr(torch, dtype)), request, tensors)
        for reader in request["readers"]
        for dtype in request["dtypes"]
    }
    save_file(answers, folder / "answers.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
