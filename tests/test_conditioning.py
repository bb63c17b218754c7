from __future__ import annotations

import pytest
import torch

from vpae.conditioning import TEXT_LENGTH, Condition, first_frame_mask, pad_text


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def condition():
    text = normal(3, 6, 8)
    text[1, 4:] = 0
    text[2, 1:] = 0
    mask = first_frame_mask(2, 4, 4).expand(3, -1, -1, -1, -1)
    return Condition(text, normal(3, 5, 7, seed=1), normal(3, 16, 2, 4, 4, seed=2), mask)


def test_mask_gives_the_first_frame_and_no_other():
    mask = first_frame_mask(5, 3, 2, stride=4)
    assert mask.shape == (4, 5, 3, 2) and (mask[:, 0] == 1).all() and (mask[:, 1:] == 0).all()
    assert first_frame_mask(2, 1, 1, stride=8).shape == (8, 2, 1, 1)


def test_packing_is_sample_then_mask_then_first_frame(condition):
    x_t = normal(3, 16, 2, 4, 4, seed=3)
    packed = condition.pack(x_t)
    assert packed.shape == (3, 36, 2, 4, 4)
    assert torch.equal(packed[:, :16], x_t)
    assert torch.equal(packed[:, 16:20], condition.mask)
    assert torch.equal(packed[:, 20:], condition.latent)


def test_packing_keeps_the_gradient_of_the_sample(condition):
    x_t = normal(3, 16, 2, 4, 4, seed=3).requires_grad_()
    condition.pack(x_t).square().sum().backward()
    assert torch.equal(x_t.grad, 2 * x_t.detach())


def test_text_to_video_packs_nothing():
    x_t = normal(2, 16, 2, 4, 4)
    assert Condition(normal(2, 6, 8)).pack(x_t) is x_t


def test_text_mask_is_true_on_tokens_alone(condition):
    assert condition.text_mask.sum(1).tolist() == [6, 4, 1]
    assert condition.text_mask[1].tolist() == [True] * 4 + [False] * 2


def test_null_changes_the_text_alone(condition):
    null_text = normal(1, 2, 8, seed=9)
    null = condition.null(null_text)
    assert null.image is condition.image and null.latent is condition.latent and null.mask is condition.mask
    assert null.text.shape == condition.text.shape
    for row in null.text:
        assert torch.equal(row[:2], null_text[0]) and (row[2:] == 0).all()


def test_null_text_may_be_cut_in_its_padding_only(condition):
    padded = torch.cat([normal(1, 6, 8, seed=9), torch.zeros(1, 4, 8)], 1)
    assert torch.equal(condition.null(padded).text[0], padded[0, :6])
    with pytest.raises(ValueError, match="does not fit"):
        condition.null(normal(1, 7, 8, seed=9))


def test_drop_replaces_the_prompt_where_told(condition):
    null_text = normal(1, 2, 8, seed=9)
    dropped = condition.drop(null_text, torch.tensor([False, True, False]))
    assert torch.equal(dropped.text[[0, 2]], condition.text[[0, 2]])
    assert torch.equal(dropped.text[1], condition.null(null_text).text[1])
    assert dropped.latent is condition.latent


def test_padding_to_512_is_zeros():
    text = normal(2, 6, 8)
    padded = pad_text(text)
    assert padded.shape == (2, TEXT_LENGTH, 8)
    assert torch.equal(padded[:, :6], text) and (padded[:, 6:] == 0).all()


def test_slicing_and_moving_take_all_parts_along(condition):
    part = condition[1:]
    assert len(part) == 2 and torch.equal(part.text, condition.text[1:]) and torch.equal(part.mask, condition.mask[1:])
    low = condition.to(dtype=torch.bfloat16)
    assert {x.dtype for x in (low.text, low.image, low.latent, low.mask)} == {torch.bfloat16}
    assert Condition(condition.text).to("cpu")[:1].image is None
