"""Optional packages and attention kernels: imported only when a recipe names them, and never replaced by another.

The native attention of torch is the default and needs nothing. Every other kernel is a choice of the recipe, so its
absence is an error before the first weight is read, not a slower or different run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

from vpae.errors import UserError


@dataclass(frozen=True)
class OptionalPackage:
    """How to find an optional package, and the line that installs it."""

    distribution: str
    module: str
    minimum: str
    install: str


@dataclass(frozen=True)
class AttentionBackend:
    """One attention kernel as recipes name it.

    Attributes:
        dispatcher: Its name in ``diffusers.models.attention_dispatch.AttentionBackendName``.
        package: The key in ``OPTIONAL_PACKAGES`` that it needs, or None where torch itself brings it.
        trains: Whether gradients pass through it.
        needs_cuda: Whether it runs on NVIDIA GPUs alone.
        masks: Whether it takes a mask (which folded text padding needs).
        half_only: Whether on a GPU it takes fp16 and bf16 alone.
    """

    dispatcher: str
    package: str | None = None
    trains: bool = True
    needs_cuda: bool = True
    masks: bool = True
    half_only: bool = False


_COMPILED = "pip install --no-build-isolation"

OPTIONAL_PACKAGES: dict[str, OptionalPackage] = {
    "xformers": OptionalPackage("xformers", "xformers.ops", "0.0.35", "pip install 'xformers>=0.0.35'"),
    "flash_attn": OptionalPackage(
        "flash-attn", "flash_attn", "2.8", f"{_COMPILED} 'flash-attn>=2.8' (it compiles: nvcc must be on PATH)"
    ),
    "flash_attn_3": OptionalPackage(
        "flash_attn_3",
        "flash_attn_interface",
        "3.0.0b1",
        f"{_COMPILED} 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper' "
        "(it compiles: nvcc must be on PATH)",
    ),
    # The index holds only 1.x of this one, which lacks the kernels that diffusers calls.
    "sageattention": OptionalPackage(
        "sageattention",
        "sageattention",
        "2.1.1",
        f"{_COMPILED} 'git+https://github.com/thu-ml/SageAttention' (it compiles: nvcc must be on PATH)",
    ),
    "torchao": OptionalPackage("torchao", "torchao.optim", "0.18", "pip install 'torchao>=0.18,<0.19'"),
    # Older ones ask the network which version a kernel has, though it lies in the cache.
    "kernels": OptionalPackage("kernels", "kernels", "0.17", "pip install 'kernels>=0.17'"),
    # It pins transformers 4.33.2 and numpy<2, which no diffusers that knows Wan2.1 can live with.
    "vbench": OptionalPackage(
        "vbench",
        "vbench",
        "0.1.5",
        "python3 -m venv .venv-vbench && .venv-vbench/bin/pip install 'vbench>=0.1.5' "
        "(an environment of its own: it pins transformers 4.33.2 and numpy<2)",
    ),
}

ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "native": AttentionBackend("native", needs_cuda=False),
    "native_math": AttentionBackend("_native_math", needs_cuda=False),
    "native_flash": AttentionBackend("_native_flash", needs_cuda=False, masks=False, half_only=True),
    "native_efficient": AttentionBackend("_native_efficient"),
    "native_cudnn": AttentionBackend("_native_cudnn", half_only=True),
    # Runs on a CPU too, but has no backward there.
    "flex": AttentionBackend("flex"),
    "xformers": AttentionBackend("xformers", "xformers"),
    "flash": AttentionBackend("flash", "flash_attn", masks=False, half_only=True),
    "flash_hub": AttentionBackend("flash_hub", "kernels", masks=False, half_only=True),
    "flash_3_hub": AttentionBackend("_flash_3_hub", "kernels", masks=False, half_only=True),
    # diffusers wraps this one in an operator without a derivative; sage has quantised products and none either.
    "flash_3": AttentionBackend("_flash_3", "flash_attn_3", trains=False, masks=False, half_only=True),
    "sage": AttentionBackend("sage", "sageattention", trains=False, masks=False, half_only=True),
    "sage_hub": AttentionBackend("sage_hub", "kernels", trains=False, masks=False, half_only=True),
}


def require(name: str, purpose: str) -> ModuleType:
    """Imports an optional package now that something needs it.

    Args:
        name: A key of ``OPTIONAL_PACKAGES``.
        purpose: What asked for it, as the user would recognise it, such as ``"attention: flash"``.

    Returns:
        The module that the package is used through (``xformers.ops`` for xformers).

    Raises:
        UserError: The package is absent, too old, or does not import; the message holds the line that mends it.
    """
    package = OPTIONAL_PACKAGES[name]
    try:
        version = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{purpose} needs {package.distribution}, which is not installed: {package.install}") from None
    if Version(version) < Version(package.minimum):
        raise UserError(
            f"{purpose} needs {package.distribution} {package.minimum} or later, found {version}: {package.install}"
        )
    try:
        return importlib.import_module(package.module)
    except (ImportError, OSError, RuntimeError) as error:
        # A kernel that was compiled for another torch fails in any of these ways.
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{purpose} needs {package.distribution}, and the installed {version} does not import with torch "
            f"{torch.__version__} ({reason}); remove it, then {package.install}"
        ) from error


def check_attention_backend(name: str, *, training: bool = True, masks: bool = False, fp32: str = "") -> str:
    """Makes sure that an attention kernel can run here, before any weight is read.

    Args:
        name: The recipe's name of it, a key of ``ATTENTION_BACKENDS``.
        training: Whether gradients must pass. Some kernels have no derivative.
        masks: Whether it must take a mask.
        fp32: What makes it compute in fp32, as the user would recognise it; empty where nothing does.

    Returns:
        The name to hand to diffusers' ``set_attention_backend``.

    Raises:
        UserError: The name is unknown, the kernel cannot train or take fp32, its package is missing or broken, or
            there is no GPU, or a kernel of the Hub is not in its cache (and, with ``HF_HUB_OFFLINE=0``, cannot be
            fetched).
    """
    if name not in ATTENTION_BACKENDS:
        raise UserError(f"attention: {name!r} is unknown; choose one of {', '.join(ATTENTION_BACKENDS)}")
    backend = ATTENTION_BACKENDS[name]
    if training and not backend.trains:
        raise UserError(
            f"attention: {name} has no backward and can only sample; to train choose native, flash or xformers"
        )
    if masks and not backend.masks:
        raise UserError(
            f"attention: {name} takes no mask, which fold_text_padding: true needs; set it to false, or choose native"
        )
    if fp32 and backend.half_only and torch.cuda.is_available():
        raise UserError(
            f"attention: {name} computes in bf16 alone, and {fp32} makes it compute in fp32; choose native, or bf16"
        )
    if backend.package is not None:
        require(backend.package, f"attention: {name}")
    if backend.needs_cuda and not torch.cuda.is_available():
        raise UserError(
            f"attention: {name} runs on an NVIDIA GPU alone and torch {torch.__version__} sees none here; choose native"
        )
    if backend.package == "kernels":
        _resolve_of_hub(name, backend.dispatcher)
    return backend.dispatcher


def _resolve_of_hub(name: str, dispatcher: str) -> None:
    """Load a kernel of the Hugging Face Hub as ``set_attention_backend`` will, which comes after clips are encoded.

    Raises:
        UserError: it is not in the cache, or does not load.
    """
    from diffusers.models import attention_dispatch as dispatch

    kernel, level = dispatch.AttentionBackendName(dispatcher), dispatch.logger.level
    wanted = dispatch._HUB_KERNELS_REGISTRY[kernel]
    dispatch.logger.setLevel(logging.CRITICAL)  # it would say the same beside our line
    try:
        dispatch._maybe_download_kernel_for_backend(kernel)
    except Exception as error:  # of network, cache, signature, loader and kernel; all mean that it cannot be used
        revision = wanted.revision or f"v{wanted.version}"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"attention: {name} is the kernel {wanted.repo_id} of the Hub, which does not load here ({reason}); fetch "
            f"it with: hf download {wanted.repo_id} --repo-type kernel --revision {revision} --include 'build/*'"
        ) from error
    finally:
        dispatch.logger.setLevel(level)


def sample_with(backbone: Any, name: str, precision: str) -> None:
    """Let a loaded backbone answer through an attention kernel that was checked, and in bf16 where that is asked for.

    Kernels without masks read the padding rows of the text one by one; the numbers are the same.

    Args:
        backbone: a :class:`vpae.backbone.Backbone`, from now on for sampling alone.
        name: a key of ``ATTENTION_BACKENDS``.
        precision: ``fp32`` or ``bf16`` (matrix products over the weights as they are).
    """
    kernel, transformer = ATTENTION_BACKENDS[name], backbone.transformer
    transformer.set_attention_backend(kernel.dispatcher)
    backbone.fold_text_padding = backbone.fold_text_padding and kernel.masks
    if precision == "bf16":
        backbone.forward = torch.autocast(transformer.device.type, torch.bfloat16)(backbone.forward)
