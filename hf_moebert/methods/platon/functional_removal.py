"""Remove inputs of a linear layer one unit after another, each the cheapest, while the others make up for it.

With the second moments `H` of the inputs, the squared error of the outputs is `tr(D H D^T)` for a change `D` of the
weights. Of all changes that leave nothing of unit `u`, with the columns `W_u`, the best one is
`-W_u P_u^-1 P[u, :]` with `P = H^-1` and its block `P_u`, and its error is `tr(W_u P_u^-1 W_u^T)`: the optimal brain
surgeon. `P` without the unit follows by one step of Gaussian elimination, so that every further unit is removed at
its exact error.

Source: Hassibi and Stork 1992 (optimal brain surgeon); Frantar and Alistarh 2022, https://arxiv.org/abs/2208.11580;
for whole units: Kurtic et al. 2023 (ZipLM), https://arxiv.org/abs/2302.04089, and Meng et al. 2024 (OSSCAR),
https://arxiv.org/abs/2403.12983. No code was copied. That outputs are weighed by `metric`, and that inputs count by
their influence, is our own design.
"""

from typing import NamedTuple

import torch
from torch import Tensor


LEAST = 1e-100  # of what is added to the diagonal, where all inputs are zero


class Removal(NamedTuple):
    """A linear layer without the units that were removed.

    Attributes:
        errors: Increase of the error with each unit that was removed, in their order. Shape `(removed,)`.
        kept: Indices of the units that stay, ascending. Shape `(kept,)`.
        columns: Their weights, `(out, kept * unit_size)`.
        bias: The bias that goes with them, `(out,)`; `None` if the inputs have no constant.
    """

    errors: Tensor
    kept: Tensor
    columns: Tensor
    bias: Tensor | None


def invert_moment(moment: Tensor, damping: float) -> Tensor:
    """Invert second moments, damped so that weights change little where the inputs say little.

    Args:
        moment: Mean of `x x^T` over the inputs. Shape `(in, in)`, float64.
        damping: Added to the diagonal, relative to its mean; above 0.
    """
    strength = (damping * moment.diagonal().mean()).clamp(min=LEAST)
    return torch.cholesky_inverse(torch.linalg.cholesky(moment + strength * torch.eye(len(moment)).to(moment)))


def remove_units(
    inverse: Tensor, weight: Tensor, *, units: int, unit_size: int, keep: int, metric: Tensor | None = None
) -> Removal:
    """Remove units one after another, each time the one whose loss the others can make up for best.

    Args:
        inverse: Inverse second moments of the inputs, `(in, in)`, float64. One behind those of the units, the
            constant of a bias, always stays.
        weight: Shape `(out, in)`.
        units: Units whose inputs come first.
        unit_size: Inputs of one unit.
        keep: Units that stay; at least 1.
        metric: Second moments by which errors of the outputs count, `(out, out)`; by default all count alike.
    """
    outputs = len(weight)
    root = None if metric is None else _square_root(metric)
    # [P; W; metric^1/2 W]: one elimination step for all of them
    system = torch.cat([inverse, weight] if root is None else [inverse, weight, root @ weight])  # (in + rows, in)
    left = torch.arange(units, device=weight.device)
    alive = torch.ones_like(left, dtype=torch.bool)
    errors = []
    for _ in range(units - keep):
        increase = _increases(system, outputs, len(left), unit_size).masked_fill_(~alive, torch.inf)
        unit = int(increase.argmin())
        errors.append(increase[unit])
        _eliminate_(system, slice(unit * unit_size, (unit + 1) * unit_size))
        alive[unit] = False
        if 8 * int(alive.sum()) <= 7 * len(left):  # what is zero need not be computed with
            system, left, alive = _compact(system, left, alive, unit_size)
    system, left, alive = _compact(system, left, alive, unit_size)
    fitted = system[system.shape[1] :][:outputs]  # (out, kept * unit_size + others)
    columns, others = fitted.tensor_split([len(left) * unit_size], dim=1)
    found = torch.stack(errors) if errors else weight.new_zeros(0)
    return Removal(found, left, columns, others[:, 0] if others.shape[1] else None)


def _square_root(metric: Tensor) -> Tensor:
    """Return a matrix `R` with `R^T R = metric`, of a matrix that may be singular."""
    values, vectors = torch.linalg.eigh(metric)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _increases(system: Tensor, outputs: int, units: int, unit_size: int) -> Tensor:
    """Compute the error that the removal of each unit adds, `(units,)`."""
    columns = system[-outputs:, : units * unit_size].unflatten(1, (units, unit_size)).permute(1, 2, 0)
    blocks = system[: units * unit_size, : units * unit_size].unflatten(0, (units, unit_size))
    blocks = blocks.unflatten(2, (units, unit_size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if unit_size == 1:
        return columns.square().sum(dim=(1, 2)) / blocks[:, 0, 0]
    alive = blocks.diagonal(dim1=1, dim2=2).any(dim=1)  # (units,)
    blocks = torch.where(alive[:, None, None], blocks, torch.eye(unit_size, dtype=blocks.dtype, device=blocks.device))
    return (columns * torch.linalg.solve(blocks, columns)).sum(dim=(1, 2))  # (units, unit_size, out)


def _eliminate_(system: Tensor, unit: slice) -> None:
    pivot = torch.linalg.solve(system[unit, unit], system[unit])  # (unit_size, in)
    system.addmm_(system[:, unit].clone(), pivot, alpha=-1)
    system[:, unit] = 0  # exactly
    system[unit] = 0


def _compact(system: Tensor, left: Tensor, alive: Tensor, unit_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out the units that were eliminated."""
    inputs = system.shape[1]
    columns = torch.ones(inputs, dtype=torch.bool, device=system.device)
    columns[: len(left) * unit_size] = alive.repeat_interleave(unit_size)
    rows = torch.cat([columns, columns.new_ones(len(system) - inputs)])
    return system[rows][:, columns], left[alive], alive[alive]
