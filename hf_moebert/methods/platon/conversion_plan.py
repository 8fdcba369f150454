"""How many units each layer keeps: the widths that lose least within a budget of weights or of time."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moebert.architectures.protocols import UnitCosts

from .functional_knapsack import choose_options
from .modeling_units import UnitGroup


def count_weights(groups: Sequence[UnitGroup]) -> list[Tensor]:
    """Count the weights of 1, 2, ... units of each group, with the biases of their rows. Shapes `(units,)`."""
    costs = []
    for group in groups:
        numel = sum(p.numel() for p in group.reader_parameters) + group.writer.weight.numel()
        costs.append(torch.arange(1, group.num_units + 1, dtype=torch.float64) * (numel // group.num_units))
    return costs


def count_time(groups: Sequence[UnitGroup], latency: UnitCosts) -> list[Tensor]:
    """Look up the time of 1, 2, ... units of each group, as shares of the dense model's. Shapes `(units,)`.

    Raises:
        ValueError: If the table is that of a model of other widths.
    """
    costs = [latency.costs(group.kind) for group in groups]
    for group, cost in zip(groups, costs, strict=True):
        if len(cost) != group.num_units:
            raise ValueError(
                f"`latency` must be the table of this model, whose layer {group.layer} has {group.num_units} "
                f"{group.kind}, got one for {len(cost)}. Measure it by `measure_unit_latency(model)`."
            )
    return costs


def fewest_units(group: UnitGroup, min_keep: float) -> int:
    """Return how many units of a group stay in any case: this share of them, at least one."""
    return max(1, math.ceil(min_keep * group.num_units))


@dataclass(frozen=True)
class Budget:
    """Costs of units, and the limit of their sum.

    Attributes:
        costs: Of 1, 2, ... units of each group. Shapes `(units,)`.
        limit: Of their sum.
    """

    costs: list[Tensor]
    limit: float


def weight_budget(groups: Sequence[UnitGroup], keep_ratio: float, *, whole: Sequence[UnitGroup] = ()) -> Budget:
    """Limit the weights of units to a share of those that there are.

    Args:
        groups: Units that may go.
        keep_ratio: Share of the weights of all units.
        whole: Units that all stay.

    Raises:
        ValueError: If the share is not in (0, 1), or less than what stays in any case.
    """
    if not isinstance(keep_ratio, float | int) or not 0 < keep_ratio < 1:
        raise ValueError(f"`keep_ratio` must be in (0, 1), got {keep_ratio!r}. Use 0.5 to keep half of the weights.")
    costs = count_weights(groups)
    rest = sum(float(cost[-1]) for cost in count_weights(whole))
    total, least = (rest + sum(float(cost[place]) for cost in costs) for place in (-1, 0))
    if keep_ratio < least / total:
        kinds = sorted({group.kind for group in whole})
        also = f" and all {' and '.join(kinds)}, for `uniform`" if kinds else ""
        raise ValueError(
            f"`keep_ratio` must be at least {math.ceil(least / total * 1e4) / 1e4}, got {keep_ratio}: one neuron and "
            f"one head of every layer stay{also}, which are that much of this model. Keep more."
        )
    return Budget(costs, keep_ratio * total - rest)


def time_budget(
    groups: Sequence[UnitGroup],
    latency: UnitCosts,
    *,
    speed_up: float | None = None,
    latency_ms: float | None = None,
    whole: Sequence[UnitGroup] = (),
    min_keep: float = 0,
) -> Budget:
    """Limit the time of a forward pass.

    Args:
        groups: Units that may go.
        latency: What they cost on this machine.
        speed_up: Time of the dense model over that of the pruned one.
        latency_ms: Milliseconds of the pruned model instead.
        whole: Units that all stay.
        min_keep: Share of the units of every group that stays.

    Raises:
        ValueError: If the table is not of this model, or its smallest form is not fast enough.
    """
    name, asked = ("latency_ms", latency_ms) if speed_up is None else ("speed_up", speed_up)
    if not isinstance(asked, float | int) or not math.isfinite(asked) or asked <= 0:
        raise ValueError(f"`{name}` must be a number above 0, got {asked!r}. Use `speed_up=2.0` for half of the time.")
    costs = count_time(groups, latency)
    rest = latency.smallest + sum(float(cost[-1]) for cost in count_time(whole, latency))
    least = rest + sum(
        float(cost[fewest_units(group, min_keep) - 1]) for group, cost in zip(groups, costs, strict=True)
    )
    share = asked / latency.milliseconds if speed_up is None else 1 / asked
    if not least < share < 1:
        low, high = (latency.milliseconds * least, latency.milliseconds) if speed_up is None else (1, 1 / least)
        stays = f"{min_keep:.0%} of the neurons and heads" if min_keep else "one neuron and one head"
        raise ValueError(
            f"`{name}` must be in ({low:.3g}, {high:.3g}) for this model and table, got {asked}: {stays} of every "
            "layer stay, and what has no units stays as it is. Ask for less, or drop whole layers."
        )
    return Budget(costs, share - rest)


def plan_widths(
    groups: Sequence[UnitGroup],
    values: Sequence[Tensor],
    budget: Budget,
    *,
    multiple_of: int = 1,
    together: Sequence[str] = (),
    min_keep: float = 0,
) -> list[int]:
    """Choose how many units each group keeps, with the largest total value within a budget.

    Args:
        groups: Units of a model.
        values: What 1, 2, ... units of each group are worth. Shapes `(units,)`.
        budget: What they cost, and the limit.
        multiple_of: Neurons are a multiple of this, or one, or all.
        together: Kinds of which every layer keeps the same number.
        min_keep: Share of the units of every group that stays.

    Raises:
        ValueError: If no widths are within the budget.
    """
    bundles: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        bundles[group.kind, -1 if group.kind in together else index].append(index)
    options = [_options(groups[members[0]], multiple_of, min_keep) for members in bundles.values()]
    pairs = list(zip(bundles.values(), options, strict=True))
    chosen = choose_options(
        [_sum_of(values, members)[option - 1] for members, option in pairs],
        [_sum_of(budget.costs, members)[option - 1] for members, option in pairs],
        budget.limit,
    )
    widths = [0] * len(groups)
    for (members, option), choice in zip(pairs, chosen, strict=True):
        for index in members:
            widths[index] = int(option[choice])
    return widths


def _options(group: UnitGroup, multiple_of: int, min_keep: float) -> Tensor:
    step, least = multiple_of if group.kind == "neurons" else 1, fewest_units(group, min_keep)
    options = {least, *range(step, group.num_units, step), group.num_units}
    return torch.tensor(sorted(option for option in options if option >= least))


def _sum_of(tensors: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    return torch.stack([tensors[index] for index in members]).sum(dim=0)
