"""The callback that trains a pruned model on without losing its zeros."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback
from hf_moebert.training.optimizers import refuse_averaging
from hf_moebert.training.sharding import refuse_sharded

from .functional import apply_mask_
from .recipe import PlatonConfig
from .training_parameters import find_prunable


class KeepZerosCallback(CheckpointManifestCallback):
    """Callback that keeps the zeros of a pruned model while any stock `Trainer` trains it on.

    What is zero when training begins is zero after every step: single weights, two of every four, and the columns of
    removed units that `shrink` looks for. A resumed run reads its zeros off the checkpoint's weights. Our own design.

    Args:
        modules: Paths of the modules in which zeros are kept; by default the repeated layers, as in `PlatonConfig`.
        **options: As for `CheckpointManifestCallback`.

    Raises:
        ValueError: When training begins, if there is no zero, the model is sharded or has adapters, or the optimizer
            evaluates other weights than it trains; and as `CheckpointManifestCallback`.
    """

    def __init__(self, modules: list[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.config = PlatonConfig(modules=modules)
        self._kept: list[tuple[Tensor, Tensor]] = []  # flat weights and their masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the zeros of the model."""
        super().on_train_begin(args, state, control, **kwargs)
        model: nn.Module = kwargs["model"]
        refuse_sharded(model, "Zeros must be kept in whole parameters")
        refuse_averaging(kwargs["optimizer"], "Zeros must be kept in the weights that are trained")
        if getattr(model, "peft_config", None):
            raise ValueError(
                "`model` must be the pruned one alone, got adapters, whose zeros are only where they begin. Frozen "
                "weights keep their zeros; merge the adapters to train those on."
            )
        weights = [parameter.detach().view(-1) for parameter in find_prunable(model, self.config).values()]
        self._kept = [(weight, weight != 0) for weight in weights if not weight.all()]
        if not self._kept:
            raise ValueError(
                f"`model` must have zeros to keep, got a {type(model).__name__} without any in its linear layers. "
                "Prune it with `PlatonPruningCallback` first, or name its `modules`."
            )

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set to zero again what the step has moved."""
        for weight, keep in self._kept:
            apply_mask_(weight, keep)


__all__ = ["KeepZerosCallback"]
