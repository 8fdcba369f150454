"""Where learned masks meet the stock `Trainer`: an optimizer with rates of its own, and a callback for the target."""

from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging

from hf_moebert.training.schedules import cubic_decay, linear_ramp
from hf_moebert.training.sharding import refuse_sharded

from .functional import open_probability
from .modeling_masked import MaskBudget, MoMModel
from .recipe import RAMPS, MaskSparsityConfig


logger = logging.get_logger(__name__)
SCORE_EPSILON = 1e-15  # scores far from closing have tiny gradients, which Adam's usual 1e-8 would swallow
SCORE_BETAS = (0.5, 0.999)  # a long memory of gradients makes the masks overshoot their target
STEADY = "steady_rate"  # in a group of the optimizer: which field of the recipe has the rate that no schedule changes
MULTIPLIER_EPSILON = 1e-2  # gradients of multipliers are gaps: those that are smaller than this hardly count
GAP = 0.02  # how close to its target a run should end, and a model be that may count as the best


class MaskSparsityCallback(TrainerCallback):
    """Learn masks while any stock `Trainer` trains the model: the target rises, and multipliers hold the masks to it.

    The constraint is in the model's own loss. What this adds is when: it sets the target of each step and draws the
    noise of the masks, the same for all batches of the step and all processes. Clock, schedule and multipliers are
    part of the model, and so of every checkpoint: a resumed run goes on as if it had never stopped. Until the target
    has its final value nothing counts as the best model.

    Give the Trainer the optimizer that `make_optimizer` makes. Logs hold `mom_target`, the expected `mom_sparsity`,
    the share `mom_active` of masks that are open without noise, and `mom_load`, the largest share of tokens that an
    expert gets; `trainer.state.log_history` also holds the open share and the kinds of units of each block.

    Args:
        config: The recipe; by default `MaskSparsityConfig()`.
        allow_changes: Whether a resumed run may have another recipe or length than it began with. The rates of routers
            and of all other weights stay what they were, as the host has it.

    Raises:
        ValueError: When training begins, if the model has no masks to learn, the optimizer is another one, the run is
            too short, the model is sharded, or a resumed run has changed; at its first step, if the constraint is not
            in the loss.
        FloatingPointError: While training, if scores become NaN or infinite.

    Source: See `MaskSparsityConfig`.
    """

    def __init__(self, config: MaskSparsityConfig | None = None, *, allow_changes: bool = False) -> None:
        self.config = MaskSparsityConfig() if config is None else config
        self.allow_changes = allow_changes
        self._model: MoMModel | None = None
        self._ramp_steps = 0
        self._clock = -1  # as this step began; -1 before the first one

    def make_optimizer(self, model: nn.Module, args: TrainingArguments) -> torch.optim.AdamW:
        """Make the optimizer for `Trainer(..., optimizers=(optimizer, None))`.

        Scores, routers and multipliers have rates of their own and no weight decay; the multipliers are maximised
        over. No schedule lowers the rates of scores and multipliers: masks that move ever slower miss their target.
        With `freeze_backbone` all other weights stop requiring gradients.

        Args:
            model: With masks to learn, as given to the Trainer. PEFT may have wrapped it if `modules_to_save` of its
                configuration names the masks.
            args: As given to the Trainer.
        """
        masked = _find_masked(model)
        own: dict[str, list[Tensor]] = {"scores": [], "routers": [], "multipliers": [masked.budget.multipliers]}
        for network in masked.masked_networks().values():
            own["scores"].append(network.masks.learned)
            own["routers"] += [] if network.router is None else [network.router.weight]
        known = {id(parameter) for parameters in own.values() for parameter in parameters}
        rest = {name: p for name, p in model.named_parameters() if id(p) not in known}
        if self.config.freeze_backbone:
            for parameter in rest.values():
                parameter.requires_grad_(False)
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
        rate = args.learning_rate if self.config.backbone_rate is None else self.config.backbone_rate
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in rest.items() if name in names and p.requires_grad], "weight_decay": decay}
            for decay, names in ((args.weight_decay, rest.keys() & decayed), (0.0, rest.keys() - decayed))
        ]
        groups += [
            {"params": own["routers"], "lr": self.config.router_rate},
            {"params": own["scores"], STEADY: "score_rate", "eps": SCORE_EPSILON, "betas": SCORE_BETAS},
            {
                "params": own["multipliers"],
                STEADY: "multiplier_rate",
                "maximize": True,
                "eps": MULTIPLIER_EPSILON,
            },
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        groups = [group for group in groups if group["params"]]
        self._hold_rates(groups)
        # Fused as the Trainer's own, but not with fp16, where a fused one does not tell that it skipped a step
        options = {"lr": rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": 0.0, "fused": not args.fp16}
        return torch.optim.AdamW(groups, **options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that everything is in its place, and go on where a checkpoint left off."""
        model: nn.Module = kwargs["model"]
        refuse_sharded(model, "Masks must be seen whole")
        if args.n_gpu > 1:
            raise ValueError(
                f"Every process must use one GPU, got {args.n_gpu}: copies of `nn.DataParallel` see no noise. Use "
                "torchrun."
            )
        self._model = _find_masked(model)
        self._refuse_other_optimizer(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))
        self._ramp_steps, self._clock = self.config.ramp_steps(state.max_steps), -1
        budget = self._running.budget
        schedule = self._describe(state.max_steps, args.seed)
        if state.global_step:
            self._refuse_changes(schedule, budget.schedule)
        else:  # anew: `train` may be called twice
            budget.clock.zero_()
            budget.multipliers.data.zero_()
        budget.schedule.copy_(torch.tensor(list(schedule.values())))
        if self.config.keep_ratio == 1:
            logger.warning("`keep_ratio` is 1: no mask will be closed.")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the target, draw the noise, and forget what was the best model on the way to the final target."""
        model = self._running
        self._clock = int(model.budget.clock)
        model.budget.target = self.target_at(self._clock)
        self._hold_rates(kwargs["optimizer"].param_groups)
        if self.config.keep_ratio == 1:
            return
        model.draw_noise(args.seed)
        if self._clock <= self._ramp_steps or (model.budget.sparsity - model.budget.target).abs().max() > GAP:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step, unless it was skipped for an overflow."""
        budget = self._running.budget
        if budget.multipliers.grad is None:
            raise ValueError(
                "The constraint on the masks must be in the loss that is trained, but the multipliers got no gradient."
                " Give the model `labels`: train without `label_smoothing_factor` and `compute_loss_func`."
            )
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            budget.clock.fill_(self._clock + 1)  # not one more: a second callback would count the step again

    @torch.no_grad()
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add the figures of the masks to what is logged of training."""
        if self._clock < 0 or logs.keys().isdisjoint({"loss", "train_loss"}):
            return
        networks = self._running.masked_networks()
        if not all(network.masks.learned.isfinite().all() for network in networks.values()):
            raise FloatingPointError(
                f"Scores of masks must be finite, but by step {state.global_step} some are not. Lower `score_rate`, "
                "clip with `max_grad_norm`, or train in bf16 instead of fp16."
            )
        open_shares = [float((n.masks.settled() > 0).float().mean()) for n in networks.values()]
        budget = self._running.budget
        logs |= {
            "mom_target": budget.target or 0.0,
            "mom_sparsity": float(budget.sparsity.mean()),
            "mom_active": sum(open_shares) / len(open_shares),
        } | self._take_load(state.global_step)
        blocks = {f"mom_open/{n.block}": float(open_probability(n.masks.learned).mean()) for n in networks.values()}
        for path, counts in self._running.count_units().items():
            blocks |= {f"mom_{kind}/{networks[path].block}": count for kind, count in counts.items()}
        if state.is_world_process_zero:  # the host has copied the logs into its history before it tells callbacks
            state.log_history[-1] |= logs | blocks

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the masks are not where they should be."""
        if self._clock < 0:  # resumed at its end
            return
        model, wanted = self._running, 1 - self.config.keep_ratio
        networks = model.masked_networks().values()
        closed = 1 - torch.stack(
            [open_probability(n.masks.learned).mean() for n in networks]
        )  # that of the best model
        reached = closed if model.config.mask_budget == "layer" else closed.mean(dim=0, keepdim=True)
        if self._clock < self._ramp_steps - 1 or (reached - wanted).abs().max() > GAP:
            logger.warning(
                f"Training stopped after {state.global_step} steps, and the model that is left has a sparsity of "
                f"{', '.join(f'{value:.3f}' for value in reached.tolist())} instead of {wanted:.3f}. Train longer, "
                "lower `ramp_share`, or raise `multiplier_rate` and `score_rate`."
            )
        model.budget.target = None
        for network in networks:
            network.masks.set_noise(None)

    def target_at(self, clock: int) -> float:
        """Return the sparsity asked for after so many steps."""
        if self.config.ramp == "cubic":
            return 1 - cubic_decay(clock, begin=0, end=self._ramp_steps, final=self.config.keep_ratio)
        return (1 - self.config.keep_ratio) * linear_ramp(clock, begin=0, end=self._ramp_steps)

    def _hold_rates(self, groups: list[dict[str, Any]]) -> None:
        """Give scores and multipliers the rates of the recipe, whatever schedule or checkpoint says."""
        for group in groups:
            if STEADY in group:
                group["lr"] = getattr(self.config, group[STEADY])

    @property
    def _running(self) -> MoMModel:
        if self._model is None:
            raise RuntimeError("The callback must be added to the Trainer before `train` is called.")
        return self._model

    def _take_load(self, step: int) -> dict[str, float]:
        """Return the largest share of tokens of an expert since the last call, and warn of those that got none."""
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

    def _describe(self, total_steps: int, seed: int) -> dict[str, float]:
        numbers = asdict(self.config) | {"ramp": RAMPS.index(self.config.ramp), "max_steps": total_steps, "seed": seed}
        return {name: -1.0 if value is None else float(value) for name, value in numbers.items()}

    def _refuse_changes(self, schedule: dict[str, float], before: Tensor) -> None:
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

    def _refuse_other_optimizer(self, optimizer: Any) -> None:
        multipliers = self._running.budget.multipliers
        maximised = [p for group in optimizer.param_groups if group.get("maximize") for p in group["params"]]
        if not any(p is multipliers for p in maximised):
            raise ValueError(
                "`optimizers` of the Trainer must hold the one that maximises over the multipliers, got "
                f"{type(optimizer).__name__} without. Pass `optimizers=(callback.make_optimizer(model, args), None)`."
            )


def _find_masked(model: nn.Module) -> MoMModel:
    inner = unwrap_peft_model(model)
    stage = getattr(getattr(inner, "config", None), "mask_stage", "dense")
    if not isinstance(inner, MoMModel) or stage != "learned":
        raise ValueError(
            f"`model` must have masks to learn, got {type(inner).__name__} whose stage is {stage!r}. Make one with "
            "`from_dense(dense)`; fixed masks need no callback."
        )
    is_kept = isinstance(model, MoMModel) or not isinstance(inner.budget, MaskBudget)  # PEFT has wrapped it
    if not is_kept:
        raise ValueError(
            "`modules_to_save` of the PEFT configuration must name the masks, or no checkpoint would hold them. Use "
            '`LoraConfig(..., modules_to_save=["masks", "router", "budget"])`.'
        )
    return inner


__all__ = ["MaskSparsityCallback"]
