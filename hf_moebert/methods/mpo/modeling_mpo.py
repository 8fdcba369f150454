"""Layers whose matrix is a chain of cores; they take the place of a linear layer or an embedding.

Source: Liu et al. 2021, https://arxiv.org/abs/2106.02205.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .functional import gather_rows
from .functional_decomposition import decompose
from .functional_shapes import factor_matrix
from .modeling_matrix import MPOMatrix


Dense: TypeAlias = nn.Linear | Conv1D | nn.Embedding


class MPOLinear(MPOMatrix):
    """A linear layer, whose matrix has the output features as rows."""

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
    """A table of embeddings, with a row for each token of the vocabulary.

    In training only the rows of the batch are rebuilt if that is cheaper than the whole table.
    """

    def __init__(self, rows: int, columns: int, *, padding_idx: int | None = None, **shape: Any) -> None:
        super().__init__(rows, columns, **shape)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, columns, padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Map token ids `(...)` to embeddings `(..., embedding_dim)`."""
        return look_up(self, input, self.padding_idx)


class TiedMPOEmbedding(nn.Module):
    """An embedding that shares the table of another one, and has no parameters of its own."""

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
    """A linear layer, usually the head, that shares the matrix of a table."""

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
    """Look rows up in the kept table, in a rebuilt one, or by rebuilding these rows only, whichever is cheapest.

    Args:
        table: Its rows are looked up.
        ids: Shape `(...)`.
        padding_idx: Id whose row gets no gradient; it still changes with the rows that it shares cores with.

    Returns:
        Shape `(..., columns)`.
    """
    if not table.learns() or torch.compiler.is_compiling() or not ids.numel():
        return F.embedding(ids, table.weight)
    distinct, places = ids.unique(return_inverse=True)
    if len(distinct) * _macs_per_row(table) < _macs_of_all(table):
        with torch.autocast(ids.device.type, enabled=False):
            use = table.use()
            rows = gather_rows(table.chain(), use[1][distinct].long() if use else distinct, table.columns)
            rows = rows * use[0][distinct].unsqueeze(1) if use else rows
            rows = F.embedding(places, rows)
    else:
        rows = F.embedding(ids, table.weight)
    if padding_idx is None:
        return rows
    return torch.where((ids == padding_idx).unsqueeze(-1), rows.detach(), rows)  # no gradient, as for the dense table


def _macs_of_all(table: MPOMatrix) -> int:
    """Count the multiplications of rebuilding the table, without the small products within either side."""
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
    module: Dense,
    *,
    row_factors: Sequence[int],
    column_factors: Sequence[int],
    bonds: Sequence[int],
    sorted_rows: bool = False,
) -> MPOMatrix:
    """Build the layer that replaces a dense layer, with its bias and with cores of zeros.

    Args:
        module: A linear layer, `Conv1D` or embedding.
        row_factors: Of the rows of its weight.
        column_factors: Of the columns.
        bonds: Between the cores.
        sorted_rows: As in `MPOMatrix`, of an embedding only.

    Raises:
        ValueError: If factors do not fit the weight, or bonds the factors, or if the layer cannot have sorted rows.
    """
    rows, columns = module.weight.shape
    for name, factors, size in (("row_factors", row_factors, rows), ("column_factors", column_factors, columns)):
        if math.prod(factors) < size:
            raise ValueError(
                f"`{name}` must multiply to {size} or more, got {tuple(factors)}. The model has other sizes."
            )
    if sorted_rows and not isinstance(module, nn.Embedding):
        raise ValueError(f"`sorted_rows` must be of an embedding, got {type(module).__name__}. Save the model again.")
    shape: dict[str, Any] = {"row_factors": row_factors, "column_factors": column_factors, "bonds": bonds}
    shape["dtype"] = module.weight.dtype
    if isinstance(module, nn.Embedding):
        shape["sorted_rows"] = sorted_rows
        layer: MPOMatrix = MPOEmbedding(rows, columns, padding_idx=module.padding_idx, **shape)
    else:
        kind = MPOConv1D if isinstance(module, Conv1D) else MPOLinear
        layer = kind(rows, columns, bias=module.bias is not None, **shape)
        layer.bias = module.bias
    layer.cores.requires_grad_(module.weight.requires_grad)  # a frozen layer stays frozen
    return layer.to(module.weight.device).train(module.training)


def decompose_layer(
    module: Dense, *, num_cores: int = 5, bonds: Sequence[int] | None = None, gauge: str = "symmetric"
) -> MPOMatrix:
    """Decompose the matrix of one dense layer.

    Args:
        module: A linear layer, `Conv1D` or embedding. It is not changed; its bias is shared.
        num_cores: Odd, at least 3.
        bonds: Largest size of each bond; None truncates nothing.
        gauge: As in `decompose`.

    Returns:
        The layer that replaces it.
    """
    row_factors, column_factors = factor_matrix(module.weight.shape[0], module.weight.shape[1], num_cores)
    cores, _ = decompose(module.weight, row_factors, column_factors, bonds=bonds, gauge=gauge)
    kept = [core.shape[-1] for core in cores[:-1]]
    layer = make_layer(module, row_factors=row_factors, column_factors=column_factors, bonds=kept)
    layer.set_cores(cores)
    return layer


def tie_layer(module: nn.Module, source: MPOMatrix) -> TiedMPOEmbedding | TiedMPOLinear:
    """Build the layer that replaces a dense layer which shares the matrix of another one.

    Args:
        module: The dense layer, or its replacement if one object is used in two places.
        source: The layer that holds the cores.
    """
    if isinstance(module, nn.Embedding | MPOEmbedding):
        return TiedMPOEmbedding(source, padding_idx=module.padding_idx)
    assert isinstance(module, nn.Linear | MPOLinear)
    return TiedMPOLinear(source, bias=module.bias)


def restore_layer(layer: MPOMatrix | TiedMPOEmbedding | TiedMPOLinear, weight: nn.Parameter) -> nn.Module:
    """Build a dense layer from a decomposed one, the reverse of `decompose_layer`.

    Args:
        layer: A decomposed layer, or one tied to it.
        weight: Its matrix; the same object for all layers that share it.
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
