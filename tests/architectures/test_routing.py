"""Routing: which tokens are real, load and balance, against brute force and transformers; and the records of it."""

import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

from hf_moebert.architectures.functional_routing import balance_loss, expert_load, real_tokens
from hf_moebert.architectures.routing import Routing, record, recording


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def choose(logits, top_k=1):
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def everything(count):
    return torch.ones(count, dtype=torch.bool)


def test_real_tokens_from_any_mask():
    rows = torch.tensor([[1, 1, 0], [1, 0, 0]])
    wanted = rows.bool()
    square = wanted[:, None, None].expand(2, 1, 3, 3)
    causal = torch.ones(3, 3, dtype=torch.bool).tril() & square
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~square, torch.finfo(torch.float32).min)
    for mask in (rows, rows.bool(), rows.float(), square, causal, additive, torch.where(causal, 0.0, -1e30)):
        assert torch.equal(real_tokens(mask, (2, 3)), wanted)
    assert real_tokens(None, (2, 3)).tolist() == [[True] * 3] * 2


def test_real_tokens_are_the_newest_of_a_cached_sequence():
    rows = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(real_tokens(rows, (2, 1)), torch.tensor([[False], [False]]))
    grown = torch.cat([torch.zeros(2, 4, dtype=torch.long), rows], dim=1)
    assert torch.equal(real_tokens(grown, (2, 3)), rows.bool())


@pytest.mark.parametrize("top_k", [1, 2])
def test_expert_load_counts_the_tokens_that_count(top_k):
    index = torch.randint(4, (9, top_k), generator=seeded())
    mask = torch.tensor([True, False, True, True, True, False, True, True, True])
    counted = [sum(int(e) == expert for e in index[mask].flatten()) for expert in range(4)]
    assert expert_load(index, mask, 4).tolist() == counted


def test_balance_is_one_if_uniform_and_the_number_of_experts_if_collapsed():
    even = torch.eye(4).repeat(3, 1) * 1e-6  # a share of a quarter each, and nearly equal probabilities
    assert balance_loss(even, choose(even), everything(12)).item() == pytest.approx(1, abs=1e-5)
    sure = 50 * torch.eye(4).repeat(3, 1)
    assert balance_loss(sure, choose(sure), everything(12)).item() == pytest.approx(1)
    one = torch.tensor([[100.0, 0, 0, 0]]).repeat(12, 1)
    assert balance_loss(one, choose(one), everything(12)).item() == pytest.approx(4)
    two = torch.tensor([[0.7, 0.3]]).log().repeat(2, 1)
    assert balance_loss(two, choose(two), everything(2)).item() == pytest.approx(1.4)
    logits = torch.randn(6, 4, generator=seeded())
    assert balance_loss(logits, choose(logits, 4), everything(6)).item() == pytest.approx(1)


def test_balance_is_that_of_transformers():
    logits = torch.randn(2, 9, 4, generator=seeded(1))
    expected = load_balancing_loss_func(logits.softmax(-1).flatten(0, 1)[None], logits.argmax(-1).flatten()[None])
    logits = logits.flatten(0, 1)
    torch.testing.assert_close(balance_loss(logits, choose(logits), everything(18)), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_leaves_padding_out(top_k):
    logits, mask = torch.randn(12, 4, generator=seeded(1)), torch.arange(12) < 8
    index = choose(logits, top_k)
    shares = index[:8].flatten().bincount(minlength=4) / (8 * top_k)
    wanted = 4 * (shares * logits[:8].softmax(1).mean(0)).sum()
    torch.testing.assert_close(balance_loss(logits, index, mask), wanted)
    assert balance_loss(logits, index, torch.zeros(12, dtype=torch.bool)) == 0


def test_the_gradient_of_balance():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=seeded(1)).requires_grad_()
    mask = torch.tensor([True, True, True, False, True, True, True, True, True])
    share = choose(logits)[mask].flatten().bincount(minlength=4) / 8
    (wanted,) = torch.autograd.grad(4 * (share * logits.softmax(1)[mask].mean(0)).sum(), logits)
    (gradient,) = torch.autograd.grad(balance_loss(logits, choose(logits), mask), logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)  # the loss is computed in float32


def test_records_are_those_of_the_innermost_pass():
    decision = Routing("network", torch.zeros(1, 2, 3), torch.zeros(2, 1))
    record(decision)  # nobody asks
    with recording() as outer:
        record(decision)
        with recording() as inner:
            record(decision)
            record(decision)
    record(decision)
    assert (len(outer), len(inner)) == (1, 2)
