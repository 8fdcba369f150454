"""Remove the zero units of a pruned model."""

import copy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_moebert.architectures.stacks import refuse_forms

from .modeling_shrunk import ShrunkModel, refuse_unshrinkable, shrunk_class
from .modeling_units import UnitGroup, cut_state, find_kept_units, find_unit_groups


logger = logging.get_logger(__name__)


@torch.no_grad()
def shrink(model: PreTrainedModel, *, multiple_of: int = 1, uniform: bool = False) -> PreTrainedModel:
    """Remove the neurons and heads of a pruned model that contribute nothing.

    A unit can be removed if all its columns of the next matrix (the down-projection of the feed-forward network, the
    output projection of the attention) are exactly zero. The outputs stay the same up to rounding.

    Args:
        model: A stock model of a family whose units can be removed, or a shrunk one. It is not changed.
        multiple_of: Round the number of neurons up to a multiple of this by keeping some that are zero: kernels
            prefer multiples of 8. At least so many neurons, and one head, stay in every layer.
        uniform: Whether all layers keep as many neurons as the widest one, and as many heads where the configuration
            has `head_dim`; other heads all stay. The result is a stock model, which loads without this package.

    Returns:
        A model of the registered class, or of the stock one, with the same head, and the same dtype, device and mode.

    Raises:
        ValueError: If the model's family or head is not supported, its weights are not in memory, `multiple_of` is
            not positive, or `uniform` is asked of a family whose configuration has one width for two kinds of layers.
    """
    check_multiple(multiple_of)
    refuse_other_forms(model)
    groups = find_unit_groups(model)
    refuse_unshrinkable(model)
    cls = type(model) if isinstance(model, ShrunkModel) else shrunk_class(type(model))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")
    kept = [(group, find_kept_units(group, multiple_of=multiple_of)) for group in groups]
    if uniform:
        kept = _widen(kept, find_uniform_kinds(model))
    if all(len(units) == group.num_units for group, units in kept):
        logger.warning_once(
            f"No neuron and no head of the {type(model).__name__} can be removed: nothing was pruned in whole units, "
            "or `multiple_of` is too large. The result has full width."
        )
    widths: list[dict[str, int]] = [{} for _ in range(model.config.num_hidden_layers)]
    for group, units in kept:
        widths[group.layer][group.kind] = len(units)
    full = {group.kind: group.num_units for group in groups}
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        pooling = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
        if uniform:
            shrunk = type(model)(_stock_config(model, widths[0]), **pooling)
        else:
            shrunk = cls(cls.config_class.from_dense(model.config, widths, full), **pooling)
    shrunk.to(dtype=model.dtype, device=model.device).load_state_dict(cut_state(model, kept))
    return shrunk.train(model.training)


def refuse_other_forms(model: Any) -> None:
    """Refuse a model that is compressed in a way after which its units cannot be removed.

    Raises:
        ValueError: If it is; the message names the order that works.
    """
    refuse_forms(
        model,
        "dense, or shrunk, to lose whole neurons and heads",
        *("adapters", "chains", "crf", "experts", "masks", "shared_experts", "tasks"),
    )


def check_multiple(multiple_of: Any) -> None:
    """Refuse what is no number of neurons.

    Raises:
        ValueError: If it is not an integer of at least 1.
    """
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(
            f"`multiple_of` must be an integer of at least 1, got {multiple_of!r}. Use 8 for tensor cores."
        )


def find_uniform_kinds(model: PreTrainedModel) -> list[str]:
    """Return the kinds of units of which a stock model can have fewer in all layers, by its configuration.

    Raises:
        ValueError: If there is none, as in a model whose layers differ already.
    """
    refuse_unshrinkable(model)
    names = {} if isinstance(model, ShrunkModel) else shrunk_class(type(model)).config_class.unit_names
    declared = {field.name for field in fields(type(model.config))} | set(model.config.attribute_map)
    kinds = [kind for kind, name in names.items() if name in declared and (kind == "neurons" or _sizes_heads(model))]
    if not kinds:
        raise ValueError(
            f"`uniform` needs a stock model whose configuration says how wide its layers are, got "
            f"{type(model).__name__}. Leave it out: the layers of a shrunk model differ in width."
        )
    return kinds


def _sizes_heads(model: PreTrainedModel) -> bool:
    return isinstance(getattr(model.config, "head_dim", None), int)  # elsewhere it is hidden_size / heads


def _widen(kept: list[tuple[UnitGroup, Tensor]], kinds: list[str]) -> list[tuple[UnitGroup, Tensor]]:
    """Keep as many units in every layer as in the widest one, and all units of other kinds."""
    most = {kind: max(len(units) for group, units in kept if group.kind == kind) for kind in kinds}
    return [(group, find_kept_units(group, at_least=most.get(group.kind, group.num_units))) for group, _ in kept]


def _stock_config(model: PreTrainedModel, widths: dict[str, int]) -> PreTrainedConfig:
    """Copy a configuration, with other widths for all layers."""
    config, names = copy.deepcopy(model.config), shrunk_class(type(model)).config_class.unit_names
    for kind in find_uniform_kinds(model):
        if names[kind] == "num_key_value_heads":  # each goes with all heads that read it
            config.num_attention_heads = widths[kind] * config.num_attention_heads // config.num_key_value_heads
        setattr(config, names[kind], widths[kind])
    return config
