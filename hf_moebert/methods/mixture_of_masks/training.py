"""The callback that learns masks while the stock `Trainer` trains a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback
from hf_moebert.training.schedules import cubic_decay, linear_ramp
from hf_moebert.training.sharding import refuse_sharded

from .functional import open_probability
from .modeling_masked import MoMModel
from .recipe import RAMPS, MaskSparsityConfig
from .training_optimizer import SCORES, find_learned, make_optimizer, set_score_rate


logger = logging.get_logger(__name__)


class MaskSparsityCallback(CheckpointManifestCallback):
    """Callback that learns masks while any `Trainer` trains the model, towards a target sparsity that rises.

    Before each step this callback draws the noise of the masks, the same for all batches of the step and all
    processes. After it, it shifts all scores together, so that the expected sparsity is exactly the target: the loss
    decides which masks close, and not how many. In the last steps masks are fixed at 0 and 1, and the other weights
    recover. Clock and schedule are part of the model, and so of every checkpoint: a resumed run continues as if it
    had never stopped. Until masks are fixed, nothing counts as the best model.

    Give the Trainer the optimizer that `make_optimizer` makes. Logs hold `mom_target`, the expected `mom_sparsity`,
    the share `mom_active` of masks that are open without noise, and `mom_load`, the largest share of tokens of an
    expert; `trainer.state.log_history` also holds the open share and the kinds of units of each block.

    Args:
        config: The recipe; by default `MaskSparsityConfig()`.
        resume_from: As for `CheckpointManifestCallback`.
        allow_changes: As for `CheckpointManifestCallback`. The learning rates of routers and of all other weights are
            still those of the checkpoint, as in any resumed run.

    Raises:
        ValueError: When training begins, if the model has no masks to learn, the optimizer is not that of
            `make_optimizer`, the run is too short, the model is sharded, or a resumed run has changed.
        FloatingPointError: While training, if scores become NaN or infinite.

    Source: As `MaskSparsityConfig`.
    """

    def __init__(
        self,
        config: MaskSparsityConfig | None = None,
        *,
        resume_from: str | Path | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(resume_from=resume_from, allow_changes=allow_changes)
        self.config = MaskSparsityConfig() if config is None else config
        self._model: MoMModel | None = None
        self._ramp_steps = self._learn_steps = 0
        self._clock = -1  # as this step began; -1 before the first one

    def make_optimizer(self, model: nn.Module, args: TrainingArguments) -> torch.optim.AdamW:
        """Make the optimizer for `Trainer(..., optimizers=(optimizer, None))`.

        Scores and routers have learning rates of their own and no weight decay. That of the scores has no schedule,
        as masks are learned in the first part of a run. With `freeze_backbone`, all other weights stop requiring
        gradients.

        Args:
            model: A model with masks to learn, as given to the Trainer. PEFT may have wrapped it if `modules_to_save`
                of its configuration names the masks.
            args: As given to the Trainer.
        """
        return make_optimizer(model, find_learned(model), self.config, args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, the optimizer and the schedule, and reset the clock of a new run."""
        super().on_train_begin(args, state, control, **kwargs)
        model: nn.Module = kwargs["model"]
        refuse_sharded(model, "Masks must be seen whole")
        if args.n_gpu > 1:
            raise ValueError(
                f"Every process must use one GPU, got {args.n_gpu}: copies of `nn.DataParallel` see no noise. Use "
                "torchrun."
            )
        self._model = find_learned(model)
        self._check_optimizer(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))
        self._ramp_steps, self._clock = self.config.ramp_steps(state.max_steps), -1
        self._learn_steps = self.config.learn_steps(state.max_steps)
        budget = self._running.budget
        schedule = self._encode_schedule(state.max_steps, args.seed)
        if state.global_step:
            self._check_changes(schedule, budget.schedule)
        else:  # a new run: `train` may be called twice
            budget.clock.zero_()
        budget.schedule.copy_(torch.tensor(list(schedule.values())))
        budget.in_run = True
        if self.config.keep_ratio == 1:
            logger.warning("`keep_ratio` is 1: no mask will be closed.")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the noise, and forget the best model, while masks are learned."""
        model = self._running
        self._clock = int(model.budget.clock)
        is_learning = self._clock < self._learn_steps
        set_score_rate(kwargs["optimizer"].param_groups, self.config.score_rate if is_learning else 0.0)
        if is_learning and self.config.keep_ratio < 1:
            model.draw_noise(args.seed)
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step and hold the masks to their target, unless it was skipped for an overflow."""
        model, clock = self._running, self._clock + 1
        was_counted = int(model.budget.clock) == clock  # by a second callback
        if was_counted or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        model.budget.clock.fill_(clock)
        if self.config.keep_ratio == 1 or clock > self._learn_steps:
            return
        if clock == self._learn_steps:
            model.harden_masks(self.config.keep_ratio)
        else:
            model.hold_masks(self.target_at(clock))

    @torch.no_grad()
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add the figures of the masks to the logs of training."""
        if self._clock < 0 or logs.keys().isdisjoint({"loss", "train_loss"}):
            return
        networks = self._running.masked_networks()
        if not all(network.masks.learned.isfinite().all() for network in networks.values()):
            raise FloatingPointError(
                f"Scores of masks must be finite, but by step {state.global_step} some are not. Lower `score_rate`, "
                "clip with `max_grad_norm`, or train in bf16 instead of fp16."
            )
        open_shares = [float((n.masks.settled() > 0).float().mean()) for n in networks.values()]
        logs |= {
            "mom_target": self.target_at(int(self._running.budget.clock)),
            "mom_sparsity": float(self._running.measure_sparsity().mean()),
            "mom_active": sum(open_shares) / len(open_shares),
        } | self._take_load(state.global_step)
        blocks = {f"mom_open/{n.block}": float(open_probability(n.masks.learned).mean()) for n in networks.values()}
        for path, counts in self._running.count_units().items():
            blocks |= {f"mom_{kind}/{networks[path].block}": count for kind, count in counts.items()}
        if state.is_world_process_zero:  # the Trainer has already copied the logs into its history
            state.log_history[-1] |= logs | blocks

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the masks have not reached their target, and end the run."""
        super().on_train_end(args, state, control)
        if self._clock < 0:  # resumed at its end
            return
        model, wanted = self._running, 1 - self.config.keep_ratio
        if int(model.budget.clock) < self._learn_steps and wanted:  # of the best model
            logger.warning(
                f"Training stopped after {state.global_step} steps, before masks were fixed, and the final model has a"
                f" sparsity of {float(model.measure_sparsity().mean()):.3f} instead of {wanted:.3f}. Train to the end,"
                " or lower `learn_share`."
            )
        model.budget.in_run = False
        for network in model.masked_networks().values():
            network.masks.set_noise(None)

    def target_at(self, clock: int) -> float:
        """Return the target sparsity after this number of steps."""
        if self.config.ramp == "cubic":
            return 1 - cubic_decay(clock, begin=0, end=self._ramp_steps, final=self.config.keep_ratio)
        return (1 - self.config.keep_ratio) * linear_ramp(clock, begin=0, end=self._ramp_steps)

    @property
    def _running(self) -> MoMModel:
        if self._model is None:
            raise RuntimeError("The callback must be added to the Trainer before `train` is called.")
        return self._model

    def _take_load(self, step: int) -> dict[str, float]:
        """Return the largest share of tokens of an expert since the last call, and warn of experts without tokens."""
        loads: dict[int, Tensor] = {}
        for network in self._running.masked_networks().values():
            if network.load is not None:
                loads[network.block], network.load = network.load, None
        idle = {block: (load == 0).nonzero().flatten().tolist() for block, load in loads.items()}
        if idle := {block: experts for block, experts in idle.items() if experts}:
            logger.warning(
                f"Up to step {step}, experts had no token since the last log, by block: {idle}. Raise "
                "`router_aux_loss_coef`."
            )
        return {"mom_load": max(float(load.max() / load.sum()) for load in loads.values())} if loads else {}

    def _encode_schedule(self, total_steps: int, seed: int) -> dict[str, float]:
        # In the place of `learn_share` 0.1.0 had a rate, by default 1; its runs learned masks to the end
        numbers = asdict(self.config) | {"ramp": RAMPS.index(self.config.ramp), "max_steps": total_steps, "seed": seed}
        return {name: -1.0 if value is None else float(value) for name, value in numbers.items()}

    def _check_changes(self, schedule: dict[str, float], before: Tensor) -> None:
        if not before.any():
            raise ValueError(
                "`resume_from_checkpoint` must be a checkpoint of a run with this callback, got one without. Train "
                "from its weights without resuming."
            )
        changes = [
            f"`{name}` from {old:g} to {new:g}"
            for (name, new), old in zip(schedule.items(), before.tolist(), strict=True)
            if abs(new - old) > 1e-6 * abs(old)
        ]
        if changes and not self.allow_changes:
            raise ValueError(
                f"A resumed run must go on as it began, this one changes {', '.join(changes)}. Use the old values, or "
                "`MaskSparsityCallback(..., allow_changes=True)`."
            )

    def _check_optimizer(self, optimizer: Any) -> None:
        scores = {id(network.masks.learned) for network in self._running.masked_networks().values()}
        held = {id(parameter) for group in optimizer.param_groups if SCORES in group for parameter in group["params"]}
        if not scores <= held:
            raise ValueError(
                "`optimizers` of the Trainer must hold the one in which the scores of the masks have a rate of their "
                f"own, got {type(optimizer).__name__} without. Pass `optimizers=(callback.make_optimizer(model, args),"
                " None)`."
            )


__all__ = ["MaskSparsityCallback"]
