from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vpae.draws import Draws, generator_of, seed_of

SHAPE = (2, 3, 2, 2)


def test_streams_are_the_same_today_as_when_runs_were_recorded():
    """A change of these numbers breaks the exact resume of every existing checkpoint."""
    assert seed_of(0, "student noise", 3) == 8936719992088021107
    assert seed_of("tiny", "text encoder") == 3213559999166325225
    normal, uniform = Draws(7, [11]).normal("fake noise", (2,)), Draws(7, [11]).uniform("fake time")
    assert normal[0].tolist() == pytest.approx([-1.3653616905, -1.1338783503])
    assert uniform.tolist() == pytest.approx([0.6237560148])


@pytest.mark.parametrize(
    "one, other",
    [
        ((1,), (1, 0)),  # numpy's SeedSequence pads with zeros: to it these two are one
        ((0,), (0, 0)),
        ((1, 0), (1, 0, 0)),
        ((1, 23), (12, 3)),
        (("a", "bc"), ("ab", "c")),
        ((1,), ("1",)),
        ((1, 2), (2, 1)),
        ((("a", 1),), ("a", 1)),
    ],
)
def test_keys_that_could_be_confused_have_their_own_streams(one, other):
    assert seed_of(*one) != seed_of(*other)
    ours, theirs = (torch.rand(4, generator=generator_of(*key)) for key in (one, other))
    assert not torch.equal(ours, theirs)  # torch's CPU generator reads the low 32 bits alone


def test_many_keys_give_as_many_streams():
    seeds = [seed_of(seed, purpose, p) for seed in (0, 1) for purpose in ("a", "b") for p in range(5000)]
    assert len({s % 2**32 for s in seeds}) == len(seeds) and max(seeds) < 2**63
    bits = np.array([[s >> k & 1 for k in range(63)] for s in seeds])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


@pytest.mark.parametrize("split", [[8], [4, 4], [1] * 8, [3, 5], [2, 1, 5]])
def test_ranks_and_micro_batches_change_nothing(split):
    whole = Draws(3, range(100, 108))
    start, normals, uniforms = 100, [], []
    for size in split:
        part = Draws(3, range(start, start + size))
        normals.append(part.normal("judge noise", SHAPE))
        uniforms.append(part.uniform("judge time"))
        start += size
    assert torch.equal(torch.cat(normals), whole.normal("judge noise", SHAPE))
    assert torch.equal(torch.cat(uniforms), whole.uniform("judge time"))


def test_a_sample_draws_the_same_wherever_it_stands_in_the_batch():
    one, other = Draws(3, [5, 9, 2]), Draws(3, [2, 5])
    a, b = one.normal("n", SHAPE), other.normal("n", SHAPE)
    assert torch.equal(a[0], b[1]) and torch.equal(a[2], b[0])


def test_asking_in_another_order_or_twice_changes_nothing():
    forth, back = Draws(3, [5]), Draws(3, [5])
    first = forth.normal("a", SHAPE), forth.normal("b", SHAPE), forth.uniform("c")
    again = back.uniform("c"), back.normal("b", SHAPE), back.normal("a", SHAPE)
    assert all(torch.equal(x, y) for x, y in zip(first, reversed(again), strict=True))
    assert torch.equal(forth.normal("a", SHAPE), first[0])


def test_position_purpose_and_seed_each_matter_and_leave_no_correlation():
    shape = (20_000,)
    rows = [
        Draws(3, [5]).normal("student noise", shape)[0],
        Draws(3, [6]).normal("student noise", shape)[0],
        Draws(3, [5]).normal("score noise", shape)[0],
        Draws(4, [5]).normal("student noise", shape)[0],
    ]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(4)
    assert correlation.abs().max() < 0.04
    assert all(abs(r.mean()) < 0.03 and abs(r.std() - 1) < 0.03 for r in rows)


def test_uniform_draws_are_uniform_over_positions():
    u = Draws(0, range(4000)).uniform("time")
    assert u.dtype == torch.float64 and u.shape == (4000,) and u.min() >= 0 and u.max() < 1
    q = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert (torch.quantile(u, q) - q).abs().max() < 0.035


def test_kind_of_integer_does_not_matter():
    ours = Draws(3, [5, 6]).uniform("time")
    assert torch.equal(Draws(3, np.array([5, 6])).uniform("time"), ours)
    assert torch.equal(Draws(3, torch.tensor([5, 6])).uniform("time"), ours)


def test_shapes():
    draws = Draws(0, [1, 2, 3])
    x = torch.zeros(3, 16, 2, 4, 4, dtype=torch.bfloat16)
    assert draws.normal_like("n", x).shape == x.shape and draws.normal_like("n", x).dtype == torch.float32
    assert torch.equal(draws.normal_like("n", x), draws.normal("n", x.shape[1:]))


def test_global_generators_are_neither_read_nor_moved():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    before = Draws(0, [1]).normal("n", SHAPE), Draws(0, [1]).uniform("u")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        assert torch.equal(Draws(0, [1]).normal("n", SHAPE), before[0])
        assert torch.equal(Draws(0, [1]).uniform("u"), before[1])
