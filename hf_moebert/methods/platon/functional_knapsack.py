"""The exact choice of one option for each group under a common budget, on tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


BUCKETS = 8192  # of the budget: costs are rounded to this share of it


def choose_options(values: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> list[int]:
    """Choose one option of each group, with the largest total value at a total cost within the budget.

    The knapsack with multiple choices, solved exactly by dynamic programming for costs that are rounded to a
    8,192nd of the budget; where options tie, the later one is taken.

    Args:
        values: Of each option, for each group. Shapes `(options,)`.
        costs: Of each option, at least 0. Shapes `(options,)`.
        budget: Limit of the total cost.

    Returns:
        Index of the option for each group.

    Raises:
        ValueError: If even the cheapest options exceed the budget.
    """
    least = sum(float(cost.min()) for cost in costs)
    if least > budget * (1 + 1e-9):
        raise ValueError(f"`budget` must be at least {least:.6g}, the cost of the cheapest options, got {budget:.6g}.")
    # From the cheapest options on, so that these always fit
    steps = [((cost - cost.min()).double() * (BUCKETS / max(budget - least, 1e-300))).round() for cost in costs]
    steps = [step.clamp(max=BUCKETS + 1).long() for step in steps]
    best = torch.zeros(BUCKETS + 1, dtype=torch.float64)  # largest value for each cost
    chosen = []
    places = torch.arange(BUCKETS + 1)
    for value, step in zip(values, steps, strict=True):
        rest = places[None, :] - step[:, None]  # (options, buckets)
        totals = torch.where(rest >= 0, best[rest.clamp(min=0)] + value.double()[:, None], -torch.inf)
        totals = totals.flip(0)  # the first maximum is that of the last option
        best, option = totals.max(dim=0)
        chosen.append(len(value) - 1 - option)
    place, options = BUCKETS, []
    for option, step in zip(reversed(chosen), reversed(steps), strict=True):
        options.append(int(option[place]))
        place -= int(step[options[-1]])
    return options[::-1]
