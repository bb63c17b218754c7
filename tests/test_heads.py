from __future__ import annotations

import pytest
import torch
from torch import nn

from vpae.draws import generator_of
from vpae.heads import Attention, build_head

KINDS = ["convolutional", "cross_attention", "semantic"]
GRID, TAPS, WIDTH, IMAGE, TEXT = (2, 4, 6), 3, 24, 12, 10
TOKENS, BATCH = 48, 3


def make(kind, seed=0, **changes):
    sizes = dict(feature_dim=WIDTH, num_taps=TAPS, image_dim=IMAGE, text_dim=TEXT, width=16, num_heads=2, queries=2)
    return build_head(kind, **(sizes | changes), generator=generator_of(seed, "head"))


def awake(kind):
    """A head whose last layer is not zero."""
    head = make(kind)
    for layer in last_layers(head):
        nn.init.normal_(layer.weight, generator=generator_of("last"))
    return head


def last_layers(head):
    return [s[-1] for s in head.stacks] if hasattr(head, "stacks") else [head.to_logit[-1]]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs():
    text = normal(BATCH, 7, TEXT, seed=20)
    keep = torch.arange(7) < torch.tensor([[7], [4], [2]])
    return dict(
        features=[normal(BATCH, TOKENS, WIDTH, seed=k) for k in range(TAPS)],
        grid=GRID,
        image=normal(BATCH, 5, IMAGE, seed=10),
        text=text * keep[..., None],
        text_keep=keep,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_finite_logit_a_video(kind, inputs):
    logits = awake(kind)(**inputs)
    assert logits.shape == (BATCH,) and logits.isfinite().all() and logits.std() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_first_logits_are_exactly_zero_and_the_first_step_is_not(kind, inputs):
    head = make(kind)
    logits = head(**inputs)
    assert (logits == 0).all()
    (logits * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in last_layers(head))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter_and_every_tap(kind, inputs):
    head = awake(kind)
    features = [f.requires_grad_() for f in inputs["features"]]
    (head(**inputs) * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    dead = [name for name, p in head.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []
    assert all((f.grad.abs().sum((1, 2)) > 0).all() for f in features)


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_depends_on_its_own_video_alone(kind, inputs):
    head, whole = awake(kind), awake(kind)(**inputs)
    alone = head([f[1:2] for f in inputs["features"]], GRID, *(inputs[k][1:2] for k in ("image", "text", "text_keep")))
    torch.testing.assert_close(alone, whole[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tap", range(TAPS))
def test_logits_depend_on_each_tap(kind, tap, inputs):
    head = awake(kind)
    before = head(**inputs)
    inputs["features"][tap] = normal(BATCH, TOKENS, WIDTH, seed=99)
    assert ((head(**inputs) - before).abs() > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_semantic_head_reads_image_and_text(kind, inputs):
    head = awake(kind)
    before = head(**inputs)
    for name in ("image", "text"):
        change = normal(*inputs[name].shape, seed=98)
        change = change * inputs["text_keep"][..., None] if name == "text" else change
        moved = (head(**(inputs | {name: change})) - before).abs()
        assert (moved > 1e-4).all() if kind == "semantic" else (moved == 0).all()


def test_semantic_head_is_blind_to_what_stands_in_padding_rows(inputs):
    head = awake("semantic")
    before = head(**inputs)
    garbage = torch.where(inputs["text_keep"][..., None], inputs["text"], normal(BATCH, 7, TEXT, seed=97) * 100)
    assert torch.equal(head(**(inputs | {"text": garbage})), before)


def test_semantic_head_is_blind_to_the_length_of_padding(inputs):
    head = awake("semantic")
    text = nn.functional.pad(inputs["text"], (0, 0, 0, 9))
    keep = nn.functional.pad(inputs["text_keep"], (0, 9))
    longer = head(**(inputs | {"text": text, "text_keep": keep}))
    torch.testing.assert_close(longer, head(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_tokens(kind, inputs):
    """Attention reads a set (the judge's features carry the positions); the convolution reads the grid."""
    head = awake(kind)
    before = head(**inputs)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    inputs["features"] = [f[:, order] for f in inputs["features"]]
    after = head(**inputs)
    if kind == "convolutional":
        assert ((after - before).abs() > 1e-4).all()
    else:
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_convolution_sees_tokens_in_frame_height_width_order():
    head = make("convolutional", num_taps=1)
    seen = []
    head.stacks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = normal(1, TOKENS, WIDTH)
    head([tokens], GRID, None, None, None)
    volume = nn.functional.layer_norm(tokens, (WIDTH,))
    for frame, row, column in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 3, 5)):
        index = (frame * GRID[1] + row) * GRID[2] + column
        assert torch.equal(seen[0][0, :, frame, row, column], volume[0, index])


def test_a_grid_that_does_not_fit_the_tokens_is_an_error(inputs):
    with pytest.raises(RuntimeError):
        make("convolutional")(**(inputs | {"grid": (2, 4, 5)}))


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_taps_must_fit(kind, inputs):
    with pytest.raises(ValueError):
        make(kind)(**(inputs | {"features": inputs["features"][:2]}))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_the_features_does_not_matter(kind, inputs):
    head = awake(kind)
    before = head(**inputs)
    inputs["features"] = [50 * f for f in inputs["features"]]
    torch.testing.assert_close(head(**inputs), before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_from_the_generator_alone(kind):
    state = torch.get_rng_state()
    same, other = make(kind).state_dict(), make(kind, seed=1).state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        again = make(kind).state_dict()
    assert all(torch.equal(same[k], again[k]) for k in same)
    assert any(not torch.equal(same[k], other[k]) for k in same)
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_is_softmax_attention_with_a_residual():
    attention = Attention(8, 6, 2)
    x, context = normal(2, 3, 8), normal(2, 5, 6, seed=1)
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    q, (k, v) = attention.to_q(attention.norm_x(x)), attention.to_kv(attention.norm_context(context)).chunk(2, -1)
    parts = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = (q[..., head] @ k[..., head].mT / 2).masked_fill(~keep[:, None], -torch.inf)
        parts.append(scores.softmax(-1) @ v[..., head])
    expected = x + attention.to_out(torch.cat(parts, -1))
    torch.testing.assert_close(attention(x, context, keep), expected)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="convolutional, cross_attention or semantic"):
        make("conv")


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_keeps_less_and_changes_no_gradient(kind, inputs):
    found, kept = [], []
    for checkpointing in (False, True):
        head, taps, sizes = awake(kind), [f.clone().requires_grad_() for f in inputs["features"]], []
        head.checkpointing = checkpointing

        def keep(saved, sizes=sizes):
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            logits = head(**inputs | {"features": taps})
        logits.square().sum().backward()
        found.append([p.grad for p in head.parameters()] + [tap.grad for tap in taps])
        kept.append(sum(sizes))
    assert kept[1] <= kept[0] - TAPS * BATCH * TOKENS * WIDTH
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)
