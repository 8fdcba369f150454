from itertools import permutations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from hf_moebert.methods.mixture_of_masks.functional_plans import (
    _fill_clusters,
    clustered_masks,
    count_kept,
    dealt_masks,
    kept_mask,
    random_masks,
    unit_magnitude,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plans(num_units, num_experts, active, seed=0):
    """The masks of every plan for one random layer."""
    rows = torch.randn(num_units, 3, generator=seeded(seed))
    return {
        "random": random_masks(num_units, num_experts, active, generator=seeded(seed)),
        "clustered": clustered_masks(rows, num_experts, active, generator=seeded(seed)),
        "dealt": dealt_masks(rows[:, 0], num_experts, active),
    }


layers = st.integers(1, 24).flatmap(
    lambda units: st.tuples(st.just(units), st.integers(1, units), st.floats(0, 1, exclude_min=True))
)


# identity


@pytest.mark.parametrize("num_experts", [1, 3, 7])
def test_all_active_opens_every_mask(num_experts):
    for name, masks in plans(7, num_experts, 1.0).items():
        assert torch.equal(masks, torch.ones(num_experts, 7, dtype=torch.bool)), name
    assert kept_mask(torch.arange(7), 1.0).all()


# oracle


@settings(deadline=None)
@given(layers, st.integers(0, 9))
def test_every_expert_has_exactly_the_width(layer, seed):
    num_units, num_experts, active = layer
    for name, masks in plans(num_units, num_experts, active, seed).items():
        assert masks.shape == (num_experts, num_units), name
        assert masks.dtype == torch.bool, name
        assert (masks.sum(dim=1) == max(round(active * num_units), 1)).all(), name


@settings(deadline=None)
@given(layers, st.data())
def test_dealing_favours_the_important(layer, data):
    num_units, num_experts, active = layer
    importance = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=num_units, max_size=num_units)))
    masks = dealt_masks(importance, num_experts, active)
    order = sorted(range(num_units), key=lambda j: (-importance[j], j))
    holders = masks.sum(dim=0)[order].tolist()  # by falling importance
    shared = holders.count(num_experts) if num_experts > 1 else 0
    assert holders == sorted(holders, reverse=True)
    assert set(holders) <= {0, 1, num_experts}
    if masks.sum() >= num_units:
        assert holders.count(0) <= max(num_experts - 2, 0)  # as many different units as the width allows
    else:
        assert shared == 0
    dealt = [j for j in order[shared:] if masks[:, j].any()]
    assert all(masks[position % num_experts, j] for position, j in enumerate(dealt))


def test_dealing_by_hand():
    importance = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3, 0.2])  # the order is 1, 3, 2, 4, 5, 0
    masks = dealt_masks(importance, 2, 4 / 6)  # 2 shared + 4 / 2 dealt
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[1, 2, 3, 5], [0, 1, 3, 4]]
    narrow = dealt_masks(importance, 2, 2 / 6)  # nothing shared; 5 and 0 left out
    assert [mask.nonzero().flatten().tolist() for mask in narrow] == [[1, 2], [3, 4]]


def test_equal_scores_go_by_index():
    assert kept_mask(torch.zeros(100), 0.3)[0].nonzero().flatten().tolist() == list(range(30))
    assert dealt_masks(torch.ones(4), 2, 0.5).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_kept_mask_keeps_the_highest():
    scores = torch.tensor([1.0, torch.inf, -2.0, 3.0])
    assert kept_mask(scores, 0.5).tolist() == [[False, True, False, True]]


def test_magnitude_is_the_product_of_norms():
    gate, up = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    down = torch.tensor([[1.0, 6.0], [0.0, 8.0]])
    assert unit_magnitude([gate, up], down).tolist() == [5 * 2 * 1, 2 * 1 * 10]
    assert unit_magnitude([gate], down).tolist() == [5, 20]


def test_magnitude_of_half_precision_neither_overflows_nor_vanishes():
    for size in (6e4, 6e-8):
        weight = torch.full((2, 2), size, dtype=torch.float16)
        exact = (weight[0].double().square().sum().sqrt() ** 3).item()
        assert unit_magnitude([weight, weight], weight).tolist() == pytest.approx([exact, exact])


def test_magnitude_is_blind_to_a_rescaling_that_the_layer_cannot_see():
    up, down = torch.randn(5, 3, generator=seeded()), torch.randn(3, 5, generator=seeded(1))
    scale = torch.tensor([1e-3, 0.5, 1.0, 7.0, 1e3])
    torch.testing.assert_close(unit_magnitude([up * scale[:, None]], down / scale), unit_magnitude([up], down))


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_found(seed):
    directions = torch.eye(4, 16)
    truth = torch.arange(32) % 4
    lengths = torch.rand(32, 1, generator=seeded(seed)) * 100 + 1  # the length of a row must not count
    rows = lengths * (directions[truth] + 0.02 * torch.randn(32, 16, generator=seeded(seed)))
    masks = clustered_masks(rows, 4, 1 / 4, generator=seeded(seed))
    found = {tuple(truth[mask].tolist()) for mask in masks}
    assert found == {(cluster,) * 8 for cluster in range(4)}


def test_width_adds_the_nearest_and_drops_the_farthest():
    angles = torch.tensor([0.0, 1.0, 2.0, 8.0, 60.0, 79.0, 80.0, 81.0]).deg2rad()  # two clusters of four
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)

    def members(active):
        masks = clustered_masks(rows, 2, active, generator=seeded())
        return sorted(mask.nonzero().flatten().tolist() for mask in masks)

    assert members(4 / 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert members(3 / 8) == [[0, 1, 2], [5, 6, 7]]  # 3 and 4 lie farthest from their centres
    assert members(5 / 8) == [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]


def test_own_cluster_comes_before_nearer_units_of_another():
    angles = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 90.0]).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    masks = clustered_masks(rows, 2, 0.5, generator=seeded())
    assert (masks.sum(dim=0) == 1).all()  # one cluster is the far row and two of the others; neither borrows


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
def test_clusters_are_of_equal_size(num_units, num_experts, seed):
    num_experts = min(num_experts, num_units)
    distances = torch.randint(4, (num_units, num_experts), generator=seeded(seed)).double()  # many ties
    sizes = _fill_clusters(distances).bincount(minlength=num_experts)
    assert sizes.sum() == num_units
    assert sizes.max() - sizes.min() <= (num_units % num_experts > 0)


@pytest.mark.parametrize("num_units", [6, 7])
def test_two_clusters_are_the_best_there_are(num_units):
    for seed in range(20):
        reached, totals = reached_and_possible(num_units, 2, seed)
        assert reached == pytest.approx(totals.min().item())


def test_three_clusters_are_near_the_best_there_are():
    shares = []
    for seed in range(50):
        reached, totals = reached_and_possible(6, 3, seed)
        shares.append((totals < reached - 1e-9).double().mean().item())
    assert sum(shares) / len(shares) < 0.05  # on average among the best twentieth of all ways to split


def reached_and_possible(num_units, num_experts, seed):
    """The total distance of the clusters found, and of all that are of the same sizes."""
    distances = torch.rand(num_units, num_experts, generator=seeded(seed), dtype=torch.float64)
    ways = torch.tensor(sorted(set(permutations(i % num_experts for i in range(num_units)))))  # (ways, units)
    reached = distances.gather(1, _fill_clusters(distances)[:, None]).sum().item()
    return reached, distances[torch.arange(num_units), ways].sum(dim=1)


# randomness, degenerate layers


def test_same_seed_same_masks():
    rows = torch.randn(40, 8, generator=seeded())
    before = rows.clone()
    for plan in (
        lambda seed: random_masks(40, 4, 0.5, generator=seeded(seed)),
        lambda seed: clustered_masks(rows, 4, 0.5, generator=seeded(seed)),
    ):
        first = plan(3)
        torch.rand(5)  # whatever else draws random numbers
        assert torch.equal(plan(3), first)
        assert not torch.equal(plan(4), first)
    assert torch.equal(rows, before)


def test_random_masks_cover_and_share_as_dealt_ones():
    masks = random_masks(12, 4, 0.5, generator=seeded())  # 4 shared + 8 / 4 dealt
    assert masks.sum(dim=0).sort().values.tolist() == [1] * 8 + [4] * 4


@pytest.mark.parametrize("rows", [torch.zeros(9, 4), torch.ones(9, 4)], ids=["zeros", "all alike"])
def test_rows_that_tell_nothing_still_make_equal_clusters(rows):
    masks = clustered_masks(rows, 3, 1 / 3, generator=seeded())
    assert (masks.sum(dim=0) == 1).all()


def test_weights_may_be_parameters_in_half_precision():
    rows = torch.nn.Parameter(torch.randn(8, 4, generator=seeded()).bfloat16())
    masks = clustered_masks(rows, 2, 0.5, generator=seeded())
    assert masks.sum(dim=1).tolist() == [4, 4]
    assert not masks.requires_grad


# refusals


@pytest.mark.parametrize("active", [0, -0.1, 1.2, float("nan")])
def test_share_out_of_range_is_refused(active):
    match = r"`keep_ratio` must be in \(0, 1\], got .*Use 0.5"
    with pytest.raises(ValueError, match=match):
        random_masks(8, 2, active, generator=seeded())
    with pytest.raises(ValueError, match=match):
        clustered_masks(torch.ones(8, 2), 2, active, generator=seeded())
    with pytest.raises(ValueError, match=match):
        kept_mask(torch.ones(8), active)


@pytest.mark.parametrize("num_experts", [0, -1, 9])
def test_number_of_experts_out_of_range_is_refused(num_experts):
    match = rf"`num_experts` must be in \[1, 8\], the number of units, got {num_experts}\."
    with pytest.raises(ValueError, match=match):
        random_masks(8, num_experts, 0.5, generator=seeded())
    with pytest.raises(ValueError, match=match):
        clustered_masks(torch.ones(8, 2), num_experts, 0.5, generator=seeded())
    with pytest.raises(ValueError, match=match):
        dealt_masks(torch.ones(8), num_experts, 0.5)


def test_layer_without_units_is_refused():
    with pytest.raises(ValueError, match=r"`num_units` must be at least 1, got 0\."):
        count_kept(0, 0.5)


@pytest.mark.parametrize("scores", [torch.tensor([1.0, torch.nan]), torch.ones(2, 3)], ids=["nan", "two layers"])
def test_unusable_scores_are_refused(scores):
    with pytest.raises(ValueError, match=r"scores must have shape \(units,\) and no NaN, got shape"):
        kept_mask(scores, 0.5)


def test_unusable_rows_are_refused():
    rows = torch.ones(4, 2)
    rows[1, 0], rows[3] = torch.inf, torch.nan
    with pytest.raises(ValueError, match="`rows` must be finite, got 2 rows"):
        clustered_masks(rows, 2, 0.5, generator=seeded())
    with pytest.raises(ValueError, match=r"`iterations` must be at least 1, got 0\."):
        clustered_masks(torch.ones(4, 2), 2, 0.5, generator=seeded(), iterations=0)


def test_weights_of_different_layers_are_refused():
    with pytest.raises(ValueError, match=r"`readers` must be one or more .* got \[\(4, 3\), \(5, 3\)\] and \(3, 4\)"):
        unit_magnitude([torch.ones(4, 3), torch.ones(5, 3)], torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"`readers` must be one or more .* got \[\]"):
        unit_magnitude([], torch.ones(3, 4))
