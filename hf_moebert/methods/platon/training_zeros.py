"""The callback that trains a pruned model on without losing its zeros."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback
from hf_moebert.training.optimizers import refuse_averaging
from hf_moebert.training.sharding import local_values, plain_classes, refuse_sharded_but_fsdp2

from .functional import apply_mask_
from .recipe import PlatonConfig
from .training_parameters import find_prunable
from .training_statistics import find_processes


class KeepZerosCallback(CheckpointManifestCallback):
    """Callback that keeps the zeros of a pruned model while any stock `Trainer` trains it on.

    What is zero when training begins is zero after every step: single weights, two of every four, and the columns of
    removed units that `shrink` looks for. A resumed run reads its zeros off the checkpoint's weights. Our own design.

    Args:
        modules: Paths of the modules in which zeros are kept; by default the repeated layers, as in `PlatonConfig`.
        **options: As for `CheckpointManifestCallback`.

    Raises:
        ValueError: When training begins, if there is no zero, the model has adapters or is sharded by other means than
            FSDP2, or the optimizer evaluates other weights than it trains; and as `CheckpointManifestCallback`.
    """

    def __init__(self, modules: list[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.config = PlatonConfig(modules=modules)
        self._kept: list[tuple[Tensor, Tensor]] = []  # parameters, and flat masks of what is here of them

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the zeros of the model."""
        super().on_train_begin(args, state, control, **kwargs)
        model: nn.Module = kwargs["model"]
        refuse_sharded_but_fsdp2(model, "Zeros must be kept in parameters that are whole or in rows")
        refuse_averaging(kwargs["optimizer"], "Zeros must be kept in the weights that are trained")
        if getattr(model, "peft_config", None):
            raise ValueError(
                "`model` must be the pruned one alone, got adapters, whose zeros are only where they begin. Frozen "
                "weights keep their zeros; merge the adapters to train those on."
            )
        with plain_classes(model):
            parameters = list(find_prunable(model, self.config).values())
        masks = [(parameter, local_values(parameter).view(-1) != 0) for parameter in parameters]
        self._kept = [(parameter, keep) for parameter, keep in masks if not keep.all()]
        if not find_processes(parameters).count(len(self._kept), parameters[0].device):
            raise ValueError(
                f"`model` must have zeros to keep, got a {type(model).__name__} without any in its linear layers. "
                "Prune it with `PlatonPruningCallback` first, or name its `modules`."
            )

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set to zero again what the step has moved."""
        for parameter, keep in self._kept:
            apply_mask_(local_values(parameter).view(-1), keep)


__all__ = ["KeepZerosCallback"]
