"""The gradient mask: central tensors, which every token trains, are left out of optimiser steps at random."""

import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moebert.checkpoints.callbacks import CheckpointManifestCallback
from hf_moebert.training.schedules import linear_ramp
from hf_moebert.training.sharding import refuse_sharded

from .functional import apply_mask, draw_mask
from .modeling_experts import MPOEFeedForward
from .recipe import MPOEGradientMaskConfig


class MPOEGradientMaskCallback(CheckpointManifestCallback):
    """Leave central tensors out of optimiser steps at random, while any stock `Trainer` trains.

    Once per step, in all processes and for all accumulated batches alike, one draw for each central tensor decides
    whether it is updated. If it is not, its gradient is zero from the backward on, so that it has no part in clipping,
    and removed before the optimiser's step, so that neither momentum nor weight decay move the tensor. With `element`
    single entries are drawn; entries that are not drawn keep their values and their moments.

    Draws depend on seed, step and tensor alone, so that a resumed run draws as an uninterrupted one.

    Args:
        config: The recipe; by default `MPOEGradientMaskConfig()`.
        resume_from: As for `CheckpointManifestCallback`.
        allow_changes: As for `CheckpointManifestCallback`.

    Raises:
        ValueError: When training begins, if no central tensor is shared and trained, if the model is sharded (FSDP,
            DeepSpeed, tensor parallelism), or if the run has two such callbacks; and as
            `CheckpointManifestCallback`. After the first step, if `element`
            meets an optimiser whose state is factored or quantised (Adafactor, 8-bit optimisers).

    Source: Gao et al. 2022, https://arxiv.org/abs/2203.01104, for the idea; `MPOEGradientMaskConfig` says
    which parts are our own.
    """

    _run: ClassVar[weakref.ref[TrainerState] | None] = None  # the last run that began with a callback of this class

    def __init__(
        self,
        config: MPOEGradientMaskConfig | None = None,
        *,
        resume_from: str | Path | None = None,
        allow_changes: bool = False,
    ) -> None:
        super().__init__(resume_from=resume_from, allow_changes=allow_changes)
        self.config = MPOEGradientMaskConfig() if config is None else config
        self.keep = 1.0
        self._centres: dict[int, nn.Parameter] = {}
        self._masks: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # mask, tensor and its values before the step
        self._armed: set[int] = set()  # tensors whose next gradient is of this step
        self._loader: Any = None  # the data loader of the run in this step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the central tensors and watch their gradients."""
        super().on_train_begin(args, state, control, **kwargs)
        model: nn.Module = kwargs["model"]
        begun = MPOEGradientMaskCallback._run
        if begun is not None and begun() is state:
            raise ValueError(
                f"A run must have one {type(self).__name__}, got two: a tensor would be drawn and rescaled twice. "
                "Leave one out."
            )
        MPOEGradientMaskCallback._run = weakref.ref(state)
        refuse_sharded(model, "The gradient mask must see whole central tensors")
        networks = [module for module in model.modules() if isinstance(module, MPOEFeedForward)]
        centres = [centre for network in networks if network.shares_centre for centre in network.centres.values()]
        self._centres = {index: centre for index, centre in enumerate(centres) if centre.requires_grad}
        if not self._centres:
            raise ValueError(
                "`model` must have central tensors that are shared (`share_centre=True`) and trained, got none of "
                f"them in {type(model).__name__}. Leave the callback out."
            )
        self._first = 1 / networks[0].num_experts if self.config.keep is None else self.config.keep
        self.refuse_changes(state, asdict(self.config) | {"total_steps": state.max_steps})
        self._stop()  # `train` may be called twice, or have stopped with an error
        self._handles = [centre.register_hook(self._make_hook(index)) for index, centre in self._centres.items()]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the tensors or entries that are updated in this step."""
        last = self._first if self.config.final_keep is None else self.config.final_keep
        progress = linear_ramp(state.global_step, begin=0, end=max(state.max_steps - 1, 1))
        self.keep = self._first + (last - self._first) * progress
        for index, centre in self._centres.items():
            where: tuple = (centre.shape, centre.device) if self.config.granularity == "element" else ((), "cpu")
            self._masks[index] = draw_mask(
                where[0], self.keep, seed=self.config.seed, step=state.global_step, index=index, device=where[1]
            )
        self._loader = GradientState().active_dataloader
        self._armed = set(self._masks)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Expect the gradients of the next of the accumulated batches."""
        self._armed = set(self._masks)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the optimiser from moving tensors that were not drawn."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        for index, mask in self._masks.items():
            centre = self._centres[index]
            if self.config.granularity == "tensor":
                centre.grad = centre.grad if mask else None  # a zero would let momentum and weight decay move it
            else:
                alike = [centre, *_moments(optimizer, centre)]
                self._held += [(mask, tensor, tensor.clone()) for tensor in alike]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put back the entries that were not drawn."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        known = {id(tensor) for _, tensor, _ in self._held}
        for mask, tensor, before in self._held:
            tensor.copy_(torch.where(mask, tensor, before))
        for index, mask in self._masks.items() if self._held else ():
            for moment in _moments(optimizer, self._centres[index]):
                if id(moment) not in known:  # created in this step
                    moment.masked_fill_(~mask, 0)
        self._held, self._masks, self._armed, self._loader = [], {}, set(), None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove all hooks and masks."""
        super().on_train_end(args, state, control)
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._masks, self._held, self._armed, self._loader = [], {}, [], set(), None

    def _make_hook(self, index: int) -> Any:
        """Return a hook that masks every gradient before it is accumulated, or averaged over processes.

        A run that stops with an error leaves its hooks and masks behind. They must not affect later training, so that
        a mask is valid for one backward, and for the data loader that its step began with.
        """

        def hook(gradient: Tensor) -> Tensor | None:
            if index not in self._armed or GradientState().active_dataloader is not self._loader:
                return None
            self._armed.discard(index)
            return apply_mask(gradient, self._masks[index], 1 / self.keep if self.config.rescale and self.keep else 1)

        return hook


def _moments(optimizer: torch.optim.Optimizer, centre: nn.Parameter) -> list[Tensor]:
    """Return the optimiser's state for the entries of a central tensor."""
    tensors = [x for x in optimizer.state.get(centre, {}).values() if torch.is_tensor(x) and x.numel() > 1]
    if any(x.shape != centre.shape or not x.is_floating_point() for x in tensors):
        raise ValueError(
            f"`granularity` must be 'tensor' with {type(optimizer).__name__}, whose state is not by entry. Use "
            "AdamW or SGD for 'element'."
        )
    return tensors


__all__ = ["MPOEGradientMaskCallback"]
