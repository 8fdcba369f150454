"""Routing, balance and draws, against brute force and transformers."""

import math

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

from hf_moebert.methods.mpo.functional import contract, pad_core
from hf_moebert.methods.mpo.functional_decomposition import decompose
from hf_moebert.methods.mpoe.functional import (
    apply_mask,
    balance_loss,
    choose_expert,
    copy_to_experts,
    draw_mask,
    expert_load,
    real_tokens,
)


def everything(count):
    return torch.ones(count, dtype=torch.bool)


def test_the_gate_is_exactly_one_and_carries_a_gradient():
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index, gate = choose_expert(logits)
    assert torch.equal(gate, torch.ones(50, 1))
    assert torch.equal(index, logits.argmax(dim=1))
    gate.sum().backward()
    expected = torch.nn.functional.one_hot(index, 5) - logits.detach().softmax(dim=1)  # of log p of the chosen
    torch.testing.assert_close(logits.grad, expected)


def balance(logits, mask):
    return balance_loss(logits, choose_expert(logits)[0], mask)


def test_ties_go_to_the_lowest_expert():
    index, _ = choose_expert(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
    assert index.tolist() == [1, 0]


def test_balance_is_one_if_uniform_and_the_number_of_experts_if_collapsed():
    even = torch.eye(4).repeat(3, 1) * 1e-6  # a share of a quarter each, and probabilities alike
    assert balance(even, everything(12)).item() == pytest.approx(1, abs=1e-5)
    one = torch.tensor([[100.0, 0, 0, 0]]).repeat(12, 1)
    assert balance(one, everything(12)).item() == pytest.approx(4)


def test_balance_is_that_of_switch_transformers():
    logits = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    expected = load_balancing_loss_func(logits.softmax(-1).flatten(0, 1)[None], logits.argmax(-1).flatten()[None])
    torch.testing.assert_close(balance(logits.flatten(0, 1), everything(18)), expected)


def test_padding_does_not_count():
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < 6
    torch.testing.assert_close(balance(logits, mask), balance(logits[:6], everything(6)))
    assert torch.equal(expert_load(logits.argmax(1), mask, 4), logits[:6].argmax(1).bincount(minlength=4))
    assert balance(logits, torch.zeros(9, dtype=torch.bool)) == 0


def test_balance_has_the_right_gradient():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    probabilities = logits.softmax(1)
    share = logits.argmax(1).bincount(minlength=4) / 9
    (4 * (share * probabilities.mean(0)).sum()).backward()
    expected, logits.grad = logits.grad, None
    balance(logits, everything(9)).backward()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)  # computed in float32


def test_real_tokens_of_any_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    additive = torch.where(mask.bool(), 0.0, -1e30)[:, None, None].expand(2, 1, 3, 3)
    for kind in (mask, mask.bool(), mask.float(), additive, mask.bool()[:, None, None].expand(2, 1, 3, 3)):
        assert torch.equal(real_tokens(kind, (2, 3)), mask.bool())
    assert torch.equal(real_tokens(mask, (2, 1)), torch.tensor([[False], [False]]))  # the newest of a cached sequence
    assert real_tokens(None, (2, 3)).all()


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
