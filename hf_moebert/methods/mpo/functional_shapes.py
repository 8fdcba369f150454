"""What a matrix product operator weighs: factors, bonds, parameters, errors, and the bonds that are worth keeping.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205.
"""

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor


LARGEST_PRIME = 64
# The factors of the published models: of whole matrices with five cores, and of single sizes by number of cores.
PUBLISHED_PAIRS = {
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (30000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2)),
    (30522, 768): ((6, 8, 10, 8, 8), (4, 4, 4, 4, 3)),
    (32128, 768): ((8, 8, 8, 8, 8), (3, 4, 4, 4, 4)),
}
PUBLISHED_FACTORS: dict[int, dict[int, tuple[int, ...]]] = {
    3: {768: (8, 12, 8), 1024: (8, 16, 8), 3072: (12, 16, 16), 4096: (16, 16, 16), 50265: (35, 40, 36)},
    5: {
        768: (4, 4, 4, 4, 3),
        1024: (4, 4, 4, 4, 4),
        3072: (4, 4, 8, 6, 4),
        4096: (4, 4, 8, 8, 4),
        50265: (5, 10, 14, 12, 6),
    },
    7: {
        768: (2, 2, 4, 4, 3, 2, 2),
        1024: (2, 2, 4, 4, 4, 2, 2),
        3072: (2, 4, 4, 4, 4, 3, 2),
        4096: (2, 4, 4, 4, 4, 4, 2),
        50265: (4, 5, 5, 7, 6, 4, 3),
    },
    9: {
        768: (2, 2, 2, 2, 3, 2, 2, 2, 2),
        1024: (2, 2, 2, 2, 4, 2, 2, 2, 2),
        3072: (2, 2, 2, 4, 4, 3, 2, 2, 2),
        50265: (2, 2, 5, 5, 7, 6, 3, 2, 2),
    },
}


def factor_matrix(rows: int, columns: int, num_cores: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose the factors of both sides of a matrix: the published ones where there are any, or `factor_shape`.

    Args:
        rows: Output features of a linear layer, or entries of a vocabulary.
        columns: The other side.
        num_cores: Odd, at least 3.

    Returns:
        Factors of the rows and of the columns.

    Raises:
        ValueError: As `factor_shape`.

    Source: Liu et al. 2021, appendix, for BERT and ALBERT; the authors' code for T5.
    """
    if num_cores == 5 and (rows, columns) in PUBLISHED_PAIRS:
        return PUBLISHED_PAIRS[rows, columns]
    return factor_shape(rows, num_cores), factor_shape(columns, num_cores)


def factor_shape(size: int, num_cores: int) -> tuple[int, ...]:
    """Split a size into one factor for each core, the largest in the middle.

    Sizes of the published models get the published factors. Others are split by our own rule: prime factors, the
    largest first, go to the slot with the smallest product. A size with a prime factor above 64 is first rounded up
    to a multiple of 64; the matrix is then padded with zeros.

    Args:
        size: Number of rows or columns.
        num_cores: Odd, at least 3.

    Returns:
        `num_cores` factors; their product is at least `size`.

    Raises:
        ValueError: If the number of cores is not odd or below 3, or if the size is not positive.

    Source: The authors' later code for single sizes.
    """
    check_num_cores(num_cores)
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}. Give the number of rows or columns of a matrix.")
    if size in PUBLISHED_FACTORS.get(num_cores, {}):
        return PUBLISHED_FACTORS[num_cores][size]
    primes = _prime_factors(size)
    if primes and primes[-1] > LARGEST_PRIME:
        primes = _prime_factors(-(-size // 64) * 64)
        if primes[-1] > LARGEST_PRIME:  # of the multiple itself: the next power of two times a small number
            step = 2 ** max(math.ceil(math.log2(size)) - 5, 0)
            primes = _prime_factors(-(-size // step) * step)
    centre = num_cores // 2
    outwards = sorted(range(num_cores), key=lambda slot: abs(slot - centre))
    factors = [1] * num_cores
    for prime in reversed(primes):
        factors[min(outwards, key=lambda slot: factors[slot])] *= prime  # `outwards` breaks ties
    largest = max(outwards, key=lambda slot: factors[slot])
    factors[centre], factors[largest] = factors[largest], factors[centre]
    return tuple(factors)


def check_num_cores(num_cores: int) -> None:
    """Refuse a number of cores that has no middle.

    Raises:
        ValueError: If it is even or below 3, or no whole number.
    """
    if type(num_cores) is not int or num_cores < 3 or num_cores % 2 == 0:
        raise ValueError(
            f"`num_cores` must be odd and at least 3, got {num_cores!r}. Use 5, as published: one central tensor and "
            "two auxiliary tensors on either side."
        )


def full_bonds(row_factors: Sequence[int], column_factors: Sequence[int]) -> tuple[int, ...]:
    """Return the bonds of a decomposition that leaves nothing out: `num_cores - 1` sizes."""
    sizes = [i * j for i, j in zip(row_factors, column_factors, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def cap_bonds(row_factors: Sequence[int], column_factors: Sequence[int], cap: int | None) -> tuple[int, ...]:
    """Return the largest bonds that a cap allows; None caps nothing."""
    return tuple(bond if cap is None else min(bond, cap) for bond in full_bonds(row_factors, column_factors))


def check_cap(bond: int | None) -> None:
    """Refuse a cap on bonds that leaves nothing, or is no number.

    Raises:
        ValueError: If it is no whole number, or below 1.
    """
    if bond is not None and (type(bond) is not int or bond < 1):
        raise ValueError(f"`bond` must be a whole number of at least 1, got {bond!r}. Use None to cut nothing.")


def count_parameters(row_factors: Sequence[int], column_factors: Sequence[int], bonds: Sequence[int]) -> list[int]:
    """Return the number of entries of each core."""
    ends = (1, *bonds, 1)
    sizes = zip(row_factors, column_factors, strict=True)
    return [left * i * j * right for left, (i, j), right in zip(ends, sizes, ends[1:], strict=False)]


def check_bonds(bonds: Sequence[int], full: Sequence[int] | None, count: int | None = None) -> tuple[int, ...]:
    """Refuse bonds that no chain of these cores can have.

    Args:
        bonds: What the user asked for.
        full: The largest possible ones; None if any are.
        count: How many there must be; the length of `full` if that is given.

    Raises:
        ValueError: If there are too few or too many, or if one is below 1 or above its largest.
    """
    count = len(full) if full is not None else count
    if len(bonds) != count:
        raise ValueError(f"`bonds` must name {count} sizes, one between every two cores, got {len(bonds)}: {bonds}.")
    for place, bond in enumerate(bonds):
        largest = full[place] if full is not None else bond
        if not 1 <= bond <= largest:
            limit = f"from 1 to {largest}" if full is not None else "at least 1"
            raise ValueError(
                f"`bonds[{place}]` must be {limit}, got {bond}. Use `full_bonds` for the largest, or a cap, which is "
                "clamped."
            )
    return tuple(bonds)


def error_bound(values: Sequence[Tensor], bonds: Sequence[int]) -> float:
    """Bound the error of a truncation from above, without doing it.

    Args:
        values: Schmidt values at each bond.
        bonds: Directions that are kept at each bond.

    Returns:
        Frobenius norm of the difference at most; the largest tail of a single bond bounds it from below.

    Source: Liu et al. 2021, theorem 1.
    """
    return math.sqrt(sum(float(spectrum[bond:].square().sum()) for spectrum, bond in zip(values, bonds, strict=True)))


def entanglement_entropy(values: Tensor) -> float:
    """Say how evenly a bond's weight is spread over its directions, in nats: 0 for one, `ln(n)` for `n` alike.

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
) -> list[tuple[int, ...]]:
    """Choose the bonds of many matrices together: always drop what costs the least error per parameter (our design).

    The error of a matrix is the bound of `error_bound` relative to its norm, so that all matrices count alike. On
    small matrices this comes within a tenth or so of the best bonds.

    Args:
        values: Schmidt values at each bond of each matrix.
        shapes: Rows times columns of each core of each matrix.
        max_parameters: Drop directions until all matrices together have at most so many parameters.
        max_error: Drop directions as long as no matrix exceeds this relative error.

    Returns:
        Bonds of each matrix.

    Raises:
        ValueError: If neither or both limits are given, or if one bond everywhere is still too large.
    """
    if (max_parameters is None) == (max_error is None):
        raise ValueError("Exactly one of `max_parameters` and `max_error` must be given. Leave the other one out.")
    chains = [_Chain(spectra, sizes) for spectra, sizes in zip(values, shapes, strict=True)]
    total = sum(chain.count_parameters() for chain in chains)
    queue = [(chain.price(k), m, k) for m, chain in enumerate(chains) for k in range(len(chain.bonds))]
    heapq.heapify(queue)
    while queue and (max_parameters is None or total > max_parameters):
        known, m, k = heapq.heappop(queue)
        chain = chains[m]
        if (now := chain.price(k)) > known:  # a neighbour got smaller: there is less to save here
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
        _give_back(chains, int(max_parameters) - total)
    return [tuple(chain.bonds) for chain in chains]


def _give_back(chains: Sequence["_Chain"], spare: int) -> None:
    """Use up what dropping saved in excess: the last direction may have been a large one."""
    places = [(chain, k) for chain in chains for k in range(len(chain.bonds))]
    while places := [(chain, k) for chain, k in places if chain.gain(k) and chain.saved(k) <= spare]:
        chain, k = max(places, key=lambda place: place[0].entries * place[0].gain(place[1]))
        spare -= chain.saved(k)
        chain.bonds[k] += 1


class _Chain:
    """One matrix while directions are dropped: its bonds, and the square of its relative error."""

    def __init__(self, values: Sequence[Tensor], sizes: Sequence[int]) -> None:
        norm = float(values[0].square().sum()) or 1.0
        self.losses = [(spectrum.square() / norm).tolist() for spectrum in values]
        self.entries = math.prod(sizes)
        self.sizes, self.bonds, self.error = sizes, [len(spectrum) for spectrum in values], 0.0

    def loss(self, k: int) -> float:
        return self.losses[k][self.bonds[k] - 1]

    def gain(self, k: int) -> float:
        return self.losses[k][self.bonds[k]] if self.bonds[k] < len(self.losses[k]) else 0.0

    def saved(self, k: int) -> int:
        ends = (1, *self.bonds, 1)
        return ends[k] * self.sizes[k] + self.sizes[k + 1] * ends[k + 2]

    def price(self, k: int) -> float:
        return self.entries * self.loss(k) / self.saved(k)

    def drop(self, k: int) -> None:
        self.error += self.loss(k)
        self.bonds[k] -= 1

    def count_parameters(self) -> int:
        return sum(a * size * b for a, size, b in zip((1, *self.bonds), self.sizes, (*self.bonds, 1), strict=True))


def plan_chain(
    row_factors: Sequence[int], column_factors: Sequence[int], bonds: Sequence[int]
) -> tuple[tuple[int, ...], int]:
    """Find how to merge neighbouring cores so that an activation passes the chain with the fewest multiplications.

    Args:
        row_factors: One for each core.
        column_factors: Likewise.
        bonds: Between the cores.

    Returns:
        How many neighbours are merged into each link of the chain, and multiplications per token. One link is the
        dense matrix itself.
    """
    count, ends = len(row_factors), (1, *bonds, 1)
    best: tuple[tuple[int, ...], int] = ((count,), math.prod(row_factors) * math.prod(column_factors))
    for cuts in range(1, 2 ** (count - 1)):
        starts = [0, *(k for k in range(1, count) if cuts >> (k - 1) & 1), count]
        macs = sum(
            ends[a] * ends[b] * math.prod(row_factors[:b]) * math.prod(column_factors[a:]) for a, b in pairwise(starts)
        )
        if macs < best[1]:
            best = (tuple(b - a for a, b in pairwise(starts)), macs)
    return best


def _prime_factors(size: int) -> list[int]:
    primes, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1
    return primes + [size] * (size > 1)
