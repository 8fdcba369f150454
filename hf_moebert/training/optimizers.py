"""The Trainer's optimizer with parameters that have rates of their own, and optimizers that callbacks refuse."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames


ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


def make_adamw(
    model: nn.Module, args: TrainingArguments, own: Sequence[dict[str, Any]], *, rate: float | None = None
) -> torch.optim.AdamW:
    """Make the Trainer's default optimizer, but for some parameters with settings of their own.

    Give it to the stock Trainer by `optimizers=(optimizer, None)`: the Trainer makes the schedule.

    Args:
        model: As given to the Trainer.
        args: As given to the Trainer.
        own: Groups of parameters as torch takes them, with what differs. They have no weight decay.
        rate: Learning rate of all other parameters that require gradients; by default that of `args`.

    Raises:
        ValueError: If `args` ask for another optimizer.
    """
    if args.optim not in ADAMW:
        raise ValueError(
            f"`optim` must be {' or '.join(repr(name.value) for name in ADAMW)}, got {args.optim.value!r}: parameters "
            "with rates of their own are trained by AdamW. Leave `optim` out, or make an optimizer of your own."
        )
    taken = {id(parameter) for group in own for parameter in group["params"]}
    names = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    decayed: dict[str, Any] = {"params": [], "weight_decay": args.weight_decay}
    undecayed: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            (decayed if name in names else undecayed)["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in (decayed, undecayed, *own) if group["params"]],
        lr=args.learning_rate if rate is None else rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=0.0,
        fused=not args.fp16,  # as the Trainer's own; with fp16, a fused optimizer does not report a skipped step
    )


def refuse_averaging(optimizer: Any, rule: str) -> None:
    """Refuse optimizers that evaluate and save other weights than they train, such as the schedule-free ones.

    They keep averages in their state and swap them in by `eval()`, which undoes what a callback does to the weights.

    Args:
        optimizer: The one of a Trainer, as it is or prepared by accelerate.
        rule: Start of the error message: who needs the trained weights.

    Raises:
        ValueError: If it has a method `eval`, as no plain optimizer of torch has.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's own wrapper always has the method
    if hasattr(inner, "eval"):
        raise ValueError(
            f"{rule}, but {type(inner).__name__} evaluates and saves averages of them. Train with "
            '`optim="adamw_torch"` and a schedule.'
        )
