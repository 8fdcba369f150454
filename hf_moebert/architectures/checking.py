"""Check that a row of the table is true of a model of its family."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families import find_architecture
from .paths import AttentionPaths
from .surgery import FeedForward, Layer, find_feed_forwards, find_layers, find_linear, get_part, matrix_of
from .units import UnitGroup, cut_state, find_unit_groups, narrow_layers


KINDS = {"neurons", "heads"}


def check_row(model: PreTrainedModel) -> None:
    """Check the row of a model's family on the model.

    A model in memory is run, too: its first network must compute what its parts do, and its units must be independent
    of each other.

    Args:
        model: A stock model of the family; it may be on the meta device. It is not changed.

    Raises:
        ValueError: If a path leads nowhere or to another kind of module, sizes disagree, or a part computes something
            else.
    """
    row = find_architecture(model)
    if not set(row.units) <= KINDS:
        raise ValueError(f"`units` must be of {sorted(KINDS)}, got {row.units}. Leave the others out.")
    networks = find_feed_forwards(model)
    for layer, network in zip(find_layers(model), networks, strict=True):
        hidden = matrix_of(network.part("down")).shape[0]
        _check_network(network, hidden)
        for number, attention in enumerate(layer.stack.attentions):
            if not number or get_part(layer.module, attention.writer) is not None:  # a model may lack further ones
                _check_attention(layer, attention, hidden, with_heads="heads" in row.units)
    groups = find_unit_groups(model) if row.units else []
    for group in groups:
        _check_number(group, getattr(row, group.kind), model.config)
    if len({group.writer for group in groups}) < len(groups):
        raise ValueError("`units` must be left out where layers share their weights, which these do.")
    if not any(parameter.is_meta for parameter in model.parameters()):
        _check_equation(networks[0])
        if groups and min(group.num_units for group in groups) > 1:
            _check_cut(model)


def _check_network(network: FeedForward, hidden: int) -> None:
    where, units = type(network.layer).__name__, network.num_units
    for name, path in network.paths.matrices.items():
        shape = tuple(matrix_of(network.part(name)).shape)
        wanted = (hidden, units) if name == "down" else (2 * units if network.paths.fused else units, hidden)
        if shape != wanted:
            raise ValueError(f"`{path}` of {where} must be of the size {wanted} (out, in), got {shape}.")
    activation = network.part("activation")
    is_function = callable(activation)
    if not is_function:
        raise ValueError(f"`{network.paths.activation}` of {where} must be the activation, got {activation!r}.")


def _check_attention(layer: Layer, paths: AttentionPaths, hidden: int, *, with_heads: bool) -> None:
    where = type(layer.module).__name__
    for path in (*paths.readers, paths.writer):
        rows, columns = matrix_of(find_linear(layer.module, path)).shape
        name, size = ("out", rows) if path == paths.writer else ("in", columns)
        if size != hidden:
            raise ValueError(f"`{path}` of {where} must have {hidden} features ({name}), got {size}.")
    size = get_part(layer.module, f"{paths.module}.{paths.head_size}")
    if with_heads and not isinstance(size, int):
        raise ValueError(
            f"`{paths.module}` of {where} must keep the size of a head in `{paths.head_size}`, got {size!r}. Name the "
            "module and its attribute, or leave heads out of `units`."
        )


def _check_number(group: UnitGroup, name: str, config: Any) -> None:
    stated = getattr(config, name, None)
    if stated is not None and stated != group.num_units:
        raise ValueError(
            f"`{name}` of the configuration must be the number of {group.kind}, got {stated}, but there are "
            f"{group.num_units}. Name another field as `{group.kind}` of the row."
        )
    blocks = {1} if len(group.readers) > 1 else {1, 2} if group.kind == "neurons" else {1, 3}
    for reader in group.readers:
        rows = len(matrix_of(reader))
        if group.blocks not in blocks or rows % (group.blocks * group.num_units):
            raise ValueError(f"A reader must have as many rows for each of {group.num_units} {group.kind}, got {rows}")


@torch.no_grad()
def _check_equation(network: FeedForward) -> None:
    """Refuse a network that computes something else than its parts do."""
    paths = network.paths
    path = paths.holder or paths.entries[0]
    layer = copy.deepcopy(network.layer).double().eval()
    module, found = get_part(layer, path), FeedForward(network.layer_path, layer, paths)
    if path == paths.up or not _takes_one_input(module):
        return  # there is no module that computes the network, or its first half, and nothing else
    down = found.part("down")
    x = torch.randn(3, len(matrix_of(down)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.to(down.weight.device)
    wanted = _activate(found, x)
    wanted = down(wanted) if paths.holder else wanted
    if not torch.allclose(module(x), wanted, rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"`{path}` of {type(layer).__name__} must compute what its parts in the row do, and does not. Perhaps "
            "`gate` and `up` are exchanged."
        )


def _activate(network: FeedForward, x: Tensor) -> Tensor:
    activation = network.part("activation")
    if network.paths.gate is not None:
        return activation(network.part("gate")(x)) * network.part("up")(x)
    first, *second = network.part("up")(x).split(network.num_units, dim=-1)
    return activation(first) * second[0] if second else activation(first)


def _takes_one_input(module: Any) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1


@torch.no_grad()
def _check_cut(model: PreTrainedModel) -> None:
    """Refuse units of which the first one cannot be cut out without another answer than from its columns at zero."""
    masked, config = copy.deepcopy(model).float().eval(), model.config
    inputs = {name: x.to(model.device) for name, x in model.dummy_inputs.items()}
    if model.main_input_name == "pixel_values":
        sides = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        inputs = {"pixel_values": torch.ones(1, config.num_channels, *sides, device=model.device)}
    groups, widths = find_unit_groups(masked), [dict[str, int]() for _ in find_layers(masked)]
    for group in groups:
        matrix_of(group.writer).unflatten(1, (group.num_units, -1))[:, 0] = 0
        widths[group.layer][group.kind] = group.num_units - 1
    kept = [(group, torch.arange(1, group.num_units, device=model.device)) for group in groups]
    narrowed, state = copy.deepcopy(masked), cut_state(masked, kept)
    narrow_layers(narrowed, widths)
    narrowed.load_state_dict(state)
    wanted = masked(**inputs)[0]
    try:
        is_same = torch.allclose(narrowed(**inputs)[0], wanted, rtol=1e-3, atol=1e-4)
    except RuntimeError:  # sizes that no longer fit
        is_same = False
    if not is_same:
        raise ValueError(
            "`units` must be independent of each other, but without the first of each layer the model answers "
            "otherwise than with its columns at zero. Leave heads out, or name all projections that belong to them."
        )


__all__ = ["check_row"]
