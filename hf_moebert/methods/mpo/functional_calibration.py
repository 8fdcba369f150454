"""Decompositions that know their data: the error of the outputs, not of the weights, on inputs of known moments.

For inputs `X`, one a row, the outputs of a linear layer of matrix `W` are off by `X (W - V)^T` if `V` stands in for
`W`. The squared norm is `tr((W - V) M (W - V)^T)` with the second moments `M = X^T X`: the inputs are not needed.

Source: the whitened decomposition is that of Wang et al. 2024, https://arxiv.org/abs/2403.07378; chains refined to the
outputs' error, and tables sorted and scaled by the use of their rows, are our own design.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import contract


RIDGE = 1e-3  # of the diagonal, added to it: moments of few inputs have directions that were never seen
UNIFORM = 0.5  # of the weight of a table's rows, the rest is by use: rows that were not seen may be used, too
STEPS = 160  # of L-BFGS: the error hardly falls after
MEMORY = 20  # steps that L-BFGS remembers; more did not help
EXACT = 1e-10  # squared relative error below which rounding decides


def stabilise(moments: Tensor) -> Tensor:
    """Return second moments that can be inverted: correlations shrink a little, and what was never seen gets some.

    Args:
        moments: Shape `(columns, columns)`, in float64.
    """
    diagonal = moments.diagonal()
    floor = RIDGE * float(diagonal.mean()) or 1.0
    return moments + torch.diag(RIDGE * (diagonal + floor))


def output_error(matrix: Tensor, other: Tensor, moments: Tensor) -> float:
    """Return the error of the outputs if another matrix stands in for a matrix, relative to their norm.

    Args:
        matrix: Shape `(rows, columns)`.
        other: Likewise.
        moments: Second moments of the inputs, `(columns, columns)`.
    """
    matrix, moments = matrix.detach().double(), moments.double()
    difference = matrix - other.detach().double()
    lost, norm = ((x @ moments * x).sum() for x in (difference, matrix))
    return math.sqrt(max(float(lost), 0.0) / (float(norm) or 1.0))


def whiten(matrix: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix by singular values of its whitened form, whose tails are errors of the outputs.

    The first `rank` columns of the first and rows of the last, with the values between them, are the matrix of that
    rank with the least error of the outputs.

    Args:
        matrix: Shape `(rows, columns)`.
        moments: Second moments of the inputs, positive definite, in float64. Shape `(columns, columns)`.

    Returns:
        Left vectors `(rows, full rank)`, singular values `(full rank,)` and right vectors `(full rank, columns)`, in
        float64; only the left ones are orthogonal.

    Source: Wang et al. 2024, https://arxiv.org/abs/2403.07378, section 3.1.
    """
    root = torch.linalg.cholesky(moments)  # lower triangle, moments = root @ root.T
    left, values, right = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    return left, values, torch.linalg.solve_triangular(root, right, upper=False, left=False)


def refine_chain(cores: Sequence[Tensor], matrix: Tensor, moments: Tensor, *, steps: int = STEPS) -> list[Tensor]:
    """Move all cores of a chain to the least error of the outputs, by L-BFGS.

    Alternating least squares, with conjugate gradients where a core is too large for a direct solution, took more than
    twice the time to the same error.

    Args:
        cores: Any chain near the matrix, each `(bond, rows, columns, next bond)`.
        matrix: Shape `(rows, columns)`.
        moments: Second moments of the inputs. Shape `(columns, columns)`.
        steps: At most.

    Returns:
        Cores of the same shapes, in no certain gauge, in float64.
    """
    dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    weight = matrix.detach().double()
    norm = float((weight @ moments * weight).sum())
    if not norm > 0 or output_error(weight, contract(list(cores), *weight.shape), moments) ** 2 < EXACT:
        return [core.double() for core in cores]
    scaled, weight = (moments.double() / norm).to(dtype), weight.to(dtype)
    with torch.inference_mode(False), torch.enable_grad():
        chain = [core.detach().to(dtype, copy=True).contiguous().requires_grad_() for core in cores]
        optimizer = torch.optim.LBFGS(
            chain,
            max_iter=steps,
            history_size=MEMORY,
            line_search_fn="strong_wolfe",
            tolerance_grad=0,
            tolerance_change=1e-7,  # of the squared relative error
        )

        def loss() -> Tensor:
            difference = contract(chain, *weight.shape) - weight
            product = difference.detach() @ scaled
            value = (product * difference.detach()).sum()
            gradients = torch.autograd.grad(difference, chain, 2 * product)
            for core, gradient in zip(chain, gradients, strict=True):
                core.grad = gradient.contiguous()
            return value

        optimizer.step(loss)
    return [core.detach().double() for core in chain]


def row_scale(counts: Tensor) -> Tensor:
    """Return the scale by which the rows of a table are decomposed: the root of how often each is used.

    Args:
        counts: Uses of each row. Shape `(rows,)`.

    Returns:
        Shape `(rows,)`, of mean square 1, in float64. A part is the same for all rows.
    """
    used = counts.double() / max(float(counts.double().mean()), 1e-12)
    return (UNIFORM + (1 - UNIFORM) * used).sqrt()
