"""The callback that prunes a model while the stock `Trainer` trains it."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_moebert.architectures.protocols import UnitCosts
from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback
from hf_moebert.training.optimizers import refuse_averaging
from hf_moebert.training.sharding import local_values, refuse_sharded_but_fsdp2

from .functional_selection import Processes
from .recipe import PlatonConfig
from .training_pruner import Pruner
from .training_state import write_state


logger = logging.get_logger(__name__)


class PlatonPruningCallback(CheckpointManifestCallback):
    """Callback that sets the least important weights of a model to zero while any stock `Trainer` trains it.

    After `initial_warmup` the share of kept weights falls along a cubic curve. In the last phase, `final_warmup`, it
    is `keep_ratio` after every single step, so that every evaluation and checkpoint of that phase is exactly as
    sparse as requested. Before that phase nothing counts as the best model, and early stopping waits: an early, dense
    model would always win.

    Logs hold the scheduled ratio, the actual share of zeros, the threshold and the share of revived weights as
    `platon_*`; `trainer.state.log_history` also holds the sparsity of each parameter. Every checkpoint gets the
    statistics in `platon_state.safetensors`, and a resumed run continues as if it had never stopped.

    Args:
        config: The recipe; by default `PlatonConfig()`.
        latency: What units cost on this machine, from `measure_unit_latency`, for a recipe with `speed_up`.
        resume_from: Folder of the checkpoint from which a run is resumed, if it is not in its `output_dir`.
        allow_changes: As for `CheckpointManifestCallback`.

    Raises:
        ValueError: If `speed_up` and `latency` do not go together; when training begins, if nothing can be pruned or
            not so much, the run is too short for the schedule, the model is sharded by other means than FSDP2, the
            optimizer evaluates other weights than it trains, or the checkpoint has no matching state; and as
            `CheckpointManifestCallback`.
        FloatingPointError: While training, if gradients stay NaN or infinite.

    Source: Zhang et al. 2022, https://arxiv.org/abs/2206.12562.
    """

    def __init__(
        self,
        config: PlatonConfig | None = None,
        *,
        latency: UnitCosts | None = None,
        resume_from: str | Path | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(resume_from=resume_from, allow_changes=allow_changes)
        self.config = PlatonConfig() if config is None else config
        self.latency = latency
        if (self.config.speed_up is None) != (latency is None):
            raise ValueError(
                f"`latency` must be given with `speed_up` and only then, got {type(latency).__name__} with "
                f"`speed_up={self.config.speed_up}`. Measure it by `measure_unit_latency(model)`."
            )
        self.pruner: Pruner | None = None
        self._overflow = False
        self._collected: tuple[dict[str, Any], dict[str, Tensor]] | None = None  # while a checkpoint is written

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the parameters to prune, and load the state of a checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        model: nn.Module = kwargs["model"]
        refuse_sharded_but_fsdp2(model, "Pruning must see parameters and their gradients, whole or by rows")
        refuse_averaging(kwargs["optimizer"], "Pruning must see the weights that are evaluated and saved")
        self.pruner = None  # frees its memory before the next one allocates as much
        self.pruner = Pruner(
            model, self.config, state.max_steps, latency=self.latency
        )  # a new one: `train` may be called twice
        if state.global_step:
            folder = self.find_checkpoint(args, state)
            self.pruner.load(folder, state.global_step, allow_changes=self.allow_changes)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the best model until the final ratio is reached."""
        if not self._running.is_final:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the gradients with the weights at which they were computed: the paper's order."""
        # Not by `step_was_skipped` later: accelerate does not know when a fused optimizer skips a step.
        self._overflow = _has_overflow(kwargs["optimizer"], self._running.statistics.processes)
        if self.config.sensitivity_at == "pre_step" and not self._overflow:
            self._running.observe()

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the gradients with the updated weights for `post_step`, and prune as scheduled."""
        if self._overflow:  # the clock stands still
            return
        if self.config.sensitivity_at == "post_step":
            self._running.observe()
        self._running.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add the figures of the pruning to the logs of training."""
        # Not to those of an evaluation: these are the metrics that searches optimise and model cards print.
        if self.pruner is None or logs.keys().isdisjoint({"loss", "train_loss"}):
            return
        sparsity = self.pruner.measure_sparsity()  # in all processes, among which weights may be spread
        if not state.is_world_process_zero:
            return
        logs |= {
            "platon_ratio": self.pruner.ratio,
            "platon_sparsity": self.pruner.average_sparsity(sparsity),
            "platon_revived": self.pruner.revived,
        }
        if math.isfinite(self.pruner.threshold):  # nothing was pruned yet, and JSON has no infinity
            logs["platon_threshold"] = self.pruner.threshold
        # The Trainer has copied the logs into its history before it calls callbacks.
        state.log_history[-1] |= logs | {f"platon_sparsity/{name}": share for name, share in sparsity.items()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the statistics into the checkpoint: in all processes, among which they may be spread."""
        if not args.save_only_model:
            self._collected = self._running.collect(state.global_step)
        super().on_save(args, state, control, **kwargs)
        self._collected = None

    def save_state(self, folder: Path, state: TrainerState) -> None:
        """Write the collected statistics."""
        assert self._collected is not None
        write_state(folder, *self._collected)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if training stopped before the final ratio was reached."""
        super().on_train_end(args, state, control)
        if not self._running.is_final:
            left = 1 - self._running.average_sparsity(self._running.measure_sparsity())
            logger.warning(
                f"Training stopped after {self._running.clock} steps, before the final ratio"
                f" {self.config.final_share:.4g} was reached: {left:.1%} of the weights are not zero."
            )

    @property
    def _running(self) -> Pruner:
        if self.pruner is None:
            raise RuntimeError("The callback must be added to the Trainer before `train` is called.")
        return self.pruner


def _has_overflow(optimizer: Any, processes: Processes) -> bool:
    """Check whether the loss scaler will skip this step for an overflow; unscale the gradients if still scaled."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return False
    with suppress(RuntimeError):  # it refuses a second time: clipping unscales, and so does a norm that is only logged
        scaler.unscale_(optimizer.optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sums = torch.stack([local_values(gradient).float().sum() for gradient in gradients])
    return not processes.join(sums).isfinite().all()
