"""The equations of learned masks: against the published table, enumeration, and finite differences."""

import itertools
import math

import pytest
import torch
from tiny_masks import seeded

from hf_moebert.methods.mixture_of_masks.functional import (
    SHIFT,
    active_share,
    choose_experts,
    choose_masks,
    classify_units,
    draw_masks,
    mix_masks,
    open_probability,
    settle_masks,
    shift_to_share,
)


# By hand from the distribution's definition: sigmoid(score +- 2/3 * ln 11), and the stretched sigmoid between.
TABLE = [  # score, open, full, settled
    (-5.0, 0.032252, 0.001360, 0.0),
    (0.0, 0.831822, 0.168178, 0.5),
    (2.3979, 0.981952, 0.689825, 1.0),
    (10.0, 0.999991, 0.999775, 1.0),
]


# identity


def test_open_masks_of_any_mixture_are_one():
    logits = torch.randn(9, 4, generator=seeded())
    for top_k in (1, 2, 3, 4):
        mixed = mix_masks(torch.ones(4, 6), *choose_experts(logits, top_k))
        torch.testing.assert_close(mixed, torch.ones(9, 6))
    assert torch.equal(mix_masks(torch.ones(4, 6), *choose_experts(logits, 1)), torch.ones(9, 6))
    assert torch.equal(settle_masks(torch.full((4, 6), 3.0)), torch.ones(4, 6))


# oracle


@pytest.mark.parametrize(("score", "opened", "full", "settled"), TABLE)
def test_the_hard_concrete_distribution_has_its_published_values(score, opened, full, settled):
    score = torch.tensor(score)
    assert open_probability(score).item() == pytest.approx(opened, abs=1e-6)
    assert 1 - open_probability(-score).item() == pytest.approx(full, abs=1e-6)
    assert settle_masks(score).item() == pytest.approx(settled, abs=1e-5)


@pytest.mark.parametrize("score", [-5.0, -1.0, 0.0, 2.0])
def test_draws_have_these_probabilities(score):
    count = 200_000
    drawn = draw_masks(torch.full((count,), score), torch.rand(count, generator=seeded(3)))
    for share, wanted in (
        ((drawn > 0).double().mean(), open_probability(torch.tensor(score)).double()),
        ((drawn == 1).double().mean(), 1 - open_probability(-torch.tensor(score)).double()),
    ):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / count).sqrt()
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_draws_at_the_end_of_the_noise_are_finite():
    scores = torch.tensor([-30.0, -3, 0, 3, 30]).repeat(2, 1).requires_grad_()
    drawn = draw_masks(scores, torch.tensor([[0.0], [1.0]]).expand(2, 5))
    drawn.sum().backward()
    assert drawn.isfinite().all()
    assert scores.grad.isfinite().all()
    assert drawn[0, 2] == 0
    assert drawn[1, 2] == 1


def test_masks_are_computed_in_float32():
    scores, noise = torch.zeros(3, dtype=torch.bfloat16), torch.full((3,), 0.25, dtype=torch.bfloat16)
    for values in (draw_masks(scores, noise), settle_masks(scores), open_probability(scores)):
        assert values.dtype == torch.float32


def test_experts_are_the_most_probable_and_ties_go_to_the_lowest():
    logits = torch.tensor([[0.0, 0, 0, 0], [1, 2, 2, 0], [3, 1, 2, 3]])
    assert choose_experts(logits, 1)[0].tolist() == [[0], [1], [0]]
    assert choose_experts(logits, 2)[0].tolist() == [[0, 1], [1, 2], [0, 3]]
    index, weights = choose_experts(torch.randn(50, 6, generator=seeded(), dtype=torch.bfloat16), 3)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(50))
    assert all(len(set(row)) == 3 for row in index.tolist())


def test_a_mixture_of_masks_is_the_gated_sum_of_experts():
    generator = seeded(2)
    down, inner = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 12), (9, 12)))
    masks = torch.rand(4, 12, generator=generator, dtype=torch.float64)
    index, weights = choose_experts(torch.randn(9, 4, generator=generator), 2)
    found = (inner * mix_masks(masks, index, weights)) @ down.T
    for token in range(9):
        experts = [(inner[token] * masks[e]) @ down.T for e in index[token].tolist()]
        torch.testing.assert_close(found[token], sum(w * y for w, y in zip(weights[token], experts, strict=True)))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_active_share_is_that_of_all_outcomes(top_k):
    """Enumerates which of a token's experts are open at a unit, with their probabilities."""
    generator = seeded(top_k)
    opened = torch.rand(4, 3, generator=generator)
    index, _ = choose_experts(torch.randn(11, 4, generator=generator), top_k)
    real = torch.arange(11) % 4 != 0
    shares = []
    for token in real.nonzero().flatten().tolist():
        for unit in range(3):
            chances = [opened[e, unit].item() for e in index[token].tolist()]
            outcomes = itertools.product((True, False), repeat=top_k)
            used = (
                math.prod(p if o else 1 - p for p, o in zip(chances, outcome, strict=True))
                for outcome in outcomes
                if any(outcome)
            )
            shares.append(sum(used))
    assert active_share(opened, index, real).item() == pytest.approx(sum(shares) / len(shares), abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_active_share_is_not_rounded_by_autocast(top_k):
    masks, real = torch.rand(4, 50, generator=seeded(1)), torch.ones(40, dtype=torch.bool)
    index = torch.rand(40, 4, generator=seeded(2)).argsort(dim=1)[:, :top_k]
    with torch.autocast("cpu", torch.bfloat16):
        found = active_share(masks, index, real)
    assert torch.equal(found, active_share(masks, index, real))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_active_share_of_binary_masks_counts_units(top_k):
    generator = seeded(4)
    masks = torch.rand(4, 10, generator=generator) < 0.5
    index, _ = choose_experts(torch.randn(20, 4, generator=generator), top_k)
    real = torch.ones(20, dtype=torch.bool)
    counted = masks[index].any(dim=1).float().mean()
    torch.testing.assert_close(active_share(masks.float(), index, real), counted)


@pytest.mark.parametrize("top_k", [1, 2])
def test_padding_alone_does_not_look_like_sparsity(top_k):
    index, _ = choose_experts(torch.randn(5, 4, generator=seeded()), top_k)
    share = active_share(torch.ones(4, 3), index, torch.zeros(5, dtype=torch.bool))
    assert share == 1


@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 30.0])
@pytest.mark.parametrize("share", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_shifted_scores_are_open_with_the_share(share, spread):
    scores = 3 + spread * torch.randn(4, 500, generator=seeded())
    shift = shift_to_share(scores, share)
    assert open_probability(scores + shift).mean() == pytest.approx(share, abs=2e-6)
    assert shift_to_share(scores + shift, share).abs() < 1e-3  # there is nothing more to do


def test_two_kinds_of_scores_are_shifted_where_no_step_alone_leads():
    """Half far open, half far closed: between them the share hardly changes."""
    scores = torch.tensor([-14.0, 14.0]).repeat(100)
    for share in (0.3, 0.5, 0.7):
        assert open_probability(scores + shift_to_share(scores, share)).mean() == pytest.approx(share, abs=2e-6)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("active", [0.01, 0.25, 0.5, 0.83, 1.0])
def test_chosen_masks_are_the_exact_share_and_the_highest_of_each_expert(by_layer, active):
    scores = torch.randn(3, 4, 20, generator=seeded(8))
    scores[1] += 2
    masks = choose_masks(scores, active, by_layer=by_layer)
    widths = masks.sum(dim=-1)  # (layers, experts)
    assert (widths == widths[:, :1]).all()  # a token uses as many, whichever expert it goes to
    assert widths[:, 0].sum() == (3 * max(round(active * 20), 1) if by_layer else max(round(active * 60), 3))
    for of_expert, chosen in zip(scores.flatten(0, 1), masks.flatten(0, 1), strict=True):
        assert chosen.any()
        assert chosen.all() or of_expert[chosen].min() >= of_expert[~chosen].max()
    if by_layer:
        assert (widths == widths[0, 0]).all()
    elif active == 0.5:  # layers get as many as they have among the highest scores of all
        highest = scores.flatten().argsort(descending=True)[: masks.sum()] // 80
        assert (highest.bincount(minlength=3) / 4 - widths[:, 0]).abs().max() < 1
        assert widths[1, 0] > widths[0, 0]


def test_equal_scores_are_opened_by_index():
    assert choose_masks(torch.zeros(2, 2, 4), 0.5).int().tolist() == [[[1, 1, 1, 0]] * 2, [[1, 0, 0, 0]] * 2]
    assert choose_masks(torch.zeros(2, 2, 4), 0.5, by_layer=True).int().tolist() == [[[1, 1, 0, 0]] * 2] * 2


def test_no_layer_is_left_without_a_mask():
    scores = torch.zeros(3, 2, 4)
    scores[0] += 9
    assert choose_masks(scores, 0.5).sum(dim=-1)[:, 0].tolist() == [3, 2, 1]


def test_without_a_share_as_many_are_opened_as_are_probable():
    scores = torch.tensor([[[SHIFT - 0.01, SHIFT + 0.01, 3.0], [SHIFT + 0.02, -8, 9]]])
    assert choose_masks(scores, None).int().tolist() == [[[0, 1, 1], [1, 0, 1]]]
    assert choose_masks(torch.full((1, 2, 3), -9.0), None).int().tolist() == [[[1, 0, 0], [1, 0, 0]]]


def test_every_unit_is_of_exactly_one_kind():
    masks = torch.tensor(list(itertools.product((False, True), repeat=3))).T  # every column that there is
    shared, specific, inactive = classify_units(masks)
    assert (shared.int() + specific.int() + inactive.int()).eq(1).all()
    assert (shared.sum(), specific.sum(), inactive.sum()) == (1, 6, 1)
    assert torch.equal(shared, masks.sum(0) == 3)
    assert torch.equal(inactive, masks.sum(0) == 0)
    one = classify_units(torch.tensor([[True, False]]))
    assert [kind.tolist() for kind in one] == [[True, False], [False, False], [False, True]]


# refusals


def test_shares_and_scores_that_do_not_exist_are_refused():
    for active in (0, -0.1, 1.01, math.nan, True):
        with pytest.raises(ValueError, match=rf"`keep_ratio` must be a number in \(0, 1\], got {active}. Use 0.5"):
            choose_masks(torch.zeros(1, 2, 3), active)
    for value in (math.nan, math.inf):
        scores = torch.zeros(1, 2, 3)
        scores[0, 1, 2] = value
        with pytest.raises(ValueError, match="`scores` must be finite, got NaN or infinity"):
            choose_masks(scores, 0.5)


# gradients


def test_draws_have_gradients_strictly_between_and_none_outside():
    noise = torch.rand(500, generator=seeded(6))
    scores = torch.linspace(-6, 6, 500).requires_grad_()
    drawn = draw_masks(scores, noise)
    drawn.sum().backward()
    between = (drawn > 0) & (drawn < 1)
    assert between.sum() > 50
    assert (scores.grad[between] > 0).all()
    assert (scores.grad[~between] == 0).all()


def numeric(function, values, step):
    """Central differences of a scalar function, in the precision of its output."""
    found = torch.zeros_like(values)
    for place in range(values.numel()):
        nudge = torch.zeros_like(values)
        nudge.view(-1)[place] = step
        found.view(-1)[place] = (function(values + nudge) - function(values - nudge)) / (2 * step)
    return found


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients_of_the_share_and_of_the_mixture_are_right(top_k):
    generator = seeded(top_k)
    index, weights = choose_experts(torch.randn(7, 4, generator=generator), top_k)
    masks = torch.rand(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    real = torch.arange(7) < 6
    weights = weights.double().detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, w: mix_masks(m, index, w), (masks, weights))
    assert torch.autograd.gradcheck(lambda m: active_share(m, index, real), (masks,))


def test_gradients_of_scores_are_those_of_finite_differences():
    """The equations compute in float32, so a wide step and a loose tolerance."""
    scores = torch.linspace(-1.5, 1.5, 7)
    noise = torch.full((7,), 0.5)
    for function in (settle_masks, open_probability, lambda s: draw_masks(s, noise)):
        leaf = scores.clone().requires_grad_()
        function(leaf).square().sum().backward()
        wanted = numeric(lambda s, f=function: f(s).square().sum(), scores, 1e-2)
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-2, atol=1e-3)


def test_one_expert_passes_its_gradient_straight_to_the_router():
    """Its weight is always 1; the gradient is that of its probability, divided by it."""
    logits = torch.randn(5, 4, generator=seeded(), dtype=torch.float64).requires_grad_()
    index, weights = choose_experts(logits, 1)
    assert torch.equal(weights.detach(), torch.ones(5, 1))
    upstream = torch.arange(1.0, 6)
    (weights[:, 0] * upstream).sum().backward()
    probabilities = logits.detach().softmax(1)
    wanted = (torch.eye(4)[index[:, 0]] - probabilities) * upstream[:, None]  # of log p
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-5, atol=1e-6)
