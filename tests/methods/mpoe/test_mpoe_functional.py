"""Routing and draws, against brute force."""

import math

import pytest
import torch

from hf_moebert.methods.mpo.functional import contract, pad_core
from hf_moebert.methods.mpo.functional_decomposition import decompose
from hf_moebert.methods.mpoe.functional import (
    apply_mask,
    choose_expert,
    copy_to_experts,
    draw_mask,
)


def test_the_gate_is_exactly_one_and_carries_a_gradient():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index, gate = choose_expert(logits)
    assert torch.equal(gate, torch.ones(50, 1))
    assert torch.equal(index, logits.argmax(dim=1))
    gate.sum().backward()
    expected = torch.nn.functional.one_hot(index, 5) - logits.detach().softmax(dim=1)  # of log p of the chosen
    torch.testing.assert_close(logits.grad, expected)


def test_ties_go_to_the_lowest_expert():
    index, _ = choose_expert(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
    assert index.tolist() == [1, 0]


def test_padded_cores_give_the_same_matrix():
    cores, _ = decompose(torch.ones(8, 12), (2, 2, 2), (2, 3, 2))
    assert [core.shape[3] for core in cores] == [1, 1, 1]
    padded = [pad_core(*pair) for pair in zip(cores, [(1, 2, 2, 4), (4, 2, 3, 4), (4, 2, 2, 1)], strict=True)]
    torch.testing.assert_close(contract(padded), contract(cores))


def test_noise_is_relative_and_of_its_own_generator():
    core = torch.full((2, 3, 4, 5), 10.0)
    drawn = [copy_to_experts(core, 50, noise=0.1, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert (drawn[0] - core).std().item() == pytest.approx(1, rel=0.05)
    still = copy_to_experts(core, 3, noise=0, generator=torch.Generator())
    assert torch.equal(still, core.expand(3, 2, 3, 4, 5))


def test_draws_have_their_probability_and_depend_on_nothing_else():
    drawn = [bool(draw_mask((), 0.125, seed=0, step=step, index=0)) for step in range(10_000)]
    assert abs(sum(drawn) / 10_000 - 0.125) < 3 * math.sqrt(0.125 * 0.875 / 10_000)
    torch.manual_seed(77)
    again = [bool(draw_mask((), 0.125, seed=0, step=step, index=0)) for step in range(100)]
    assert again == drawn[:100]
    other = [
        [bool(draw_mask((), 0.5, seed=s, step=step, index=i)) for step in range(100)] for s, i in ((0, 0), (1, 0))
    ]
    assert other[0] != other[1]
    entries = draw_mask((100, 100), 0.125, seed=0, step=0, index=0)
    assert abs(entries.double().mean().item() - 0.125) < 3 * math.sqrt(0.125 * 0.875 / 10_000)


def test_draws_at_the_ends_are_certain():
    assert draw_mask((1000,), 1.0, seed=0, step=0, index=0).all()
    assert not draw_mask((1000,), 0.0, seed=0, step=0, index=0).any()


def test_a_masked_nan_is_gone():
    masked = apply_mask(torch.tensor([math.nan, 2.0]), torch.tensor([False, True]), 3)
    assert masked.tolist() == [0.0, 6.0]
