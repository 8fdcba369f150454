"""Between matrices and chains of cores: decompose a matrix, round a chain to smaller bonds, and set its gauge.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; Gao et al. 2022, https://arxiv.org/abs/2203.01104.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import merge
from .functional_shapes import check_bonds, full_bonds


GAUGES = ("symmetric", "left", "centre", "even")
TRUNCATIONS = ("sequential", "simultaneous")
RANK_TOLERANCE = 1e-12  # relative to the largest Schmidt value: smaller ones are rounding errors of float64


def decompose(
    matrix: Tensor,
    row_factors: Sequence[int],
    column_factors: Sequence[int],
    *,
    bonds: Sequence[int] | None = None,
    gauge: str = "symmetric",
    truncation: str = "sequential",
) -> tuple[list[Tensor], list[Tensor]]:
    """Write a matrix as a chain of cores, in float64, by one singular value decomposition per bond.

    A matrix smaller than the product of its factors is padded with zeros. Directions of zero weight are dropped, so
    the bonds of a rank-deficient matrix are smaller than asked for.

    Args:
        matrix: Shape `(rows, columns)`.
        row_factors: One for each core; their product is at least `rows`.
        column_factors: Likewise for the columns.
        bonds: Largest size of each bond, `num_cores - 1` of them; None truncates nothing.
        gauge: Which cores carry the singular values of a bond: `symmetric`, both sides alike, as the authors' code
            does, of a truncated chain by its own values; `left`, the last core; `centre`, the central tensor; `even`,
            as `symmetric`, with entries of one size in all cores, so that one learning rate suits all (both are
            our own).
        truncation: `sequential` truncates while it decomposes; `simultaneous` truncates afterwards, as the authors'
            code does, and is slightly less exact.

    Returns:
        The cores, in the matrix's dtype, and all singular values at each bond, in float64, those of dropped
        directions included. Without truncation, or with the simultaneous one, they are the matrix's Schmidt values.

    Raises:
        ValueError: If factors or bonds do not fit the matrix, if an option is unknown, or if a value is not finite.

    Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; Oseledets 2011 for the sequential truncation.
    """
    _check_matrix(matrix, row_factors, column_factors)
    check_option("gauge", gauge, GAUGES)
    check_option("truncation", truncation, TRUNCATIONS)
    full = full_bonds(row_factors, column_factors)
    wanted = full if bonds is None else check_bonds(bonds, full)
    limits = wanted if truncation == "sequential" else full
    rest = _interleave(matrix.detach().double(), row_factors, column_factors)
    sizes = list(zip(row_factors, column_factors, strict=True))
    left: list[Tensor] = []
    values: list[Tensor] = []
    bond = 1
    for (i, j), limit in zip(sizes, limits, strict=False):
        core, spectrum, rest = _split(rest.reshape(bond * i * j, -1), limit)
        left.append(core.reshape(bond, i, j, -1))
        values.append(spectrum)
        bond = core.shape[1]
    left.append(rest.reshape(bond, *sizes[-1], 1))
    if truncation == "simultaneous":
        left = _cut(left, wanted)
    exact = all(core.shape[-1] == _rank(spectrum) for core, spectrum in zip(left, values, strict=False))
    cores = _set_gauge(left, values if exact else None, gauge)
    return [core.to(matrix.dtype) for core in cores], values


def round_cores(
    cores: Sequence[Tensor], bonds: Sequence[int] | None = None, *, gauge: str = "symmetric"
) -> tuple[list[Tensor], list[Tensor]]:
    """Truncate the bonds of a chain optimally, without building its matrix, and set its gauge.

    The error relative to the given chain is the root of the sum of the squares of the dropped singular values, the
    same as if the matrix were decomposed anew.

    Args:
        cores: In any gauge, trained or not.
        bonds: Largest size of each bond; None drops directions of zero weight only.
        gauge: As in `decompose`.

    Returns:
        The cores, in the dtype they had, and all singular values at each bond, in float64, those of dropped
        directions included.

    Raises:
        ValueError: If the number of bonds does not match the cores, if one is below 1, or if a value is not finite.

    Source: Oseledets 2011, https://doi.org/10.1137/090752286, algorithm 2.
    """
    check_option("gauge", gauge, GAUGES)
    if not all(bool(core.isfinite().all()) for core in cores):
        raise ValueError("`cores` must hold finite values, got NaN or infinity. Go back to a checkpoint without them.")
    limits = tuple(core.shape[-1] for core in cores[:-1])
    if bonds is not None:
        limits = tuple(min(pair) for pair in zip(limits, check_bonds(bonds, None, len(limits)), strict=True))
    chain = [core.detach().double() for core in cores]
    left, values = _sweep(chain, limits)
    exact = all(core.shape[-1] == _rank(spectrum) for core, spectrum in zip(left, values, strict=False))
    rounded = _set_gauge(left, values if exact else None, gauge)
    return [core.to(cores[0].dtype) for core in rounded], values


def project_centre(matrix: Tensor, left: Sequence[Tensor], right: Sequence[Tensor], digits: tuple[int, int]) -> Tensor:
    """Return the central tensor that brings a chain closest to a matrix, for given auxiliary tensors.

    For the auxiliary tensors of `decompose` this is the central tensor of `decompose` if only the two bonds beside it
    were truncated, and a better one if others were, too. It needs no singular value decomposition of the matrix, and
    does not depend on the signs of one (our design).

    Args:
        matrix: Shape `(rows, columns)`.
        left: Auxiliary tensors before the centre.
        right: Auxiliary tensors behind it.
        digits: Number of rows and of columns of the central tensor.

    Returns:
        Shape `(bond, rows, columns, next bond)`, in the matrix's dtype.
    """
    before, behind = merge([core.double() for core in left]), merge([core.double() for core in right])
    head, tail = before.flatten(0, 2), behind.flatten(1)  # (rows * columns of left, bond), (bond, rows * columns)
    rows, columns = zip(before.shape[1:3], digits, behind.shape[1:3], strict=True)
    rest = _interleave(matrix.detach().double(), rows, columns).reshape(len(head), -1)
    rest = (torch.linalg.pinv(head) @ rest).reshape(-1, tail.shape[1])  # (bond * rows * columns, those of the right)
    return (rest @ torch.linalg.pinv(tail)).reshape(-1, *digits, len(tail)).to(matrix.dtype)


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an option that is not among the allowed ones.

    Raises:
        ValueError: If it is not; the message lists them.
    """
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _interleave(matrix: Tensor, row_factors: Sequence[int], column_factors: Sequence[int]) -> Tensor:
    """Pad a matrix with zeros, and order its entries by first row digit, first column digit, second row digit, ..."""
    count, (rows, columns) = len(row_factors), matrix.shape
    right, below = math.prod(column_factors) - columns, math.prod(row_factors) - rows
    padded = torch.nn.functional.pad(matrix, (0, right, 0, below))
    order = [side * count + k for k in range(count) for side in (0, 1)]
    return padded.reshape(*row_factors, *column_factors).permute(order)


def _split(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept left singular vectors, all singular values, and the matrix in the basis of these vectors."""
    if matrix.shape[0] < matrix.shape[1]:  # the right singular vectors are not needed: five times faster
        basis, square = None, torch.linalg.qr(matrix.mT, mode="r")[1].mT
    else:
        basis, square = torch.linalg.qr(matrix)
    try:
        u, values, _ = torch.linalg.svd(square)
    except torch.linalg.LinAlgError:  # slower and exact to half the digits, but it always converges
        squares, u = torch.linalg.eigh(square @ square.mT)
        u, values = u.flip(1), squares.flip(0).clamp(min=0).sqrt()
    u = u[:, : min(limit, _rank(values))]
    u = u if basis is None else basis @ u
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))  # (1, kept)
    u = u * torch.where(largest < 0, -1.0, 1.0).to(u.dtype)  # so that equal matrices give equal cores
    return u, values, u.mT @ matrix


def _rank(values: Tensor) -> int:
    return max(int((values > RANK_TOLERANCE * values[0]).count_nonzero()), 1)


def _sweep(cores: Sequence[Tensor], limits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Orthogonalise from right to left, then truncate from left to right."""
    chain, carry = list(cores), torch.eye(1, dtype=torch.float64, device=cores[0].device)
    for k in range(len(chain) - 1, 0, -1):
        core = chain[k] @ carry  # (bond, rows, columns, next bond)
        q, r = torch.linalg.qr(core.flatten(1).mT)
        chain[k], carry = q.mT.reshape(-1, *core.shape[1:]), r.mT
    chain[0] = chain[0] @ carry
    left, values = [], []
    rest = torch.eye(1, dtype=torch.float64, device=cores[0].device)
    for core, limit in zip(chain, limits, strict=False):
        core = (rest @ core.flatten(1)).reshape(-1, *core.shape[1:])
        kept, spectrum, rest = _split(core.flatten(0, 2), limit)
        left.append(kept.reshape(*core.shape[:3], -1))
        values.append(spectrum)
    left.append((rest @ chain[-1].flatten(1)).reshape(-1, *chain[-1].shape[1:]))
    return left, values


def _cut(cores: Sequence[Tensor], bonds: Sequence[int]) -> list[Tensor]:
    ends = (1, *bonds, 1)
    return [core[:a, :, :, :b] for core, a, b in zip(cores, ends, ends[1:], strict=False)]


def _set_gauge(left: Sequence[Tensor], values: Sequence[Tensor] | None, gauge: str) -> list[Tensor]:
    """Move the norm of a left-orthogonal chain from its last core to where the gauge wants it."""
    if gauge == "left":
        return list(left)
    if gauge == "centre":
        chain, carry = list(left), torch.eye(1, dtype=torch.float64, device=left[0].device)
        for k in range(len(chain) - 1, len(chain) // 2, -1):
            core = chain[k] @ carry
            q, r = torch.linalg.qr(core.flatten(1).mT)
            chain[k], carry = q.mT.reshape(-1, *core.shape[1:]), r.mT
        chain[len(chain) // 2] = chain[len(chain) // 2] @ carry
        return chain
    if values is None:  # the chain was truncated, and has Schmidt values of its own
        left, values = _sweep(left, [core.shape[-1] for core in left[:-1]])
    roots = [spectrum[: core.shape[-1]].sqrt() for core, spectrum in zip(left, values, strict=False)]
    roots = [torch.where(root > 0, root, 1.0) for root in roots]
    one = torch.ones(1, dtype=torch.float64, device=left[0].device)
    cores = [
        core * after / before[:, None, None, None]
        for core, before, after in zip(left, [one, *roots], [*roots, one], strict=True)
    ]
    return _even_out(cores) if gauge == "even" else cores


def _even_out(cores: list[Tensor]) -> list[Tensor]:
    """Scale cores to one root mean square, and leave their product as it is."""
    sizes = torch.stack([core.square().mean().sqrt() for core in cores])
    if not bool((sizes > 0).all()):
        return cores
    return [core * scale for core, scale in zip(cores, sizes.log().mean().exp() / sizes, strict=True)]


def _check_matrix(matrix: Tensor, row_factors: Sequence[int], column_factors: Sequence[int]) -> None:
    if matrix.dim() != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise ValueError(
            f"`matrix` must be a floating point matrix that is not empty, got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}."
        )
    if len(row_factors) != len(column_factors):
        raise ValueError(
            f"`row_factors` and `column_factors` must be as many, got {len(row_factors)} and {len(column_factors)}."
        )
    for name, factors, size in (
        ("row_factors", row_factors, matrix.shape[0]),
        ("column_factors", column_factors, matrix.shape[1]),
    ):
        if min(factors) < 1 or math.prod(factors) < size:
            raise ValueError(
                f"`{name}` must be positive and multiply to {size} or more, got {tuple(factors)}. Use "
                f"`factor_shape({size}, {len(factors)})`."
            )
    if not bool(matrix.isfinite().all()):
        raise ValueError("`matrix` must hold finite values, got NaN or infinity. Repair the checkpoint first.")
