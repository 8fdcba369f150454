"""Remove the zero units of a pruned model."""

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling_shrunk import ShrunkModel, refuse_unshrinkable, shrunk_class
from .modeling_units import cut_state, find_kept_units, find_unit_groups


logger = logging.get_logger(__name__)


@torch.no_grad()
def shrink(model: PreTrainedModel, *, multiple_of: int = 1) -> PreTrainedModel:
    """Remove the neurons and heads of a pruned model that contribute nothing.

    A unit can be removed if all its columns of the next matrix (the down-projection of the feed-forward network, the
    output projection of the attention) are exactly zero. The outputs stay the same up to rounding.

    Args:
        model: A stock model of a family whose units can be removed, or a shrunk one. It is not changed.
        multiple_of: Round the number of neurons up to a multiple of this by keeping some that are zero: kernels
            prefer multiples of 8. At least so many neurons, and one head, stay in every layer.

    Returns:
        A model of the registered class with the same head, and the same dtype, device and mode.

    Raises:
        ValueError: If the model's family or head is not supported, its weights are not in memory, or `multiple_of` is
            not positive.
    """
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(
            f"`multiple_of` must be an integer of at least 1, got {multiple_of!r}. Use 8 for tensor cores."
        )
    groups = find_unit_groups(model)
    refuse_unshrinkable(model)
    cls = type(model) if isinstance(model, ShrunkModel) else shrunk_class(type(model))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("`model` must hold its weights in memory, some are offloaded. Load it without offloading.")
    kept = [(group, find_kept_units(group, multiple_of=multiple_of)) for group in groups]
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
        shrunk = cls(cls.config_class.from_dense(model.config, widths, full), **pooling)
    shrunk.to(dtype=model.dtype, device=model.device).load_state_dict(cut_state(model, kept))
    return shrunk.train(model.training)
