"""The chains of a model's matrices: of which bonds, and how exact, with or without the inputs of each matrix."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .conversion_calibration import Statistics
from .functional import contract
from .functional_bonds import choose_bonds
from .functional_calibration import output_error, refine_chain, row_scale, stabilise, whiten
from .functional_decomposition import decompose, round_cores
from .functional_shapes import cap_bonds, factor_matrix, full_bonds
from .modeling_mpo import Dense


logger = logging.get_logger(__name__)
TRIALS = 6  # sizes that are tried for an error of the outputs: to 1/64 of a matrix
TRIAL_STEPS = 15  # of refining a trial


@dataclass(frozen=True)
class Size:
    """How small chains are made: by at most one of the three.

    Attributes:
        bond: A cap on every bond.
        max_error: Largest relative error of every matrix, or of its outputs where its inputs are known.
        keep_ratio: Share of the parameters that is kept.
    """

    bond: int | None = None
    max_error: float | None = None
    keep_ratio: float | None = None


@dataclass
class Chain:
    """The cores of a matrix, each `(bond, rows, columns, next bond)`, and how its rows are used, as in `MPOMatrix`."""

    cores: list[Tensor]
    use: tuple[Tensor, ...] = ()

    def count(self) -> int:
        """Count the parameters."""
        return sum(tensor.numel() for tensor in (*self.cores, *self.use))

    def describe(self) -> dict:
        """Return factors and bonds as config.json has them."""
        shape: dict = {
            "row_factors": [core.shape[1] for core in self.cores],
            "column_factors": [core.shape[2] for core in self.cores],
            "bonds": [core.shape[3] for core in self.cores[:-1]],
        }
        return shape | {"sorted_rows": True} if self.use else shape


class Plan:
    """The matrix of one layer, in the form in which it is decomposed.

    Args:
        layer: A dense layer.
        num_cores: 2, or odd.
        moments: Of its inputs, if they are known.
        counts: Of the uses of its rows, if it is a table and they are known.
        sensitivity: Of the model's outputs to its errors, if it is known.
    """

    def __init__(
        self,
        layer: Dense,
        num_cores: int,
        moments: Tensor | None = None,
        counts: Tensor | None = None,
        sensitivity: float | None = None,
    ) -> None:
        weight = layer.weight.detach()
        self.is_table, self.transposed = isinstance(layer, nn.Embedding), isinstance(layer, Conv1D)
        self.moments = None if moments is None else stabilise(moments)
        self.scale = None if counts is None else row_scale(counts).to(weight.device)
        self.dtype, self.size = weight.dtype, weight.numel()
        self.weight = float(self.size) if sensitivity is None else sensitivity
        matrix = weight.mT if self.transposed else weight  # (outputs, inputs)
        self.matrix = matrix.double() if self.scale is None else matrix.double() * self.scale.unsqueeze(1)
        self.use: tuple[Tensor, ...] = ()
        if counts is not None and self.scale is not None and num_cores > 2:
            order = counts.to(weight.device).argsort(descending=True, stable=True)
            self.matrix, self.use = self.matrix[order], (1 / self.scale, order.argsort())
        self.factors = factor_matrix(weight.shape[0], weight.shape[1], num_cores)
        self.num_cores = num_cores

    @property
    def shape(self) -> list[int]:
        """Rows times columns of each core."""
        return [i * j for i, j in zip(*self.factors, strict=True)]

    def count_rest(self) -> int:
        """Count the parameters of a chain besides its cores."""
        return sum(tensor.numel() for tensor in self.use)

    def spectrum(self) -> Tensor:
        """Return singular values whose tails are the errors of the outputs of two factors, to half the digits."""
        root = torch.linalg.cholesky(self._metric())
        whitened = self.matrix @ root  # (outputs, inputs)
        gram = whitened.mT @ whitened if len(whitened) > whitened.shape[1] else whitened @ whitened.mT
        return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()

    def cap(self, bond: int | None, gauge: str) -> Chain:
        """Return the chain of the best cores with a cap on every bond, by the error of the weights."""
        if self.num_cores == 2:
            return self.cut(self.decompose()[0], cap_bonds(*self.factors, bond), gauge)
        bonds = cap_bonds(*self.factors, bond)
        return Chain(decompose(self._stored(self.matrix), *self.factors, bonds=bonds, gauge=gauge)[0])

    def decompose(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return exact cores of the matrix, and the singular values at each bond, which tell errors of the outputs.

        With inputs that are known and more than two cores, the values are an estimate: by the inputs' sizes alone.
        """
        if self.num_cores == 2:
            left, spectrum, right = whiten(self.matrix, self._metric())
            return self._pair(left * spectrum, right), [spectrum]
        cores, values = decompose(self._stored(self.matrix), *self.factors, gauge="left")
        if self.moments is not None:
            sizes = self.moments.diagonal().sqrt()
            _, values = decompose(self._stored(self.matrix * sizes), *self.factors, gauge="left")
        return cores, values

    def cut(self, cores: list[Tensor], bonds: tuple[int, ...], gauge: str, steps: int | None = None) -> Chain:
        """Cut exact cores to bonds, and make the best of these."""
        if self.num_cores == 2:  # in the order of the values, which rounding would not keep
            cores = [cores[0][..., : bonds[0]], cores[1][: bonds[0]]]
            if self.scale is not None:
                cores[0] = cores[0] / self.scale[:, None, None]
            return Chain(round_cores(cores, gauge=gauge)[0])
        cut, _ = round_cores(cores, bonds, gauge="symmetric" if self.moments is not None else gauge)
        if self.moments is not None:
            options = {} if steps is None else {"steps": steps}
            matrix = self.matrix if self.dtype == torch.float64 else self.matrix.float()
            refined = refine_chain(self._turned(cut), matrix, self.moments, **options)
            cut, _ = round_cores(self._turned(refined), gauge=gauge)
        return Chain(cut, self.use)

    def error(self, chain: Chain) -> float:
        """Return the relative error of the outputs, of a table that of its rows, weighted by their use."""
        other = contract(chain.cores, *self._stored(self.matrix).shape)
        if self.scale is not None and not self.use:
            other = other * self.scale.unsqueeze(1)
        return output_error(self.matrix, self._stored(other), self._metric())

    def _metric(self) -> Tensor:
        return torch.eye(self.matrix.shape[1]).to(self.matrix) if self.moments is None else self.moments

    def _stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def _turned(self, cores: list[Tensor]) -> list[Tensor]:
        """Turn the cores of the matrix as it is stored into those of `(outputs, inputs)`, or back."""
        return [core.transpose(1, 2) for core in cores] if self.transposed else cores

    def _pair(self, left: Tensor, right: Tensor) -> list[Tensor]:
        if self.transposed:
            left, right = right.mT, left.mT
        return [left[None, :, None, :], right[:, None, :, None]]


def make_chains(
    model: PreTrainedModel,
    num_cores: Mapping[str, int],
    size: Size,
    gauge: str,
    statistics: Statistics | None = None,
) -> dict[str, Chain]:
    """Decompose matrices of a model, in float64.

    With `keep_ratio` and known inputs, tables and linear layers keep this share each, because the errors of the two do
    not compare.

    Args:
        model: Dense.
        num_cores: For each matrix, by the path of its module.
        size: How small they are made.
        gauge: As in `decompose`.
        statistics: Of the inputs; by default errors are those of the weights.

    Returns:
        A chain for each matrix, but for those that would be larger than their matrices where something smaller is
        asked for.

    Raises:
        ValueError: If none would be smaller, or `keep_ratio` is too small.
    """
    found = statistics or Statistics()
    plans = {path: Plan(model.get_submodule(path), cores, *found.of(path)) for path, cores in num_cores.items()}
    if statistics is None and size.max_error is None and size.keep_ratio is None:
        return {path: plan.cap(size.bond, gauge) for path, plan in plans.items()}
    exact = {path: plan.decompose() for path, plan in plans.items()}
    if statistics is not None and size.max_error is not None:
        chains = {path: _fit(plan, exact[path], size.max_error, gauge) for path, plan in plans.items()}
    else:
        if size.bond is not None:
            bonds = {path: cap_bonds(*plan.factors, size.bond) for path, plan in plans.items()}
        elif statistics is not None and size.keep_ratio is not None:
            bonds = _share(plans, exact, size.keep_ratio)
        else:
            bonds = _choose_bonds(plans, exact, size)
        chains = {path: plan.cut(exact[path][0], bonds[path], gauge) for path, plan in plans.items() if path in bonds}
    if statistics is None and (size.keep_ratio or 0) >= 1:
        return chains
    return _keep_smaller(plans, chains, size)


def _choose_bonds(
    plans: dict[str, Plan], exact: dict[str, tuple[list[Tensor], list[Tensor]]], size: Size
) -> dict[str, tuple[int, ...]]:
    """Choose the bonds of all matrices together, by the errors of the weights."""
    budget = None if size.keep_ratio is None else size.keep_ratio * sum(plan.size for plan in plans.values())
    values, shapes = [exact[path][1] for path in plans], [plan.shape for plan in plans.values()]
    bonds = choose_bonds(values, shapes, max_parameters=budget, max_error=size.max_error)
    return dict(zip(plans, bonds, strict=True))


def _share(
    plans: dict[str, Plan], exact: dict[str, tuple[list[Tensor], list[Tensor]]], keep_ratio: float
) -> dict[str, tuple[int, ...]]:
    """Choose bonds by the errors of the model's outputs, for tables apart from linear layers.

    Each matrix gets the size that two factors would get, whose errors are known without refining; then its bonds.
    """
    bonds = {}
    for tables in (True, False):
        group = {path: plan for path, plan in plans.items() if plan.is_table == tables}
        for path, budget in _share_budget(group, keep_ratio).items():
            plan = plans[path]
            least = sum(plan.shape)
            found = choose_bonds([exact[path][1]], [plan.shape], max_parameters=max(budget - plan.count_rest(), least))
            bonds[path] = found[0]
    return bonds


def _share_budget(group: dict[str, Plan], keep_ratio: float) -> dict[str, int]:
    """Return the parameters of each matrix but those that stay dense, which leave the rest to the others."""
    left = dict(group)
    budget = keep_ratio * sum(plan.size for plan in group.values())
    spectra = {path: plan.spectrum() for path, plan in group.items()}
    while left:
        ranks = choose_bonds(
            [[spectra[path]] for path in left],
            [plan.matrix.shape for plan in left.values()],
            max_parameters=budget,
            weights=[plan.weight for plan in left.values()],
        )
        sizes = {path: rank * sum(left[path].matrix.shape) for path, (rank,) in zip(left, ranks, strict=True)}
        dense = [path for path, size in sizes.items() if size >= left[path].size]
        if not dense:
            return sizes
        budget -= sum(left.pop(path).size for path in dense)
    return {}


def _fit(plan: Plan, exact: tuple[list[Tensor], list[Tensor]], max_error: float, gauge: str) -> Chain:
    """Find the smallest chain within an error of the outputs, to 1/64 of the matrix; an exact one if there is none."""
    cores, values = exact
    low, high, found = 0, 2**TRIALS, full_bonds(*plan.factors)
    while high - low > 1:
        middle = (low + high) // 2
        budget = max(middle / 2**TRIALS * plan.size - plan.count_rest(), sum(plan.shape))
        (bonds,) = choose_bonds([values], [plan.shape], max_parameters=budget)
        if plan.error(plan.cut(cores, bonds, gauge, TRIAL_STEPS)) <= max_error:
            high, found = middle, bonds
        else:
            low = middle
    return plan.cut(cores, found, gauge)


def _keep_smaller(plans: dict[str, Plan], chains: dict[str, Chain], size: Size) -> dict[str, Chain]:
    """Return the chains that are smaller than their matrices, and tell of the others."""
    name, value = next((name, value) for name, value in asdict(size).items() if value is not None)
    kept = {path: chain for path, chain in chains.items() if chain.count() < plans[path].size}
    if not kept:
        raise ValueError(
            f"`{name}` must allow chains smaller than their matrices, {value} does so for none of {len(plans)}. "
            "Allow a larger error or a smaller size, or leave both out for exact chains, which are larger."
        )
    if larger := [path for path in plans if path not in kept]:
        logger.warning(
            f"{len(larger)} of {len(plans)} matrices stay dense, because a chain within `{name}` {value} would be "
            f"larger: {', '.join(larger)}."
        )
    return kept
