"""Units that can only be removed whole: neurons of feed-forward networks and heads of attentions.

Which weights belong together, and that a unit may go once no column of its writer is left, is our own design: the
structured rule of PLATON's paper is not known to us.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class UnitGroup:
    """Units of one layer that can only be removed whole: neurons of a feed-forward network or heads of an attention.

    Attributes:
        layer: Index of the layer.
        kind: "neurons" or "heads".
        readers: Modules whose output rows (of the weight and of the bias) belong to the units.
        writer: Module whose input columns belong to the units.
        unit_size: Rows of each reader, and columns of the writer, for one unit.
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


@dataclass(frozen=True)
class Layout:
    """Where the models of a family keep their units; all paths but the first start at a layer.

    Attributes:
        layers: Path of the list of layers in the body.
        neurons: Paths of the readers of the neurons, and of their writer.
        heads: Paths of the readers of the heads, and of their writer.
        attention: Path of the module that computes the attention.
        head_size: Attribute in which that module keeps the size of a head.
    """

    layers: str
    neurons: tuple[str, ...]
    heads: tuple[str, ...] = ()
    attention: str = ""
    head_size: str = ""


BERT = Layout(
    layers="encoder.layer",
    neurons=("intermediate.dense", "output.dense"),
    heads=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    attention="attention.self",
    head_size="attention_head_size",
)
DISTILBERT = Layout(
    layers="transformer.layer",
    neurons=("ffn.lin1", "ffn.lin2"),
    heads=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    attention="attention",
    head_size="attention_head_size",
)
VIT = Layout(
    layers="layers",
    neurons=("mlp.fc1", "mlp.fc2"),
    heads=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    attention="attention",
    head_size="head_dim",
)
# Heads that share parts with others (relative positions, grouped keys) cannot be removed one by one: neurons only.
DEBERTA = Layout(layers="encoder.layer", neurons=("intermediate.dense", "output.dense"))
GATED = Layout(layers="layers", neurons=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))

LAYOUTS = {
    "bert": BERT,
    "roberta": BERT,
    "distilbert": DISTILBERT,
    "vit": VIT,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA,
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
}


def find_unit_groups(model: PreTrainedModel) -> list[UnitGroup]:
    """Find the neurons and, where they are independent of each other, the heads of each layer.

    Args:
        model: A stock model of one of the families in `LAYOUTS`, with any head; or a shrunk one.

    Returns:
        The groups, by layer, neurons before heads.

    Raises:
        ValueError: If the family is not known, or a layer is not built of plain linear modules.
    """
    layout = _find_layout(model)
    groups = []
    for index, layer in enumerate(_find(model.base_model, layout.layers, nn.ModuleList)):
        for kind, paths in (("neurons", layout.neurons), ("heads", layout.heads)):
            if paths:
                *readers, writer = (_find(layer, path, nn.Linear) for path in paths)
                size = getattr(attrgetter(layout.attention)(layer), layout.head_size) if kind == "heads" else 1
                groups.append(UnitGroup(index, kind, tuple(readers), writer, size))
    return groups


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
        rows = torch.arange(group.writer.in_features, device=units.device)
        rows = rows.unflatten(0, (group.num_units, group.unit_size))[units].flatten()  # (kept * unit_size,)
        for reader in group.readers:
            for name, _ in reader.named_parameters():
                key = f"{names[reader]}.{name}"
                state[key] = state[key][rows]
        key = f"{names[group.writer]}.weight"
        state[key] = state[key][:, rows]
    return state


def narrow_layers(model: PreTrainedModel, widths: list[dict[str, int]]) -> None:
    """Leave the first units of each layer, in place; what the units hold does not matter here.

    Args:
        model: A model as the host builds it.
        widths: Units that stay in each layer, by kind.
    """
    layout = _find_layout(model)
    layers = attrgetter(layout.layers)(model.base_model)
    for group in find_unit_groups(model):
        count = widths[group.layer][group.kind]
        size = count * group.unit_size
        for reader in group.readers:
            _narrow(reader, rows=size)
        _narrow(group.writer, columns=size)
        if group.kind == "heads":
            attention = attrgetter(layout.attention)(layers[group.layer])
            for name, value in (("num_attention_heads", count), ("n_heads", count), ("all_head_size", size)):
                if hasattr(attention, name):  # the host does not compute with them: they only tell the truth
                    setattr(attention, name, value)


def _narrow(linear: nn.Linear, *, rows: int | None = None, columns: int | None = None) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())


def _find_layout(model: PreTrainedModel) -> Layout:
    family = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if family.removeprefix("shrunk_") not in LAYOUTS:
        raise ValueError(
            f"`model` must be of a type whose neurons and heads are known, one of {sorted(LAYOUTS)}, got {family!r}. "
            "Prune and shrink the dense model before you convert it, or prune single weights."
        )
    return LAYOUTS[family.removeprefix("shrunk_")]


def _find(parent: nn.Module, path: str, wanted: type[nn.Module]) -> Any:
    try:
        module: Any = attrgetter(path)(parent)
    except AttributeError:
        module = None
    if type(module) is not wanted:  # a subclass may compute with its weights in another way
        raise ValueError(
            f"`{path}` of {type(parent).__name__} must be a plain {wanted.__name__}, got {type(module)}. Merge "
            "adapters and undo quantization or parametrizations first."
        )
    return module


__all__ = ["UnitGroup", "find_unit_groups"]
