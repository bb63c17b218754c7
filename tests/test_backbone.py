from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers import transformer_wan
from helpers import tiny_transformer
from PIL import Image
from torch import nn
from torch.nn import functional

from vpae import folding
from vpae.backbone import Backbone, default_taps
from vpae.conditioning import TEXT_LENGTH, Condition, first_frame_mask
from vpae.data.encoders import Encoders, load_pipeline, load_transformer
from vpae.draws import Draws, generator_of
from vpae.extras import ATTENTION_BACKENDS
from vpae.recipe import Lora
from vpae.roles import Role, add_lora, full_copy
from vpae.sampling import sample_latents

BATCH, GRID = 2, (2, 2, 3)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(fold=False, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = tiny_transformer(**changes)
    return Backbone(transformer.requires_grad_(False), fold_text_padding=fold)


def condition(rows=6, seed=1):
    text = normal(BATCH, rows, 16, seed=seed)
    text[1, rows // 2 :] = 0
    mask = first_frame_mask(2, 4, 6).expand(BATCH, -1, -1, -1, -1)
    return Condition(text, normal(BATCH, 5, 16, seed=seed + 1), normal(BATCH, 16, 2, 4, 6, seed=seed + 2), mask)


X_T, T = normal(BATCH, 16, 2, 4, 6, seed=9), torch.tensor([0.3, 1.0])


@pytest.mark.parametrize("fold", [True, False])
def test_attention_sees_one_dtype_where_norms_leave_fp32(monkeypatch, fold):
    """As under CUDA's autocast, which the CPU's is made like here: flash-attn takes no q, k and v of two dtypes."""

    def in_fp32(norm, x):
        return functional.rms_norm(x.float(), norm.normalized_shape, norm.weight, norm.eps)

    def seen_by(attention):
        def call(query, key, value, **options):
            seen.append({query.dtype, key.dtype, value.dtype})
            return attention(query, key, value, **options)

        return call

    seen = []
    monkeypatch.setattr(nn.RMSNorm, "forward", in_fp32)
    for module in (transformer_wan, folding):
        monkeypatch.setattr(module, "dispatch_attention_fn", seen_by(module.dispatch_attention_fn))
    twin = copy.deepcopy(make(fold))
    with torch.autocast("cpu", torch.bfloat16):
        twin(X_T, T, condition())
    assert len(seen) == 4 * 3 and all(dtypes == {torch.bfloat16} for dtypes in seen)  # blocks x (self, text, image)


class TestTaps:
    def hooked(self, backbone):
        """Outputs of all blocks in a plain forward of the transformer, and its velocity."""
        outputs = {}
        hooks = [
            block.register_forward_hook(lambda m, a, out, k=k: outputs.__setitem__(k, out))
            for k, block in enumerate(backbone.transformer.blocks)
        ]
        velocity = backbone(X_T, T, condition()).velocity
        for hook in hooks:
            hook.remove()
        return outputs, velocity

    @pytest.mark.parametrize("stop", [False, True])
    @pytest.mark.parametrize("taps", [(1,), (1, 2, 3), (2, 0)])
    def test_features_are_what_the_blocks_put_out(self, taps, stop):
        backbone = make()
        outputs, velocity = self.hooked(backbone)
        prediction = backbone(X_T, T, condition(), taps, stop)
        assert prediction.grid == GRID
        assert [f.shape for f in prediction.features] == [(BATCH, 12, 24)] * len(taps)
        assert all(torch.equal(f, outputs[k]) for f, k in zip(prediction.features, taps, strict=True))
        if stop:
            assert prediction.velocity is None
        else:
            assert torch.equal(prediction.velocity, velocity)

    def test_early_exit_runs_no_later_block_and_leaves_the_backbone_whole(self):
        backbone = make()
        ran = []
        for k, block in enumerate(backbone.transformer.blocks):
            block.register_forward_pre_hook(lambda m, a, k=k: ran.append(k))
        backbone(X_T, T, condition(), (1,), True)
        assert ran == [0, 1]
        ran.clear()
        assert backbone(X_T, T, condition()).velocity is not None
        assert ran == [0, 1, 2, 3]
        assert not any(block._forward_hooks for block in backbone.transformer.blocks)

    def test_blocks_come_back_after_an_error(self):
        backbone = make()
        with pytest.raises(RuntimeError):
            backbone(X_T[:, :3], T, condition(), (1,), True)
        assert len(backbone.transformer.blocks) == 4 and not backbone.transformer.blocks[1]._forward_hooks
        assert backbone(X_T, T, condition()).velocity is not None

    @pytest.mark.parametrize("taps", [(4,), (-1,), (0, 7)])
    def test_taps_that_do_not_exist_are_refused(self, taps):
        with pytest.raises(ValueError, match="do not fit a backbone of 4 blocks"):
            make()(X_T, T, condition(), taps)

    def test_gradient_of_a_feature_reaches_input_and_earlier_blocks_alone(self):
        backbone = make()
        backbone.transformer.requires_grad_(True)
        x_t = X_T.clone().requires_grad_()
        backbone(x_t, T, condition(), (1,), True).features[0].sum().backward()
        touched = [any(p.grad is not None for p in block.parameters()) for block in backbone.transformer.blocks]
        assert touched == [True, True, False, False] and x_t.grad.abs().sum() > 0

    def test_default_taps(self):
        assert default_taps(40) == (19, 29, 39)
        assert default_taps(30) == (14, 21, 29)
        assert default_taps(4) == (1, 2, 3)


class TestFolding:
    """One row of padding in place of hundreds, against diffusers' own 512-row computation."""

    def gradients(self, backbone, given):
        """Of every weight and input, in fp64: sums over 512 equal rows round badly in fp32."""
        backbone.transformer.double().requires_grad_(True)
        x_t, text = X_T.clone().requires_grad_(), given.text.clone().requires_grad_()
        velocity = backbone(x_t, T, Condition(text, given.image, given.latent, given.mask)).velocity
        (velocity * normal(*velocity.shape, seed=5)).sum().backward()
        return {n: p.grad for n, p in backbone.transformer.named_parameters()} | {"x_t": x_t.grad, "text": text.grad}

    @pytest.mark.parametrize("rows", [1, 2, 6, 40, 511])
    def test_equals_the_stock_computation(self, rows):
        given, stock, folded = condition(rows), make(), make(fold=True)
        torch.testing.assert_close(folded(X_T, T, given).velocity, stock(X_T, T, given).velocity, atol=1e-5, rtol=1e-5)
        ours, theirs = self.gradients(folded, given), self.gradients(stock, given)
        for name, gradient in theirs.items():
            assert gradient.abs().max() > 1e-6, name
            assert (ours[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name

    def test_keeps_the_backend_that_was_chosen_before(self):
        transformer = make().transformer
        with attention_backend("native"):
            transformer.set_attention_backend("_native_math")
        folded = Backbone(transformer, fold_text_padding=True)
        chosen = {block.attn2.processor._attention_backend for block in folded.transformer.blocks}
        assert chosen == {AttentionBackendName._NATIVE_MATH}

    @pytest.mark.parametrize("backend", ["native", "native_math", "flex"])
    def test_backends_that_take_masks_agree(self, backend):
        """flex and xformers read a mask of two dimensions as one of (batch, keys)."""
        wanted = make(fold=True)(X_T, T, condition()).velocity
        transformer = make().transformer
        with attention_backend("native"), torch.no_grad():
            transformer.set_attention_backend(ATTENTION_BACKENDS[backend].dispatcher)
            folded = Backbone(transformer, fold_text_padding=True)
            torch.testing.assert_close(folded(X_T, T, condition()).velocity, wanted, atol=1e-5, rtol=1e-5)

    def test_a_prompt_without_padding_is_not_folded(self):
        given = condition(TEXT_LENGTH)
        wanted = make()(X_T, T, given).velocity
        torch.testing.assert_close(make(fold=True)(X_T, T, given).velocity, wanted)

    def test_does_not_depend_on_the_default_backend_of_the_process(self):
        folded = make(fold=True)
        wanted = folded(X_T, T, condition()).velocity
        for block in folded.transformer.blocks:
            block.attn1.processor._attention_backend = "native"  # attn2, which folds, is left without a choice
        with attention_backend("_native_flash"):  # knows no masks
            assert torch.equal(folded(X_T, T, condition()).velocity, wanted)

    def test_equals_it_in_a_text_to_video_model_and_under_lora(self):
        given = Condition(condition().text)
        pair = []
        for fold in (False, True):
            backbone = make(fold, image_dim=None, added_kv_proj_dim=None, in_channels=16)
            role = add_lora(backbone, "student", Lora(2, 2.0, ("to_q", "to_k", "to_v")), 0)
            awaken(role)
            pair.append(role.velocity(X_T, T, given))
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)

    def test_computes_the_padding_once(self):
        rows = []
        for backbone in (make(), make(fold=True)):
            hook = lambda m, args: rows.append(args[0].shape[1])  # noqa: E731
            backbone.transformer.blocks[0].attn2.to_k.register_forward_pre_hook(hook)
            backbone(X_T, T, condition(6))
        assert rows == [512, 7]

    def test_called_by_others_the_transformer_is_the_stock_one(self):
        """As a pipeline does it, with 512 rows; also after a forward of the backbone."""
        given, stock, folded = condition(), make(), make(fold=True)
        folded(X_T, T, given)
        arguments = (given.pack(X_T), 1000 * T, nn.functional.pad(given.text, (0, 0, 0, 506)), given.image)
        assert torch.equal(folded.transformer(*arguments).sample, stock.transformer(*arguments).sample)


def test_inputs_and_samples_are_those_of_the_pipeline(micro_pipeline):
    """Captured from a real WanImageToVideoPipeline call: packing, mask, tokens, time scale, guidance, Euler grid."""
    picture = (normal(32, 32, 3).sigmoid() * 255).to(torch.uint8).numpy()
    prompt, negative = "A red ball moves left. Gravity pulls down.", "no balls"
    encoders = Encoders(micro_pipeline)
    given = encoders.condition([picture], [prompt], 5)
    null = given.null(encoders.texts([negative]))
    draws = Draws(0, [3])

    def captured(transformer):
        calls = []
        transformer.register_forward_pre_hook(lambda m, a, kw: calls.append(kw), with_kwargs=True)
        return calls

    pipeline = load_pipeline(micro_pipeline, transformer=True)
    theirs = captured(pipeline.transformer)
    sample = pipeline(
        Image.fromarray(picture),
        prompt,
        negative,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=draws.normal_like("sample noise", given.latent),
        output_type="latent",
    ).frames

    backbone = Backbone(load_transformer(micro_pipeline))
    ours = captured(backbone.transformer)
    options = dict(steps=3, guidance_scale=3.0, scheduler=pipeline.scheduler)
    latents = sample_latents(Role("teacher", backbone), given, null, draws, **options)

    assert len(theirs) == len(ours) == 6
    for they, we in zip(theirs, ours, strict=True):
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image"):
            torch.testing.assert_close(we[name], they[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(ours[0]["encoder_hidden_states"], ours[1]["encoder_hidden_states"])
    torch.testing.assert_close(latents, sample, atol=1e-5, rtol=1e-5)


LORA = Lora(2, 4.0, ("to_q", "to_v", "ffn.net.2"))


def awaken(role, seed=0):
    """Adapter weights that are not zero."""
    with torch.no_grad():
        for name, p in role.named_parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator_of(seed, role.name, name)))


def adapters(checkpointing, fold=True):
    backbone = make(fold)
    names = ("student", "ema", "fake_score")
    roles = {name: add_lora(backbone, name, LORA, 0) for name in names}
    for role in roles.values():
        awaken(role)
    if checkpointing:
        backbone.enable_checkpointing()
    return roles | {"teacher": Role("teacher", backbone)}


def fake_then_teacher(roles):
    """Phase I, fake turn, with the teacher asked between forward and backward."""
    loss = roles["fake_score"].velocity(X_T, T, condition()).square().mean()
    with torch.no_grad():
        roles["teacher"].velocity(X_T, T, condition())
        roles["student"].velocity(X_T, T, condition())
    return loss


def student_through_ema(roles):
    """Phase II, student turn: one graph through two adapters of one base."""
    x0_hat = roles["student"].x0(X_T, torch.ones(BATCH), condition())
    features = roles["ema"](0.5 * x0_hat + 0.5, T, condition(), (1, 3), True).features
    return sum((f * normal(*f.shape, seed=k)).sum() for k, f in enumerate(features))


def student_through_base(roles):
    """The same with a frozen judge, whose answer is the base without any adapter."""
    x0_hat = roles["student"].x0(X_T, torch.ones(BATCH), condition())
    features = roles["teacher"](0.5 * x0_hat + 0.5, T, condition(), (1, 3), True).features
    return sum((f * normal(*f.shape, seed=k)).sum() for k, f in enumerate(features))


def two_prompts(roles):
    """Texts of different lengths in one graph."""
    return (roles["student"].velocity(X_T, T, condition(6)) * roles["ema"].velocity(X_T, T, condition(3))).sum()


SCENES = [(fake_then_teacher, "fake_score"), (student_through_ema, "student"), (student_through_base, "student")]
SCENES.append((two_prompts, "student"))


class TestAdapters:
    def gradients(self, roles, scene, player):
        for name, role in roles.items():
            role.requires_grad_(name == player)
        scene(roles).backward()
        found = {name: p.grad for name, p in roles[player].named_parameters()}
        others = [p for name, role in roles.items() if name != player for p in role.parameters()]
        assert all(p.grad is None for p in others)
        assert all(g is not None and g.abs().sum() > 0 for g in found.values())
        return found

    @pytest.mark.parametrize("scene, player", SCENES, ids=lambda x: getattr(x, "__name__", x))
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_roles_interleaved_on_one_base_equal_networks_of_their_own(self, scene, player, checkpointing):
        shared = adapters(checkpointing)
        apart = {name: copy.deepcopy(role) for name, role in adapters(False, fold=False).items()}
        ours, reference = self.gradients(shared, scene, player), self.gradients(apart, scene, player)
        for name, gradient in reference.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    def test_checkpointing_recomputes_the_blocks(self):
        counts = []
        for checkpointing in (False, True):
            roles, ran = adapters(checkpointing), []
            roles["student"].requires_grad_(True)
            for block in roles["student"].backbone.transformer.blocks:
                block.register_forward_pre_hook(lambda m, a, ran=ran: ran.append(m))
            student_through_ema(roles).backward()
            counts.append(len(ran))
        assert counts == [8, 16]

    def test_a_full_copy_of_a_checkpointing_backbone_recomputes_its_own_blocks(self):
        teacher = Role("teacher", make(fold=True))
        teacher.backbone.enable_checkpointing()
        student = full_copy(teacher, "student")
        fake = add_lora(teacher.backbone, "fake_score", LORA, 0)
        awaken(fake)
        student.requires_grad_(True)
        with fake.backbone.answering_as("fake_score"):  # the copy must not ask its original who answers
            loss = student.velocity(X_T, T, condition()).square().mean()
        loss.backward()
        plain = Role("plain", make())
        plain.requires_grad_(True)
        plain.velocity(X_T, T, condition()).square().mean().backward()
        expected = dict(plain.named_parameters())
        for name, p in student.named_parameters():
            torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-5, rtol=1e-4)

    def test_each_adapter_answers_as_itself_and_the_base_as_none(self):
        roles = adapters(False)
        said = {name: role.velocity(X_T, T, condition()) for name, role in roles.items()}
        assert torch.equal(said["teacher"], make(fold=True)(X_T, T, condition()).velocity)
        names = list(said)
        for i, one in enumerate(names):
            assert torch.equal(roles[one].velocity(X_T, T, condition()), said[one])
            assert all(not torch.equal(said[one], said[other]) for other in names[i + 1 :])

    def test_switching_changes_no_requires_grad_and_is_undone_by_an_error(self):
        roles = adapters(False)
        roles["student"].requires_grad_(True)
        backbone = roles["student"].backbone
        before = {name: p.requires_grad for name, p in backbone.transformer.named_parameters()}
        layers = [m for m in backbone.transformer.modules() if hasattr(m, "_active_adapter")]
        state = [copy.copy((m._active_adapter, m._disable_adapters)) for m in layers]
        with pytest.raises(KeyError), backbone.answering_as("ema"), backbone.answering_as(None):
            assert {n: p.requires_grad for n, p in backbone.transformer.named_parameters()} == before
            raise KeyError
        assert [(m._active_adapter, m._disable_adapters) for m in layers] == state and backbone.adapter is None

    def test_an_adapter_that_is_not_there_is_an_error(self):
        with pytest.raises(RuntimeError, match="carries none"):
            make()(X_T, T, condition(), adapter="student")
        with pytest.raises(RuntimeError, match="'judge' is asked for, but this transformer carries student, ema"):
            adapters(False)["student"].backbone(X_T, T, condition(), adapter="judge")


def test_time_input_is_a_thousand_times_t_in_fp32_whatever_the_weights():
    backbone = make()
    backbone.transformer.to(torch.bfloat16)
    seen = []
    backbone.transformer.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["timestep"]), with_kwargs=True)
    velocity = backbone(X_T, torch.tensor([0.3333, 1.0]), condition()).velocity
    assert seen[0].tolist() == pytest.approx([333.3, 1000.0]) and velocity.dtype == torch.float32
    assert isinstance(backbone, nn.Module)
