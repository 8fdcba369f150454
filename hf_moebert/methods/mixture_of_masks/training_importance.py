"""Importance of units for a one-shot split: the effect of each on the loss."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .modeling_surgery import FeedForward, find_feed_forwards


def measure_unit_importance(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Score each unit between the matrices of the feed-forward networks by what its loss would cost, to first order.

    It is the absolute derivative of the loss of each example by a mask of value 1 on the unit, summed over examples;
    in language models the longer examples of a batch count for more, as they do in its loss. This is the part of
    MoEBERT's importance that belongs to the second matrix (Zuo et al. 2022, https://arxiv.org/abs/2204.07675, section
    3.2); that it stands for the whole is our own choice.

    Args:
        model: Dense. It is left as it was.
        batches: Inputs with `labels`, on the model's device. Use training data.

    Returns:
        Shape `(layers, units)`, on the CPU.

    Raises:
        ValueError: If there is no batch or one without labels, or a derivative is not finite.
    """
    networks = find_feed_forwards(model)
    totals = torch.zeros(len(networks), networks[0].num_units)
    was_training, count = model.training, 0
    model.eval()
    try:
        for batch in batches:
            if "labels" not in batch:
                raise ValueError(f"`batches` must have `labels`, got {sorted(batch)}. Use labelled training data.")
            grads = _derive_by_masks(model, batch, networks)
            # the loss is a mean over the batch: times its size, examples of small and large ones count alike
            totals += torch.stack([len(grad) * grad.float().abs().sum(dim=0).flatten().cpu() for grad in grads])
            count += 1
    finally:
        model.train(was_training)
    if not count or not totals.isfinite().all():
        raise ValueError(
            "`batches` must hold at least one batch, and give finite derivatives, "
            f"got {'NaN or infinity' if count else 'none'}. Check the data and the model."
        )
    return totals


def _derive_by_masks(
    model: PreTrainedModel, batch: Mapping[str, Any], networks: list[FeedForward]
) -> tuple[Tensor, ...]:
    """Return the derivative of the loss by a mask of value 1 on each unit of each example, for each network."""
    scaled: list[Tensor] = []
    handles = [network.part("down").register_forward_pre_hook(_scale_by(scaled)) for network in networks]
    try:
        with torch.enable_grad():
            return torch.autograd.grad(model(**batch).loss, scaled)
    finally:
        for handle in handles:
            handle.remove()


def _scale_by(scaled: list[Tensor]) -> Any:
    """Multiply the input of a matrix by masks of value 1, one for each example, which are collected."""

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden = inputs[0]  # (batch, ..., units)
        mask = hidden.new_ones(len(hidden), *[1] * (hidden.dim() - 2), hidden.shape[-1]).requires_grad_()
        scaled.append(mask)
        return (hidden * mask,)

    return hook


__all__ = ["measure_unit_importance"]
