"""Count the cost of storing and running a model: parameters, bytes on disk and floating point operations."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from hf_moebert.architectures.counting import count_active
from hf_moebert.architectures.inputs import complete_inputs
from hf_moebert.architectures.positions import count_positions
from hf_moebert.architectures.units import find_unit_groups
from hf_moebert.checkpoints.packing import packed_bytes
from hf_moebert.inference.onnx_runtime import OnnxModel
from hf_moebert.inference.optimized import OptimizedModule


@dataclass(frozen=True)
class Footprint:
    """The cost of one model.

    Attributes:
        total: Distinct parameters; a tied parameter counts once.
        active: Parameters used for one token.
        nonzero: Parameters that differ from zero, None for a model on the meta device or an export.
        pruned: Parameters of the matrices with zeros enough to be packed, none of them in a dense or narrower model;
            None for a model on the meta device or an export.
        pruned_nonzero: Those of them that differ from zero.
        bytes_on_disk: Size of the safetensors files, None when no folder was given.
        flops_per_token: Floating point operations (two per multiply-add) of the forward pass for each token, None
            for a model that does not run on `input_ids`.
    """

    total: int
    active: int
    nonzero: int | None
    pruned: int | None
    pruned_nonzero: int | None
    bytes_on_disk: int | None
    flops_per_token: float | None


def measure_footprint(model: nn.Module, *, seq_len: int = 128, folder: str | PathLike[str] | None = None) -> Footprint:
    """Count the parameters, bytes and operations of a model.

    A module that uses only a part of its own parameters for one token has a float attribute `active_fraction`, in
    (0, 1] (`PartlyActive`); the parameters of all other modules count fully.

    Args:
        model: The model, on any device; one on the meta device is counted without its values.
        seq_len: Tokens of the sequence whose operations are counted.
        folder: Checkpoint of the model, whose `*.safetensors` files are added up.

    Raises:
        ValueError: If `seq_len` does not fit the model, if the model is optimised for inference, or if `folder` holds
            no safetensors file.
    """
    if isinstance(model, OnnxModel):  # its manifest knows what it was made of
        size = None if folder is None else sum(path.stat().st_size for path in Path(folder).glob("*/model.onnx*"))
        return Footprint(model.sizes["parameters"], model.sizes["active_parameters"], None, None, None, size, None)
    if any(isinstance(module, OptimizedModule) for module in model.modules()):
        raise ValueError(
            "`model` must not be optimised for inference, whose operators cannot be counted. Measure it before, or "
            "after `revert_optimizations`."
        )
    positions = count_positions(model)
    if seq_len < 1 or (positions is not None and seq_len > positions):
        limit = "1" if positions is None else f"1 and at most the model's {positions} positions"
        raise ValueError(f"`seq_len` must be at least {limit}, got {seq_len}. Use the length of a usual input.")
    parameters = list(model.parameters())
    on_meta = any(parameter.is_meta for parameter in parameters)
    pruned = [] if on_meta else find_pruned_matrices(model)
    return Footprint(
        total=sum(parameter.numel() for parameter in parameters),
        active=count_active(model),
        nonzero=None if on_meta else _count_nonzero(parameters),
        pruned=None if on_meta else sum(matrix.numel() for matrix in pruned),
        pruned_nonzero=None if on_meta else _count_nonzero(pruned),
        bytes_on_disk=None if folder is None else count_bytes(Path(folder)),
        flops_per_token=_count_flops(model, seq_len) if _runs_on_ids(model) else None,
    )


@dataclass(frozen=True)
class LayerWidth:
    """How many units of one kind a layer has.

    Attributes:
        layer: Index of the layer.
        kind: "neurons" or "heads"; heads that read the same keys are one.
        units: Units that are left.
        dense: Units of the dense model.
        weights: Parameters of one unit, with its biases; None where experts hold the units.
    """

    layer: int
    kind: str
    units: int
    dense: int
    weights: int | None


def find_widths(model: nn.Module) -> list[LayerWidth]:
    """Return how wide the layers of a narrowed model are, beside those of its dense origin; of other models nothing.

    The origin has `weights * (dense - units)` parameters more for each of them.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_heterogeneous", False) or not hasattr(config, "unit_names"):
        return []
    dense = config.to_dict()
    weights = _count_weights_of_units(model)
    return [
        LayerWidth(layer, kind, units, dense[config.unit_names[kind]], weights.get((layer, kind)))
        for layer, widths in enumerate(config.widths)
        for kind, units in widths.items()
    ]


def width_rows(widths: Sequence[LayerWidth]) -> list[dict[str, str]]:
    """Convert widths to one row for each layer."""
    rows: dict[int, dict[str, str]] = {}
    for width in widths:
        row = rows.setdefault(width.layer, {"layer": str(width.layer)})
        row[width.kind] = f"{width.units:,} of {width.dense:,}"
    return list(rows.values())


def describe_origin(widths: Sequence[LayerWidth], total: int) -> str:
    """Write how many parameters the dense origin of a model with so many of them has, if that is known."""
    removed = [width.weights and width.weights * (width.dense - width.units) for width in widths]
    if None in removed:
        return "unknown, its units are in experts"
    dense = total + sum(filter(None, removed))
    return f"{dense:,} parameters, of which {total / dense:.0%} are left"


def _count_weights_of_units(model: Any) -> dict[tuple[int, str], int]:
    try:
        groups = find_unit_groups(model)
    except ValueError:  # such as experts
        return {}
    numels = [sum(p.numel() for p in group.reader_parameters) + group.writer.weight.numel() for group in groups]
    return {(g.layer, g.kind): numel // g.num_units for g, numel in zip(groups, numels, strict=True)}


def find_pruned_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices that take less space packed, because many of their entries are zero."""
    return [weight for weight in model.parameters() if weight.dim() > 1 and packed_bytes(weight) < weight.nbytes]


def _count_nonzero(parameters: Iterable[nn.Parameter]) -> int:
    return sum(int(torch.count_nonzero(parameter)) for parameter in parameters)


def count_bytes(folder: Path) -> int:
    """Add up the bytes of a checkpoint's weights files.

    Raises:
        ValueError: If there are none.
    """
    # a Trainer's checkpoint may hold the state of a callback besides: no part of the model
    files = [file for file in folder.glob("*.safetensors") if not file.stem.endswith("_state")]
    sizes = [file.stat().st_size for file in files]
    if not sizes:
        raise ValueError(
            f"`folder` must hold the model's *.safetensors files, got {str(folder)!r}. Save the model there first."
        )
    return sum(sizes)


def _runs_on_ids(model: nn.Module) -> bool:
    takes_ids = getattr(model, "main_input_name", None) == "input_ids"
    # An encoder-decoder needs ids on both sides, so operations "per token" would have two meanings.
    return takes_ids and not getattr(model.config, "is_encoder_decoder", False)


def _count_flops(model: PreTrainedModel, seq_len: int) -> float:
    vocabulary = model.get_input_embeddings().num_embeddings
    device = next(model.parameters()).device
    # Different ids, because experts may be chosen by the id.
    inputs = complete_inputs(model, (torch.arange(seq_len, device=device) % vocabulary).unsqueeze(0))  # (1, seq)
    formulas = {  # for operations that the counter does not know, and would count as nothing
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._grouped_mm: _grouped_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with _evaluating(model), torch.no_grad():
        model(**inputs)  # work done once for all calls is not part of a token
        with counter:
            model(**inputs)
    return counter.get_total_flops() / seq_len


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    # Every head of the queries meets keys and values, which several heads may share.
    return sdpa_flop_count(query, (*query[:2], *key[2:]), (*query[:2], *value[2:]))


def _grouped_flops(tokens: torch.Size, weights: torch.Size, *_: Any, **__: Any) -> int:
    # Every token, whatever its group, is multiplied by one of the stacked matrices.
    return 2 * tokens.numel() * weights[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)  # torch's counter looks for the gradients of slices of weights, as DeBERTa's
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
