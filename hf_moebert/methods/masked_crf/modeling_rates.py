"""A rate of their own for the scores of a CRF, under any optimizer of torch.

An optimizer moves a weight by about the learning rate a step, but scores of transitions have to move by some units: at
the rate of an encoder they hardly leave zero. Hooks, which torch offers for all optimizers, divide the scores by a
factor before each step and multiply them by it after, so that the step is longer by that factor. It is a power of two,
which rounds nothing. Our own design.
"""

import math
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.utils import logging


logger = logging.get_logger(__name__)
BASE_RATE = "crf_base_rate"  # entry of a group of parameters: its rate before any schedule. It is in checkpoints.


class ScoresWithRate(nn.Module):
    """A layer whose own parameters move at a rate of their own while it computes losses.

    The rate of the optimizer holds where it is higher, where the parameters have a group to themselves, and in steps
    that compute the loss themselves.

    Attributes:
        score_rate: Learning rate of the parameters before any schedule, above 0; None for that of the optimizer. It is
            not saved.
    """

    score_rate: float | None = 1e-2
    _divisor = 1.0  # above 1 within a step only

    def give_rate(self) -> None:
        """Let the next steps of optimizers be longer for these parameters.

        Raises:
            ValueError: If `score_rate` is not above 0.
        """
        if self.score_rate is not None and not self.score_rate > 0:
            raise ValueError(f"`score_rate` must be above 0 or None, got {self.score_rate!r}. Use 1e-2.")
        self._multiply()  # a step may have stopped with an error
        _watch_optimizers()
        _layers.add(self)

    @torch.no_grad()
    def _divide(self, optimizer: Optimizer) -> None:
        divisor = self._divisor_for(optimizer)
        if divisor <= 1 or self._divisor > 1:  # the second in a step within a step, as of a subclass
            return
        for parameter in self.parameters(recurse=False):
            parameter.div_(divisor)
        self._divisor = divisor

    @torch.no_grad()
    def _multiply(self) -> None:
        if self._divisor > 1:
            for parameter in self.parameters(recurse=False):
                parameter.mul_(self._divisor)
            self._divisor = 1.0

    def _groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        own = {id(parameter) for parameter in self.parameters(recurse=False)}
        return [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]

    def _divisor_for(self, optimizer: Optimizer) -> float:
        groups, scores = self._groups(optimizer), {id(p) for layer in _layers for p in layer.parameters(recurse=False)}
        if not self.score_rate or not all(any(id(p) not in scores for p in group["params"]) for group in groups):
            return 1.0
        for group in groups:
            if rate := float(group.get("initial_lr", group.get("lr")) or 0):  # 0 at the start of a warm-up, or None
                group.setdefault(BASE_RATE, rate)
        rates = [group[BASE_RATE] for group in groups if BASE_RATE in group]
        if not rates or min(rates) >= self.score_rate:
            return 1.0
        if hasattr(optimizer, "eval"):  # its averages of weights would not fit the divided ones
            logger.warning_once(
                f"The scores of the CRF move at the rate of all weights, because {type(optimizer).__name__} evaluates "
                "averages of them. Give them a group of parameters of their own, with a rate of about 1e-2."
            )
            return 1.0
        return 2.0 ** round(math.log2(self.score_rate / min(rates)))


_layers: WeakSet[ScoresWithRate] = WeakSet()  # that compute losses


@cache
def _watch_optimizers() -> None:
    """Register the hooks, once, when the first loss is computed."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not any(callable(value) for value in (*args, *kwargs.values())):  # a closure computes the loss within the step
        for layer in list(_layers):
            layer._divide(optimizer)


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for layer in list(_layers):
        if layer._groups(optimizer):
            layer._multiply()
