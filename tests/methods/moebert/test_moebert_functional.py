"""The equations of MoEBERT against definitions, hand-computed examples and naive loops."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

from hf_moebert.methods.moebert import functional


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_neurons_are_dealt_like_cards():
    importance = torch.arange(12.0, 0, -1)  # order of importance: 0, 1, ..., 11
    dealt = functional.assign_neurons(importance, num_experts=3, expert_size=6, num_shared=3)
    assert dealt.tolist() == [[0, 1, 2, 3, 6, 9], [0, 1, 2, 4, 7, 10], [0, 1, 2, 5, 8, 11]]


@pytest.mark.parametrize(
    ("num_experts", "num_shared", "expert_size", "union"),
    [(4, 512, 768, 1536), (8, 512, 768, 2560), (4, 0, 768, 3072), (2, 512, 768, 1024), (4, 768, 768, 768)]
    + [(1, 512, 768, 768), (3, 512, 768, 1280), (4, 512, 1024, 2560), (1, 3072, 3072, 3072)],
)
def test_union_of_the_experts_neurons(num_experts, num_shared, expert_size, union):
    importance = torch.rand(3072, generator=seeded())
    dealt = functional.assign_neurons(importance, num_experts, expert_size, num_shared)
    assert dealt.shape == (num_experts, expert_size)
    assert dealt.unique().numel() == union


@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 10), st.integers(0, 5), st.integers(0, 1000))
def test_dealing_shares_the_best_and_splits_the_rest(num_experts, num_shared, own, spare, seed):
    size = num_shared + own * num_experts + spare
    if num_shared + own == 0:
        return
    importance = torch.rand(size, generator=seeded(seed))
    dealt = functional.assign_neurons(importance, num_experts, num_shared + own, num_shared)
    best = set(importance.topk(num_shared).indices.tolist())
    experts = [set(row.tolist()) for row in dealt]
    assert all(best <= expert and len(expert) == num_shared + own for expert in experts)
    assert sum(len(expert - best) for expert in experts) == len(set().union(*experts) - best)  # nothing twice
    assert torch.equal(dealt, dealt.sort(dim=1).values)


def test_ties_go_to_the_smaller_index():
    assert functional.assign_neurons(torch.ones(6), 2, 2, 1).tolist() == [[0, 1], [0, 2]]


def test_too_large_experts_are_refused():
    with pytest.raises(ValueError, match=r"`expert_size` must be in \[3, 6\] for 3 experts .* got 7"):
        functional.assign_neurons(torch.rand(12), 3, 7, 3)


def test_experts_are_rows_and_columns_of_the_dense_layer():
    up, up_bias, down, down_bias = torch.rand(6, 4), torch.rand(6), torch.rand(4, 6), torch.rand(4)
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    cut = functional.cut_experts(up, up_bias, down, down_bias, index=index)
    for expert, rows in enumerate(index.tolist()):
        x = torch.rand(5, 4)
        mask = torch.zeros(6).index_fill(0, torch.tensor(rows), 1)
        dense = F.linear(F.gelu(F.linear(x, up, up_bias)) * mask, down, down_bias)
        small = F.linear(F.gelu(F.linear(x, cut[0][expert], cut[1][expert])), cut[2][expert], cut[3][expert])
        torch.testing.assert_close(small, dense)


def test_random_tables_follow_their_seed_alone():
    first = functional.random_table(1000, 4, generator=seeded(7))
    torch.rand(5)  # other draws change nothing
    assert torch.equal(first, functional.random_table(1000, 4, generator=seeded(7)))
    assert not torch.equal(first, functional.random_table(1000, 4, generator=seeded(8)))
    assert first.dtype == torch.uint8
    assert (first.bincount(minlength=4) - 250).abs().max() < 60  # uniform: sd is 13.7


def test_balanced_table_of_a_small_corpus():
    counts = torch.tensor([10, 7, 5, 4, 1])
    table = functional.balanced_table(counts, 2, generator=seeded())
    assert table.tolist() == [0, 1, 1, 0, 1]
    assert [int(counts[table == expert].sum()) for expert in (0, 1)] == [14, 13]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.integers(1, 5))
def test_balanced_loads_differ_by_at_most_one_token_type(counts, num_experts):
    counts = torch.tensor(counts)
    if counts.sum() == 0:
        return  # nothing to balance
    table = functional.balanced_table(counts, num_experts, generator=seeded()).long()
    loads = torch.zeros(num_experts, dtype=torch.long).index_add(0, table, counts)
    fullest = table == loads.argmax()
    assert int(loads.max() - loads.min()) <= int(counts[fullest].max())


def test_gate_weights():
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]], requires_grad=True)
    index, weights = functional.choose_experts(logits, 2, "probability")
    assert index.tolist() == [[1, 2], [0, 1]]  # ties: lowest first
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, index))
    index, straight = functional.choose_experts(logits, 2, "straight-through")
    torch.testing.assert_close(straight.sum(dim=-1), torch.ones(2))
    torch.testing.assert_close(straight, weights / weights.sum(-1, keepdim=True))
    (gradient,) = torch.autograd.grad(functional.choose_experts(logits, 1, "straight-through")[1][0].sum(), logits)
    p = logits[0].detach().softmax(-1)
    torch.testing.assert_close(gradient[0], torch.tensor([0.0, 1.0, 0.0]) - p)  # of log p of the chosen


def test_masked_mean():
    states = torch.randn(3, 4, 2, generator=seeded())
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    mean = functional.masked_mean(states, mask)
    torch.testing.assert_close(mean[0], states[0, :3].mean(0))
    torch.testing.assert_close(mean[1], states[1, 0])
    assert mean[2].tolist() == [0, 0]


def test_sorted_slots():
    index = torch.tensor([[2, 0, 2, 1, 0], [3, 3, 3, 3, 3]], dtype=torch.uint8)
    order, inverse, counts = functional.sort_by_expert(index, 4)
    assert order.tolist() == [[1, 4, 3, 0, 2], [0, 1, 2, 3, 4]]  # stable
    assert counts.tolist() == [[2, 1, 2, 0], [0, 0, 0, 5]]
    assert torch.equal(order.gather(1, inverse), torch.arange(5).expand(2, 5))
