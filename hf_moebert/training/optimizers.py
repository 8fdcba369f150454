"""Refuse optimizers that a callback which changes weights cannot work beside."""

from typing import Any


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
