"""The error of truncated bonds, and the choice of the bonds of many matrices for a given size or error.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205, for the bound and the entropy.
"""

import heapq
import math
from collections.abc import Sequence

from torch import Tensor


def error_bound(values: Sequence[Tensor], bonds: Sequence[int]) -> float:
    """Return an upper bound of the error of a truncation.

    Args:
        values: Schmidt values at each bond.
        bonds: Directions that are kept at each bond.

    Returns:
        Bound of the Frobenius norm of the difference; the largest tail of a single bond bounds it from below.

    Source: Liu et al. 2021, theorem 1.
    """
    return math.sqrt(sum(float(spectrum[bond:].square().sum()) for spectrum, bond in zip(values, bonds, strict=True)))


def entanglement_entropy(values: Tensor) -> float:
    """Return the entanglement entropy of a bond in nats: 0 for one direction, `ln(n)` for `n` of equal weight.

    Args:
        values: Schmidt values of one bond.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; squared and normalised values are our reading.
    """
    weights = values.double().square()
    weights = weights[weights > 0] / weights.sum()
    return float(-(weights * weights.log()).sum())


def choose_bonds(
    values: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[int]],
    *,
    max_parameters: float | None = None,
    max_error: float | None = None,
    weights: Sequence[float] | None = None,
) -> list[tuple[int, ...]]:
    """Choose the bonds of many matrices together, greedily by the error per parameter (our design).

    The direction that costs the least error per saved parameter is dropped first. The error of a matrix is the bound
    of `error_bound` relative to its norm, so that all matrices count alike. On small matrices this comes within about
    a tenth of the best bonds.

    Args:
        values: Schmidt values at each bond of each matrix.
        shapes: Rows times columns of each core of each matrix.
        max_parameters: Largest number of parameters of all matrices together.
        max_error: Largest relative error of every matrix.
        weights: How much the square of each matrix's relative error counts; by default as much as it has entries.

    Returns:
        Bonds of each matrix.

    Raises:
        ValueError: If neither or both limits are given, or if bonds of 1 everywhere are still too large.
    """
    if (max_parameters is None) == (max_error is None):
        raise ValueError("Exactly one of `max_parameters` and `max_error` must be given. Leave the other one out.")
    weights = [math.prod(sizes) for sizes in shapes] if weights is None else weights
    chains = [_Chain(*each) for each in zip(values, shapes, weights, strict=True)]
    total = sum(chain.count_parameters() for chain in chains)
    queue = [(chain.price(k), m, k) for m, chain in enumerate(chains) for k in range(len(chain.bonds))]
    heapq.heapify(queue)
    while queue and (max_parameters is None or total > max_parameters):
        known, m, k = heapq.heappop(queue)
        chain = chains[m]
        if (now := chain.price(k)) > known:  # a neighbouring bond has shrunk since, so there is less to save here
            heapq.heappush(queue, (now, m, k))
        elif chain.bonds[k] > 1 and (max_error is None or chain.error + chain.loss(k) <= max_error**2):
            total -= chain.saved(k)
            chain.drop(k)
            heapq.heappush(queue, (chain.price(k), m, k))
    if max_parameters is not None and total > max_parameters:
        raise ValueError(
            f"`max_parameters` must leave room for one direction at every bond, which takes {total}, got "
            f"{max_parameters}. Ask for a larger size or decompose fewer matrices."
        )
    if max_parameters is not None:
        _spend_rest(chains, int(max_parameters) - total)
    return [tuple(chain.bonds) for chain in chains]


def _spend_rest(chains: Sequence["_Chain"], spare: int) -> None:
    """Enlarge bonds again while parameters are left: the last dropped direction may have saved too many."""
    places = [(chain, k) for chain in chains for k in range(len(chain.bonds))]
    while places := [(chain, k) for chain, k in places if chain.gain(k) and chain.saved(k) <= spare]:
        chain, k = max(places, key=lambda place: place[0].weight * place[0].gain(place[1]))
        spare -= chain.saved(k)
        chain.bonds[k] += 1


class _Chain:
    """The bonds of one matrix while directions are dropped, and the square of its relative error."""

    def __init__(self, values: Sequence[Tensor], sizes: Sequence[int], weight: float) -> None:
        norm = float(values[0].square().sum()) or 1.0
        self.losses = [(spectrum.square() / norm).tolist() for spectrum in values]
        self.weight = weight
        self.sizes, self.bonds, self.error = sizes, [len(spectrum) for spectrum in values], 0.0

    def loss(self, k: int) -> float:
        return self.losses[k][self.bonds[k] - 1]

    def gain(self, k: int) -> float:
        return self.losses[k][self.bonds[k]] if self.bonds[k] < len(self.losses[k]) else 0.0

    def saved(self, k: int) -> int:
        ends = (1, *self.bonds, 1)
        return ends[k] * self.sizes[k] + self.sizes[k + 1] * ends[k + 2]

    def price(self, k: int) -> float:
        return self.weight * self.loss(k) / self.saved(k)

    def drop(self, k: int) -> None:
        self.error += self.loss(k)
        self.bonds[k] -= 1

    def count_parameters(self) -> int:
        return sum(a * size * b for a, size, b in zip((1, *self.bonds), self.sizes, (*self.bonds, 1), strict=True))
