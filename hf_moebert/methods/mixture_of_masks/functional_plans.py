"""One-shot splits of a dense feed-forward layer into experts, as binary masks: the baselines of learned masks.

Every plan gives each expert exactly `count_kept(units, keep_ratio)` of the layer's hidden units.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def count_kept(num_units: int, keep_ratio: float) -> int:
    """Count the hidden units that each expert of a layer keeps.

    Args:
        num_units: Hidden units of the dense layer.
        keep_ratio: Share of them that an expert keeps, in (0, 1].

    Returns:
        The nearest whole number of units, but at least 1.

    Raises:
        ValueError: If there is no unit, or the share is out of range.
    """
    if num_units < 1:
        raise ValueError(f"`num_units` must be at least 1, got {num_units}. Use the dense layer's intermediate size.")
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"`keep_ratio` must be in (0, 1], got {keep_ratio}. Use 0.5 to keep half of the units.")
    return max(round(keep_ratio * num_units), 1)


def random_masks(num_units: int, num_experts: int, keep_ratio: float, *, generator: Generator) -> Tensor:
    """Share and deal the units as `dealt_masks` does, but in a random order.

    Args:
        num_units: Hidden units of the dense layer.
        num_experts: Number of experts, from 1 to `num_units`.
        keep_ratio: Share of the units that an expert keeps, in (0, 1].
        generator: Source of the random order.

    Returns:
        True where an expert keeps a unit, on the generator's device. Shape `(experts, units)`, bool.

    Raises:
        ValueError: If a count or the share is out of range.

    Source: our own design, the control of the plans that look at the weights.
    """
    _check_counts(num_units, num_experts, keep_ratio)
    order = torch.randperm(num_units, generator=generator, device=generator.device)
    return dealt_masks(order, num_experts, keep_ratio)


def dealt_masks(importance: Tensor, num_experts: int, keep_ratio: float) -> Tensor:
    """Share the most important units among all experts and deal the others out like cards, best first.

    The number of shared units follows from the width of the experts: it is the smallest `s` with
    `s + (units - s) / experts >= width`. Where the units cannot be dealt evenly, the least important ones, at most
    `experts - 2`, are left out. Where the width is less than `units / experts`, nothing is shared, and the least
    important units are left out.

    Args:
        importance: Score of each unit, larger is kept first; ties go to the lower index. Shape `(units,)`.
        num_experts: Number of experts, from 1 to `units`.
        keep_ratio: Share of the units that an expert keeps, in (0, 1].

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
    width = _check_counts(num_units, num_experts, keep_ratio)
    shared = -(-max(width * num_experts - num_units, 0) // max(num_experts - 1, 1))  # rounded up
    own = width - shared
    order = torch.sort(importance, descending=True, stable=True).indices  # (units,)
    dealt = order[shared : shared + own * num_experts].view(own, num_experts).T  # (experts, own)
    kept = torch.cat([order[:shared].expand(num_experts, -1), dealt], dim=1)  # (experts, width)
    return _masks_at(kept, num_units)


def kept_mask(scores: Tensor, keep_ratio: float) -> Tensor:
    """Keep the units with the highest scores: the plan of one narrower dense layer.

    Args:
        scores: Score of each unit, larger is kept first; ties go to the lower index. Shape `(units,)`.
        keep_ratio: Share of the units to keep, in (0, 1].

    Returns:
        True where a unit is kept. Shape `(1, units)`, bool.

    Raises:
        ValueError: As `dealt_masks`.
    """
    return dealt_masks(scores, 1, keep_ratio)


def unit_magnitude(readers: Sequence[Tensor], writer: Tensor) -> Tensor:
    """Score each unit by the size of its weights: the product of the norms of its rows and of its column.

    Scaling a unit's column up and its row of the up-projection down by the same factor leaves a gated layer unchanged;
    this score stays the same, too, where a sum of norms would change. Biases do not count.

    Args:
        readers: Weight of the up-projection, or those of gate and up-projection. Each of shape `(units, hidden)`.
        writer: Weight of the down-projection. Shape `(hidden, units)`.

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
    rows: Tensor, num_experts: int, keep_ratio: float, *, generator: Generator, iterations: int = 20
) -> Tensor:
    """Give each expert units with similar input weights: a cluster, widened or narrowed to the width of the experts.

    Balanced k-means on the normalised rows of the input weights. The clusters differ in size by at most one unit. An
    expert keeps the units of its own cluster first, nearest to the centre first, and then the nearest of the others.

    Args:
        rows: Input weights of each unit; in a gated layer, those of the gate. Shape `(units, hidden)`.
        num_experts: Number of experts, from 1 to `units`.
        keep_ratio: Share of the units that an expert keeps, in (0, 1].
        generator: Source of the first centres.
        iterations: Maximum number of k-means rounds.

    Returns:
        True where an expert keeps a unit. Shape `(experts, units)`, bool.

    Raises:
        ValueError: If a weight is not finite, or a count or the share is out of range.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2110.01786, section 3; the greedy assignment of units to
    clusters, and any width but `units / experts`, are our own design.
    """
    width = _check_counts(len(rows), num_experts, keep_ratio)
    if not rows.isfinite().all():
        broken = int((~rows.isfinite().all(dim=1)).sum())
        raise ValueError(f"`rows` must be finite, got {broken} rows with NaN or infinity. Repair the weights first.")
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}. Use 20.")
    rows = F.normalize(rows.detach().double(), dim=1)  # a row of zeros stays zero
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


def _check_counts(num_units: int, num_experts: int, keep_ratio: float) -> int:
    """Check the share and the number of experts; return the width of the experts."""
    width = count_kept(num_units, keep_ratio)
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
    """Compute the squared distance of each row from each centre. Shape `(units, experts)`."""
    return rows.square().sum(dim=1, keepdim=True) - 2 * rows @ centres.T + centres.square().sum(dim=1)


def _cluster_means(rows: Tensor, cluster: Tensor, num_experts: int) -> Tensor:
    """Average the rows of each cluster; no cluster is empty. Shape `(experts, hidden)`."""
    members = F.one_hot(cluster, num_experts).to(rows.dtype)  # (units, experts)
    return members.T @ rows / members.sum(dim=0)[:, None]


def _first_centres(rows: Tensor, num_experts: int, generator: Generator) -> Tensor:
    """Draw rows as first centres, with probabilities that grow with the distance from earlier ones (k-means++)."""
    probability = rows.new_ones(len(rows))
    chosen: list[int] = []
    for _ in range(num_experts):
        chosen.append(int(torch.multinomial(probability.to(generator.device), 1, generator=generator)))
        nearest = _squared_distances(rows, rows[chosen]).amin(dim=1)  # (units,)
        probability = nearest.clamp(min=1e-12)  # identical rows can still be drawn
    return rows[chosen]


def _fill_clusters(distances: Tensor) -> Tensor:
    """Assign units to near clusters of equal size, those first that lose most by their second choice.

    Whenever a cluster is full, the remaining units choose again among the others. For two clusters the total distance
    is minimal; for more, this is a greedy approximation.

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
        served = int((taken <= room).all(dim=1).sum())  # the queue stops at the first unit without room
        cluster[left[queue[:served]]] = choice[queue[:served]]
        room = room - taken[served - 1]
        left = left[queue[served:]].sort().values
    return cluster
