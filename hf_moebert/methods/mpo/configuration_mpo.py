"""The part of config.json that describes which matrices of a model are chains of cores, and of which shapes."""

from dataclasses import dataclass
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_moebert.checkpoints.forms import check_options

from .functional_shapes import check_bonds, full_bonds


FORMAT_VERSION = "2"
FIRST_VERSION = "1"  # without two factors and sorted rows; still written where there are none, for earlier releases


@dataclass(frozen=True)
class MatrixShape:
    """Factors and bonds of one matrix, and whether its rows are sorted and scaled by their use.

    Raises:
        ValueError: If the two sides have different numbers of factors, or the bonds do not fit them.
    """

    row_factors: tuple[int, ...]
    column_factors: tuple[int, ...]
    bonds: tuple[int, ...]
    sorted_rows: bool = False

    def __post_init__(self) -> None:
        if len(self.row_factors) != len(self.column_factors):
            raise ValueError(
                f"`row_factors` and `column_factors` must be as many, got {self.row_factors} and "
                f"{self.column_factors}."
            )
        check_bonds(self.bonds, full_bonds(self.row_factors, self.column_factors))


@register_quantization_config("mpo")
class MPOCompressionConfig(QuantizationConfigMixin):
    """The description of a compressed model: its modules that are chains of cores, with their factors and bonds.

    Args:
        matrices: Factors and bonds of each matrix, as lists, by the path of its module; of a table whose rows are
            sorted and scaled by their use also `sorted_rows`.
        tied: For each module that shares the matrix of another one, by path: the path of that other one.
        train_centre: Whether central tensors are trained; they are frozen otherwise.
        gauge: The gauge that later cuts leave the cores in; see `decompose`.
        sizes: Rows and columns of each matrix, which its factors may pad; earlier checkpoints do not hold them.

    Raises:
        ValueError: If a newer release wrote it, or if the description of a matrix is incomplete.
    """

    def __init__(
        self,
        matrices: dict[str, dict[str, Any]],
        tied: dict[str, str] | None = None,
        train_centre: bool = False,
        gauge: str = "symmetric",
        sizes: dict[str, list[int]] | None = None,
        format_version: str = FIRST_VERSION,
        **unknown: Any,
    ) -> None:
        if format_version not in (FIRST_VERSION, FORMAT_VERSION):
            raise ValueError(
                f"`format_version` of matrix product operators must be {FIRST_VERSION!r} or {FORMAT_VERSION!r} for "
                f"this release, got {format_version!r}. Update hf_moebert."
            )
        check_options("mpo", unknown)
        self.quant_method = "mpo"
        self.matrices = matrices
        self.tied = tied or {}
        self.train_centre, self.gauge = train_centre, gauge
        self.sizes = sizes or {}
        self.format_version = format_version
        if self._is_new():
            self.format_version = FORMAT_VERSION
        for name, source in self.tied.items():
            if source not in matrices:
                raise ValueError(
                    f"`tied` must name one of `matrices`, got {source!r} for {name!r}. Save the model again."
                )
        self.shapes()

    def _is_new(self) -> bool:
        return any(shape.sorted_rows or len(shape.bonds) == 1 for shape in self.shapes().values())

    def shapes(self) -> dict[str, MatrixShape]:
        """Return the shape of each matrix by the path of its module."""
        found = {}
        for name, shape in self.matrices.items():
            try:
                sizes = {key: tuple(value) for key, value in shape.items() if key != "sorted_rows"}
                found[name] = MatrixShape(**sizes, sorted_rows=bool(shape.get("sorted_rows", False)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"`matrices[{name!r}]` must hold factors and bonds, got {shape}: {error}") from error
        return found
