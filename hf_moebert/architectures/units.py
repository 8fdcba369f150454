"""Units that can only be removed whole: neurons of feed-forward networks and heads of attentions.

Which weights belong together, and that a unit may go once no column of its writer is left, is our own design: the
structured rule of PLATON's paper is not known to us.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import ARCHITECTURES, find_architecture, name_family
from .surgery import Layer, find_feed_forwards, find_layers, find_linear, get_part, narrow


PLAIN = (nn.Linear,)  # what prunes and cuts units reads rows and columns off the weight as it is stored


@dataclass(frozen=True)
class UnitGroup:
    """Units of one layer that can only be removed whole: neurons of a feed-forward network or heads of an attention.

    Attributes:
        layer: Index of the layer.
        kind: "neurons" or "heads".
        readers: Modules whose output rows (of the weight and of the bias) belong to the units.
        writer: Module whose input columns belong to the units.
        unit_size: Columns of the writer, and rows of each block of a reader, for one unit.
    """

    layer: int
    kind: str
    readers: tuple[nn.Linear, ...]
    writer: nn.Linear
    unit_size: int

    @property
    def num_units(self) -> int:
        """Units in the layer."""
        return self.writer.in_features // self.unit_size

    @property
    def blocks(self) -> int:
        """Matrices in each reader, one above the other: a fused gate and up-projection are two."""
        return self.readers[0].out_features // self.writer.in_features


def find_unit_groups(model: PreTrainedModel) -> list[UnitGroup]:
    """Find the neurons and, where they are independent of each other, the heads of each layer.

    Args:
        model: A stock model of a family whose units can be removed, with any head; or a shrunk one.

    Returns:
        The groups, by layer, neurons before heads.

    Raises:
        ValueError: If the family is not known or its units cannot be removed, or a layer is not built of plain linear
            modules.
    """
    units = find_architecture(model).units
    if not units:
        known = sorted(family for family, row in ARCHITECTURES.items() if row.units)
        raise ValueError(
            f"`model` must be of a family whose neurons or heads can be removed, one of {known}, got "
            f"{name_family(model)!r}. Prune single weights instead."
        )
    groups = []
    for index, (layer, network) in enumerate(zip(find_layers(model), find_feed_forwards(model), strict=True)):
        if "neurons" in units:
            *readers, writer = network.paths.matrices.values()
            groups.append(_group_units(layer, index, "neurons", readers, writer))
        if "heads" in units:
            for attention in layer.stack.attentions:
                size = getattr(get_part(layer.module, attention.module), attention.head_size)
                groups.append(_group_units(layer, index, "heads", attention.readers, attention.writer, size))
    return groups


def _group_units(
    layer: Layer, index: int, kind: str, readers: Sequence[str], writer: str, unit_size: int = 1
) -> UnitGroup:
    modules = tuple(find_linear(layer.module, path, PLAIN) for path in readers)
    return UnitGroup(index, kind, modules, find_linear(layer.module, writer, PLAIN), unit_size)


def find_kept_units(group: UnitGroup, *, multiple_of: int = 1) -> Tensor:
    """Find the units that have to stay: those whose columns of the writer are not all exactly zero.

    The others contribute nothing, whatever their rows and biases hold. Of them the first ones stay where fewer than
    one head, or no multiple of `multiple_of` neurons, would be left.

    Args:
        group: The units of a layer.
        multiple_of: What the number of neurons is rounded up to.

    Returns:
        Indices of the units, ascending. Shape `(kept,)`.
    """
    columns = group.writer.weight.detach().unflatten(1, (group.num_units, group.unit_size))
    needed = (columns != 0).any(dim=2).any(dim=0)  # (hidden, units, unit_size) -> (units,)
    step = multiple_of if group.kind == "neurons" else 1
    count = max(-(-int(needed.sum()) // step), 1) * step
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
        rows = torch.arange(group.blocks * group.writer.in_features, device=units.device)
        rows = rows.unflatten(0, (group.blocks, group.num_units, group.unit_size))[:, units]
        columns = rows[0].flatten()  # (kept * unit_size,)
        for reader in group.readers:
            for name, _ in reader.named_parameters():
                key = f"{names[reader]}.{name}"
                state[key] = state[key][rows.flatten()]
        key = f"{names[group.writer]}.weight"
        state[key] = state[key][:, columns]
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
        size, blocks = count * group.unit_size, group.blocks
        for reader in group.readers:
            narrow(reader, rows=size, blocks=blocks)
        narrow(group.writer, columns=size)
        if group.kind == "heads":
            _tell_heads(layers[group.layer], count, size)


def _tell_heads(layer: Layer, count: int, size: int) -> None:
    for paths in layer.stack.attentions:
        attention = get_part(layer.module, paths.module)
        for name, value in (("num_attention_heads", count), ("n_heads", count), ("all_head_size", size)):
            if hasattr(attention, name):  # transformers does not compute with them: they only tell the truth
                setattr(attention, name, value)


__all__ = ["UnitGroup", "find_unit_groups"]
