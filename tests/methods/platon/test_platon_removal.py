"""Units removed one after another, on tensors: against brute force, with and without a constant and a metric."""

import itertools

import pytest
import torch

from hf_moebert.methods.platon.functional_influence import draw_direction, with_bias, with_constant
from hf_moebert.methods.platon.functional_knapsack import choose_options
from hf_moebert.methods.platon.functional_removal import invert_moment, remove_units


TINY = 1e-10  # damping that cannot be seen


def make_layer(units, unit_size, *, bias=True):
    """Correlated inputs `(tokens, in)` and the weights of a layer, with the constant of the bias."""
    generator = torch.Generator().manual_seed(units)
    width = units * unit_size
    inputs = torch.randn(300, width, generator=generator).double()
    inputs = inputs @ torch.randn(width, width, generator=generator).double() + 1
    weight = torch.randn(5, width, generator=generator).double()
    offset = torch.randn(5, generator=generator).double() if bias else None
    return with_constant(inputs, offset), with_bias(weight, offset)


def fit(inputs, weight, columns):
    """The least squares fit of the outputs by some columns, and the second moments of its errors."""
    outputs = inputs @ weight.T
    fitted = torch.linalg.lstsq(inputs[:, columns], outputs).solution.T
    errors = outputs - inputs[:, columns] @ fitted.T
    return fitted, errors.T @ errors / len(inputs)


def columns_of(units, unit_size, inputs):
    others = range(inputs.shape[1] // unit_size * unit_size, inputs.shape[1])
    return [unit * unit_size + place for unit in units for place in range(unit_size)] + list(others)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("units", "unit_size"), [(12, 2), (5, 3), (24, 1)])
@pytest.mark.parametrize("weighed", [False, True])
def test_each_removed_unit_is_the_cheapest_and_the_others_make_up_for_it(units, unit_size, bias, weighed):
    inputs, weight = make_layer(units, unit_size, bias=bias)
    if unit_size == 1 and bias:  # the constant would pass for a unit in `columns_of`
        inputs, weight = inputs[:, :-1], weight[:, :-1]
    metric = torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).double()) + 0.1 if weighed else None
    weigh = torch.eye(5).double() if metric is None else metric
    inverse = invert_moment(inputs.T @ inputs / len(inputs), TINY)
    left, spent = list(range(units)), 0.0
    for keep in range(units - 1, 1, -1):
        removal = remove_units(inverse, weight, units=units, unit_size=unit_size, keep=keep, metric=metric)
        costs = {}
        for unit in left:
            others = columns_of([other for other in left if other != unit], unit_size, inputs)
            costs[unit] = float((fit(inputs, weight, others)[1] * weigh).sum())
        cheapest = min(costs, key=costs.get)
        left.remove(cheapest)
        assert removal.kept.tolist() == left
        spent = float(removal.errors.sum())
        assert spent == pytest.approx(costs[cheapest], rel=1e-5)
    assert spent > 0
    fitted = fit(inputs, weight, columns_of(left, unit_size, inputs))[0]
    found = removal.columns if removal.bias is None else torch.cat([removal.columns, removal.bias[:, None]], dim=1)
    torch.testing.assert_close(found, fitted, atol=1e-5, rtol=1e-5)


def test_nothing_is_removed_and_nothing_changes():
    inputs, weight = make_layer(6, 2)
    inverse = invert_moment(inputs.T @ inputs, 0.01)
    removal = remove_units(inverse, weight, units=6, unit_size=2, keep=6)
    assert removal.errors.numel() == 0
    assert removal.kept.tolist() == list(range(6))
    assert torch.equal(torch.cat([removal.columns, removal.bias[:, None]], dim=1), weight)


def test_what_others_can_say_as_well_costs_nothing():
    inputs, weight = make_layer(8, 1, bias=False)
    doubled, weights = inputs.repeat(1, 2), torch.cat([weight, weight.flip(0)], dim=1)
    inverse = invert_moment(doubled.T @ doubled / len(doubled), 1e-9)
    removal = remove_units(inverse, weights, units=16, unit_size=1, keep=8)
    outputs = doubled @ weights.T
    torch.testing.assert_close(doubled[:, removal.kept] @ removal.columns.T, outputs, atol=1e-4, rtol=1e-4)


def test_inputs_that_are_always_zero_can_be_inverted():
    inverse = invert_moment(torch.zeros(3, 3).double(), 0.01)
    assert inverse.isfinite().all()


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_directions_have_the_curvature_of_the_outputs_as_their_moments(kind):
    outputs = torch.tensor([2.0, -1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    drawn = draw_direction(outputs.expand(200_000, 3), kind, generator)
    share = outputs.softmax(0) if kind == "classes" else outputs.sigmoid()
    wanted = {
        "classes": share.diag() - share[:, None] * share,
        "labels": (share * (1 - share)).diag(),
        "numbers": torch.eye(3),
    }[kind]
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), wanted, atol=0.01, rtol=0.02)


def test_the_knapsack_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = [torch.rand(count, generator=generator) for count in (4, 3, 5, 2)]
        costs = [torch.randint(0, 30, (count,), generator=generator).double() for count in (4, 3, 5, 2)]
        budget = float(sum(cost.min() for cost in costs) + torch.randint(0, 60, (), generator=generator))
        best = max(
            sum(float(v[o]) for v, o in zip(values, options, strict=True))
            for options in itertools.product(range(4), range(3), range(5), range(2))
            if sum(float(c[o]) for c, o in zip(costs, options, strict=True)) <= budget
        )
        chosen = choose_options(values, costs, budget)
        assert sum(float(c[o]) for c, o in zip(costs, chosen, strict=True)) <= budget * 1.001
        assert sum(float(v[o]) for v, o in zip(values, chosen, strict=True)) == pytest.approx(best)


def test_a_knapsack_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match=r"`budget` must be at least 5, the cost of the cheapest options, got 4"):
        choose_options([torch.ones(2)] * 2, [torch.tensor([2.0, 9.0]), torch.tensor([3.0, 9.0])], 4.0)
