"""Chains of cores: products of a matrix that is written as a matrix product operator.

Core `k` of `n` has shape `(bond, rows, columns, next bond)`, the outer bonds being 1. A row index counts through the
`row_factors`, a column index through the `column_factors`, the last fastest; an entry of the matrix is the product of
the slices of all cores at its row's and its column's digits. The core in the middle is the central tensor, the others
are the auxiliary tensors.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; Gao et al. 2022, https://arxiv.org/abs/2203.01104.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


TOKENS_AT_ONCE = 64  # through a chain: the intermediate results of so many tokens fit in the cache


def contract(cores: Sequence[Tensor], rows: int | None = None, columns: int | None = None) -> Tensor:
    """Rebuild the matrix of a chain.

    The cores on either side of the centre are merged first, which leaves two large products and one copy. Two cores
    are multiplied as they are.

    Args:
        cores: Each `(..., bond, rows, columns, next bond)`; leading dimensions are broadcast, so that
            auxiliary tensors may be stacked while the central tensor is not.
        rows: Of the matrix without padding; None for all.
        columns: Likewise.

    Returns:
        Shape `(..., rows, columns)`, differentiable in every core.
    """
    if len(cores) == 2:
        return merge(cores)[..., 0, :rows, :columns, 0]
    centre = len(cores) // 2
    left, middle, right = merge(cores[:centre]), cores[centre], merge(cores[centre + 1 :])
    head, tail = left.flatten(-4, -2), right.flatten(-3, -1)  # (..., entries, bond), (..., next bond, entries)
    (before, bond), (after, behind) = head.shape[-2:], tail.shape[-2:]
    if bond * behind * (before + after) <= before * after * (bond + behind):  # the order with fewer multiplications
        whole = head @ (middle.flatten(-4, -2) @ tail).unflatten(-2, (bond, -1)).flatten(-2, -1)
    else:
        whole = (head @ middle.flatten(-3, -1)).unflatten(-1, (-1, after)).flatten(-3, -2) @ tail
        whole = whole.unflatten(-2, (before, -1)).flatten(-2, -1)  # (..., entries of left, those of middle and right)
    digits = (*left.shape[-3:-1], *middle.shape[-3:-1], *right.shape[-3:-1])
    digits = whole.unflatten(-1, digits[2:]).unflatten(-5, digits[:2])  # (..., row, column, row, column, row, column)
    matrix = digits.movedim((-5, -3), (-3, -2)).flatten(-6, -4).flatten(-3, -1)  # (..., rows, columns)
    return matrix[..., :rows, :columns]


def merge(cores: Sequence[Tensor]) -> Tensor:
    """Multiply neighbouring cores into one.

    Args:
        cores: Each `(..., bond, rows, columns, next bond)`.

    Returns:
        Shape `(..., bond, all rows, all columns, next bond)`.
    """
    merged = cores[0]
    for core in cores[1:]:
        product = merged.flatten(-4, -2) @ core.flatten(-3, -1)  # (..., bond * rows * columns, the same of `core`)
        product = product.unflatten(-1, core.shape[-3:]).unflatten(-4, merged.shape[-4:-1])
        merged = product.transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)
    return merged


def contract_activation(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Multiply an activation by the matrix of a chain, core by core, without building the matrix.

    Args:
        x: Shape `(..., columns)`, as wide as the product of the column factors.
        cores: Each `(bond, rows, columns, next bond)`.

    Returns:
        `x @ matrix.T`, shape `(..., rows)`, as high as the product of the row factors.
    """
    links = [core.permute(1, 3, 0, 2).flatten(2).flatten(0, 1) for core in cores]  # (rows * next bond, bond * columns)
    parts = x.reshape(-1, x.shape[-1]).split(TOKENS_AT_ONCE)
    passed = torch.cat([_pass(part, cores, links) for part in parts])  # (tokens, rows)
    return passed.reshape(*x.shape[:-1], passed.shape[-1])


def _pass(x: Tensor, cores: Sequence[Tensor], links: Sequence[Tensor]) -> Tensor:
    """Multiply a few tokens by a chain; tokens are the last dimension, so that products are few and wide."""
    (tokens, rest), done, state = x.shape, 1, x.mT
    for core, link in zip(cores, links, strict=True):
        bond, rows, columns, _ = core.shape
        rest //= columns
        state = state.reshape(done, bond * columns, rest * tokens)
        # With a single column left, a plain product replaces a batch of them.
        state = state[..., 0] @ link.mT if rest * tokens == 1 else link @ state
        done *= rows
    return state.reshape(done, tokens).mT


def gather_rows(cores: Sequence[Tensor], ids: Tensor, columns: int | None = None) -> Tensor:
    """Rebuild some rows of the matrix of a chain.

    Rows that differ only in the digits of the right side share the product of the left side and the central tensor,
    which is computed once, and only where one of these rows needs it.

    Args:
        cores: Each `(bond, rows, columns, next bond)`; of two, the first has all rows, and the second all columns.
        ids: Index of each row. Shape `(count,)`.
        columns: Of the matrix without padding; None for all.

    Returns:
        Shape `(count, columns)`, differentiable in every core.
    """
    if len(cores) == 2:
        return (cores[0][0, ids, 0] @ cores[1][:, 0, :, 0])[:, :columns]
    centre = len(cores) // 2
    left = merge(cores[:centre])[0]  # (rows, columns, bond)
    right = merge(cores[centre + 1 :])[..., 0]  # (bond, rows, columns)
    middles = cores[centre].flatten(2).unbind(1)  # of each digit: (bond, columns * next bond)
    shared, places = (ids // right.shape[1]).unique(return_inverse=True)
    digits, first = shared % len(middles), shared // len(middles)
    order = digits.argsort(stable=True)
    groups = zip(middles, first[order].split(digits.bincount(minlength=len(middles)).tolist()), strict=True)
    heads = torch.cat([(left[rows] @ middle).flatten(1) for middle, rows in groups if len(rows)])
    heads = heads[order.argsort()[places]].unflatten(1, (-1, len(right)))  # (count, columns of left and middle, bond)
    return (heads @ right[:, ids % right.shape[1]].movedim(1, 0)).flatten(1)[:, :columns]


def pad_core(core: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad a core with zeros to larger bonds, which does not change the matrix of its chain.

    The bonds of a matrix of low rank are smaller than its sizes allow; this is for shapes that follow from sizes.

    Args:
        core: Shape `(bond, rows, columns, next bond)`.
        shape: The shape wanted, which is larger in the bonds only.

    Returns:
        A contiguous tensor, so that sums round as with a core that was loaded.
    """
    padded = torch.nn.functional.pad(core, (0, shape[3] - core.shape[3], 0, 0, 0, 0, 0, shape[0] - core.shape[0]))
    return padded.clone(memory_format=torch.contiguous_format)
