"""A matrix that is stored as a chain of cores, and is multiplied in the cheapest way.

While cores are trained, every call rebuilds the matrix, which costs about as much as a few hundred tokens through the
layer. Otherwise the matrix is kept until a core changes; for few tokens and small bonds the activation is multiplied
by the chain instead, where that takes fewer multiplications.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; keeping the matrix is our own design.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_moebert.inference.caching import Derived

from .functional import contract, contract_activation, merge
from .functional_shapes import check_bonds, full_bonds, plan_chain


CHAIN_RATIO = 0.7  # of the dense product's multiplications; above it the chain was never measured to be faster
CHAIN_TOKENS = 64  # with more, the intermediate results no longer fit in the cache
CHAIN_SAVING = 10_000_000  # multiplications that the chain must save in one call to pay for its several products
FEWEST_TOKENS = 8  # with fewer, the dense product takes as long: it is bound by reading the matrix from memory

plan = lru_cache(plan_chain)


class Cores(nn.ParameterList):
    """The cores of a chain; calling it lets accelerate load those that are offloaded."""

    __call__ = nn.Module.__call__

    def forward(self) -> list[Tensor]:
        """List the cores, which accelerate loads before and drops after."""
        return self.as_stored()

    def as_stored(self) -> list[Tensor]:
        """List the cores without loading them."""
        return [core for core in self._parameters.values() if core is not None]


class MPOMatrix(nn.Module):
    """A matrix of shape `(rows, columns)` as a chain of cores; `weight` is the matrix.

    Args:
        rows: Of the matrix without padding.
        columns: Likewise.
        row_factors: One for each core.
        column_factors: Likewise.
        bonds: Between the cores.
        sorted_rows: Whether the chain has the rows in another order, and each by a scale, so that it is most exact for
            rows that are used most. A scale `(rows,)` and the place of each row in the chain `(rows,)` then belong to
            the parameters.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        row_factors: Sequence[int],
        column_factors: Sequence[int],
        bonds: Sequence[int],
        sorted_rows: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.row_factors, self.column_factors = tuple(row_factors), tuple(column_factors)
        ends = (1, *check_bonds(bonds, full_bonds(row_factors, column_factors)), 1)
        shapes = zip(ends, row_factors, column_factors, ends[1:], strict=False)
        self.cores = Cores(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)
        self.row_use = None
        if sorted_rows:  # frozen: they choose what is precise, and know no more; a list, as accelerate loads it alone
            use = (torch.ones(rows, dtype=dtype), torch.arange(rows, dtype=torch.int32))
            self.row_use = Cores(nn.Parameter(tensor, requires_grad=False) for tensor in use)
        self._matrix: Derived[Tensor] = Derived()
        self._links: Derived[list[Tensor]] = Derived()

    @property
    def bonds(self) -> tuple[int, ...]:
        """The sizes between the cores, `num_cores - 1` of them."""
        return tuple(core.shape[-1] for core in self._stored()[:-1])

    @property
    def centre(self) -> nn.Parameter:
        """The central tensor, `(bond, rows, columns, next bond)`."""
        return self.cores[len(self.cores) // 2]

    def chain(self) -> list[Tensor]:
        """List the cores; those that are offloaded are loaded for it."""
        cores: list[Tensor] = self.cores() if self.is_offloaded() else self._stored()
        return cores

    def _stored(self) -> list[Tensor]:
        # Indexing costs more than a small layer, and is left for a replica on another GPU, which has attributes only.
        return self.cores.as_stored() or [getattr(self.cores, str(k)) for k in range(len(self.row_factors))]

    def freeze(self, train_centre: bool) -> None:
        """Freeze what no training changes: scale and place of rows, and the central tensor unless it is asked for."""
        if not train_centre and not self.is_pair():
            self.centre.requires_grad_(False)
        if self.row_use is not None:
            self.row_use.requires_grad_(False)

    def use(self) -> list[Tensor]:
        """List scale and place of the rows if they are sorted; loaded if they are offloaded."""
        if self.row_use is None:
            return []
        use: list[Tensor] = self.row_use() if self.is_offloaded() else self.row_use.as_stored()
        return use

    def is_pair(self) -> bool:
        """Check whether the matrix is a product of two factors, one with all rows and one with all columns."""
        return len(self.row_factors) == 2 and self.row_factors[1] == self.column_factors[0] == 1

    def is_offloaded(self) -> bool:
        """Check whether the cores are on the meta device, from where accelerate fetches them for each call."""
        return self._stored()[0].is_meta

    @property
    def weight(self) -> Tensor:
        """The matrix, `(rows, columns)`, kept while the cores need no gradient, rebuilt otherwise."""
        chain, use = self.chain(), self.use()
        if torch.compiler.is_compiling() or self.learns() or self.is_offloaded():
            return self._contract(chain, use)
        return self._matrix.get([*chain, *use], lambda: self._contract(chain, use))

    def _contract(self, chain: list[Tensor], use: list[Tensor]) -> Tensor:
        if chain[0].is_meta:  # without hooks, as while a model is loaded; there is no autocast for this device
            return contract(chain, self.rows, self.columns)
        with torch.autocast(chain[0].device.type, enabled=False):  # rounded cores give another matrix
            matrix = contract(chain, self.rows, self.columns)
            return matrix.index_select(0, use[1]) * use[0].unsqueeze(1) if use else matrix

    def learns(self) -> bool:
        """Check whether any core needs a gradient."""
        return torch.is_grad_enabled() and any(core.requires_grad for core in self._stored())

    @torch.no_grad()
    def set_cores(self, cores: Sequence[Tensor], use: Sequence[Tensor] = ()) -> None:
        """Replace the values of the cores, and with them the bonds; the parameters stay the same objects.

        Args:
            cores: As many as there are.
            use: Scale and place of the rows, if they are sorted; by default they stay.
        """
        for parameter, tensor in zip(self.row_use or (), use, strict=False):
            parameter.data = tensor.to(parameter).contiguous()
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter.grad = None
            parameter.data = core.to(parameter).contiguous()

    def multiply(self, x: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        """Return `x @ weight.T + bias`, or with `weight` if transposed, through the chain where that is cheaper."""
        if (
            self.is_pair()
            and self.row_use is None
            and self.bonds[0] * (self.rows + self.columns) < self.rows * self.columns
        ):
            left, right = (core.flatten(0, 1).flatten(1) for core in self.chain())  # (rows, bond), (bond, columns)
            first, second = (left.T, right.T) if transposed else (right, left)
            return F.linear(F.linear(x, first), second, bias)
        if counts := self._plan(x, transposed):
            out, wide = (self.columns, self.row_factors) if transposed else (self.rows, self.column_factors)
            links = self._links.get(self.chain(), lambda: self._make_links(counts, transposed))
            y = contract_activation(F.pad(x, (0, math.prod(wide) - x.shape[-1])), links)[..., :out]
            y = y.index_select(-1, use[1]) * use[0] if (use := self.use()) else y
            return y if bias is None else y + bias
        return F.linear(x, self.weight.T if transposed else self.weight, bias)

    def _plan(self, x: Tensor, transposed: bool) -> tuple[int, ...] | None:
        """Return how many cores to merge into each link, or None where the dense product is cheaper or more exact."""
        tokens = x.numel() // x.shape[-1]
        if tokens > CHAIN_TOKENS or torch.compiler.is_compiling() or self.learns() or self.is_offloaded():
            return None
        if torch.is_autocast_enabled(x.device.type):  # would round between all links
            return None
        factors, dense = (self.row_factors, self.column_factors), self.rows * self.columns
        counts, macs = plan(*reversed(factors) if transposed else factors, self.bonds)
        pays = macs < CHAIN_RATIO * dense and (dense - macs) * max(tokens, FEWEST_TOKENS) > CHAIN_SAVING
        return counts if pays else None

    def _make_links(self, counts: tuple[int, ...], transposed: bool) -> list[Tensor]:
        chain = [core.transpose(1, 2) if transposed else core for core in self.chain()]
        starts = [sum(counts[:k]) for k in range(len(counts))]
        links = [merge(chain[start : start + count]) for start, count in zip(starts, counts, strict=True)]
        return [link.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1) for link in links]  # as they are multiplied

    def train(self, mode: bool = True) -> "MPOMatrix":
        """Set the mode, and drop kept results: torch does not count all edits that training makes."""
        self._matrix.clear()
        self._links.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "MPOMatrix":
        self._matrix.clear()  # on another device, or in another dtype
        self._links.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Adopt the bonds of a checkpoint with the same factors, which may have been squeezed since."""
        for name, core in self.cores.named_parameters():
            saved = state_dict.get(f"{prefix}cores.{name}")
            if saved is not None and saved.shape != core.shape and saved.shape[1:3] == core.shape[1:3]:
                core.data = core.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rows}, {self.columns}, bonds={self.bonds})"  # as of a dense layer


def list_matrices(model: nn.Module) -> dict[str, MPOMatrix]:
    """Return the decomposed matrices of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MPOMatrix)}
