# Copied from hf_moebert/architectures/empty_losses.py by `make copies`; edit there.
"""Losses over no label at all, which are NaN where transformers takes a mean over nothing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput


def zero_empty_loss(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any) -> Any:
    """Replace a loss over no label by zero; a forward hook, which torch calls with the model's keyword arguments.

    A label counts unless it is -100; a place of an answer, unless it is outside of the sequence. Of the two ends of
    answers, one that has no place adds zero. Nothing else changes, such as a loss that is NaN for another reason.

    Args:
        module: The model.
        args: Not read: the Trainer gives all inputs by name.
        inputs: By name.
        outputs: Of the model; other kinds than `ModelOutput` are left alone.

    Returns:
        The outputs.
    """
    loss = outputs.get("loss") if isinstance(outputs, ModelOutput) else None
    if torch.compiler.is_compiling() or not isinstance(loss, Tensor) or not loss.isnan().all():
        return outputs
    labels, start, end = (inputs.get(name) for name in ("labels", "start_positions", "end_positions"))
    if isinstance(start, Tensor) and isinstance(end, Tensor) and "start_logits" in outputs:
        ends = [_end_loss(outputs["start_logits"], start), _end_loss(outputs["end_logits"], end)]
        outputs["loss"] = (ends[0] + ends[1]) / 2
    elif isinstance(labels, Tensor) and not labels.is_floating_point() and _is_empty(labels):
        outputs["loss"] = _zero(outputs["logits"])
    return outputs


def hook_empty_loss(model: nn.Module) -> None:
    """Let the losses of a model over no label be zero, until `unhook_empty_loss`."""
    if "_empty_loss_hook" not in vars(model):
        vars(model)["_empty_loss_hook"] = model.register_forward_hook(zero_empty_loss, with_kwargs=True)


def unhook_empty_loss(model: nn.Module) -> None:
    """Let the losses of a model be its own again."""
    if hook := vars(model).pop("_empty_loss_hook", None):
        hook.remove()


def _is_empty(labels: Tensor) -> bool:
    counted = labels != -100
    # The first label of a row is no target of a causal model; of another one, its loss would be a number
    return not bool((counted[..., 1:] if labels.dim() > 1 else counted).any())


def _end_loss(logits: Tensor, position: Tensor) -> Tensor:
    """Average the cross entropy over the ends inside the sequence, as transformers does; zero if there is none."""
    outside = logits.shape[1]
    position = position.to(logits.device).reshape(-1).clamp(0, outside)  # (batch,)
    if not bool((position != outside).any()):
        return _zero(logits)
    return F.cross_entropy(logits, position, ignore_index=outside)


def _zero(logits: Tensor) -> Tensor:
    """Return a zero that depends on logits, so that every parameter has a gradient."""
    return logits.reshape(-1)[:1].nan_to_num(0.0, 0.0, 0.0).sum() * 0.0
