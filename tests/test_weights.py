"""Networks that are put together without memory, and read from the teacher's files afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from vpae import recipe as recipes
from vpae.data.encoders import load_transformer
from vpae.engine.parallel import Processes
from vpae.errors import UserError
from vpae.models import distillation_cast, fake_score, find_model, materialise
from vpae.recipe import from_plain
from vpae.released import TRANSFORMERS
from vpae.weights import unborn_transformer

RECIPES = Path(__file__).parent.parent / "recipes"
# What fixes names and shapes of the VAE of Wan2.2-TI2V-5B: 48 channels for 4 x 16 x 16 pixels, of which 2 x 2 go into
# channels by rearrangement alone. Mean and std of its latents are in its own config.
VAE_TI2V_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
ALONE = Processes(0, 1, torch.device("cpu"), None)


def count(module):
    """Parameters of a network, those of its adapters left out."""
    return sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)


def _cast(plain, kind="full", dtype="fp32", path=None):
    plain["student"]["kind"] = kind
    plain["teacher"] |= {"dtype": dtype, "path": str(path or plain["teacher"]["path"])}
    plain["engine"]["precision"] = "bf16" if dtype == "bf16" else "fp32"
    recipe = from_plain(plain, "test")
    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
    fake_score(cast, recipe.priming.fake_lora, recipe.seed)
    return cast


def _shards(folder):
    """The pipeline's transformer in files of a few tensors each, as the released ones are."""
    target = folder / "transformer"
    transformer = load_transformer(folder)
    shutil.rmtree(target)
    transformer.save_pretrained(target, max_shard_size="50KB")
    assert len(list(target.glob("*.safetensors"))) > 3
    return target


@pytest.fixture
def teacher(micro_pipeline, tmp_path):
    shutil.copytree(micro_pipeline, tmp_path / "teacher")
    _shards(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_nothing_has_memory_before_it_is_asked_for(micro_recipe):
    cast = _cast(micro_recipe)
    for backbone in cast.backbones:
        tensors = [*backbone.transformer.parameters(), *backbone.transformer.buffers()]
        assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_network_holds_what_diffusers_would_load(micro_recipe, teacher, kind):
    cast, loaded = _cast(micro_recipe, kind, path=teacher), load_transformer(teacher)
    materialise(cast, ALONE)
    for backbone in cast.backbones:
        mine = {n.replace(".base_layer.", "."): p for n, p in backbone.transformer.named_parameters()}
        theirs = dict(loaded.named_parameters())
        assert {n for n in mine if "lora_" not in n} == theirs.keys()
        assert all(torch.equal(mine[name], p) for name, p in theirs.items())
        buffers = dict(backbone.transformer.named_buffers())
        assert buffers.keys() == dict(loaded.named_buffers()).keys() != set()
        assert all(torch.equal(buffers[name], b) for name, b in loaded.named_buffers())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_teacher_in_bf16_leaves_student_and_adapters_in_fp32(micro_recipe, teacher, kind):
    cast, loaded = _cast(micro_recipe, kind, "bf16", teacher), dict(load_transformer(teacher).named_parameters())
    materialise(cast, ALONE)
    base = {n.replace(".base_layer.", "."): p for n, p in cast.teacher.named_parameters()}
    theirs = WanTransformer3DModel.from_pretrained(teacher, subfolder="transformer", torch_dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        assert base[name].dtype == parameter.dtype and torch.equal(base[name], parameter), name
    for name, parameter in base.items():
        assert torch.equal(parameter, loaded[name].to(parameter.dtype)), name
    assert {p.dtype for p in base.values()} == {torch.float32, torch.bfloat16}
    adapters = [p for n, p in cast.backbones[0].transformer.named_parameters() if "lora_" in n]
    assert adapters and all(p.dtype == torch.float32 for p in adapters)
    if kind == "full":
        for role in (cast.student, cast.ema):
            assert all(torch.equal(p, loaded[name]) for name, p in role.named_parameters())


def test_adapters_are_drawn_by_name_and_b_is_zero(micro_recipe):
    drawn = []
    for _ in range(2):
        cast = _cast(micro_recipe, "lora")
        torch.rand(3)  # whatever the global generator stands at
        materialise(cast, ALONE)
        drawn.append({n: p.clone() for n, p in cast.student.named_parameters()})
    for name, parameter in drawn[0].items():
        assert torch.equal(parameter, drawn[1][name])
        if "lora_B" in name:
            assert not parameter.any()
        else:
            bound = parameter.shape[1] ** -0.5  # of nn.Linear's own draw
            assert 0.5 * bound < float(parameter.abs().max()) <= bound
    ema = dict(cast.ema.named_parameters())
    assert all(torch.equal(parameter, ema[name]) for name, parameter in drawn[1].items())
    a = [parameter for name, parameter in drawn[0].items() if "lora_A" in name]
    assert not any(torch.equal(x, y) for i, x in enumerate(a) for y in a[:i] if x.shape == y.shape)


def _drop(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file)


def _stretch(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, file)


def _add(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(file) | {"blocks.99.scale_shift_table": torch.zeros(1)}, file)


def _cut(folder):
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])


def _lose(folder):
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def _intrude(folder):
    save_file({"proof": torch.zeros(1)}, folder / "adapter.safetensors")


def _scribble(folder):
    next(folder.glob("*.index.json")).write_text("{]")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_drop, "is not in its files; its config.json makes it"),
        (_stretch, "its config.json makes it"),
        (_add, "blocks.99.scale_shift_table', which its config.json knows nothing of"),
        (_cut, "cannot load the transformer"),
        (_lose, "is missing from"),
        (_intrude, "adapter.safetensors is none of the files that make up the model"),
        (_scribble, "cannot load the transformer"),
    ],
)
def test_wrong_files_are_told_in_one_line(micro_recipe, teacher, harm, message):
    harm(teacher / "transformer")
    with pytest.raises(UserError) as caught:
        materialise(_cast(micro_recipe, path=teacher), ALONE)
    assert message in str(caught.value) and str(teacher) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Wan2.1-I2V-14B-480P-Diffusers", 16_394_878_784),
        ("Wan2.1-I2V-14B-720P-Diffusers", 16_394_878_784),
        ("Wan2.1-T2V-14B-Diffusers", 14_288_491_584),
        ("Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800),
        ("Wan2.2-TI2V-5B-Diffusers", 4_999_787_712),  # 19,999,150,848 bytes of fp32, as its index says
    ],
)
def test_released_transformers_have_their_released_size(name, parameters):
    assert count(unborn_transformer(TRANSFORMERS[name])) == parameters


def test_the_vae_of_wan22_has_its_released_size():
    """Its file is of 2.82 GB, in fp32."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(**VAE_TI2V_5B, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    assert count(vae) == 704_688_668


def test_a_released_model_that_is_not_here_is_said_how_to_fetch(tmp_path):
    with pytest.raises(UserError, match="hf download Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --local-dir"):
        find_model(str(tmp_path / "Wan2.1-I2V-14B-480P-Diffusers"))


def test_a_config_that_makes_no_transformer_is_told(teacher, micro_recipe):
    config = teacher / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size": "none"}))
    with pytest.raises(UserError, match="does not make a WanTransformer3DModel"):
        _cast(micro_recipe, path=teacher)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("wan21_i2v_14b_480p", 16_394_878_784),
        ("wan21_i2v_14b_720p", 16_394_878_784),
        ("wan21_i2v_14b_480p_lora_1gpu", 16_394_878_784),
        ("wan21_t2v_1_3b", 1_418_996_800),
        ("wan22_ti2v_5b", 4_999_787_712),
    ],
)
def test_recipes_of_released_models_put_all_roles_together_without_memory(name, parameters, tmp_path):
    """The teacher's folder holds its config alone: names, shapes, adapters' targets, taps and head come from it."""
    released = Path(recipes.load(RECIPES / f"{name}.yaml").teacher.path).name
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(TRANSFORMERS[released]))
    recipe = recipes.load(RECIPES / f"{name}.yaml", (f"teacher.path={tmp_path}",))
    cast = distillation_cast(recipe.teacher, recipe.student, recipe.engine, recipe.seed)
    fake = fake_score(cast, recipe.priming.fake_lora, recipe.seed)
    networks = 1 if recipe.student.kind == "lora" else 3
    assert [count(b.transformer) for b in cast.backbones] == [parameters] * networks
    assert all(p.is_meta for role in (cast.student, cast.ema, fake) for p in role.parameters())
    assert {p.dtype for p in cast.student.parameters()} == {torch.float32}
    assert max(recipe.equilibrium.taps) == cast.teacher.backbone.transformer.config.num_layers - 1
