"""One-shot ways to split a dense feed-forward layer into experts, as binary masks: what learned masks must beat.

Every plan gives each expert exactly `count_active(units, active)` of the layer's hidden units.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def count_active(num_units: int, active: float) -> int:
    """Count the hidden units that each expert of a layer keeps.

    Args:
        num_units: Hidden units of the dense layer.
        active: Share of them that an expert keeps, in (0, 1].

    Returns:
        The nearest whole number of units, but at least 1.

    Raises:
        ValueError: If there is no unit, or the share is out of range.
    """
    if num_units < 1:
        raise ValueError(f"`num_units` must be at least 1, got {num_units}. Use the dense layer's intermediate size.")
    if not 0 < active <= 1:
        raise ValueError(f"`active` must be in (0, 1], got {active}. Use 0.5 to keep half of the units.")
    return max(round(active * num_units), 1)


def random_masks(num_units: int, num_experts: int, active: float, *, generator: Generator) -> Tensor:
    """Share and deal the units as `dealt_masks` does, but in a random order.

    Args:
        num_units: Hidden units of the dense layer.
        num_experts: Number of experts, from 1 to `num_units`.
        active: Share of the units that an expert keeps, in (0, 1].
        generator: Where the order comes from.

    Returns:
        True where an expert keeps a unit, on the generator's device. Shape `(experts, units)`, bool.

    Raises:
        ValueError: If a count or the share is out of range.

    Source: our own design, the control of the plans that look at the weights.
    """
    _check_counts(num_units, num_experts, active)
    order = torch.randperm(num_units, generator=generator, device=generator.device)
    return dealt_masks(order, num_experts, active)


def dealt_masks(importance: Tensor, num_experts: int, active: float) -> Tensor:
    """Share the most important units among all experts and deal the others out like cards, best first.

    The width of the experts says how many are shared: the fewest `s` with `s + (units - s) / experts >= width`. Where
    the cards do not come out even, the least important units, at most `experts - 2`, are left out. Where the width
    is less than `units / experts`, nothing is shared, and the least important units are left out.

    Args:
        importance: Score of each unit, larger is kept first; ties go to the lower index. Shape `(units,)`.
        num_experts: Number of experts, from 1 to `units`.
        active: Share of the units that an expert keeps, in (0, 1].

    Returns:
        True where an expert keeps a unit. Shape `(experts, units)`, bool.

    Raises:
        ValueError: If the scores have another shape or hold NaN, or a count or the share is out of range.

    Source: Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section 3.2; the number of shared units is our own
    design.
    """
    if importance.dim() != 1 or importance.isnan().any():
        raise ValueError(
            f"The units' scores must have shape (units,) and no NaN, got shape {tuple(importance.shape)} with "
            f"{int(importance.isnan().sum())} NaN. Pass the scores of one layer, from finite weights."
        )
    num_units = importance.numel()
    width = _check_counts(num_units, num_experts, active)
    shared = -(-max(width * num_experts - num_units, 0) // max(num_experts - 1, 1))  # rounded up
    own = width - shared
    order = torch.sort(importance, descending=True, stable=True).indices  # (units,)
    dealt = order[shared : shared + own * num_experts].view(own, num_experts).T  # (experts, own)
    kept = torch.cat([order[:shared].expand(num_experts, -1), dealt], dim=1)  # (experts, width)
    return _masks_at(kept, num_units)


def kept_mask(scores: Tensor, active: float) -> Tensor:
    """Keep the units with the highest scores: the plan of one narrower dense layer.

    Args:
        scores: Score of each unit, larger is kept first; ties go to the lower index. Shape `(units,)`.
        active: Share of the units to keep, in (0, 1].

    Returns:
        True where a unit is kept. Shape `(1, units)`, bool.

    Raises:
        ValueError: As `dealt_masks`.
    """
    return dealt_masks(scores, 1, active)


def unit_magnitude(readers: Sequence[Tensor], writer: Tensor) -> Tensor:
    """Score each unit by the size of its weights: the product of the norms of its rows and of its column.

    A unit's column can be scaled up and its row of `up` down by as much without any effect on a gated layer; this
    score then stays the same, where a sum of norms would change. Biases do not count.

    Args:
        readers: First-layer weights: one, or gate and up. Each of shape `(units, hidden)`.
        writer: Second-layer weight. Shape `(hidden, units)`.

    Returns:
        Scores in float64. Shape `(units,)`.

    Raises:
        ValueError: If there is no reader, or the number of units differs.

    Source: our own choice.
    """
    units = {*(reader.shape[0] for reader in readers), writer.shape[1]}
    if not readers or len(units) > 1:
        raise ValueError(
            f"`readers` must be one or more weights of shape (units, hidden), for a writer of shape (hidden, units), "
            f"got {[tuple(reader.shape) for reader in readers]} and {tuple(writer.shape)}. Transpose the weights of "
            "GPT-2's Conv1D."
        )
    score = torch.linalg.vector_norm(writer, dim=0, dtype=torch.float64)  # (units,)
    for reader in readers:
        score = score * torch.linalg.vector_norm(reader, dim=1, dtype=torch.float64)
    return score


def clustered_masks(
    rows: Tensor, num_experts: int, active: float, *, generator: Generator, iterations: int = 20
) -> Tensor:
    """Give each expert units that read alike: a cluster of equal size, made wider or narrower.

    Balanced k-means on the rows of the first layer, each of length 1. The clusters differ in size by at most one
    unit. An expert keeps its own cluster first, nearest to the centre first, and then the nearest of the others.

    Args:
        rows: First-layer weight of each unit; of a gated layer, the gate's. Shape `(units, hidden)`.
        num_experts: Number of experts, from 1 to `units`.
        active: Share of the units that an expert keeps, in (0, 1].
        generator: Where the first centres come from.
        iterations: Rounds of k-means at most.

    Returns:
        True where an expert keeps a unit. Shape `(experts, units)`, bool.

    Raises:
        ValueError: If a weight is not finite, or a count or the share is out of range.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2110.01786, section 3; the greedy assignment of units to
    clusters, and any width but `units / experts`, are our own design.
    """
    width = _check_counts(len(rows), num_experts, active)
    if not rows.isfinite().all():
        broken = int((~rows.isfinite().all(dim=1)).sum())
        raise ValueError(f"`rows` must be finite, got {broken} rows with NaN or infinity. Repair the weights first.")
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}. Use 20.")
    rows = F.normalize(rows.detach().double(), dim=1)  # a row of zeros stays one
    cluster = _fill_clusters(_squared_distances(rows, _first_centres(rows, num_experts, generator)))
    for _ in range(iterations):
        distances = _squared_distances(rows, _cluster_means(rows, cluster, num_experts))  # (units, experts)
        previous, cluster = cluster, _fill_clusters(distances)
        if cluster.equal(previous):
            break
    distances = _squared_distances(rows, _cluster_means(rows, cluster, num_experts)).T  # (experts, units)
    nearest = distances.argsort(dim=1, stable=True)  # (experts, units)
    foreign = cluster[nearest] != torch.arange(num_experts, device=rows.device)[:, None]
    own_first = nearest.gather(1, foreign.byte().argsort(dim=1, stable=True))  # (experts, units)
    return _masks_at(own_first[:, :width], len(rows))


def _check_counts(num_units: int, num_experts: int, active: float) -> int:
    """Refuse a share or a number of experts that no plan can meet; return the width of the experts."""
    width = count_active(num_units, active)
    if not 1 <= num_experts <= num_units:
        raise ValueError(
            f"`num_experts` must be in [1, {num_units}], the number of units, got {num_experts}. Use no more experts "
            "than the layer has units, for example 4."
        )
    return width


def _masks_at(kept: Tensor, num_units: int) -> Tensor:
    """Turn each expert's units, `(experts, width)`, into masks, `(experts, units)`."""
    masks = torch.zeros(len(kept), num_units, dtype=torch.bool, device=kept.device)
    return masks.scatter_(1, kept, True)


def _squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    """Measure how far each row is from each centre. Shape `(units, experts)`."""
    return rows.square().sum(dim=1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(dim=1)


def _cluster_means(rows: Tensor, cluster: Tensor, num_experts: int) -> Tensor:
    """Average the rows of each cluster, none of which is empty. Shape `(experts, hidden)`."""
    members = F.one_hot(cluster, num_experts).to(rows.dtype)  # (units, experts)
    return members.T @ rows / members.sum(dim=0)[:, None]


def _first_centres(rows: Tensor, num_experts: int, generator: Generator) -> Tensor:
    """Draw rows as first centres, each with a chance that grows with its distance from those before (k-means++)."""
    chance = rows.new_ones(len(rows))
    chosen: list[int] = []
    for _ in range(num_experts):
        chosen.append(int(torch.multinomial(chance.to(generator.device), 1, generator=generator)))
        nearest = _squared_distances(rows, rows[chosen]).amin(dim=1)  # (units,)
        chance = nearest.clamp(min=1e-12)  # rows that are all alike can still be drawn
    return rows[chosen]


def _fill_clusters(distances: Tensor) -> Tensor:
    """Send units to near clusters of equal size, those first that have most to lose from their second choice.

    Whenever a cluster is full, the units that are left choose anew among the others. Two clusters are filled at the
    least total distance that there is; with more, this is a greedy approximation.

    Args:
        distances: Shape `(units, experts)`.

    Returns:
        Cluster of each unit. Shape `(units,)`, int64.
    """
    num_units, num_experts = distances.shape
    clusters = torch.arange(num_experts, device=distances.device)
    room = num_units // num_experts + (clusters < num_units % num_experts).long()  # (experts,)
    left = torch.arange(num_units, device=distances.device)
    cluster = torch.empty_like(left)
    while left.numel():
        cost = distances[left].masked_fill(room == 0, torch.inf)  # (left, experts)
        first, choice = cost.min(dim=1)
        second = cost.scatter(1, choice[:, None], torch.inf).amin(dim=1)
        queue = (second - first).argsort(descending=True, stable=True)
        taken = F.one_hot(choice[queue], num_experts).cumsum(dim=0)  # (left, experts)
        served = int((taken <= room).all(dim=1).sum())  # the queue stops at the first who finds no room
        cluster[left[queue[:served]]] = choice[queue[:served]]
        room = room - taken[served - 1]
        left = left[queue[served:]].sort().values
    return cluster
