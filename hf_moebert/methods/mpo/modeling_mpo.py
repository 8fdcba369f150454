"""Layers whose matrix is a chain of cores; they stand where a linear layer or an embedding stood.

While cores learn, every call rebuilds the matrix, which costs about as much as a few hundred tokens through the layer.
Otherwise the matrix is kept until a core changes; for few tokens and small bonds the activation passes the chain
instead, where a count says that this is cheaper.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205; keeping the matrix is our own design.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_moebert.inference.caching import Derived

from .functional import contract, contract_activation, decompose, gather_rows, merge
from .functional_shapes import check_bonds, factor_matrix, full_bonds, plan_chain


CHAIN_RATIO = 0.7  # of the dense product's multiplications: above, the chain was never measured to be faster
CHAIN_TOKENS = 64  # beyond, the intermediate results leave the cache
CHAIN_SAVING = 10_000_000  # multiplications in one call that several small products must save to be worth their calls
FEWEST_TOKENS = 8  # fewer take the dense product as long, which then reads the matrix from memory

Dense: TypeAlias = nn.Linear | Conv1D | nn.Embedding

plan = lru_cache(plan_chain)


class MPOMatrix(nn.Module):
    """A matrix of shape `(rows, columns)` as a chain of cores; `weight` is the matrix.

    Args:
        rows: Of the matrix without padding.
        columns: Likewise.
        row_factors: One for each core.
        column_factors: Likewise.
        bonds: Between the cores.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        row_factors: Sequence[int],
        column_factors: Sequence[int],
        bonds: Sequence[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.row_factors, self.column_factors = tuple(row_factors), tuple(column_factors)
        ends = (1, *check_bonds(bonds, full_bonds(row_factors, column_factors)), 1)
        shapes = zip(ends, row_factors, column_factors, ends[1:], strict=False)
        self.cores = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes)
        self._matrix: Derived[Tensor] = Derived()
        self._links: Derived[list[Tensor]] = Derived()

    @property
    def bonds(self) -> tuple[int, ...]:
        """Sizes between the cores, `num_cores - 1` of them."""
        return tuple(core.shape[-1] for core in self.chain()[:-1])

    @property
    def centre(self) -> nn.Parameter:
        """The central tensor, `(bond, rows, columns, next bond)`."""
        return self.cores[len(self.cores) // 2]

    def chain(self) -> list[Tensor]:
        """List the cores."""
        # Item by item costs more than a small layer, and is left for a replica on another GPU, which has attributes.
        cores: list[Tensor] = [core for core in self.cores._parameters.values() if core is not None]
        return cores or [getattr(self.cores, str(k)) for k in range(len(self.row_factors))]

    @property
    def weight(self) -> Tensor:
        """The matrix, `(rows, columns)`: kept while no gradient is wanted of the cores, rebuilt otherwise."""
        if torch.compiler.is_compiling() or self.learns():
            return self._rebuild()
        return self._matrix.get(self.chain(), self._rebuild)

    def _rebuild(self) -> Tensor:
        with torch.autocast(self.centre.device.type, enabled=False):  # a product of rounded cores is no longer theirs
            return contract(self.chain(), self.rows, self.columns)

    def learns(self) -> bool:
        """Whether a gradient is wanted of any core."""
        return torch.is_grad_enabled() and any(core.requires_grad for core in self.chain())

    @torch.no_grad()
    def set_cores(self, cores: Sequence[Tensor]) -> None:
        """Replace the values of the cores, and with them the bonds; the parameters stay the same objects."""
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter.grad = None
            parameter.data = core.to(parameter).contiguous()

    def multiply(self, x: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        """Return `x @ weight.T + bias`, or with `weight` if transposed, through the chain where that is cheaper."""
        if counts := self._plan(x, transposed):
            out, wide = (self.columns, self.row_factors) if transposed else (self.rows, self.column_factors)
            links = self._links.get(self.chain(), lambda: self._make_links(counts, transposed))
            y = contract_activation(F.pad(x, (0, math.prod(wide) - x.shape[-1])), links)[..., :out]
            return y if bias is None else y + bias
        return F.linear(x, self.weight.T if transposed else self.weight, bias)

    def _plan(self, x: Tensor, transposed: bool) -> tuple[int, ...] | None:
        """Say how many cores make each link, or None where the dense product is cheaper or more exact."""
        tokens = x.numel() // x.shape[-1]
        if tokens > CHAIN_TOKENS or torch.compiler.is_compiling() or self.learns():
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
        """Forget what was kept: edits that torch does not count happen in training."""
        self._matrix.clear()
        self._links.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "MPOMatrix":
        self._matrix.clear()  # of another device or dtype
        self._links.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over the bonds of a checkpoint of the same factors: they may have been squeezed since."""
        for name, core in self.cores.named_parameters():
            saved = state_dict.get(f"{prefix}cores.{name}")
            if saved is not None and saved.shape != core.shape and saved.shape[1:3] == core.shape[1:3]:
                core.data = core.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return sizes and bonds for printing."""
        return f"{self.rows}, {self.columns}, bonds={self.bonds}"


class MPOLinear(MPOMatrix):
    """A linear layer; its matrix has the output features as rows."""

    def __init__(self, rows: int, columns: int, *, bias: bool = True, **shape: Any) -> None:
        super().__init__(rows, columns, **shape)
        self.in_features, self.out_features = columns, rows
        self.bias = nn.Parameter(torch.zeros(rows, dtype=shape.get("dtype"))) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return self.multiply(input, self.bias)


class MPOConv1D(MPOMatrix):
    """GPT-2's linear layer, which stores its matrix transposed: the input features are the rows."""

    def __init__(self, rows: int, columns: int, *, bias: bool = True, **shape: Any) -> None:
        super().__init__(rows, columns, **shape)
        self.nx, self.nf = rows, columns
        self.bias = nn.Parameter(torch.zeros(columns, dtype=shape.get("dtype"))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., nx)` to `(..., nf)`."""
        return self.multiply(x, self.bias, transposed=True)


class MPOEmbedding(MPOMatrix):
    """A table of embeddings; the vocabulary is the rows.

    While it learns, only the rows of the batch are rebuilt if that is cheaper than the whole table.
    """

    def __init__(self, rows: int, columns: int, *, padding_idx: int | None = None, **shape: Any) -> None:
        super().__init__(rows, columns, **shape)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, columns, padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map token ids `(...)` to embeddings `(..., embedding_dim)`."""
        return look_up(self, input, self.padding_idx)


class TiedMPOEmbedding(nn.Module):
    """A second place of the same table, which holds no parameters of its own."""

    def __init__(self, source: MPOMatrix, *, padding_idx: int | None = None) -> None:
        super().__init__()
        self._source = [source]  # in a list, so that it is not registered, counted and saved twice
        self.num_embeddings, self.embedding_dim, self.padding_idx = source.rows, source.columns, padding_idx

    @property
    def weight(self) -> Tensor:
        """The matrix of the source, `(rows, columns)`."""
        return self._source[0].weight

    def forward(self, input: Tensor) -> Tensor:
        """Map token ids `(...)` to embeddings `(..., embedding_dim)`."""
        return look_up(self._source[0], input, self.padding_idx)


class TiedMPOLinear(nn.Module):
    """A linear layer, as a rule the head, that shares the matrix of a table."""

    def __init__(self, source: MPOMatrix, *, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._source = [source]
        self.in_features, self.out_features, self.bias = source.columns, source.rows, bias

    @property
    def weight(self) -> Tensor:
        """The matrix of the source, `(rows, columns)`."""
        return self._source[0].weight

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return self._source[0].multiply(input, self.bias)


def look_up(table: MPOMatrix, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Look rows up: in the kept table, in a rebuilt one, or by rebuilding these rows only, whatever is cheapest.

    Args:
        table: Its rows are looked up.
        ids: Shape `(...)`.
        padding_idx: The id whose row gets no gradient; other rows still change it, because they share cores with it.

    Returns:
        Shape `(..., columns)`.
    """
    if not table.learns() or torch.compiler.is_compiling() or not ids.numel():
        return F.embedding(ids, table.weight)
    distinct, places = ids.unique(return_inverse=True)
    if len(distinct) * _macs_per_row(table) < _macs_of_all(table):
        with torch.autocast(ids.device.type, enabled=False):
            rows = F.embedding(places, gather_rows(table.chain(), distinct, table.columns))
    else:
        rows = F.embedding(ids, table.weight)
    if padding_idx is None:
        return rows
    return torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)  # no gradient, as for the dense table


def _macs_of_all(table: MPOMatrix) -> int:
    """Count the multiplications of rebuilding, leaving out the small products within either side."""
    centre, (before, behind) = len(table.cores) // 2, table.centre.shape[::3]
    right = math.prod(table.row_factors[centre + 1 :]) * math.prod(table.column_factors[centre + 1 :])
    middle = table.row_factors[centre] * table.column_factors[centre]
    left = math.prod(table.row_factors[:centre]) * math.prod(table.column_factors[:centre])
    return before * middle * right * (behind + left)


def _macs_per_row(table: MPOMatrix) -> int:
    centre, (before, behind) = len(table.cores) // 2, table.centre.shape[::3]
    columns = table.column_factors
    left, right = math.prod(columns[:centre]), math.prod(columns[centre + 1 :])
    return left * columns[centre] * behind * (before + right)


def make_layer(
    module: Dense, *, row_factors: Sequence[int], column_factors: Sequence[int], bonds: Sequence[int]
) -> MPOMatrix:
    """Build the layer that takes a dense layer's place, with its bias and with cores of zeros.

    Args:
        module: A linear layer, `Conv1D` or embedding.
        row_factors: Of the rows of its weight.
        column_factors: Of the columns.
        bonds: Between the cores.

    Raises:
        ValueError: If the factors do not fit the weight, or the bonds the factors.
    """
    rows, columns = module.weight.shape
    for name, factors, size in (("row_factors", row_factors, rows), ("column_factors", column_factors, columns)):
        if math.prod(factors) < size:
            raise ValueError(
                f"`{name}` must multiply to {size} or more, got {tuple(factors)}. The model has other sizes."
            )
    shape: dict[str, Any] = {"row_factors": row_factors, "column_factors": column_factors, "bonds": bonds}
    shape["dtype"] = module.weight.dtype
    if isinstance(module, nn.Embedding):
        layer: MPOMatrix = MPOEmbedding(rows, columns, padding_idx=module.padding_idx, **shape)
    else:
        kind = MPOConv1D if isinstance(module, Conv1D) else MPOLinear
        layer = kind(rows, columns, bias=module.bias is not None, **shape)
        layer.bias = module.bias
    layer.cores.requires_grad_(module.weight.requires_grad)  # what was frozen stays so
    return layer.to(module.weight.device).train(module.training)


def decompose_layer(
    module: Dense, *, num_cores: int = 5, bonds: Sequence[int] | None = None, gauge: str = "symmetric"
) -> MPOMatrix:
    """Write one dense layer as a chain of cores.

    Args:
        module: A linear layer, `Conv1D` or embedding; it is left as it is, but its bias is shared.
        num_cores: Odd, at least 3.
        bonds: Most directions to keep at each bond; None keeps all.
        gauge: As in `decompose`.

    Returns:
        The layer that takes its place.
    """
    row_factors, column_factors = factor_matrix(module.weight.shape[0], module.weight.shape[1], num_cores)
    cores, _ = decompose(module.weight, row_factors, column_factors, bonds=bonds, gauge=gauge)
    kept = [core.shape[-1] for core in cores[:-1]]
    layer = make_layer(module, row_factors=row_factors, column_factors=column_factors, bonds=kept)
    layer.set_cores(cores)
    return layer


def tie_layer(module: nn.Module, source: MPOMatrix) -> TiedMPOEmbedding | TiedMPOLinear:
    """Build what takes the place of a dense layer that shares the matrix of another one.

    Args:
        module: The dense layer, or the layer that has already taken its place, where one object stands in two.
        source: The layer that holds the cores.
    """
    if isinstance(module, nn.Embedding | MPOEmbedding):
        return TiedMPOEmbedding(source, padding_idx=module.padding_idx)
    assert isinstance(module, nn.Linear | MPOLinear)
    return TiedMPOLinear(source, bias=module.bias)


def list_matrices(model: nn.Module) -> dict[str, MPOMatrix]:
    """Return the decomposed matrices of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MPOMatrix)}


def restore_layer(layer: MPOMatrix | TiedMPOEmbedding | TiedMPOLinear, weight: nn.Parameter) -> nn.Module:
    """Build the dense layer again: the reverse of `decompose_layer`.

    Args:
        layer: A decomposed layer, or one tied to it.
        weight: Its matrix, the same object for all layers that share it.
    """
    rows, columns = weight.shape
    if isinstance(layer, MPOEmbedding | TiedMPOEmbedding):
        table = nn.Embedding(rows, columns, padding_idx=layer.padding_idx, device="meta")
        table.weight = weight
        return table.train(layer.training)
    dense: nn.Linear | Conv1D = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta")
    if isinstance(layer, MPOConv1D):
        dense = Conv1D(layer.nf, layer.nx)
    dense.weight, dense.bias = weight, layer.bias
    return dense.train(layer.training)
