# Copied from hf_moebert/architectures/units.py by `make copies`; edit there.
"""Units that can only be removed whole: neurons of feed-forward networks and heads of attentions.

Which weights belong together, and that a unit may go once no column of its writer is left, is our own design: the
structured rule of PLATON's paper is not known to us.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_families import ARCHITECTURES, find_architecture, name_family
from .configuration_paths import AttentionPaths
from .modeling_surgery import (
    Layer,
    find_feed_forwards,
    find_layers,
    find_linear,
    get_part,
    matrix_of,
    narrow,
    output_dim,
)


Linear: TypeAlias = nn.Linear | Conv1D


@dataclass(frozen=True)
class UnitGroup:
    """Units of one layer that can only be removed whole: neurons of a feed-forward network or heads of an attention.

    Attributes:
        layer: Index of the layer.
        kind: "neurons" or "heads".
        readers: Modules whose output rows (of the weight and of the bias) belong to the units: linear or `Conv1D`.
        writer: Module whose input columns belong to the units.
        unit_size: Columns of the writer for one unit.
    """

    layer: int
    kind: str
    readers: tuple[Linear, ...]
    writer: Linear
    unit_size: int

    @property
    def num_units(self) -> int:
        """Units in the layer."""
        return matrix_of(self.writer).shape[1] // self.unit_size

    @property
    def blocks(self) -> int:
        """Matrices in each reader, one above the other: a fused gate and up-projection are two."""
        return len(matrix_of(self.readers[0])) // matrix_of(self.writer).shape[1]

    @property
    def reader_parameters(self) -> list[nn.Parameter]:
        """Weights and biases of the readers."""
        return [parameter for reader in self.readers for parameter in reader.parameters(recurse=False)]

    def rows_of_unit(self, reader: Linear) -> int:
        """Return the rows of each block of a reader that belong to one unit: heads may share their keys and values."""
        return len(matrix_of(reader)) // (self.blocks * self.num_units)


def find_unit_groups(model: PreTrainedModel) -> list[UnitGroup]:
    """Find the neurons and, where they are independent of each other, the heads of each layer.

    Heads that read the same keys and values are one unit.

    Args:
        model: A stock model of a family whose units can be removed, with any head; or a shrunk one.

    Returns:
        The groups, by layer, neurons before heads.

    Raises:
        ValueError: If the family is not known or its units cannot be removed, or a layer is not built of plain linear
            modules.
    """
    architecture = find_architecture(model)
    if not architecture.units:
        known = sorted(family for family, row in ARCHITECTURES.items() if row.units)
        reason = f", because {architecture.kept}" if architecture.kept else ""
        raise ValueError(
            f"`model` must be of a family whose neurons or heads can be removed, one of {known}, got "
            f"{name_family(model)!r}{reason}. Prune single weights instead."
        )
    groups = []
    for index, (layer, network) in enumerate(zip(find_layers(model), find_feed_forwards(model), strict=True)):
        if "neurons" in architecture.units:
            *paths, writer = network.paths.matrices.values()
            readers = [find_linear(layer.module, path) for path in paths]
            groups.append(UnitGroup(index, "neurons", tuple(readers), find_linear(layer.module, writer), 1))
        if "heads" in architecture.units:
            groups += [_group_heads(layer, index, attention) for attention in layer.stack.attentions]
    return groups


def _group_heads(layer: Layer, index: int, paths: AttentionPaths) -> UnitGroup:
    writer = find_linear(layer.module, paths.writer)
    readers = [find_linear(layer.module, path) for path in paths.readers]
    size: int = getattr(get_part(layer.module, paths.module), paths.head_size)
    columns = matrix_of(writer).shape[1]
    count = min(columns, *(len(matrix_of(reader)) for reader in readers)) // size  # fewer keys than queries: groups
    readers += [find_linear(layer.module, path) for path in paths.extras if get_part(layer.module, path) is not None]
    return UnitGroup(index, "heads", tuple(readers), writer, columns // count)


def find_kept_units(group: UnitGroup, *, multiple_of: int = 1, at_least: int = 1) -> Tensor:
    """Find the units that have to stay: those whose columns of the writer are not all exactly zero.

    The others contribute nothing, whatever their rows and biases hold. Of them the first ones stay where fewer than
    `at_least`, or no multiple of `multiple_of` neurons, would be left.

    Args:
        group: The units of a layer.
        multiple_of: What the number of neurons is rounded up to.
        at_least: Units that stay in any case.

    Returns:
        Indices of the units, ascending. Shape `(kept,)`.
    """
    columns = matrix_of(group.writer).detach().unflatten(1, (group.num_units, group.unit_size))
    needed = (columns != 0).any(dim=2).any(dim=0)  # (hidden, units, unit_size) -> (units,)
    step = multiple_of if group.kind == "neurons" else 1
    count = -(-max(int(needed.sum()), at_least) // step) * step
    order = needed.int().argsort(descending=True, stable=True)  # the needed ones first
    return order[:count].sort().values


def cut_state(model: PreTrainedModel, kept: list[tuple[UnitGroup, Tensor]]) -> dict[str, Tensor]:
    """Take the kept units' rows and columns, and everything else as it is, out of a model.

    Args:
        model: The model; it is not changed.
        kept: Groups of the model, each with the indices of its units that stay.
    """
    names = {module: name for name, module in model.named_modules()}
    state = model.state_dict()
    for group, units in kept:
        for reader in group.readers:
            rows = torch.arange(len(matrix_of(reader)), device=units.device)
            rows = rows.unflatten(0, (group.blocks, group.num_units, -1))[:, units].flatten()
            for name, parameter in reader.named_parameters():
                key = f"{names[reader]}.{name}"
                state[key] = state[key].index_select(output_dim(reader, parameter), rows)
        columns = torch.arange(matrix_of(group.writer).shape[1], device=units.device)
        columns = columns.unflatten(0, (group.num_units, -1))[units].flatten()  # (kept * unit_size,)
        key = f"{names[group.writer]}.weight"
        state[key] = state[key].index_select(1 - output_dim(group.writer, state[key]), columns)
    return state


def narrow_layers(model: PreTrainedModel, widths: list[dict[str, int]]) -> None:
    """Keep the first units of each layer, in place; what the units hold does not matter here.

    Args:
        model: A model as transformers builds it.
        widths: Units that stay in each layer, by kind.
    """
    layers = find_layers(model)
    for group in find_unit_groups(model):
        count = widths[group.layer][group.kind]
        blocks, sizes = group.blocks, [group.rows_of_unit(reader) for reader in group.readers]
        for reader, size in zip(group.readers, sizes, strict=True):
            narrow(reader, rows=count * size, blocks=blocks)
        narrow(group.writer, columns=count * group.unit_size)
        if group.kind == "heads":
            _tell_heads(layers[group.layer], count * group.unit_size)


def _tell_heads(layer: Layer, columns: int) -> None:
    """Tell the attention how many heads it has; some compute with it."""
    for paths in layer.stack.attentions:
        attention = get_part(layer.module, paths.module)
        heads = columns // getattr(attention, paths.head_size)
        for name, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", columns)):
            if hasattr(attention, name):
                setattr(attention, name, value)


__all__ = ["UnitGroup", "find_unit_groups"]
