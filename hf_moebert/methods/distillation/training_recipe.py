"""The callback that keeps the recipe of a distillation in its checkpoints."""

from dataclasses import asdict
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback

from .recipe import DistillationConfig


class DistillationRecipeCallback(CheckpointManifestCallback):
    """Refuse to resume a distillation with another recipe than it began with.

    Args:
        config: The recipe.
        allow_changes: As for `CheckpointManifestCallback`.
    """

    def __init__(self, config: DistillationConfig, *, allow_changes: bool = False) -> None:
        super().__init__(allow_changes=allow_changes)
        self.config = config

    @property
    def owner(self) -> str:
        """Name of the class whose constructor a user gives `allow_changes`."""
        return "DistillationTrainer"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the recipe with that of the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        self.refuse_changes(state, asdict(self.config) | {"total_steps": state.max_steps})
