"""The callback that keeps the recipe of a distillation in its checkpoints."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback

from .recipe import DistillationConfig
from .training_projection import Projection


class DistillationRecipeCallback(CheckpointManifestCallback):
    """Refuse to resume a distillation with another recipe than it began with.

    Args:
        config: The recipe.
        projection: The map that is learned beside the student, if there is one, which checkpoints keep.
        allow_changes: As for `CheckpointManifestCallback`.
    """

    def __init__(
        self, config: DistillationConfig, projection: Projection | None = None, *, allow_changes: bool = False
    ) -> None:
        super().__init__(allow_changes=allow_changes)
        self.config, self.projection = config, projection

    @property
    def owner(self) -> str:
        """Name of the class whose constructor a user gives `allow_changes`."""
        return "DistillationTrainer"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the recipe with that of the checkpoint, and read its projection."""
        super().on_train_begin(args, state, control, **kwargs)
        self.refuse_changes(state, asdict(self.config) | {"total_steps": state.max_steps})
        if self.projection is not None:
            self.projection.zero_grad()
            if state.global_step:
                self.projection.load(self.find_checkpoint(args, state))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the gradient of the projection: the Trainer does so for those of its model alone."""
        if self.projection is not None:
            self.projection.zero_grad()

    def save_state(self, folder: Path, state: TrainerState) -> None:
        """Write the projection into a checkpoint."""
        if self.projection is not None:
            self.projection.save(folder)
