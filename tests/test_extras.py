"""Optional packages are touched only when asked for, and their absence is an error with the line that mends it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers.models import attention_dispatch

from vpae import extras
from vpae.errors import UserError

# A finder that finds nothing and records every attempt to import one of the two, so that `try: import` counts even
# where it fails. A mere look-up (`importlib.util.find_spec`, as in diffusers and transformers) loads nothing and does
# not count.
PROBE = """
import importlib.abc, sys

attempts = []

class Recorder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        frame, callers = sys._getframe(1), []
        while frame is not None and "importlib" in frame.f_code.co_filename:
            callers.append(frame.f_code.co_name)
            frame = frame.f_back
        if name.partition(".")[0] in ("xformers", "flash_attn") and "_find_and_load" in callers:
            attempts.append(name)

sys.meta_path.insert(0, Recorder())
"""
IMPORT_ALL_OF_VPAE = """
import importlib, pkgutil, vpae
names = [m.name for m in pkgutil.walk_packages(vpae.__path__, "vpae.")]
assert "vpae.extras" in names and "vpae.data.bounce" in names, names
for name in names:
    importlib.import_module(name)
"""
REPORT = "\nprint('attempts:', *attempts)"


def imports_tried_by(source: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", PROBE + source + REPORT], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.rpartition("attempts:")[2].split()


def test_no_module_of_the_package_imports_a_gpu_kernel():
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    if installed & {"xformers", "flash-attn"}:
        pytest.skip("this is not a CPU-only install: diffusers itself imports the kernels that it finds")
    assert imports_tried_by(IMPORT_ALL_OF_VPAE) == []


def test_the_probe_sees_a_guarded_import_and_no_look_up():
    guarded = "\ntry:\n    import xformers.ops\nexcept ImportError:\n    pass\n"
    look_up = "\nimport importlib.util\nimportlib.util.find_spec('flash_attn')\n"
    assert imports_tried_by(look_up + guarded) == ["xformers"]


@pytest.fixture
def installed(monkeypatch):
    """Makes one package look installed in a version, with the module it would import as (an error to raise, or one)."""

    def install(name: str, version: str, module: types.ModuleType | Exception) -> None:
        package = extras.OPTIONAL_PACKAGES[name]

        def import_module(wanted: str) -> types.ModuleType:
            assert wanted == package.module
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(extras.importlib.metadata, "version", {package.distribution: version}.__getitem__)
        monkeypatch.setattr(extras.importlib, "import_module", import_module)

    return install


@pytest.fixture
def nothing_installed(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.importlib.metadata, "version", version)


@pytest.mark.parametrize("name", extras.OPTIONAL_PACKAGES)
def test_absent_package_names_purpose_and_remedy(nothing_installed, name):
    with pytest.raises(UserError) as caught:
        extras.require(name, "the recipe")
    message = str(caught.value)
    assert message.startswith(f"the recipe needs {extras.OPTIONAL_PACKAGES[name].distribution}, which is not installed")
    assert "pip install" in message and "\n" not in message


def test_flash_attn_line_says_what_its_build_needs(nothing_installed):
    with pytest.raises(UserError, match="--no-build-isolation .*flash-attn.*nvcc"):
        extras.require("flash_attn", "the recipe")


def test_installed_package_is_returned(installed):
    module = types.ModuleType("xformers.ops")
    installed("xformers", "0.0.35", module)
    assert extras.require("xformers", "the recipe") is module


def test_old_package_is_refused(installed):
    installed("sageattention", "1.0.6", types.ModuleType("sageattention"))
    with pytest.raises(UserError, match="2.1.1 or later, found 1.0.6"):
        extras.require("sageattention", "the recipe")


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: _ZN3c10\nmore"), OSError("libcudart.so.12"), RuntimeError("x")]
)
def test_package_built_for_another_torch_is_refused(installed, error):
    installed("flash_attn", "2.8.3", error)
    with pytest.raises(UserError, match="does not import with torch") as caught:
        extras.require("flash_attn", "the recipe")
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_torch_alone_is_enough_for_the_default():
    assert extras.check_attention_backend("native") == "native"


def test_unknown_backend_lists_the_known():
    with pytest.raises(UserError, match="'flash3' is unknown; choose one of native, .*flash_3"):
        extras.check_attention_backend("flash3")


@pytest.mark.parametrize("name", [n for n, b in extras.ATTENTION_BACKENDS.items() if b.package])
def test_backend_without_its_package_is_refused(nothing_installed, name):
    with pytest.raises(UserError, match=f"attention: {name} needs .*pip install"):
        extras.check_attention_backend(name, training=False)


@pytest.mark.parametrize("name", ["sage", "sage_hub", "flash_3"])
def test_backend_without_a_derivative_cannot_train(name):
    with pytest.raises(UserError, match="no backward"):
        extras.check_attention_backend(name)


@pytest.mark.parametrize("name", ["sage", "sage_hub", "flash_3"])
def test_backend_without_a_derivative_can_sample(name, installed, monkeypatch):
    backend = extras.ATTENTION_BACKENDS[name]
    package = extras.OPTIONAL_PACKAGES[backend.package]
    installed(backend.package, package.minimum, types.ModuleType(package.module))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", lambda kernel: None)
    assert extras.check_attention_backend(name, training=False) == backend.dispatcher
    with pytest.raises(UserError, match="bf16 alone, and --precision fp32 makes it"):
        extras.check_attention_backend(name, training=False, fp32="--precision fp32")


@pytest.mark.parametrize("name", [n for n, b in extras.ATTENTION_BACKENDS.items() if b.package])
def test_a_recipe_or_a_command_with_an_absent_kernel_fails_at_start(nothing_installed, name):
    """Before a model is looked for: the folder named here is none."""
    from vpae.commands import evaluate, sample
    from vpae.models import preflight

    asked = types.SimpleNamespace(attention=name, precision="bf16", model=Path("nowhere"), role=None)
    for command in (lambda: sample(asked), lambda: evaluate(asked, None)):
        with pytest.raises(UserError, match=f"attention: {name} needs .*not installed: .*pip install"):
            command()
    teacher = types.SimpleNamespace(attention=name, fold_text_padding=False)
    refused = "needs .*pip install" if extras.ATTENTION_BACKENDS[name].trains else "no backward"
    with pytest.raises(UserError, match=refused):
        preflight(teacher, types.SimpleNamespace(precision="bf16"), None)


@pytest.mark.parametrize("fold", [False, True])
def test_a_loaded_model_samples_through_another_kernel(fold):
    """native_flash takes no mask, so padding is no longer folded; bf16 is what autocast makes of it."""
    from diffusers.models.attention_dispatch import attention_backend
    from helpers import tiny_transformer

    from vpae.backbone import Backbone
    from vpae.conditioning import Condition, first_frame_mask

    torch.manual_seed(0)
    backbone = Backbone(tiny_transformer().eval(), fold_text_padding=fold)
    latents = torch.randn(2, 1, 16, 2, 4, 4)
    condition = Condition(torch.randn(1, 6, 16), torch.randn(1, 5, 16), latents[1], first_frame_mask(2, 4, 4)[None])
    inputs = latents[0], torch.tensor([0.5]), condition
    with attention_backend("native"), torch.no_grad():
        before = backbone(*inputs).velocity
        extras.sample_with(backbone, "native_flash", "fp32")
        processors = {block.attn2.processor._attention_backend for block in backbone.transformer.blocks}
        assert {p.value for p in processors} == {"_native_flash"} and not backbone.fold_text_padding
        torch.testing.assert_close(backbone(*inputs).velocity, before, rtol=0, atol=1e-5)
        extras.sample_with(backbone, "native", "bf16")
        gap = (backbone(*inputs).velocity - before).abs().max() / before.abs().max()
    assert 1e-5 < gap < 0.05


def test_gpu_backend_needs_a_gpu(installed, monkeypatch):
    installed("xformers", "0.0.35", types.ModuleType("xformers.ops"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="NVIDIA GPU alone"):
        extras.check_attention_backend("xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert extras.check_attention_backend("xformers") == "xformers"


def test_a_kernel_of_half_precision_is_refused_where_attention_is_fp32(installed, monkeypatch):
    """On a GPU: there flash-attn raises in the first forward, hours into the run where ST-R1 is what is fp32."""
    installed("flash_attn", "2.8.3", types.ModuleType("flash_attn"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("flash", "native_flash", "native_cudnn"):
        assert extras.check_attention_backend(name)
        with pytest.raises(
            UserError, match=f"attention: {name} computes in bf16 alone, and engine.precision: fp32 makes"
        ):
            extras.check_attention_backend(name, fp32="engine.precision: fp32")
    assert extras.check_attention_backend("native", fp32="engine.precision: fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extras.check_attention_backend("native_flash", fp32="engine.precision: fp32")  # the CPU's takes both


@pytest.fixture
def hub(installed, monkeypatch):
    """``hub(get_kernel)``: the package ``kernels`` with this function, on a machine with a GPU; nothing loaded yet."""
    registry = attention_dispatch._HUB_KERNELS_REGISTRY
    for kernel, config in list(registry.items()):
        monkeypatch.setitem(registry, kernel, dataclasses.replace(config, kernel_fn=None, wrapped_forward_fn=None))
    monkeypatch.setattr(attention_dispatch, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def make(get_kernel):
        module = types.ModuleType("kernels")
        module.get_kernel = get_kernel
        monkeypatch.setitem(sys.modules, "kernels", module)
        installed("kernels", extras.OPTIONAL_PACKAGES["kernels"].minimum, module)

    return make


HUB = [n for n, b in extras.ATTENTION_BACKENDS.items() if b.package == "kernels"]


@pytest.mark.parametrize("name", HUB)
def test_a_kernel_of_the_hub_that_is_not_there_is_refused_with_the_line_that_fetches_it(hub, name, capfd):
    def get_kernel(repository, **options):
        raise FileNotFoundError(f"no local snapshot for {repository}\nand more")

    hub(get_kernel)
    with pytest.raises(UserError, match=f"attention: {name} is the kernel .*no local snapshot for") as caught:
        extras.check_attention_backend(name, training=False)
    config = attention_dispatch._HUB_KERNELS_REGISTRY[
        attention_dispatch.AttentionBackendName(extras.ATTENTION_BACKENDS[name].dispatcher)
    ]
    fetch = f"hf download {config.repo_id} --repo-type kernel --revision v{config.version} --include 'build/*'"
    assert str(caught.value).endswith(f"fetch it with: {fetch}") and "\n" not in str(caught.value)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("name", HUB)
def test_a_kernel_of_the_hub_is_loaded_at_start_and_once(hub, name):
    asked = []

    def get_kernel(repository, **options):
        asked.append((repository, options["version"]))
        function = lambda *_: None  # noqa: E731
        inner = types.SimpleNamespace(_flash_attn_forward=function, _flash_attn_backward=function)
        return types.SimpleNamespace(
            __name__="k", flash_attn_func=function, sageattn=function, flash_attn_interface=inner
        )

    hub(get_kernel)
    dispatcher = extras.ATTENTION_BACKENDS[name].dispatcher
    for _ in range(2):
        assert extras.check_attention_backend(name, training=False) == dispatcher
    config = attention_dispatch._HUB_KERNELS_REGISTRY[attention_dispatch.AttentionBackendName(dispatcher)]
    assert asked == [(config.repo_id, config.version)] and callable(config.kernel_fn)


@pytest.mark.parametrize(("name", "backend"), extras.ATTENTION_BACKENDS.items())
def test_dispatcher_knows_every_backend(name, backend):
    assert backend.dispatcher.lstrip("_") == name
    known = attention_dispatch.AttentionBackendName(backend.dispatcher)
    if backend.package is None:
        # diffusers' own check of what it needs, so that a kernel torch stops shipping shows here.
        attention_dispatch._check_attention_backend_requirements(known)


@pytest.mark.parametrize("name", [n for n, b in extras.ATTENTION_BACKENDS.items() if not b.needs_cuda])
def test_cpu_backends_pass_gradients_through_the_wan_transformer(name):
    from diffusers import WanTransformer3DModel
    from diffusers.models.attention_dispatch import attention_backend

    model = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
    )
    model = model.to(torch.bfloat16)
    with attention_backend("native"):  # on leaving, the process-wide default is what it was: diffusers sets that too
        model.set_attention_backend(extras.check_attention_backend(name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    latents = torch.randn(1, 4, 1, 4, 4, generator=generator, dtype=torch.bfloat16)
    text = torch.randn(1, 3, 8, generator=generator, dtype=torch.bfloat16)
    model(latents, torch.tensor([500]), text, return_dict=False)[0].float().square().sum().backward()
    gradient = model.blocks[0].attn1.to_k.weight.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().sum() > 0
