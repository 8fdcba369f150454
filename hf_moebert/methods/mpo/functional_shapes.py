"""Sizes of matrix product operators: factors of a matrix, bonds, parameters, and the cheapest way to multiply.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205.
"""

import math
from collections.abc import Sequence
from itertools import pairwise


LARGEST_PRIME = 64
# Factors of the published models: of whole matrices with five cores, and of single sizes by number of cores.
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

    Two cores are the two factors of a matrix of low rank: one has all rows, the other all columns.

    Args:
        rows: Output features of a linear layer, or entries of a vocabulary.
        columns: The other side.
        num_cores: 2, or odd.

    Returns:
        Factors of the rows and of the columns.

    Raises:
        ValueError: As `factor_shape`.

    Source: Liu et al. 2021, appendix, for BERT and ALBERT; the authors' code for T5.
    """
    if num_cores == 2:
        return (rows, 1), (1, columns)
    if num_cores == 5 and (rows, columns) in PUBLISHED_PAIRS:
        return PUBLISHED_PAIRS[rows, columns]
    return factor_shape(rows, num_cores), factor_shape(columns, num_cores)


def factor_shape(size: int, num_cores: int) -> tuple[int, ...]:
    """Split a size into one factor for each core, the largest in the middle.

    Sizes of the published models get the published factors. Others are split by our own rule: each prime factor, from
    the largest on, goes to the core with the smallest product so far. A size with a prime factor above 64 is rounded
    up to a multiple of 64 first; the matrix is then padded with zeros.

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
        if primes[-1] > LARGEST_PRIME:  # the multiple has one, too: take the next power of two times a small number
            step = 2 ** max(math.ceil(math.log2(size)) - 5, 0)
            primes = _prime_factors(-(-size // step) * step)
    centre = num_cores // 2
    outwards = sorted(range(num_cores), key=lambda core: abs(core - centre))
    factors = [1] * num_cores
    for prime in reversed(primes):
        factors[min(outwards, key=lambda core: factors[core])] *= prime  # `outwards` breaks ties
    largest = max(outwards, key=lambda core: factors[core])
    factors[centre], factors[largest] = factors[largest], factors[centre]
    return tuple(factors)


def full_bonds(row_factors: Sequence[int], column_factors: Sequence[int]) -> tuple[int, ...]:
    """Return the bonds of an exact decomposition: `num_cores - 1` sizes."""
    sizes = [i * j for i, j in zip(row_factors, column_factors, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def cap_bonds(row_factors: Sequence[int], column_factors: Sequence[int], cap: int | None) -> tuple[int, ...]:
    """Return the full bonds, each limited by a cap; None limits nothing."""
    return tuple(bond if cap is None else min(bond, cap) for bond in full_bonds(row_factors, column_factors))


def count_parameters(row_factors: Sequence[int], column_factors: Sequence[int], bonds: Sequence[int]) -> list[int]:
    """Return the number of entries of each core."""
    ends = (1, *bonds, 1)
    sizes = zip(row_factors, column_factors, strict=True)
    return [left * i * j * right for left, (i, j), right in zip(ends, sizes, ends[1:], strict=False)]


def plan_chain(
    row_factors: Sequence[int], column_factors: Sequence[int], bonds: Sequence[int]
) -> tuple[tuple[int, ...], int]:
    """Choose the neighbouring cores to merge so that an activation takes the fewest multiplications.

    Args:
        row_factors: One for each core.
        column_factors: Likewise.
        bonds: Between the cores.

    Returns:
        Number of neighbouring cores that are merged into each link, and multiplications per token. A single link is
        the dense matrix.
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


def check_num_cores(num_cores: int, name: str = "num_cores", *, two: bool = False) -> None:
    """Refuse a number of cores without a central one, unless it is 2 where two factors will do.

    Raises:
        ValueError: If it is even, below 3, or no whole number.
    """
    whole = type(num_cores) is int
    if not whole or (num_cores < 3 or num_cores % 2 == 0) and not (two and num_cores == 2):
        raise ValueError(
            f"`{name}` must be odd and at least 3{', or 2' if two else ''}, got {num_cores!r}. Use 5, as published: "
            "one central tensor and two auxiliary tensors on either side."
        )


def check_cap(bond: int | None) -> None:
    """Refuse a cap on bonds that is no positive whole number.

    Raises:
        ValueError: If it is no whole number, or below 1.
    """
    if bond is not None and (type(bond) is not int or bond < 1):
        raise ValueError(f"`bond` must be a whole number of at least 1, got {bond!r}. Use None to cut nothing.")


def check_bonds(bonds: Sequence[int], full: Sequence[int] | None, count: int | None = None) -> tuple[int, ...]:
    """Refuse bonds that no chain of these cores can have.

    Args:
        bonds: The bonds that were asked for.
        full: The largest possible bonds; None if there is no limit.
        count: Number of bonds; the length of `full` if that is given.

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


def _prime_factors(size: int) -> list[int]:
    primes, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1
    return primes + [size] * (size > 1)
